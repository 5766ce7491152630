"""Write checkpoints of imported weights: check that all tensors are there, write them, print the [model] section."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from griffin.parallel.config import ModelConfig, ParallelConfig
from griffin.tools.checkpoints.auxiliary_files import tokenizer_text
from griffin.tools.checkpoints.sources import StoredArray
from griffin.tools.checkpoints.write import OutputArray, write_step
from griffin.tools.common.workers import Workers
from griffin.trainer.checkpoint.arrays import MODEL, ArraySpec, GlobalTensor, chunk_shape, default_cuts
from griffin.trainer.checkpoint.header import Header
from griffin.trainer.checkpoint.zarr_io import CheckpointError
from griffin.trainer.settings.presets import PRESETS
from griffin.trainer.settings.sections import Config

MOST_LISTED = 10  # tensors that a message lists


def model_tensors(model: ModelConfig) -> list[GlobalTensor]:
    """Return a model's tensors in model order, as training saves them."""
    from griffin.parallel.sharding import named_pieces
    from griffin.parallel.stage import meta_stage
    from griffin.parallel.world.grid import single_rank_grid
    from griffin.trainer.checkpoint.state import global_tensor

    with single_rank_grid() as grid:
        return [global_tensor(piece) for piece, _ in named_pieces([meta_stage(model, grid)])]


def require_tensors(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless a file has exactly the expected tensors, by name and shape."""
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not a tensor of this model" for name in found if name not in expected]
    differences += [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if differences:
        more = f"; and {len(differences) - MOST_LISTED} more" if len(differences) > MOST_LISTED else ""
        raise CheckpointError(f"{path}: {'; '.join(differences[:MOST_LISTED])}{more}")


def write_imported(
    source: Path,
    target: Path,
    model: ModelConfig,
    arrays: Mapping[str, StoredArray],
    workers: Workers,
    *,
    dtype: str | None,
    auxiliary: Mapping[str, Path],
) -> None:
    """Write a checkpoint of weights only to the new folder `target`, and print a summary.

    Args:
        source: where the weights come from; recorded in the manifest.
        arrays: the weights by canonical name, in model order. Each keeps its dtype unless `dtype` is given.
        auxiliary: files to copy into the checkpoint, by their names there.

    Raises CheckpointError if a file cannot be read or written, and ValueError for a value that overflows `dtype`;
    nothing is left then.
    """
    cuts = default_cuts([array.spec.tensor for array in arrays.values()])
    outputs = []
    for array in arrays.values():
        tensor = array.spec.tensor
        spec = ArraySpec(kind=MODEL, tensor=tensor, dtype=dtype or array.spec.dtype, chunks=chunk_shape(tensor, cuts))
        outputs.append(OutputArray(spec, (array,)))
    header = Header(
        step=0,
        samples=0,
        attempt=1,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        config=json.loads(json.dumps(dataclasses.asdict(Config(model=model)))),
        layout=ParallelConfig().record(1),
        optimizer=None,
        random={},
        sources=(str(source.absolute()),),
    )
    write_step(target, header, outputs, workers, auxiliary)
    print(f"{sum(array.spec.tensor.elements for array in arrays.values()):,} parameters; {tokenizer_text(auxiliary)}")
    print(f"To train it, a config needs:\n\n{model_section(model)}")


def model_section(model: ModelConfig) -> str:
    """Return the [model] section of a config for a model: a preset's name and its changes if one is close enough."""
    settings = dataclasses.asdict(model)
    for name, preset in PRESETS.items():
        changed = {key: settings[key] for key, value in dataclasses.asdict(preset).items() if settings[key] != value}
        if not changed.keys() - {"vocabulary", "window", "logit_soft_cap"}:
            # The vocabulary is stated even if it is the preset's: otherwise the data would set it.
            return tomli_w.dumps({"model": {"preset": name} | changed | {"vocabulary": model.vocabulary}})
    return tomli_w.dumps({"model": settings})
