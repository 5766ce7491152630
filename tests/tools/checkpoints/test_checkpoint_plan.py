"""`griffin checkpoint plan`: the plan equals that of real ranks, and its figures equal what they write."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from pathlib import Path
from typing import Any

import megatron.core.distributed
import numpy as np
import pytest
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig

from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import rank_grid
from griffin.tools.checkpoints.save_plan import (
    CheckpointPlan,
    RankLoad,
    StagePlan,
    balance,
    cut_tensors,
    describe,
    file_bytes,
    plan_checkpoint,
    rank_loads,
)
from griffin.tools.cli import main
from griffin.trainer import sharded_optimizer
from griffin.trainer.checkpoint import arrays
from griffin.trainer.checkpoint.arrays import ArraySpec, GlobalTensor, numpy_dtype, state_arrays
from griffin.trainer.checkpoint.plan import Member, Parameter, PlacedTensor, SavePlan, Shard, plan_chunks
from griffin.trainer.checkpoint.state import ShardedState
from griffin.trainer.checkpoint.zarr_io import create_array
from griffin.trainer.settings.presets import preset
from griffin.trainer.settings.sections import Config, DataConfig, OptimizerConfig, TrainConfig
from griffin.trainer.settings.validate import validate
from griffin.trainer.step import Training
from tests.layouts import LAYOUTS, make_config
from tests.ranks import RankPool

MIB = 2**20

# name: layout, ranks, training
TRAININGS: dict[str, tuple[ParallelConfig, int, dict[str, Any]]] = {
    "one": (ParallelConfig(), 1, {}),
    "dp3-overlap": (ParallelConfig(), 3, {"overlap": "on", "dtype": "bfloat16"}),
    "dp4": (ParallelConfig(), 4, {}),
    "tp2-dp2": (LAYOUTS["tp2-dp2"], 4, {"dtype": "bfloat16"}),
    "tp2-dp2-overlap": (LAYOUTS["tp2-dp2"], 4, {"overlap": "on"}),
    "tp2-pp2": (LAYOUTS["tp2-pp2"], 4, {}),
    "pp2-dp2-overlap": (LAYOUTS["pp2-dp2"], 4, {"overlap": "on", "dtype": "bfloat16"}),
    "pp2-interleaved": (LAYOUTS["pp2-interleaved"], 2, {}),
    "pp2-interleaved-dp2-overlap": (LAYOUTS["pp2-interleaved"], 4, {"overlap": "on"}),
}


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Make a small model have many chunks and many of megatron-core's buckets."""
    patch.setattr(arrays, "CHUNK_BYTES", 4096)
    patch.setattr(arrays, "WHOLE_BYTES", 1024)
    config = functools.partial(DistributedDataParallelConfig, bucket_size=5000)
    for module in (megatron.core.distributed, sharded_optimizer):
        patch.setattr(module, "DistributedDataParallelConfig", config)


def save_plan(ranks: Any, config: Config) -> tuple[SavePlan, int]:
    """Return this rank's plan as made in training, and its number of buckets."""
    with pytest.MonkeyPatch.context() as patch, rank_grid(config.parallel, ranks) as grid:
        make_small(patch)
        training = Training(config, grid)
        buckets = sum(len(buffer.buckets) for chunk in training.chunks for buffer in chunk.buffers)
        return ShardedState(training, grid).save_plan(), buckets


