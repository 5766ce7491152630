"""Make checkpoints from others: reshard for another layout, change the dtype, or average several."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from griffin.parallel.config import ParallelConfig
from griffin.tools.checkpoints import rank_files
from griffin.tools.checkpoints.auxiliary_files import checkpoint_auxiliary_files
from griffin.tools.checkpoints.sources import SourceCheckpoint, StoredArray, open_step
from griffin.tools.checkpoints.write import OutputArray, check_files, refuse_target, write_ranks, write_step
from griffin.tools.common.workers import Workers
from griffin.trainer.checkpoint.arrays import (
    EXP_AVG,
    EXP_AVG_SQ,
    KINDS,
    MASTER,
    MODEL,
    ArraySpec,
    GlobalTensor,
    chunk_shape,
    default_cuts,
)
from griffin.trainer.checkpoint.header import Header
from griffin.trainer.checkpoint.manifest import Manifest
from griffin.trainer.checkpoint.steps import resolve


def reshard(
    path: Path,
    target: Path,
    layout: ParallelConfig | None,
    workers: Workers,
    *,
    weights_only: bool = False,
    dtype: str | None = None,
    from_ranks: bool = False,
    to_ranks: bool = False,
) -> None:
    """Write the checkpoint at `path` to the new folder `target`, chunked for a layout (None: as training saves).

    `from_ranks` reads, and `to_ranks` writes, one file per (tensor, pipeline) rank. `dtype` is that of the model's
    weights in the result; they are rounded from the master weights if there are any. Raises ValueError, and
    CheckpointError naming a damaged file; nothing is left at `target` then.
    """
    refuse_target(target)
    if from_ranks:
        source, files = rank_files.open_rank_folder(path)
    elif (path / rank_files.INDEX).exists():
        raise ValueError(f"{path}: holds one file per rank; add --from-ranks to read them")
    else:
        source, files = open_step(resolve(path)), []
    manifest = source.manifest
    if dtype == "float16" and not weights_only and manifest.optimizer is not None:
        raise ValueError("--dtype fp16: needs --weights-only; training resumes in bfloat16 or float32 only")
    check_layout(manifest, layout)
    if files:
        check_files(path, files, workers)
    if to_ranks:
        layout = layout or ParallelConfig()
    tensors = _tensors(manifest)
    cuts = layout.tensor if layout else default_cuts(tensors)
    # For a stated layout, tensors of any size are cut, so that a rank reads only what it holds.
    whole_bytes = 0 if layout else None
    chunks = {tensor.name: chunk_shape(tensor, cuts, whole_bytes=whole_bytes) for tensor in tensors}
    outputs = _output_arrays(source, chunks, dtype, weights_only)
    header = _output_header(manifest, weights_only)
    if layout:
        header = replace(header, layout=layout.record(layout.model_ranks))
    if to_ranks:
        assert layout is not None
        write_ranks(target, header, outputs, layout, workers)
    else:
        write_step(target, header, outputs, workers, checkpoint_auxiliary_files(source.path))


def average(paths: Sequence[Path], target: Path, workers: Workers, *, dtype: str | None = None) -> None:
    """Write the mean of the weights of several checkpoints of one model to the new folder `target`.

    Means are computed in float64, from the master weights if there are any, and rounded to float32, then to `dtype`
    (default: that of the newest checkpoint). The result holds only weights. Its other metadata are those of the newest
    checkpoint; `sources` lists all of them. Raises as `reshard` does.
    """
    refuse_target(target)
    if len(paths) < 2:
        raise ValueError("average: needs at least two checkpoints SRC... and, last, DST")
    sources = [open_step(resolve(path)) for path in paths]
    newest = max(sources, key=lambda source: source.manifest.step)
    for source in sources:
        _refuse_other_model(source, newest)
    outputs = [
        OutputArray(
            replace(newest.manifest.arrays[name], dtype=dtype or newest.manifest.arrays[name].dtype),
            tuple(best_weights(source)[name] for source in sources),
        )
        for name in newest.arrays
        if newest.manifest.arrays[name].kind == MODEL
    ]
    header = _output_header(newest.manifest, weights_only=True)
    header = replace(header, sources=tuple(str(source.path) for source in sources))
    write_step(target, header, outputs, workers, checkpoint_auxiliary_files(newest.path))


def _tensors(manifest: Manifest) -> list[GlobalTensor]:
    return [spec.tensor for spec in manifest.arrays.values() if spec.kind == MODEL]


def best_weights(source: SourceCheckpoint) -> dict[str, StoredArray]:
    """Return the weights in the best available precision, by the names of the model's arrays."""
    best = {}
    for tensor in _tensors(source.manifest):
        master = source.arrays.get(f"{MASTER}.{tensor.name}")
        best[f"{MODEL}.{tensor.name}"] = master or source.arrays[f"{MODEL}.{tensor.name}"]
    return best


def _output_arrays(
    source: SourceCheckpoint, chunks: Mapping[str, tuple[int, ...]], dtype: str | None, weights_only: bool
) -> list[OutputArray]:
    """Plan the output arrays: the source's, with master weights unless the model's weights are float32."""
    best, outputs = best_weights(source), []
    for tensor in _tensors(source.manifest):
        model = source.arrays[f"{MODEL}.{tensor.name}"]
        wanted = dtype or model.spec.dtype
        weights = best[f"{MODEL}.{tensor.name}"]
        origins = {MODEL: model if wanted == model.spec.dtype else weights}
        if not weights_only and f"{EXP_AVG}.{tensor.name}" in source.arrays:
            if wanted != "float32":
                origins[MASTER] = weights
            origins |= {kind: source.arrays[f"{kind}.{tensor.name}"] for kind in (EXP_AVG, EXP_AVG_SQ)}
        for kind in KINDS:
            if kind in origins:
                kept = wanted if kind == MODEL else "float32"
                spec = ArraySpec(kind=kind, tensor=tensor, dtype=kept, chunks=chunks[tensor.name])
                outputs.append(OutputArray(spec, (origins[kind],)))
    return outputs


def _output_header(source: Header, weights_only: bool) -> Header:
    """Return the header of a checkpoint made from another. `extras` are kept: only their writer can interpret them."""
    header = replace(source, created=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    return replace(header, optimizer=None, random={}, spikes=None) if weights_only else header


def check_layout(manifest: Manifest, layout: ParallelConfig | None) -> None:
    """Raise ValueError naming the option if a checkpoint's model cannot be sharded for a layout."""
    if layout is None:
        return
    sharded = [tensor for tensor in _tensors(manifest) if tensor.axis is not None]
    common = math.gcd(*(tensor.atoms for tensor in sharded))
    for tensor in sharded:
        if tensor.atoms % layout.tensor:
            accepted = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
            raise ValueError(
                f"--tensor {layout.tensor}: must divide the {tensor.atoms} parts that {tensor.name} can be cut into; "
                f"accepted: {accepted}"
            )
    rank_files.stage_blocks(manifest, layout)


def _refuse_other_model(source: SourceCheckpoint, newest: SourceCheckpoint) -> None:
    found, expected = source.manifest.config["model"], newest.manifest.config["model"]
    differences = [
        f"model.{key} is {found.get(key)!r} there, {expected.get(key)!r} in {newest.path}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
    found, expected = ({tensor.name: tensor.shape for tensor in _tensors(one.manifest)} for one in (source, newest))
    differences += [
        f"{name} is {found.get(name, 'missing')} there, {expected.get(name, 'missing')} in {newest.path}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise ValueError(f"{source.path}: holds another model: {'; '.join(differences[:10])}")
