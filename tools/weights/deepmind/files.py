"""Open DeepMind's weights: a file of torch.save, or an orbax folder with the parameter tree of the JAX code."""

from __future__ import annotations

import functools
import logging
import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from griffin.tools.checkpoints.sources import StoredArray
from griffin.tools.common.safetensors_files import DTYPES
from griffin.tools.weights.axis_map import AxisMap
from griffin.tools.weights.file_arrays import foreign_spec
from griffin.trainer.checkpoint.arrays import ArraySpec, Box, GlobalTensor, numpy_dtype
from griffin.trainer.checkpoint.zarr_io import CheckpointError

_PREFIX = "params."


@dataclass(frozen=True)
class DeepMindFile:
    """Names and shapes of a file's tensors; `array(name, axes, tensor)` returns one as a canonical tensor to read."""

    shapes: Mapping[str, tuple[int, ...]]
    flax: bool
    array: Callable[[str, AxisMap, GlobalTensor], StoredArray]


def _by_name(path: Path, stored: Collection[str]) -> dict[str, str]:
    """Return the stored names by name without the prefix "params.", below which the JAX code keeps its tree."""
    names = {name.removeprefix(_PREFIX): name for name in stored}
    if len(names) < len(stored):
        raise CheckpointError(f"{path}: holds the same name twice, with and without the prefix {_PREFIX}")
    return names


def _require_dtype(path: Path, name: str, dtype: str) -> str:
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is of dtype {dtype}; must be {', '.join(DTYPES)}")
    return dtype


# torch.save


def open_torch_file(path: Path) -> DeepMindFile:
    """Open a file of torch.save without running pickled code. Values are not read yet.

    Raises CheckpointError unless it is such a file and holds a flat dictionary of tensors.
    """
    _require_plain_records(path)
    tensors = _tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_meta or str(tensor.layout) != "torch.strided":
            raise CheckpointError(f"{path}: {name} must be a dense tensor with values")
    _require_whole_records(path, tensors.values())
    names = _by_name(path, tensors)

    def array(name: str, axes: AxisMap, tensor: GlobalTensor) -> StoredArray:
        dtype = _require_dtype(path, name, str(tensors[names[name]].dtype).removeprefix("torch."))
        return TorchArray(path, names[name], axes, foreign_spec(tensor, dtype))

    return DeepMindFile({name: tuple(tensors[key].shape) for name, key in names.items()}, False, array)


@dataclass(frozen=True)
class TorchArray:
    """A tensor of a torch.save file. The file is memory-mapped per tensor, so read all chunks of one in sequence."""

    path: Path
    name: str
    axes: AxisMap
    spec: ArraySpec

    def read(self, box: Box) -> np.ndarray:
        """As `StoredArray.read`."""
        part = _mapped_tensor(self.path, self.name)[self.axes.foreign_box(box)].resolve_neg().contiguous()
        return self.axes.to_canonical(_numpy_bits(part).view(numpy_dtype(self.spec.dtype)))


@functools.lru_cache(maxsize=1)
def _mapped_tensor(path: Path, name: str) -> Any:
    """Map the file anew for each tensor, so that what was read of the last one leaves memory."""
    return _tensors(path)[name]


def _tensors(path: Path) -> dict[str, Any]:
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: holds more than tensors, or is damaged; pickled code is never run: save only the state dict"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {_first_line(error)}") from None
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(f"{path}: must hold a dictionary of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: must hold tensors by name only; {name!r} is a {type(tensor).__name__}")
    return dict(tensors)


def _require_plain_records(path: Path) -> None:
    """Raise CheckpointError unless the file is an uncompressed zip archive, which can be memory-mapped."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: is not a file of torch.save, is older than PyTorch 1.6, or is cut short")
    if any(record.compress_type != zipfile.ZIP_STORED for record in _records(path)):
        raise CheckpointError(f"{path}: is compressed; must be as torch.save writes it")


def _require_whole_records(path: Path, tensors: Iterable[Any]) -> None:
    """Raise CheckpointError if records and tensors differ in size: torch maps as many bytes as the pickle states."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    sizes = [record.file_size for record in _records(path) if "/data/" in record.filename]
    if sorted(size for size in storages.values() if size) != sorted(size for size in sizes if size):
        raise CheckpointError(f"{path}: is damaged: its records are not as large as its tensors")


def _records(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {_first_line(error)}") from None


def _numpy_bits(tensor: Any) -> np.ndarray:
    """Return values of 2 or 4 bytes as integers: torch does not convert bfloat16 to numpy."""
    import torch

    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).numpy()


# orbax


def open_orbax_folder(path: Path) -> DeepMindFile:
    """Open an orbax folder. Raises ValueError if orbax is not installed, and CheckpointError if it finds no tree."""
    leaves = {key: leaf for key, leaf in _leaves(_metadata(path)).items() if key}
    if not leaves:
        raise CheckpointError(
            f"{path}: orbax finds no parameters; must be the folder of the tree itself, such as STEP/default of a "
            "CheckpointManager"
        )
    by_keys = {".".join(key): key for key in leaves}
    if len(by_keys) < len(leaves):
        raise CheckpointError(f"{path}: two arrays have the same name once their keys are joined by dots")
    keys = {name: by_keys[stored] for name, stored in _by_name(path, by_keys).items()}

    def array(name: str, axes: AxisMap, tensor: GlobalTensor) -> StoredArray:
        dtype = _require_dtype(path, name, str(np.dtype(leaves[keys[name]].dtype)))
        return OrbaxArray(path, keys[name], axes, foreign_spec(tensor, dtype))

    return DeepMindFile({name: _shape(leaves[key]) for name, key in keys.items()}, True, array)


@contextmanager
def _orbax(path: Path, problem: str) -> Iterator[Any]:
    """Import orbax for the CPU, silently. Its errors become CheckpointErrors with the folder and `problem`."""
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
            raise CheckpointError(f"{path}: {problem}: {_first_line(error)}") from None


@dataclass(frozen=True)
class OrbaxArray:
    """An array of an orbax folder, which is read as a whole: read all chunks of one in sequence."""

    path: Path
    keys: tuple[str, ...]
    axes: AxisMap
    spec: ArraySpec

    def read(self, box: Box) -> np.ndarray:
        """As `StoredArray.read`."""
        return self.axes.to_canonical(_restored(self.path, self.keys)[self.axes.foreign_box(box)])


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
    """Read the tree of shapes and dtypes."""
    with _orbax(path, "is not an orbax folder") as orbax, orbax.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(path.absolute())
    found = getattr(found, "item_metadata", found)
    return getattr(found, "tree", found)


def _leaves(tree: Any, keys: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Flatten a tree of dictionaries and lists to its leaves by their keys."""
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return {keys: tree}
    found = (_leaves(value, (*keys, str(key))) for key, value in tree.items())
    return {key: leaf for leaves in found for key, leaf in leaves.items()}


def _shape(leaf: Any) -> tuple[int, ...]:
    """Return a leaf's shape; () for what is not an array."""
    return tuple(getattr(leaf, "shape", None) or ())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
