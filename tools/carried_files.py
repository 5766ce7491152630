"""Files that go along with a model's weights from format to format: its tokenizer, and how it is to be used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from griffin.trainer.checkpoint.zarr_io import naming, synchronise

SOURCE = "source"  # the subfolder of a checkpoint that holds them
CONFIG = "config.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_MODEL,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
CARRIED = (*TOKENIZER_FILES, "generation_config.json", CONFIG)


def files_of(folder: Path, names: Iterable[str] = CARRIED) -> list[Path]:
    """Those of `names` that a folder holds; none if there is no such folder."""
    return [folder / name for name in names if (folder / name).is_file()]


def carried_files(checkpoint: Path) -> list[Path]:
    """What a checkpoint carries along."""
    return files_of(checkpoint / SOURCE)


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder, durably. Raises CheckpointError naming a file that cannot be read or written."""
    for path in files:
        with naming(path), open(path, "rb") as source, open(folder / path.name, "xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
    synchronise(folder)
