"""Samples: content, dependence on settings, epochs, blends, index caches, damaged files."""

import logging
import multiprocessing
import os
import pickle
import shutil
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from griffin.trainer.data import dataset as dataset_module
from griffin.trainer.data.dataset import BLEND_PERIOD, build_index, open_samples
from griffin.trainer.data.prefix import read_info
from tests.data_sets import write_prefix

EOD = 99


def random_documents(seed, count, longest=12):
    """Documents of 0 to `longest` tokens, so of 1 to longest + 1 with the end-of-document token."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, EOD, rng.integers(0, longest + 1)).tolist() for _ in range(count)]


def numbered_documents(lengths):
    """Documents whose tokens are all different, with their vocabulary and eod."""
    starts = np.cumsum([0, *lengths])
    documents = [list(range(start, end)) for start, end in pairwise(starts)]
    return documents, {"vocabulary": int(starts[-1]) + 1, "eod": int(starts[-1])}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def always_files(monkeypatch):
    monkeypatch.setattr(dataset_module, "INDEX_FILES_FROM", 1)


def test_a_sample(tmp_path):
    prefix = write_prefix(tmp_path / "p", random_documents(0, 200))
    samples = open_samples([prefix], sequence_length=32, seed=5)
    assert samples.sequence_length == 32
    assert samples.tokens == read_info(prefix).tokens
    assert samples.samples_per_epoch == (samples.tokens - 1) // 32
    seen_eod = 0
    for n in range(samples.samples_per_epoch):
        sample = samples[n]
        assert {key: (t.dtype, tuple(t.shape)) for key, t in sample.items()} == {
            "tokens": (torch.int64, (32,)),
            "labels": (torch.int64, (32,)),
            "loss_mask": (torch.float32, (32,)),
            "positions": (torch.int64, (32,)),
        }
        tokens, position = sample["tokens"].tolist(), 0
        assert sample["labels"].tolist()[:-1] == tokens[1:]
        for t, token in enumerate(tokens):
            assert sample["positions"][t] == position
            assert sample["loss_mask"][t] == (0.0 if token == EOD else 1.0)
            position = 0 if token == EOD else position + 1
            seen_eod += token == EOD
    assert seen_eod > 100
    with pytest.raises(IndexError):
        samples[-1]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=25),
    sequence_length=st.integers(2, 14),
    seed=st.integers(0, 2**32 - 20),
)
def test_each_token_is_an_input_once_an_epoch(tmp_path, lengths, sequence_length, seed):
    documents, ids = numbered_documents(lengths)
    prefix = write_prefix(tmp_path / os.urandom(8).hex(), documents, **ids)
    total = sum(lengths) + len(lengths)
    if total <= sequence_length:
        with pytest.raises(ValueError, match=rf"{total} tokens: a sample of sequence_length {sequence_length} needs"):
            open_samples([prefix], sequence_length=sequence_length, seed=seed)
        return
    samples = open_samples([prefix], sequence_length=sequence_length, seed=seed)
    per_epoch = samples.samples_per_epoch
    assert 1 <= total - per_epoch * sequence_length <= sequence_length  # left at the end of the epoch
    for epoch in range(3):
        drawn = [samples[n] for n in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        inputs = torch.cat([sample["tokens"] for sample in drawn])
        inputs = inputs[inputs != ids["eod"]].tolist()
        assert len(inputs) == len(set(inputs))
        # What follows a token inside its document is its label, and the document's end after its last token.
        ends = {document[-1] for document in documents if document}
        for sample in drawn:
            for token, label in zip(sample["tokens"].tolist(), sample["labels"].tolist(), strict=True):
                if token != ids["eod"]:
                    assert label == (ids["eod"] if token in ends else token + 1)
        # All but the tail of the epoch's stream was an input: count the ends of documents, which are alike, too.
        ends_seen = per_epoch * sequence_length - len(inputs)
        assert 0 <= len(documents) - ends_seen <= sequence_length


def test_epochs_are_shuffled_differently(tmp_path):
    documents, ids = numbered_documents([7] * 60)
    prefix = write_prefix(tmp_path / "p", documents, **ids)
    samples = open_samples([prefix], sequence_length=8, seed=3)
    epochs = [[tuple(samples[e * 59 + i]["tokens"].tolist()) for i in range(59)] for e in range(3)]
    assert samples.samples_per_epoch == 59
    assert all(len(set(epoch)) == 59 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] == [tuple(samples[i]["tokens"].tolist()) for i in range(59)]  # back again after other epochs
    other = open_samples([prefix], sequence_length=8, seed=7)
    assert epochs[0] != [tuple(other[i]["tokens"].tolist()) for i in range(59)]


def test_sample_does_not_depend_on_the_number_requested(tmp_path, always_files):
    prefixes = [write_prefix(tmp_path / name, random_documents(i, 50 * (i + 1))) for i, name in enumerate("ab")]
    entries = [f"0.7 {prefixes[0]}", f"0.3 {prefixes[1]}"]
    drawn = []
    for asked in (0, 3, 20, 200):
        cache = str(tmp_path / f"cache{asked}")
        build_index(entries, sequence_length=16, seed=1, samples=asked, cache=cache)
        samples = open_samples(entries, sequence_length=16, seed=1, cache=cache)
        drawn.append([samples[n] for n in (0, 1, 19, 57, 120, 199)])
    for others in drawn[1:]:
        assert all(same(a, b) for a, b in zip(drawn[0], others, strict=True))


def test_samples_in_another_order_and_process(tmp_path, always_files):
    prefix = write_prefix(tmp_path / "p", random_documents(0, 100))
    build_index([prefix], sequence_length=16, seed=1, samples=100)
    samples = open_samples([prefix], sequence_length=16, seed=1)
    wanted = [samples[n] for n in range(100)]
    pickled = pickle.dumps(samples)  # with two epochs open
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    for n in np.random.default_rng(0).permutation(100).tolist():
        assert same(again[n], wanted[n])


def index_folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "p.cache").iterdir())


def test_index_files(tmp_path, always_files, caplog):
    prefix = write_prefix(tmp_path / "p", random_documents(0, 100))
    per_epoch = open_samples([prefix], sequence_length=16, seed=1).samples_per_epoch
    build_index([prefix], sequence_length=16, seed=1, samples=per_epoch)
    start = read_info(prefix).sha256[:16]
    assert index_folders(tmp_path) == [f"{start}-length16-seed1"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "p.cache").rglob("*.*")}
    build_index([prefix], sequence_length=16, seed=1, samples=per_epoch + 1)
    assert index_folders(tmp_path) == [f"{start}-length16-seed{s}" for s in (1, 2)]
    assert len(times) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert oct((tmp_path / "p.cache").stat().st_mode) == oct(next((tmp_path / "p.cache").iterdir()).stat().st_mode)

    caplog.set_level(logging.WARNING)
    samples = open_samples([prefix], sequence_length=16, seed=1)
    kept = [samples[n] for n in (0, per_epoch)]
    assert not caplog.records
    # Without the files: the same, with a warning where they were expected.
    shutil.rmtree(tmp_path / "p.cache")
    samples = open_samples([prefix], sequence_length=16, seed=1)
    assert all(same(samples[n], sample) for n, sample in zip((0, per_epoch), kept, strict=True))
    assert [record.getMessage()[:17] for record in caplog.records] == ["no index files in"] * 2
    assert not (tmp_path / "p.cache").exists()


def test_a_small_epoch_has_no_index_files(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    prefix = write_prefix(tmp_path / "p", random_documents(0, 100))
    build_index([prefix], sequence_length=16, seed=1, samples=10_000)
    open_samples([prefix], sequence_length=16, seed=1)[5000]
    assert not (tmp_path / "p.cache").exists()
    assert not caplog.records


def killed_index(prefix, calls):
    real, count = np.save, 0

    def kill(*args, **kwargs):
        nonlocal count
        count += 1
        real(*args, **kwargs)
        if count == calls:
            os.kill(os.getpid(), 9)

    np.save = kill
    build_index([prefix], sequence_length=16, seed=1, samples=10)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_killed_index_build_is_incomplete(tmp_path, always_files, calls):
    prefix = write_prefix(tmp_path / "p", random_documents(0, 100))
    wanted = open_samples([prefix], sequence_length=16, seed=1)[3]
    process = multiprocessing.get_context("fork").Process(target=killed_index, args=(prefix, calls))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert [name[:12] for name in index_folders(tmp_path)] == [".unfinished-"]
    build_index([prefix], sequence_length=16, seed=1, samples=10)
    assert same(open_samples([prefix], sequence_length=16, seed=1)[3], wanted)


def test_a_rebuilt_prefix_does_not_use_the_old_index(tmp_path, always_files):
    for seed in (0, 1):
        prefix = write_prefix(tmp_path / "p", random_documents(seed, 100))
        fresh = open_samples([prefix], sequence_length=16, seed=1, cache=str(tmp_path / f"cache{seed}"))[2]
        build_index([prefix], sequence_length=16, seed=1, samples=10)
        assert same(open_samples([prefix], sequence_length=16, seed=1)[2], fresh)
        for suffix in (".bin", ".idx", ".json"):
            Path(prefix + suffix).unlink()


def test_damaged_index_files(tmp_path, always_files):
    prefix = write_prefix(tmp_path / "p", random_documents(0, 100))
    build_index([prefix], sequence_length=16, seed=1, samples=10)
    [damaged] = (tmp_path / "p.cache").rglob("*shuffle_index.npy")
    for content in (damaged.read_bytes()[:-8], b"", b"garbage"):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"index cache .*length16-seed1 is damaged .*: remove it"):
            open_samples([prefix], sequence_length=16, seed=1)[0]


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def plant(path, kind, target):
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Planted(target)))
    elif kind == "objects":
        np.save(path, np.array([Planted(target)], dtype=object), allow_pickle=True)
    elif kind == "archive":
        np.savez(path.with_suffix(""), a=np.array([Planted(target)], dtype=object))
        path.with_suffix(".npz").rename(path)
    elif kind == "FIFO":
        path.unlink()
        os.mkfifo(path)
    else:
        array = np.load(path)
        if kind == "dtype":
            array = array.astype(np.float64)
        elif kind == "length":
            array = array[:-1]
        elif kind == "range":
            array[0] = 10_000
        np.save(path, array)


@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index"])
@pytest.mark.parametrize("kind", ["pickle", "objects", "archive", "FIFO", "dtype", "length", "range"])
def test_planted_index_files_are_replaced_unread(tmp_path, always_files, caplog, kind, name):
    prefix = write_prefix(tmp_path / "p", random_documents(0, 100))
    build_index([prefix], sequence_length=16, seed=1, samples=10)
    wanted = open_samples([prefix], sequence_length=16, seed=1)[3]
    [path] = (tmp_path / "p.cache").rglob(f"{name}.npy")
    plant(path, kind, tmp_path / "planted")
    if kind != "range":  # of which rank 0 alone reads all numbers
        with pytest.raises(ValueError, match=rf"index cache .* is damaged \({name}.npy: "):
            open_samples([prefix], sequence_length=16, seed=1)[3]
    build_index([prefix], sequence_length=16, seed=1, samples=10)
    assert f"is damaged ({name}.npy: " in caplog.text
    assert same(open_samples([prefix], sequence_length=16, seed=1)[3], wanted)
    assert not (tmp_path / "planted").exists()
    assert len(index_folders(tmp_path)) == 1


def test_a_damaged_index_that_cannot_be_replaced_is_refused(tmp_path, always_files, monkeypatch):
    prefix = write_prefix(tmp_path / "p", random_documents(0, 100))
    build_index([prefix], sequence_length=16, seed=1, samples=10)
    [path] = (tmp_path / "p.cache").rglob("shuffle_index.npy")
    plant(path, "range", tmp_path / "planted")

    def refuse(*paths):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ValueError, match=r"is damaged .* cannot be replaced .*Permission denied.*data\.cache"):
        build_index([prefix], sequence_length=16, seed=1, samples=10)


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_others_may_read_the_index_and_not_write_it(tmp_path, always_files, umask):
    prefix = write_prefix(tmp_path / "p", random_documents(0, 100))
    before = os.umask(umask)
    try:
        build_index([prefix], sequence_length=16, seed=1, samples=10)
    finally:
        os.umask(before)
    paths = [tmp_path / "p.cache", *(tmp_path / "p.cache").rglob("*")]
    assert [oct(path.stat().st_mode & 0o777) for path in paths] == ["0o755"] * 2 + ["0o644"] * 3


def test_a_cache_that_cannot_be_written(tmp_path, always_files, caplog):
    prefix = write_prefix(tmp_path / "p", random_documents(0, 100))
    (tmp_path / "p.cache").write_text("in the way")
    build_index([prefix], sequence_length=16, seed=1, samples=10)
    assert "cannot be written" in caplog.text
    with pytest.raises(ValueError, match=r"index cache '.*p\.cache': cannot be written"):
        build_index([prefix], sequence_length=16, seed=1, samples=10, cache=str(tmp_path / "p.cache"))
    assert (tmp_path / "p.cache").read_text() == "in the way"


def test_without_collectives(tmp_path, always_files, monkeypatch):
    """With torch.distributed initialized, rank 0 builds and any rank reads without waiting for others."""
    prefixes = [write_prefix(tmp_path / name, random_documents(i, 60)) for i, name in enumerate("pq")]
    wanted = open_samples(prefixes, sequence_length=16, seed=1, cache=str(tmp_path / "none"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for name in ("barrier", "broadcast", "all_reduce", "all_gather", "broadcast_object_list", "monitored_barrier"):
            monkeypatch.setattr(torch.distributed, name, lambda *args, **kwargs: pytest.fail("a collective"))
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 3)
        with pytest.raises(AssertionError, match="rank 0 builds the index"):
            build_index(prefixes, sequence_length=16, seed=1, samples=50)
        early = open_samples(prefixes, sequence_length=16, seed=1)
        assert all(same(early[n], wanted[n]) for n in (0, 49))  # another rank, without files
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 0)
        build_index(prefixes, sequence_length=16, seed=1, samples=50)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 3)
        late = open_samples(prefixes, sequence_length=16, seed=1)
        assert all(same(late[n], wanted[n]) for n in range(50))  # another rank, with files
    finally:
        torch.distributed.destroy_process_group()


def blend_of_three(tmp_path):
    """Prefixes with disjoint tokens: 0-29, 30-59, 60-89."""
    rng = np.random.default_rng(0)
    return [
        write_prefix(tmp_path / f"p{i}", [rng.integers(30 * i, 30 * i + 30, 20).tolist() for _ in range(10 * (i + 1))])
        for i in range(3)
    ]


def origins(samples, numbers):
    return [int(samples[n]["tokens"].masked_fill(samples[n]["tokens"] == EOD, -1).max()) // 30 for n in numbers]


def test_blend_proportions(tmp_path):
    prefixes = blend_of_three(tmp_path)
    weights = [5, 3, 2]
    samples = open_samples([f"{w} {p}" for w, p in zip(weights, prefixes, strict=True)], sequence_length=16, seed=1)
    drawn = np.array(origins(samples, range(300)))
    for i, weight in enumerate(weights):
        counts = np.cumsum(drawn == i)
        # Greedy blending of three prefixes stays within one sample of the wanted share after any number of samples.
        assert np.abs(counts - weight / 10 * np.arange(1, 301)).max() <= 1
    by_tokens = open_samples(prefixes, sequence_length=16, seed=1)
    assert np.bincount(origins(by_tokens, range(300))).tolist() == [50, 100, 150]  # 10, 20 and 30 like documents
    assert by_tokens.samples_per_epoch == sum((210 * i - 1) // 16 for i in (1, 2, 3))


def test_each_part_of_a_blend_keeps_its_order(tmp_path):
    prefixes = blend_of_three(tmp_path)
    blend = open_samples(prefixes, sequence_length=16, seed=4)
    alone = [open_samples([prefix], sequence_length=16, seed=4) for prefix in prefixes]
    next_of = [0, 0, 0]
    for n, origin in enumerate(origins(blend, range(200))):
        assert same(blend[n], alone[origin][next_of[origin]])
        next_of[origin] += 1


def test_a_blend_repeats_after_its_period(tmp_path, monkeypatch):
    prefixes = blend_of_three(tmp_path)
    entries = [f"{w} {p}" for w, p in zip((0.5, 0.31, 0.19), prefixes, strict=True)]
    long = open_samples(entries, sequence_length=16, seed=1)
    assert len(long._source) == BLEND_PERIOD
    monkeypatch.setattr(dataset_module, "BLEND_PERIOD", 50)
    short = open_samples(entries, sequence_length=16, seed=1)
    assert all(same(short[n], long[n]) for n in range(50))
    alone = [open_samples([prefix], sequence_length=16, seed=1) for prefix in prefixes]
    next_of = [0, 0, 0]
    for n, origin in enumerate(origins(short, range(220))):
        assert same(short[n], alone[origin][next_of[origin]])
        next_of[origin] += 1
        assert short._samples_per_part(n + 1) == next_of
    unequal = open_samples([f"1e9 {prefixes[0]}", f"1 {prefixes[1]}"], sequence_length=16, seed=1)
    assert unequal._samples_per_part(100) == [98, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 1}, "sequence_length 1: expected at least 2"),
        ({"seed": -1}, "seed -1: expected 0 to"),
        ({"seed": 2**32 - 1}, "seed 4294967295: expected"),
        ({"sequence_length": 4}, r"p holds 4 tokens: a sample of sequence_length 4 needs 5"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    prefix = write_prefix(tmp_path / "p", [[1, 2, 3]])
    with pytest.raises(ValueError, match=message):
        open_samples([prefix], **{"sequence_length": 3, "seed": 1, **arguments})


def test_the_last_seed(tmp_path):
    samples = open_samples([write_prefix(tmp_path / "p", [[1, 2, 3]])], sequence_length=3, seed=2**32 - 2)
    samples[1]
    with pytest.raises(ValueError, match=r"seed 4294967294 and epoch 2 of .*p add up past 4294967295"):
        samples[2]


def patch(path, offset, content):
    data = bytearray(Path(path).read_bytes())
    data[offset : offset + len(content)] = content
    Path(path).write_bytes(data)


@pytest.mark.parametrize(
    ("vocabulary", "wrong"), [(100, 100), (100, 65535), (70_000, -1), (70_000, -5), (70_000, 70_000)]
)
@pytest.mark.parametrize("place", [0, 5, 16])
def test_ids_outside_the_vocabulary_are_found_when_samples_are_read(tmp_path, vocabulary, wrong, place):
    prefix = write_prefix(tmp_path / "p", [[1] * 19], vocabulary=vocabulary)  # one sample of 16, and its last label
    patch(
        prefix + ".bin",
        place * (2 if vocabulary == 100 else 4),
        struct.pack("<H" if vocabulary == 100 else "<i", wrong),
    )
    samples = open_samples([prefix], sequence_length=16, seed=1)
    message = rf"p\.bin is damaged: sample 3: token id {wrong} is outside the tokenizer's vocabulary of {vocabulary}"
    with pytest.raises(ValueError, match=message):
        samples[3]
