"""Open a folder as transformers saves a model: config.json, and weights in one or several safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from griffin.tools.checkpoints.auxiliary_files import CONFIG, read_object, require_inside
from griffin.tools.common.safetensors_files import Entry, read_entries
from griffin.trainer.checkpoint.zarr_io import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TransformersFolder:
    """The content of a folder: config.json, and the tensors by name, each with its file."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, Entry]]


def open_transformers_folder(path: Path) -> TransformersFolder:
    """Open a folder and check the headers and sizes of its files. Reads no weights.

    Raises ValueError if it is not such a folder, and CheckpointError naming a missing or damaged file.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: must be a folder with {CONFIG} and {WEIGHTS} or {INDEX}")
    config = read_object(require_inside(path, CONFIG))
    if (path / INDEX).is_file():
        if (path / WEIGHTS).exists():
            raise CheckpointError(f"{path}: holds {WEIGHTS} and {INDEX}; must hold only one of them")
        return TransformersFolder(path, config, _read_shards(path))
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{path}: holds neither {WEIGHTS} nor {INDEX}; other formats are not read")
    file = require_inside(path, WEIGHTS)
    return TransformersFolder(path, config, {name: (file, entry) for name, entry in read_entries(file).items()})


def _read_shards(path: Path) -> dict[str, tuple[Path, Entry]]:
    """Read the headers of the files that the index names, and check that both agree."""
    names = read_object(require_inside(path, INDEX)).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) and _is_name(file) for file in names.values()):
        raise CheckpointError(f'{path / INDEX}: is damaged: "weight_map" must name the file of each tensor')
    files = {}
    for file in sorted(set(names.values())):
        if not (path / file).is_file():
            raise CheckpointError(f"{path / file} is missing; {INDEX} names it")
        files[file] = read_entries(require_inside(path, file))
    tensors = {}
    for name, file in names.items():
        if name not in files[file]:
            raise CheckpointError(f"{path / file}: {name} is missing; {INDEX} says that it is there")
        tensors[name] = (path / file, files[file][name])
    for file, entries in files.items():
        for name in entries:
            if names.get(name) != file:
                raise CheckpointError(f"{path / file}: {INDEX} does not say that {name} is there")
    return tensors


def _is_name(file: str) -> bool:
    """Whether it names a file in the folder itself."""
    return file not in ("", ".", "..") and Path(file).name == file
