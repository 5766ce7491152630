"""What `griffin doctor` says of one check, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence

OK, WARNING, FAILED = "ok", "warning", "FAILED"
Finding = tuple[str, str]  # OK, WARNING or FAILED, and a text


def report(findings: Sequence[Finding]) -> None:
    """Print a line for each."""
    for state, text in findings:
        print(f"{state:<8} {text}", flush=True)


def has_failed(findings: Sequence[Finding]) -> bool:
    return any(state == FAILED for state, _ in findings)
