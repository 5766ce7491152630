"""Small trainings' states, cut over ranks as the distributed optimizer cuts them, and ranks that are threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import zarr

from griffin.trainer.checkpoint.arrays import EXP_AVG, EXP_AVG_SQ, MASTER, MODEL, ArraySpec, GlobalTensor
from griffin.trainer.checkpoint.header import Header
from griffin.trainer.checkpoint.manifest import Manifest, verify
from griffin.trainer.checkpoint.plan import Member, Parameter, PlacedTensor, SavePlan, Shard, plan_chunks
from griffin.trainer.checkpoint.saving.saver import Outcome, Saver

T = TypeVar("T")
State = dict[str, np.ndarray]  # by tensor: float32 [3 (master, exp_avg, exp_avg_sq), *shape]

GATE, UP = (GlobalTensor(name=name, shape=(24, 5), axis=0, atoms=24) for name in ("gate", "up"))
DOWN = GlobalTensor(name="down", shape=(5, 24), axis=1, atoms=24)
INPUT, RECURRENCE = (GlobalTensor(name=name, shape=(12, 3, 3), axis=0, atoms=12) for name in ("input", "recurrence"))
EMBEDDING = GlobalTensor(name="embedding", shape=(31, 5), axis=0, atoms=36, padded=36)
NORM = GlobalTensor(name="norm", shape=(7,))
TENSORS = (EMBEDDING, NORM, GATE, UP, DOWN, INPUT, RECURRENCE)
# Unions of atoms; the last one of the embedding is smaller than the others.
CHUNKS = {
    "embedding": (3, 5),
    "norm": (7,),
    "gate": (2, 5),
    "up": (2, 5),
    "down": (5, 4),
    "input": (2, 3, 3),
    "recurrence": (2, 3, 3),
}


class Layout:
    """How `tensor_size` x `data_size` ranks hold the state: fused parameters, cut by flat ranges at odd places."""

    def __init__(
        self, tensor_size: int, data_size: int, dtype: str = "float32", seed: int = 0, *, empty: bool = False
    ) -> None:
        """With `empty`, all data-parallel ranks but the last hold nothing."""
        self.tensor_size, self.size, self.dtype = tensor_size, tensor_size * data_size, dtype
        held = 24 // tensor_size
        self.parameters = [
            Parameter((36 // tensor_size, 5), (PlacedTensor(EMBEDDING, 0, 0),)),
            Parameter((7,), (PlacedTensor(NORM, 0, 0),)),
            Parameter((2 * held, 5), (PlacedTensor(GATE, 0, 0), PlacedTensor(UP, 0, held))),
            Parameter((5, held), (PlacedTensor(DOWN, 0, 0),)),
            Parameter((12 // tensor_size, 3, 6), (PlacedTensor(INPUT, 2, 0), PlacedTensor(RECURRENCE, 2, 3))),
        ]
        random = np.random.default_rng(seed)
        sizes = [math.prod(parameter.shape) for parameter in self.parameters]
        ends = [[0, *sorted(random.integers(0, 1 if empty else size, data_size - 1)), size] for size in sizes]
        members = []
        for rank in range(self.size):
            data_rank, shards, offset = rank // tensor_size, [], 0
            for parameter_ends in ends:
                start, stop = int(parameter_ends[data_rank]), int(parameter_ends[data_rank + 1])
                shards.append(Shard(start, stop, offset))
                offset += stop - start
            members.append(Member(rank, rank % tensor_size, tuple(shards)))
        chunks = plan_chunks(self.parameters, members, tensor_size, CHUNKS)
        kinds = (MODEL, EXP_AVG, EXP_AVG_SQ) if dtype == "float32" else (MODEL, MASTER, EXP_AVG, EXP_AVG_SQ)
        self.arrays = tuple(
            ArraySpec(kind=kind, tensor=tensor, dtype=dtype if kind == MODEL else "float32", chunks=CHUNKS[tensor.name])
            for tensor in TENSORS
            for kind in kinds
        )
        self.plans = [
            SavePlan(
                rank=member.rank,
                dtype=dtype,
                shards=member.shards,
                elements=sum(shard.stop - shard.start for shard in member.shards),
                chunks=tuple(chunk for chunk in chunks if chunk.involves(member.rank)),
                arrays=self.arrays if member.rank == 0 else (),
            )
            for member in members
        ]
        self.files = sum(math.prod(array.grid) for array in self.arrays)  # chunks of a checkpoint

    def stage(self, state: State, rank: int, staging: np.ndarray) -> None:
        for parameter, shard in zip(self.parameters, self.plans[rank].shards, strict=True):
            local = np.full((3, *parameter.shape), np.nan, np.float32)
            for placed in parameter.tensors:
                box = (slice(None), *placed.tensor.part(rank % self.tensor_size, self.tensor_size))
                part = state[placed.tensor.name][box]
                place = [slice(0, size) for size in part.shape]
                place[placed.dim + 1] = slice(placed.start, placed.start + part.shape[placed.dim + 1])
                local[tuple(place)] = part
            rows = staging[:, shard.offset : shard.offset + shard.stop - shard.start]
            rows[...] = local.reshape(3, -1)[:, shard.start : shard.stop]


def random_state(seed: int) -> State:
    random = np.random.default_rng(seed)
    return {tensor.name: random.standard_normal((3, *tensor.shape), dtype=np.float32) for tensor in TENSORS}


def header(step: int) -> Header:
    return Header(
        step=step,
        samples=8 * step,
        attempt=1,
        created="2030-01-01T00:00:00+0000",
        config={"model": {"width": 5}},
        layout={"tensor": 1},
        optimizer={"name": "adam", "step": step},
        random={"cpu": "AAAA"},
    )


def assert_holds(path: Path | None, state: State, dtype: str) -> Manifest:
    """A checkpoint verifies, and stock zarr reads from it exactly what was staged."""
    assert path is not None
    manifest = verify(path)
    assert zarr.open_group(path, mode="r").attrs["step"] == manifest.step
    for name, (master, exp_avg, exp_avg_sq) in state.items():
        expected = {MODEL: master, EXP_AVG: exp_avg, EXP_AVG_SQ: exp_avg_sq}
        if dtype == "bfloat16":
            expected |= {MODEL: master.astype(ml_dtypes.bfloat16).view(np.uint16), MASTER: master}
        for kind, values in expected.items():
            found = np.asarray(zarr.open_array(path / f"{kind}.{name}", mode="r")[:])
            assert found.dtype == values.dtype
            np.testing.assert_array_equal(found, values, err_msg=f"{kind}.{name}")
    assert len(manifest.arrays) == len(state) * len(expected)
    return manifest


class Team:
    """The savers of all ranks of a layout, each used by a thread of its own."""

    def __init__(self, layout: Layout, root: Path, **options: Any) -> None:
        self.layout, self.root = layout, root
        self._barrier = threading.Barrier(layout.size, timeout=120)
        self._slots: list[Any] = [None] * layout.size
        self._threads = ThreadPoolExecutor(layout.size)
        settings: dict[str, Any] = {"host": "127.0.0.1", "keep_last": 0, "keep_every": 0, "lock": None, "timeout": 30}
        settings |= options

        def make(rank: int) -> Saver:
            return Saver(
                root=root,
                plan=layout.plans[rank],
                all_gather=lambda value, _: self._gather(rank, value),
                rank=rank,
                world_size=layout.size,
                **settings,
            )

        self.savers = self.each(make)

    def each(self, call: Callable[[int], T]) -> list[T]:
        """Call a function with every rank at the same time."""
        return [future.result(120) for future in [self._threads.submit(call, rank) for rank in range(self.layout.size)]]

    def start(self, step: int, state: State) -> None:
        def start(rank: int) -> None:
            self.layout.stage(state, rank, self.savers[rank].staging)
            self.savers[rank].start(step, header(step) if rank == 0 else None)

        self.each(start)

    def wait(self) -> list[Outcome | None]:
        return self.each(lambda rank: self.savers[rank].wait())

    def save(self, step: int, state: State) -> list[Outcome | None]:
        self.start(step, state)
        return self.wait()

    def pid(self, rank: int) -> int:
        """Of a rank's saving process."""
        process = self.savers[rank]._process
        assert process is not None
        return process.pid

    def close(self) -> None:
        self.each(lambda rank: self.savers[rank].close())
        self._threads.shutdown()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values
