"""The index files of an epoch. Others may be able to write them, so their content is checked, and no pickle is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# The index that GPTDataset builds, in its order: files, and the dtypes of their numbers.
NAMES = {
    "document_index": (np.int32,),  # [documents]: their order
    "sample_index": (np.int32, np.int64),  # [samples + 1, 2]: position in that order, and offset, where a sample begins
    "shuffle_index": (np.uint32, np.int64),  # [samples]: their order
}
FOLDER_MODE, FILE_MODE = 0o755, 0o644  # all may read the index; only its owner may write it

Index = tuple[np.ndarray, ...]


def make_folder(folder: Path) -> None:
    """Create a folder, and its parents, that only its owner may write. An existing one is left as it is."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(FOLDER_MODE)


def write_index(folder: Path, index: Index) -> None:
    """Write the index of an epoch to a new folder."""
    make_folder(folder)
    for name, array in zip(NAMES, index, strict=True):
        path = folder / f"{name}.npy"
        np.save(path, array, allow_pickle=False)
        path.chmod(FILE_MODE)


def read_index(folder: Path, *, documents: int, samples: int, ranges: bool) -> Index:
    """Memory-map the index that `write_index` wrote. With `ranges`, all its numbers are read and checked.

    Raises FileNotFoundError if there is no folder, and ValueError if files are missing or not such an index.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    shapes: tuple[tuple[int, ...], ...] = ((documents,), (samples + 1, 2), (samples,))
    index = tuple(
        _read(folder / f"{name}.npy", types, shape) for (name, types), shape in zip(NAMES.items(), shapes, strict=True)
    )
    if ranges:
        order, starts, shuffle = index
        for name, numbers, end in (
            ("document_index", order, documents),
            ("sample_index", starts[:, 0], documents),
            ("sample_index", starts[:, 1], np.iinfo(np.int32).max),
            ("shuffle_index", shuffle, samples),
        ):
            if numbers.min() < 0 or numbers.max() >= end:
                raise ValueError(f"{name}.npy: a number is outside 0 ... {end - 1}")
    return index


def _read(path: Path, types: tuple[type[np.integer], ...], shape: tuple[int, ...]) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path.name}: no such file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path.name}: not an array of numbers ({error})") from error
    if not isinstance(array, np.memmap) or array.dtype not in types or array.shape != shape:
        raise ValueError(f"{path.name}: not an array {list(shape)} of {' or '.join(t.__name__ for t in types)}")
    return array