@pytest.mark.parametrize("name", TRAININGS)
def test_the_plan_is_that_of_the_ranks_themselves(
    rank_pool: RankPool, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    layout, ranks, train = TRAININGS[name]
    config = make_config("griffin", layout, **{"overlap": "off", **train})
    answers = rank_pool.run(save_plan, ranks, config)
    if train.get("overlap") == "on":
        assert answers[0][1] > 4, "the case needs several buckets"
    make_small(monkeypatch)
    planned = plan_checkpoint(config, ranks)
    assert not dist.is_initialized()

    assert planned.arrays == answers[0][0].arrays
    members = {member.rank: (member, stage) for stage in planned.stages for member in stage.members}
    assert sorted(members) == list(range(ranks))
    for rank, (real, _) in enumerate(answers):
        member, stage = members[rank]
        assert member.shards == real.shards
        assert tuple(chunk for chunk in stage.chunks if chunk.involves(rank)) == real.chunks
    for load, (real, _) in zip(itertools.chain.from_iterable(rank_loads(planned)), answers, strict=True):
        assert load.staged == 3 * 4 * real.elements


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_have_the_size_that_is_written(tmp_path: Path, dtype: str) -> None:
    tensor = GlobalTensor(name="t", shape=(7, 30), axis=1, atoms=8, padded=32)  # the last chunks are not full
    array = ArraySpec(kind="model", tensor=tensor, dtype=dtype, chunks=(4, 8))
    stored = create_array(tmp_path, array)
    for index in array.indices():
        shape = [part.stop - part.start for part in array.box(index)]
        stored.write(index, np.ones(shape, numpy_dtype(dtype))).result()
    sizes = [(tmp_path / array.file(index)).stat().st_size for index in array.indices()]
    assert sizes == [file_bytes(array)] * 8


def test_what_ranks_write_and_exchange() -> None:
    """Two ranks hold 5 and 3 of a tensor's 8 elements, in one chunk; only rank 1 holds the other tensor."""
    first, second = GlobalTensor(name="first", shape=(8,)), GlobalTensor(name="second", shape=(16,))
    parameters = [Parameter(tensor.shape, (PlacedTensor(tensor, 0, 0),)) for tensor in (first, second)]
    members = (
        Member(0, 0, (Shard(0, 5, 0), Shard(0, 0, 5))),
        Member(1, 0, (Shard(5, 8, 0), Shard(0, 16, 3))),
    )
    chunks = plan_chunks(parameters, members, 1, {"first": (8,), "second": (16,)})
    plan = CheckpointPlan(
        arrays=tuple(state_arrays([first, second], "bfloat16", 1)),
        stages=(StagePlan(members=members, chunks=tuple(chunks)),),
    )
    # Per element, one bfloat16 and three float32 are written, three float32 staged and sent. A file ends with 4 bytes
    # of checksum.
    expected = [
        RankLoad(staged=5 * 12, files=4, written=8 * 14 + 4 * 4, received=3 * 12, largest=8 * 4),
        RankLoad(staged=19 * 12, files=4, written=16 * 14 + 4 * 4, sent=3 * 12, largest=16 * 4),
    ]
    assert rank_loads(plan) == [expected]


def plan_14b(pipeline: int, data: int) -> tuple[Config, CheckpointPlan, int]:
    config = Config(
        model=preset("griffin-14b"),
        parallel=ParallelConfig(tensor=8, pipeline=pipeline),
        data=DataConfig(train=("unread",)),
        optimizer=OptimizerConfig(schedule="constant"),
        train=TrainConfig(dtype="bfloat16"),
    )
    assert config.model.vocabulary == 256_000
    ranks = 8 * pipeline * data
    validate(config, ranks)
    return config, plan_checkpoint(config, ranks), ranks


@pytest.fixture(scope="module")
def one_stage() -> tuple[Config, CheckpointPlan, int]:
    begun = time.process_time()
    made = plan_14b(pipeline=1, data=8)
    # CPU time, since the machine may be busy: 2 s measured.
    assert time.process_time() - begun < 30
    return made


def check_files_of_14b(plan: CheckpointPlan) -> None:
    sizes = [file_bytes(array) for array in plan.arrays for _ in array.indices()]
    values = sum(array.nbytes for array in plan.arrays)
    assert values == 15_074_661_376 * (2 + 3 * 4)
    # 7,904 files of weights' chunks, and 1,720 of tensors below 1 MiB (norms, biases, convolutions), which stay whole.
    assert len(sizes) <= 10_000
    assert sum(size > MIB for size in sizes) <= 8_000
    assert max(sizes) <= 64 * MIB + 4
    assert 15e6 <= sum(sizes) / len(sizes) <= 45e6
    assert sum(sizes) < 1.001 * values, "next to nothing of the files may be padding and checksums"

    chunks = [chunk for stage in plan.stages for chunk in stage.chunks]
    places = {(chunk.tensor.name, chunk.index) for chunk in chunks}
    assert len(places) == len(chunks), "each chunk has one owner"
    assert places == {(array.tensor.name, index) for array in plan.arrays for index in array.indices()}
    for tensor_size in (1, 2, 4, 8):
        assert cut_tensors(plan.arrays, tensor_size) == []

    loads = [load for stage in rank_loads(plan) for load in stage]
    assert sum(load.written for load in loads) == sum(sizes)
    assert sum(load.files for load in loads) == len(sizes)
    tensors = [array.tensor for array in plan.arrays if array.kind == arrays.MODEL]
    staged = sum(tensor.elements * (1 if tensor.axis is not None else 8) for tensor in tensors)
    assert sum(load.staged for load in loads) == 12 * staged, "tensor ranks stage what each of them updates"
    assert sum(load.sent for load in loads) == sum(load.received for load in loads)


def test_14b_in_one_stage(one_stage: tuple[Config, CheckpointPlan, int]) -> None:
    _, plan, _ = one_stage
    check_files_of_14b(plan)
    (loads,) = rank_loads(plan)
    assert balance([load.written for load in loads]) <= 1.2


@pytest.mark.slow
def test_14b_in_four_stages() -> None:
    _, plan, _ = plan_14b(pipeline=4, data=4)
    check_files_of_14b(plan)
    stages = rank_loads(plan)
    assert len(stages) == 4
    for loads in stages:  # a rank can only write what its stage holds, and stages are balanced by computation
        assert balance([load.written for load in loads]) <= 1.2


def test_what_is_printed_for_14b(one_stage: tuple[Config, CheckpointPlan, int]) -> None:
    config, plan, ranks = one_stage
    lines = describe(config, ranks, plan).splitlines()
    assert lines[:2] == [
        "64 ranks: tensor 8 x pipeline 1 x data 8",
        "15,074,661,376 weights, bfloat16; sharded for training with overlap (train.overlap = 'auto': on GPUs)",
    ]
    rows = {line[:21].strip(): line[21:].split() for line in lines[4:9]}
    assert list(rows) == [*arrays.KINDS, "all"]
    sizes = [file_bytes(array) for array in plan.arrays for _ in array.indices()]
    count, files, total = (int(figure.replace(",", "")) for figure in rows["all"][:3])
    assert (count, files, total) == (len(plan.arrays), len(sizes), sum(sizes))
    classes = next(line for line in lines if line.startswith("sizes: ")).removeprefix("sizes: ")
    counted = [int(part.split(" ")[0].replace(",", "")) for part in classes.split(", ")]
    assert sum(counted) == len(sizes)
    assert classes.endswith(" up to 64.0 MiB")
    assert lines[-1].startswith("tensor-parallel size 8: a tensor rank reads whole chunks only")
    assert max(map(len, lines)) <= 130, "a table is read in one glance"


def held_in_part(array: ArraySpec, tensor_size: int) -> bool:
    """Whether some tensor rank holds a part of a chunk, found element by element."""
    chunks = np.zeros(array.shape, int)
    for number, index in enumerate(array.indices()):
        chunks[array.box(index)] = number
    for tensor_rank in range(tensor_size):
        held = np.zeros(array.shape, bool)
        held[array.tensor.part(tensor_rank, tensor_size)] = True
        if set(chunks[held]) & set(chunks[~held]):
            return True
    return False


@pytest.mark.parametrize("tensor_size", [1, 2, 4, 5, 8])
def test_tensors_whose_chunks_are_cut_are_named(tensor_size: int) -> None:
    tensors = [
        GlobalTensor(name="rows", shape=(40, 3), axis=0, atoms=40),
        GlobalTensor(name="columns", shape=(3, 40), axis=1, atoms=40),
        GlobalTensor(name="vocabulary", shape=(37, 2), axis=0, atoms=40, padded=40),
        GlobalTensor(name="replicated", shape=(40, 3)),
    ]
    found = {}
    for tensor, parts in itertools.product(tensors, (2, 4, 5, 8, 40)):
        chunks = [40 // parts if place == (tensor.axis or 0) else size for place, size in enumerate(tensor.shape)]
        renamed = dataclasses.replace(tensor, name=f"{tensor.name} in {parts}")
        found[renamed.name] = ArraySpec(kind="model", tensor=renamed, dtype="float32", chunks=tuple(chunks))
    expected = [
        name
        for name, array in found.items()
        if array.tensor.axis is not None and held_in_part(array, tensor_size)  # of replicated ones, all is held
    ]
    assert cut_tensors(list(found.values()), tensor_size) == expected
    assert bool(expected) == (tensor_size > 1)
    whole = ArraySpec(kind="model", tensor=tensors[0], dtype="float32", chunks=(40, 3))
    assert cut_tensors([whole], tensor_size) == [], "one chunk is read as a whole"


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(
        '[model]\npreset = "griffin-100m"\nvocabulary = 1000\n[data]\ntrain = ["unread"]\n', encoding="utf-8"
    )
    return str(path)


def test_the_command(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--parallel.pipeline", "2", "--train.dtype", "float32", "--train.overlap=off"]
    assert main(["checkpoint", "plan", config_file, "--ranks", "4", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "4 ranks: tensor 1 x pipeline 2 x data 2\n" in printed
    assert "float32; sharded for training without overlap\n" in printed
    assert "optimizer.exp_avg_sq" in printed
    assert "optimizer.master" not in printed, "a float32 model is its own master"
    assert "written, most / mean of each pipeline rank: " in printed
    assert "\nplanned in " in printed


def test_what_cannot_be_planned_is_refused(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*words: str) -> str:
        assert main(["checkpoint", "plan", *words]) == 2
        return capsys.readouterr().err

    assert "world size = 3: must be a multiple of " in refusal(config_file, "--ranks", "3", "--parallel.tensor", "2")
    assert "parallel.tensor = 5: must divide " in refusal(config_file, "--ranks", "5", "--parallel.tensor", "5")
    assert "missing.toml: no such config file" in refusal("missing.toml", "--ranks", "1")
    with pytest.raises(SystemExit):
        main(["checkpoint", "plan", config_file])
    assert "--ranks" in capsys.readouterr().err
