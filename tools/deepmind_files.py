"""DeepMind's files of weights: what torch.save wrote, or an orbax folder with the parameter tree of the JAX code."""

from __future__ import annotations

import functools
import logging
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from griffin.tools.foreign_arrays import FileArray, foreign_spec
from griffin.tools.foreign_axes import Axes
from griffin.tools.safetensors_files import DTYPES, Entry
from griffin.tools.stored_arrays import StoredArray
from griffin.trainer.checkpoint.arrays import ArraySpec, Box, GlobalTensor
from griffin.trainer.checkpoint.zarr_io import CheckpointError

_PREFIX = "params."


@dataclass(frozen=True)
class DeepMindFile:
    """What is known of weights before any is read; `array` makes one of ours of a tensor by its name."""

    shapes: Mapping[str, tuple[int, ...]]
    flax: bool
    array: Callable[[str, Axes, GlobalTensor], StoredArray]


def _without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Names below "params", where all are: the JAX code has its tree there."""
    if all(name.startswith(_PREFIX) for name in tensors):
        return {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    return dict(tensors)


def _require_dtype(path: Path, name: str, dtype: str) -> str:
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is of dtype {dtype}; must be {', '.join(DTYPES)}")
    return dtype


# torch.save


def open_torch_file(path: Path) -> DeepMindFile:
    """A file of torch.save: its tensors' places are found, and nothing of what it has pickled is run.

    Raises CheckpointError where it is no such file, or holds anything but a flat dictionary of tensors.
    """
    places = {name: _place(path, name, tensor) for name, tensor in _without_prefix(_load_places(path)).items()}

    def array(name: str, axes: Axes, tensor: GlobalTensor) -> StoredArray:
        entry, order = places[name]
        stored = Axes(tuple(axes.places[dimension] for dimension in order))
        return FileArray(path, entry, stored, foreign_spec(tensor, entry.dtype))

    shapes = {
        name: tuple(entry.shape[order.index(dimension)] for dimension in range(len(order)))
        for name, (entry, order) in places.items()
    }
    return DeepMindFile(shapes, False, array)


def _load_places(path: Path) -> dict[str, Any]:
    """Tensors without values, which know where in the file theirs are."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    _require_plain_values(path)
    try:
        with FakeTensorMode():
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: holds more than tensors, or is damaged; no pickled code is run: save its state dict alone"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(f"{path}: must hold a dictionary of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: must hold tensors by name only; {name!r} is a {type(tensor).__name__}")
    return dict(tensors)


def _require_plain_values(path: Path) -> None:
    """Raise CheckpointError unless values lie in the file as they would in memory, as torch.save leaves them."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: is no file of torch.save, is of a format before PyTorch 1.6, or is cut short")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            orders = [archive.read(record) for record in records if record.filename.endswith("/byteorder")]
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or b"big" in orders:
        raise CheckpointError(
            f"{path}: is compressed, or was saved on a big-endian machine; must be as torch.save writes"
        )


def _place(path: Path, name: str, tensor: Any) -> tuple[Entry, list[int]]:
    """A tensor as it lies row-major in the file, and which of its dimensions are that one's: it may be transposed."""
    dtype = _require_dtype(path, name, str(tensor.dtype).removeprefix("torch."))
    order = sorted(range(tensor.dim()), key=lambda dimension: -tensor.stride(dimension))
    shape = tuple(tensor.shape[dimension] for dimension in order)
    if not tensor.permute(order).is_contiguous():
        raise CheckpointError(f"{path}: {name} is a part of a larger tensor; save a copy of it")
    offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
    return Entry(name, dtype, shape, offset), order


# orbax


def open_orbax_folder(path: Path) -> DeepMindFile:
    """A folder of orbax. Raises ValueError where that is not installed, and CheckpointError where it finds no tree."""
    leaves = _leaves(_metadata(path))
    if not leaves:
        raise CheckpointError(f"{path}: orbax finds no parameters there")
    keys = dict(zip(_without_prefix({".".join(key): None for key in leaves}), leaves, strict=True))
    dtypes = {name: _require_dtype(path, name, str(np.dtype(leaves[key].dtype))) for name, key in keys.items()}

    def array(name: str, axes: Axes, tensor: GlobalTensor) -> StoredArray:
        return OrbaxArray(path, keys[name], axes, foreign_spec(tensor, dtypes[name]))

    return DeepMindFile({name: tuple(leaves[key].shape) for name, key in keys.items()}, True, array)


@contextmanager
def _orbax(path: Path, what: str) -> Iterator[Any]:
    """The package, on the CPU and silent; what it raises names the folder, and what is wrong with it."""
    try:
        import jax
        import orbax.checkpoint
    except ImportError:
        raise ValueError(
            f"{path}: is a folder, which orbax-checkpoint reads; pip install 'griffin-megatron[orbax]'"
        ) from None
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield orbax.checkpoint
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: {what}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class OrbaxArray:
    """An array of an orbax folder, which is read as a whole: chunks of one are to follow each other."""

    path: Path
    keys: tuple[str, ...]
    axes: Axes
    spec: ArraySpec

    def read(self, box: Box) -> np.ndarray:
        """As `StoredArray.read`."""
        return self.axes.ours(_restored(self.path, self.keys)[self.axes.foreign_box(box)])


@functools.lru_cache(maxsize=1)
def _restored(path: Path, keys: tuple[str, ...]) -> np.ndarray:
    item: Any = 0
    with _orbax(path, f"{'.'.join(keys)} cannot be read") as orbax, orbax.PyTreeCheckpointer() as checkpointer:
        arguments = orbax.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            item, arguments = {key: item}, {key: arguments}
        wanted = orbax.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        values = checkpointer.restore(path.absolute(), args=wanted)
        for key in keys:
            values = values[key]
        return np.asarray(values)


def _metadata(path: Path) -> Any:
    """The tree of shapes and dtypes."""
    with _orbax(path, "is no folder of orbax") as orbax, orbax.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(path.absolute())
    found = getattr(found, "item_metadata", found)
    return getattr(found, "tree", found)


def _leaves(tree: Any, keys: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """What has a shape and a dtype in a tree of dictionaries, by its keys."""
    if isinstance(tree, Mapping):
        found = (_leaves(value, (*keys, str(key))) for key, value in tree.items())
        return {key: leaf for leaves in found for key, leaf in leaves.items()}
    return {keys: tree} if hasattr(tree, "shape") and hasattr(tree, "dtype") else {}
