"""Batches: the same global batch for every layout, from any step, with or without worker processes."""

from itertools import islice

import numpy as np
import pytest
import torch

from griffin.trainer.data.dataset import open_samples
from griffin.trainer.data.loader import batches, sample_numbers
from griffin.trainer.data.prefix import PrefixWriter

KEYS = {"tokens", "labels", "loss_mask", "positions"}


@pytest.fixture
def samples(tmp_path):
    writer = PrefixWriter(str(tmp_path / "p"), {"kind": "test", "vocabulary": 50, "eod": 49, "sha256": None}, "t", None)
    rng = np.random.default_rng(0)
    for _ in range(40):
        writer.add(np.append(rng.integers(0, 49, rng.integers(0, 9)), 49))
    writer.finish(["test"])
    writer.publish()
    return open_samples([str(tmp_path / "p")], sequence_length=8, seed=1)


def test_sample_numbers():
    layout = {"global_batch": 12, "micro_batch": 2, "data_size": 3}
    assert sample_numbers(0, **layout, data_rank=0) == [[0, 1], [6, 7]]
    assert sample_numbers(0, **layout, data_rank=2) == [[4, 5], [10, 11]]
    assert sample_numbers(2, **layout, data_rank=1) == [[26, 27], [32, 33]]


@pytest.mark.parametrize(("micro_batch", "data_size"), [(1, 1), (12, 1), (1, 12), (2, 3), (3, 2), (4, 3), (1, 4)])
@pytest.mark.parametrize("first_step", [0, 3])
def test_a_step_is_the_same_samples_on_every_layout(samples, micro_batch, data_size, first_step):
    micro_batches = 12 // (micro_batch * data_size)
    layout = {"global_batch": 12, "micro_batch": micro_batch, "data_size": data_size}
    ranks = [batches(samples, first_step=first_step, **layout, data_rank=rank) for rank in range(data_size)]
    for step in (first_step, first_step + 1):
        parts = [next(ranks[rank]) for _ in range(micro_batches) for rank in range(data_size)]
        assert all(part["tokens"].shape == (micro_batch, 8) for part in parts)
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        assert whole.keys() == KEYS
        for i in range(12):
            assert all(torch.equal(whole[key][i], samples[step * 12 + i][key]) for key in KEYS)


def test_worker_processes_change_nothing(samples):
    layout = {"global_batch": 4, "micro_batch": 2, "data_rank": 1, "data_size": 2}
    drawn = [list(islice(batches(samples, first_step=1, **layout, workers=workers), 60)) for workers in (0, 2)]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*drawn, strict=True) for key in KEYS)


@pytest.mark.parametrize("workers", [0, 1])
def test_torch_random_state_is_left_alone(samples, workers):
    state = torch.get_rng_state()
    next(batches(samples, first_step=0, global_batch=2, micro_batch=2, data_rank=0, data_size=1, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch": 10},
            "global_batch 10: expected a positive multiple of micro_batch 2 x 2 data-parallel ranks",
        ),
        ({"global_batch": 0}, "global_batch 0: expected"),
        ({"micro_batch": 0}, "expected a positive multiple of micro_batch 0"),
        ({"first_step": -1}, "first_step -1"),
        ({"data_rank": 2}, "data_rank 2 of 2: out of range"),
    ],
)
def test_refusals(samples, changes, message):
    arguments = {"first_step": 0, "global_batch": 8, "micro_batch": 2, "data_rank": 0, "data_size": 2} | changes
    with pytest.raises(ValueError, match=message):
        batches(samples, **arguments)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_stops_the_loader(samples, tmp_path, workers):
    with open(tmp_path / "p.bin", "r+b") as file:
        file.write(b"\xff" * 20)
    loader = batches(samples, first_step=0, global_batch=8, micro_batch=8, data_rank=0, data_size=1, workers=workers)
    with pytest.raises(ValueError, match=r"p\.bin is damaged: sample \d+: token id 65535"):
        list(islice(loader, samples.samples_per_epoch))
