"""Convert transformers' RecurrentGemma weights to a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from griffin.tools.checkpoints.auxiliary_files import CONFIG, find_files
from griffin.tools.checkpoints.sources import StoredArray
from griffin.tools.checkpoints.write import refuse_target
from griffin.tools.common.safetensors_files import Entry, read_bytes
from griffin.tools.common.workers import Workers
from griffin.tools.weights.file_arrays import FileArray, foreign_spec
from griffin.tools.weights.hf.config import model_of_config
from griffin.tools.weights.hf.folder import TransformersFolder, open_transformers_folder
from griffin.tools.weights.hf.names import transformers_axes, transformers_name
from griffin.tools.weights.imported import model_tensors, require_tensors, write_imported
from griffin.trainer.checkpoint.arrays import CHUNK_BYTES, GlobalTensor
from griffin.trainer.checkpoint.zarr_io import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"  # the same table; not in every file
_BUFFERS = re.compile(r"model\.normalizer|model\.layers\.\d+\.temporal_block\.rotary_emb\.(original_)?inv_freq")


def convert_transformers(source: Path, target: Path, workers: Workers, *, dtype: str | None = None) -> None:
    """Write the model of a transformers folder to the new step folder `target`.

    Every weight keeps its bits, unless rounded to `dtype`. Raises ValueError, and CheckpointError naming a missing or
    damaged file; nothing is left then.
    """
    refuse_target(target)
    folder = open_transformers_folder(source)
    try:
        model = model_of_config(folder.config)
    except ValueError as error:
        raise ValueError(f"{source / CONFIG}: {error}") from None
    arrays = planned_arrays(folder, model_tensors(model))
    if HEAD in folder.tensors:
        _require_tied(folder, workers)
    write_imported(source, target, model, arrays, workers, dtype=dtype, auxiliary=find_files(source))


def planned_arrays(folder: TransformersFolder, tensors: list[GlobalTensor]) -> dict[str, StoredArray]:
    """Find each of a model's tensors in the folder. Raises CheckpointError if the folder has other tensors."""
    axes = {tensor.name: transformers_axes(tensor.name, len(tensor.shape)) for tensor in tensors}
    expected = {transformers_name(tensor.name): axes[tensor.name].foreign_shape(tensor.shape) for tensor in tensors}
    found = {name: entry.shape for name, (_, entry) in folder.tensors.items() if not _BUFFERS.fullmatch(name)}
    if HEAD in found:
        expected[HEAD] = expected[EMBEDDING]
    require_tensors(folder.path, found, expected)
    arrays: dict[str, StoredArray] = {}
    for tensor in tensors:
        path, entry = folder.tensors[transformers_name(tensor.name)]
        arrays[tensor.name] = FileArray(path, entry, axes[tensor.name], foreign_spec(tensor, entry.dtype))
    return arrays


@dataclass(frozen=True)
class _ByteRange:
    """`count` bytes of two tensors of the same size, from byte `first` of each."""

    tensors: tuple[tuple[Path, Entry], tuple[Path, Entry]]
    first: int
    count: int


def _require_tied(folder: TransformersFolder, workers: Workers) -> None:
    """Raise CheckpointError unless the output projection is the embedding table, bit by bit."""
    tensors = folder.tensors[HEAD], folder.tensors[EMBEDDING]
    (path, head), (_, table) = tensors

    def ranges() -> Iterator[_ByteRange]:
        for first in range(0, head.nbytes, CHUNK_BYTES):
            yield _ByteRange(tensors, first, min(CHUNK_BYTES, head.nbytes - first))

    def done(equal: bool) -> None:
        if not equal:
            raise CheckpointError(f"{path}: {HEAD} differs from {EMBEDDING}; must be equal: this model ties them")

    if head.dtype != table.dtype:
        done(False)
    workers.run(_is_equal, ranges(), done)


def _is_equal(part: _ByteRange) -> bool:
    a, b = (read_bytes(path, entry.offset + part.first, part.count) for path, entry in part.tensors)
    return bool((a == b).all())
