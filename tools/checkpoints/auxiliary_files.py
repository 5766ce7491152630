"""Auxiliary files of a model, kept with its weights through conversions: tokenizer, config.json, generation config."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from griffin.trainer.checkpoint.zarr_io import CheckpointError, naming, synchronise
from griffin.trainer.files import open_regular, parse_json, read_regular

SOURCE_FOLDER = "source"  # subfolder of a checkpoint with the auxiliary files of the model that it was converted from
CONFIG = "config.json"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
AUXILIARY_FILES = (*TOKENIZER_FILES, "generation_config.json", CONFIG)


def find_files(folder: Path, names: Iterable[str] = AUXILIARY_FILES) -> dict[str, Path]:
    """Return the paths of those of `names` that a folder holds; empty if there is no such folder.

    Raises CheckpointError for a symbolic link that leads out of the folder.
    """
    return {name: require_inside(folder, name) for name in names if (folder / name).is_file()}


def require_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder. Raises CheckpointError for a symbolic link that leads out of the folder.

    Following such links would let whoever made the folder have other files of this user copied. Links from a
    `snapshots/X` folder of Hugging Face's cache to `blobs` beside `snapshots` are followed.
    """
    path, root = folder / name, folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(f"{path}: is a symbolic link that leads out of {root}; must be a file there")
    return path


def checkpoint_auxiliary_files(checkpoint: Path) -> dict[str, Path]:
    """Return the auxiliary files that a checkpoint holds, by name."""
    return find_files(checkpoint / SOURCE_FOLDER)


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into a folder under the given names and sync them. Raises CheckpointError for an unreadable file."""
    for name, path in files.items():
        with naming(path), open_regular(path) as source, open(folder / name, "xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
    synchronise(folder)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError naming the file for anything else."""
    with naming(path):
        text = read_regular(path)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return values


def tokenizer_text(names: Iterable[str]) -> str:
    """Describe which of some auxiliary files belong to a tokenizer, for messages."""
    found = [name for name in names if name in TOKENIZER_FILES]
    return f"tokenizer files: {', '.join(found)}" if found else "no tokenizer files"
