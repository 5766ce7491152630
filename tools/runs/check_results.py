"""Results of the checks of `griffin doctor`."""

from __future__ import annotations

from collections.abc import Sequence

OK, WARNING, FAILED = "ok", "warning", "FAILED"
CheckResult = tuple[str, str]  # OK, WARNING or FAILED, and a text


def print_results(results: Sequence[CheckResult]) -> None:
    """Print one line per result."""
    for state, text in results:
        print(f"{state:<8} {text}", flush=True)


def has_failed(results: Sequence[CheckResult]) -> bool:
    return any(state == FAILED for state, _ in results)
