"""Code of a job: records its version, makes a snapshot, and checks that the snapshot is what runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import griffin

PACKAGE = Path(griffin.__file__).absolute().parent  # its folders may be symlinks into a checkout
# Prints the path of the imported package, or nothing without PyTorch.
CHECK = "import griffin, importlib.util as u; print(griffin.__file__ if u.find_spec('torch') else '')"


def write_version(path: Path) -> None:
    """Write the version of the code to the new file `path`, and uncommitted changes to a .diff file beside it."""
    version: dict[str, Any] = {"version": griffin.__version__, "package": str(PACKAGE)}
    root = (PACKAGE / "trainer").resolve().parent
    if _git(root, "rev-parse", "--show-toplevel") == os.fsencode(f"{root}\n"):
        version["commit"] = "".join(_lines(_git(root, "rev-parse", "HEAD")))
        version["untracked"] = _lines(_git(root, "ls-files", "--others", "--exclude-standard"))
        if diff := _git(root, "diff", "--binary", "HEAD"):
            with path.with_suffix(".diff").open("xb") as file:  # as bytes: any encoding and line endings
                file.write(diff)
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(version, indent=2) + "\n")


def write_snapshot(folder: Path) -> None:
    """Copy the package into the new `folder`, for use as PYTHONPATH."""
    shutil.copytree(PACKAGE, folder / "griffin", ignore=shutil.ignore_patterns("__pycache__", ".*"))


def python_path(python: str) -> tuple[str, ...]:
    """Return the PYTHONPATH with which `python` imports the code that runs here.

    Raises ValueError if `python` does not start or lacks PyTorch.
    """
    paths = tuple(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry))
    for candidate in (paths, (str(PACKAGE.parent), *paths)):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(candidate), "PYTHONSAFEPATH": "1"}
        try:
            command = [python, "-P", "-c", CHECK]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"--python {python}: does not start ({error})") from None
        if done.returncode == 0 and done.stdout.strip() and Path(done.stdout.strip()).parent.samefile(PACKAGE):
            return candidate
    reason = done.stderr.strip().splitlines()[-1:] or ["no module named 'torch'"]
    raise ValueError(f"--python {python}: cannot import what the training needs ({reason[0]})")


def refuse_other(expected: Path) -> None:
    """Raise ValueError unless the running package is in the folder `expected`."""
    if not (expected.is_dir() and expected.samefile(PACKAGE)):
        raise ValueError(
            f"--code {expected}: griffin was imported from {PACKAGE} instead; check PYTHONPATH, and whether srun or "
            "--setup changes it"
        )


def _git(root: Path, *arguments: str) -> bytes:
    """Return git's output, or nothing if git is missing or fails."""
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""


def _lines(answer: bytes) -> list[str]:
    return answer.decode(errors="replace").splitlines()
