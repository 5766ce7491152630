"""Checkpoints made of weights in other formats: what they must hold, writing them, and what to train them with."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from griffin.parallel.config import ModelConfig
from griffin.tools.checkpoints.auxiliary_files import tokenizer_text
from griffin.tools.checkpoints.sources import StoredArray
from griffin.tools.checkpoints.write import OutputArray, write_step
from griffin.tools.common.workers import Workers
from griffin.trainer.checkpoint.arrays import MODEL, ArraySpec, GlobalTensor, chunk_shape, default_cuts
from griffin.trainer.checkpoint.manifest import Manifest
from griffin.trainer.checkpoint.zarr_io import CheckpointError
from griffin.trainer.settings.presets import PRESETS
from griffin.trainer.settings.sections import Config

SHOWN = 10  # tensors that a message lists


def model_tensors(model: ModelConfig) -> list[GlobalTensor]:
    """The tensors of a model, in its order, as training saves them."""
    from griffin.parallel.sharding import named_pieces
    from griffin.parallel.stage import meta_stage
    from griffin.parallel.world.grid import single_rank_grid
    from griffin.trainer.checkpoint.state import global_tensor

    with single_rank_grid() as grid:
        return [global_tensor(piece) for piece, _ in named_pieces([meta_stage(model, grid)])]


def require_tensors(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless a file has exactly the tensors, by name and shape, that its model is made of."""
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is none of this model's tensors" for name in found if name not in expected]
    differences += [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if differences:
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise CheckpointError(f"{path}: {'; '.join(differences[:SHOWN])}{more}")


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
    """Write a checkpoint of weights only to the new folder `target`, and print what was made.

    Args:
        source: what the weights are taken from.
        arrays: the weights by canonical name, in the model's order; each stays in its dtype unless `dtype` is given.
        auxiliary: files to take along, by the names that they get.

    Raises CheckpointError where a file cannot be read or written, and ValueError for a value that does not fit
    `dtype`; then nothing is left.
    """
    cuts = default_cuts([array.spec.tensor for array in arrays.values()])
    outputs = []
    for array in arrays.values():
        tensor = array.spec.tensor
        spec = ArraySpec(kind=MODEL, tensor=tensor, dtype=dtype or array.spec.dtype, chunks=chunk_shape(tensor, cuts))
        outputs.append(OutputArray(spec, (array,)))
    manifest = Manifest(
        step=0,
        samples=0,
        attempt=1,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        config=json.loads(json.dumps(dataclasses.asdict(Config(model=model)))),
        layout={"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence_parallel": False, "data": 1},
        optimizer=None,
        random={},
        sources=(str(source.absolute()),),
        arrays={one.spec.name: one.spec for one in outputs},
        files={},
    )
    write_step(target, manifest, outputs, workers, auxiliary)
    print(f"{sum(array.spec.tensor.elements for array in arrays.values()):,} parameters; {tokenizer_text(auxiliary)}")
    print(f"To train it, a config needs:\n\n{model_section(model)}")


def model_section(model: ModelConfig) -> str:
    """The section of a config that describes a model: of a preset's, only what is stated beside the preset."""
    mine = dataclasses.asdict(model)
    for name, preset in PRESETS.items():
        changed = {key: mine[key] for key, value in dataclasses.asdict(preset).items() if mine[key] != value}
        if not changed.keys() - {"vocabulary", "window", "logit_soft_cap"}:
            # Stated even if it is the preset's: otherwise the data decide.
            return tomli_w.dumps({"model": {"preset": name} | changed | {"vocabulary": model.vocabulary}})
    return tomli_w.dumps({"model": mine})
