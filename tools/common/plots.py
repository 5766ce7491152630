"""Files of plots, which are new ones and need an extra."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def require_new_plot(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a plot that could not be written later."""
    if path.suffix not in suffixes:
        raise ValueError(f"{option} {path}: must end in {' or '.join(suffixes)}")
    if path.exists():
        raise ValueError(f"{option} {path}: exists already; must be a new file")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: {path.parent} must be a folder")
    if find_spec("matplotlib") is None:
        raise ValueError(f"{option} {path}: needs matplotlib; pip install 'griffin-megatron[bench]'")
