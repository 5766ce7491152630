"""Install a wheel into a fresh environment without the checkout, and use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("griffin", "kernels", "launch", "parallel", "tools", "trainer", "pyproject.toml", "README.md", "LICENSE")
STEP = "--parallel.tensor=1 --parallel.pipeline=1 --train.steps=1 --optimizer.warmup_steps=0 --checkpoint.interval=0"


def run(*words: str | Path, cwd: Path, seconds: float = 120) -> str:
    """Run a command without this process's PYTHON* variables and return its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_in_a_fresh_environment(tmp_path: Path) -> None:
    # Not with find_spec: setuptools mistakes a search for pip for pip itself, and changes later imports.
    if absent := {"pip", "setuptools"} - {distribution.name for distribution in distributions()}:
        pytest.skip(f"{', '.join(sorted(absent))}: not installed here")
    source, wheels, work = tmp_path / "source", tmp_path / "wheels", tmp_path / "work"
    for folder in (source, work):
        folder.mkdir()
    for name in SOURCES:  # a copy, since a build leaves files behind
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index", "--quiet")
    run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, source, cwd=work, seconds=300)
    (wheel,) = wheels.iterdir()
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=work)
    python, griffin = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "griffin"
    run(*pip, "--python", python, "install", *offline, wheel, cwd=work)
    shutil.rmtree(source)
    # The other packages are those of this interpreter. Python does not run .pth files of folders named in a .pth file,
    # so an editable installation there is not found.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=work).strip())
    others = sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))
    found = run(python, "-c", "import griffin.trainer.loop as loop; print(loop.__file__)", cwd=work).strip()
    assert Path(found) == site / "griffin" / "trainer" / "loop.py"
    assert (site / "griffin" / "py.typed").is_file()
    assert list(site.glob("griffin_megatron-*.dist-info/licenses/LICENSE"))
    stated = run(python, "-c", "from importlib.metadata import version; print(version('griffin-megatron'))", cwd=work)
    assert run(griffin, "--version", cwd=work) == f"griffin-megatron {stated}"

    (work / "text.txt").write_text("to be or not to be " * 500)
    for name in ("stdlib", "stdlib-held-out"):
        run(griffin, "data", "build", f"data/{name}", "text.txt", "--tokenizer", "bytes", "--workers", "1", cwd=work)
    assert "vocabulary = 257\n" in run(griffin, "train", "demo", "--print-config", cwd=work)
    assert "blocks per stage 6" in run(griffin, "train", "demo", *STEP.split(), "--dry-run", cwd=work)
    printed = run(griffin, "train", "demo", *STEP.split(), "--run-dir", "run", cwd=work, seconds=300)
    assert "training loss:" in printed
    assert (work / "run" / "checkpoints" / "step-00000001").is_dir()
