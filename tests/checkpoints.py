"""Small checkpoints made by hand, of every way in which tensors are cut, and what stock readers find in one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr

from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig, ParallelConfig, axis_atoms
from griffin.tools.cli import main
from griffin.trainer.checkpoint import arrays
from griffin.trainer.checkpoint.arrays import (
    EXP_AVG_SQ,
    MASTER,
    MODEL,
    GlobalTensor,
    default_cuts,
    numpy_dtype,
    state_arrays,
)
from griffin.trainer.checkpoint.manifest import Manifest, commit
from griffin.trainer.checkpoint.zarr_io import create_array
from griffin.trainer.settings.sections import Config

BLOCKS = 4
WIDTH = 8
MODEL_CONFIG = ModelConfig(
    pattern=(RECURRENT, ATTENTION) * (BLOCKS // 2),
    width=WIDTH,
    recurrent_width=24,
    heads=4,
    head_dim=8,
    gate_blocks=4,
    vocabulary=130,
)


def block_tensors(block: int) -> list[GlobalTensor]:
    name = f"blocks.{block}"
    return [
        GlobalTensor(name=f"{name}.mlp_norm.weight", shape=(WIDTH,)),
        GlobalTensor(name=f"{name}.mlp.gate.weight", shape=(24, WIDTH), axis=0, atoms=24),
        GlobalTensor(name=f"{name}.mlp.gate.bias", shape=(24,), axis=0, atoms=24),
        GlobalTensor(name=f"{name}.mlp.down.weight", shape=(WIDTH, 24), axis=1, atoms=24),
        GlobalTensor(name=f"{name}.recurrent.input_gate.weight", shape=(4, 6, 6), axis=0, atoms=4),
    ]


TENSORS = [
    # In memory 256 rows: of 4 tensor ranks the last holds padding only, the third two rows besides.
    GlobalTensor(name="embedding.weight", shape=(130, WIDTH), axis=0, atoms=axis_atoms(256), padded=256),
    *(tensor for block in range(BLOCKS) for tensor in block_tensors(block)),
    GlobalTensor(name="final_norm.weight", shape=(WIDTH,)),
]
FEW = [TENSORS[0], *block_tensors(0), TENSORS[-1]]  # one block's only


@contextmanager
def small_chunks(chunk_bytes: int = 1024) -> Iterator[None]:
    """Cut tensors above 256 bytes into chunks of `chunk_bytes` and less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "WHOLE_BYTES", 256)
        patch.setattr(arrays, "CHUNK_BYTES", chunk_bytes)
        yield


def reshard(*words: object, workers: int = 1) -> int:
    """The exit code of `griffin checkpoint reshard`."""
    return main(["checkpoint", "reshard", *map(str, words), "--workers", str(workers)])


def config_json(model: ModelConfig = MODEL_CONFIG, parallel: ParallelConfig | None = None) -> dict[str, Any]:
    """A run's config as a manifest holds it."""
    return json.loads(json.dumps(dataclasses.asdict(Config(model=model, parallel=parallel or ParallelConfig()))))


def make_checkpoint(
    folder: Path,
    *,
    step: int = 100,
    dtype: str = "float32",
    tensors: Sequence[GlobalTensor] = TENSORS,
    weights_only: bool = False,
    seed: int = 0,
    cuts: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Write a complete checkpoint to the new folder `folder`, and return its arrays by name.

    Weights and first moments are normal, the first element -0, the same for all checkpoints of one seed; second moments
    are zero.
    """
    specs = state_arrays(tensors, dtype, default_cuts(tensors) if cuts is None else cuts)
    if weights_only:
        specs = [spec for spec in specs if spec.kind == MODEL]
    tmp = folder.with_name(f"{folder.name}.tmp")
    tmp.mkdir(parents=True)
    values: dict[str, np.ndarray] = {}
    files = {}
    for spec in specs:
        kind = MODEL if spec.kind == MASTER else spec.kind
        value = np.zeros(spec.shape, np.float32)
        if kind != EXP_AVG_SQ:
            generator = np.random.default_rng([seed, *f"{kind}.{spec.tensor.name}".encode()])
            value[...] = generator.standard_normal(spec.shape, np.float32)
            value.flat[0] = -0.0
        values[spec.name] = value.astype(numpy_dtype(spec.dtype))
        array = create_array(tmp, spec)
        for index in spec.indices():
            files[spec.file(index)] = array.write(index, values[spec.name][spec.box(index)]).result()
    manifest = Manifest(
        step=step,
        samples=4 * step,
        attempt=2,
        created="2026-01-02T03:04:05+0000",
        config=dict(config or config_json()),
        layout={"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence_parallel": False, "data": 1},
        optimizer=None if weights_only else {"name": "adamw", "step": step},
        random={} if weights_only else {"cpu": "AAAA"},
        spikes=None if weights_only else {"losses": [2.5], "skipped": 1},
        extras={"ramp": {"sizes": [8, step], "ends": None}},
        arrays={spec.name: spec for spec in specs},
        files=files,
    )
    assert commit(tmp, manifest) == folder
    return values


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, as stock Zarr reads them."""
    found = {}
    for metadata in folder.glob("*/zarr.json"):
        array = zarr.open_array(metadata.parent, mode="r")
        values = np.asarray(array[...])
        found[metadata.parent.name] = values.view(ml_dtypes.bfloat16) if array.attrs["dtype"] == "bfloat16" else values
    return found


def assert_equal_arrays(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Names, dtypes and every bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name
