"""Building data sets: input formats, determinism, atomicity, hold-out, refusals, the command line."""

import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from griffin.tools.cli import main
from griffin.tools.commands import data as tool
from griffin.trainer.data import build as build_module
from griffin.trainer.data import documents as documents_module
from griffin.trainer.data.build import build
from griffin.trainer.data.documents import EncodeOptions, Lines, Source, is_held_out
from griffin.trainer.data.prefix import PrefixWriter, read_info

EOD = 256
TEXTS = ["first document", "zweites Dokument: äöü", "x", "四番目\r\n\n", "the last one " * 50]


def read_back(prefix):
    """Documents of a bytes prefix as text; checks the end-of-document tokens."""
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    texts = []
    for number in range(len(dataset)):
        ids = dataset[number].tolist()
        assert ids[-1] == EOD
        assert EOD not in ids[:-1]
        texts.append(bytes(ids[:-1]).decode())
    return texts


def json_lines(texts, key="text"):
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def out(tmp_path):
    return str(tmp_path / "out" / "data")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines(tmp_path, name):
    raw = json_lines(TEXTS, key="body").replace(b"\n", b"\r\n\n")  # other line ends and blank lines do not matter
    half = len(raw) // 2
    packed = {
        ".jsonl": lambda: raw,
        ".gz": lambda: gzip.compress(raw[:half]) + gzip.compress(raw[half:]),
        ".zst": lambda: b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:])),
    }[Path(name).suffix]()
    [info] = build(out(tmp_path), [write(tmp_path / name, packed)], tokenizer="bytes", text_key="body")
    assert read_back(info.prefix) == TEXTS
    assert info == read_info(info.prefix)
    assert info.documents == len(TEXTS)
    assert info.tokens == sum(len(text.encode()) + 1 for text in TEXTS)
    assert info.dtype is np.uint16
    assert info.sha256 == hashlib.sha256(Path(info.prefix + ".bin").read_bytes()).hexdigest()
    assert files_of(tmp_path / "out") == ["data.bin", "data.idx", "data.json"]


def test_text_files_and_folders(tmp_path):
    corpus = tmp_path / "corpus"
    write(corpus / "b.txt", TEXTS[0])
    write(corpus / "a" / "z.py", TEXTS[1])
    write(corpus / "a" / "deep" / "y.md", TEXTS[2])
    write(corpus / "c.jsonl", json_lines(TEXTS[3:]))
    write(corpus / "a.bin", b"not of a default kind")
    write(corpus / ".hidden" / "h.txt", "hidden")
    write(corpus / "empty.txt", "")
    write(corpus / "latin1.txt", b"caf\xe9")
    (corpus / "broken.txt").symlink_to(corpus / "nowhere")
    named = write(tmp_path / "named.anything", "a named file of any kind")
    [info] = build(out(tmp_path), [named, str(corpus)], tokenizer="bytes")
    assert read_back(info.prefix) == ["a named file of any kind", TEXTS[2], TEXTS[1], TEXTS[0], *TEXTS[3:]]
    assert (info.empty, info.undecodable) == (1, 1)
    assert info.inputs == (named, str(corpus))


def test_glob_and_exclude(tmp_path):
    for name in ("a.txt", "a.log", "lib/b.log", "lib/skip/c.log", "lib/keep/skip.log", "skip/d.log", "e/f.log"):
        write(tmp_path / "in" / name, name)
    [info] = build(out(tmp_path), [str(tmp_path / "in")], tokenizer="bytes", globs=["*.log"], exclude=["skip", "e/f.*"])
    assert read_back(info.prefix) == ["a.log", "lib/b.log", "lib/keep/skip.log"]
    [info] = build(out(tmp_path) + "2", [str(tmp_path / "in")], tokenizer="bytes", globs=["lib/*.log"])
    assert read_back(info.prefix) == ["lib/b.log", "lib/keep/skip.log", "lib/skip/c.log"]


def byte_level_tokenizer(path, size):
    """A Hugging Face tokenizer of `size` entries, which decides the dtype of stored ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"unused-{i}" for i in range(size - len(alphabet) - 1)), "</s>"]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(path))
    return str(path)


@pytest.mark.parametrize(("size", "dtype"), [(300, np.uint16), (70_000, np.int32)])
def test_hugging_face_tokenizer_and_dtype(tmp_path, size, dtype):
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer.json", size)
    [info] = build(out(tmp_path), [write(tmp_path / "a.txt", "hello")], tokenizer=tokenizer)
    dataset = IndexedDataset(info.prefix)
    assert dataset.index.dtype is info.dtype is dtype is DType.optimal_dtype(size)
    ids = dataset[0].tolist()
    assert ids[-1] == size - 1 == info.eod
    assert info.load_tokenizer().decode(ids).replace(" ", "") == "hello"
    byte_level_tokenizer(tmp_path / "tokenizer.json", size + 1)
    with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer that .*data was built with"):
        read_info(info.prefix).load_tokenizer()


def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "TASK_BYTES", 300)
    corpus = tmp_path / "corpus"
    for i in range(30):
        write(corpus / f"{i:02}.txt", f"file {i} " * (7 * i % 23))
    write(corpus / "lines.jsonl", json_lines([f"line {i} " * (i % 11 + 1) for i in range(60)]))
    contents = []
    for workers in (1, 2, 3):
        prefix, held = f"{out(tmp_path)}{workers}", f"{out(tmp_path)}{workers}-held"
        build(
            prefix, [str(corpus)], tokenizer="bytes", workers=workers, hold_out=0.3, hold_out_prefix=held
        )  # fmt: skip
        contents.append([Path(p + s).read_bytes() for p in (prefix, held) for s in (".bin", ".idx", ".json")])
    assert contents[0] == contents[1] == contents[2]


def test_errors_reach_the_caller_from_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "TASK_BYTES", 10)
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS) + b"{\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 6: not a JSON object"):
        build(out(tmp_path), [path], tokenizer="bytes", workers=2)
    assert files_of(tmp_path / "out") == []


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_module, "encode", die)
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    words = ["data", "build", out(tmp_path), str(path), "--tokenizer", "bytes", "--workers", "2"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error == "griffin: error: a worker process was killed: out of memory? (try fewer --workers)\n"
    assert files_of(tmp_path / "out") == []


def test_few_tasks_are_pending_at_a_time(tmp_path):
    taken = 0

    def tasks():
        nonlocal taken
        for i in range(40):
            taken += 1
            yield Lines(Source(tmp_path, "k", named=True), i, (json_lines(["text"]),), 1)

    options = EncodeOptions(tokenizer="bytes", eod=None, text_key="text", hold_out=0.0)
    limit = 2 * build_module.TASKS_PER_WORKER
    for done, encoded in enumerate(build_module.encode_in_order(tasks(), options, workers=2)):
        assert encoded.lengths.tolist() == [5]
        assert taken - done <= limit
    assert taken == 40


def test_large_file_is_split_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "TASK_BYTES", 1000)
    path = Path(write(tmp_path / "a.jsonl.gz", gzip.compress(json_lines([f"document {i}" for i in range(500)]))))
    tasks = list(documents_module.cut_into_tasks([Source(path, path.name, named=True)]))
    assert len(tasks) > 10
    assert all(sum(map(len, task.lines)) < 1100 for task in tasks)
    assert [task.first for task in tasks] == np.cumsum([1] + [len(task.lines) for task in tasks])[:-1].tolist()
    assert sum(task.progress for task in tasks) == path.stat().st_size


def test_hold_out_is_a_stable_partition(tmp_path):
    corpus = tmp_path / "corpus"
    texts = {f"d{i % 7}/{i}.txt": f"document {i}" for i in range(400)}
    for name, text in texts.items():
        write(corpus / name, text)
    lines = [f"line {i}" for i in range(400)]
    write(corpus / "l.jsonl", json_lines(lines))
    prefixes = out(tmp_path), out(tmp_path) + "-held"
    kept, held = build(prefixes[0], [str(corpus)], tokenizer="bytes", hold_out=0.2, hold_out_prefix=prefixes[1])
    assert sorted(read_back(kept.prefix) + read_back(held.prefix)) == sorted([*texts.values(), *lines])
    wanted = [text for name, text in sorted(texts.items()) if is_held_out(name, 0.2)]
    wanted += [text for i, text in enumerate(lines, start=1) if is_held_out(f"l.jsonl:{i}", 0.2)]
    assert sorted(read_back(held.prefix)) == sorted(wanted)
    # 800 draws of probability 0.2: 160 on average, standard deviation 11.3; four of them either way
    assert 115 < held.documents < 205
    # The same files in another place, and more of them, fall on the same side.
    write(corpus / "more.txt", "more")
    corpus.rename(tmp_path / "moved")
    _, again = build(
        out(tmp_path) + "2", [str(tmp_path / "moved")], tokenizer="bytes", hold_out=0.2,
        hold_out_prefix=out(tmp_path) + "2-held",
    )  # fmt: skip
    assert set(read_back(held.prefix)) <= set(read_back(again.prefix)) <= {*read_back(held.prefix), "more"}


REFUSALS = {
    "missing input": (lambda d: {"inputs": [str(d / "none.txt")]}, r"input '.*none.txt': no such file or folder"),
    "empty folder": (lambda d: (d / "e").mkdir() or {"inputs": [str(d / "e")]}, r"no documents: no file in .* matches"),
    "only empty files": (lambda d: {"inputs": [write(d / "a.txt", "")]}, r"no documents \(0 read in all, 1 without"),
    "undecodable": (lambda d: {"inputs": [write(d / "a.txt", b"ok \xff")]}, r"a\.txt: not UTF-8 text .*position 3"),
    "bad JSON": (
        lambda d: {"inputs": [write(d / "a.jsonl", b'{"text": "ok"}\n\n{"text": \n')]},
        r"a\.jsonl, line 3: not a JSON object",
    ),
    "not UTF-8 JSON": (lambda d: {"inputs": [write(d / "a.jsonl", b'{"text": "\xff"}')]}, r"a\.jsonl, line 1: not a"),
    "not an object": (
        lambda d: {"inputs": [write(d / "a.jsonl", b'["text"]')]},
        r"line 1: not a JSON object, but list",
    ),
    "no key": (
        lambda d: {"inputs": [write(d / "a.jsonl", b'{"body": "x"}')]},
        r"line 1: no key 'text' among \['body'\]",
    ),
    "not a string": (lambda d: {"inputs": [write(d / "a.jsonl", b'{"text": 3}')]}, r"'text' is not a string, but int"),
    "lone surrogate": (
        lambda d: {"inputs": [write(d / "a.jsonl", b'{"text": "\\ud800"}')]},
        r"'text' cannot be written as UTF-8",
    ),
    "cut gzip": (
        lambda d: {"inputs": [write(d / "a.jsonl.gz", gzip.compress(os.urandom(5000))[:900])]},
        r"a\.jsonl\.gz: damaged or unreadable",
    ),
    "not gzip": (lambda d: {"inputs": [write(d / "a.jsonl.gz", b"plain")]}, r"a\.jsonl\.gz: damaged or unreadable"),
    "cut zstd": (
        lambda d: {
            "inputs": [write(d / "a.jsonl.zst", zstandard.ZstdCompressor().compress(json_lines(TEXTS * 99))[:-9])]
        },
        r"a\.jsonl\.zst: damaged or unreadable .*ends inside a zstd frame",
    ),
    "not zstd": (lambda d: {"inputs": [write(d / "a.jsonl.zst", b"plain")]}, r"a\.jsonl\.zst: damaged or unreadable"),
    "tokenizer": (lambda d: {"tokenizer": "words"}, r"tokenizer 'words': expected \"bytes\""),
    "workers": (lambda d: {"workers": 0}, "--workers 0: expected at least 1"),
    "fraction": (lambda d: {"hold_out": 1.5, "hold_out_prefix": str(d / "out" / "h")}, "--hold-out 1.5: expected"),
    "fraction alone": (lambda d: {"hold_out": 0.1}, "--hold-out FRACTION and --hold-out-prefix PREFIX go together"),
    "same prefix": (lambda d: {"hold_out": 0.1, "hold_out_prefix": out(d)}, "must differ from the prefix"),
    "nothing held out": (
        lambda d: {"hold_out": 1e-9, "hold_out_prefix": out(d) + "h"},
        r"datah: no documents \(1 read in all",
    ),
    "folder as prefix": (lambda d: {"prefix": str(d / "out") + "/"}, "expected a path that ends in a name"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_nothing(tmp_path, case):
    make, message = REFUSALS[case]
    arguments = {"prefix": out(tmp_path), "inputs": [write(tmp_path / "fine.txt", "fine")], "tokenizer": "bytes"}
    arguments |= make(tmp_path)
    with pytest.raises(ValueError, match=message):
        build(arguments.pop("prefix"), arguments.pop("inputs"), **arguments)
    assert not (tmp_path / "out").exists() or files_of(tmp_path / "out") == []


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("which", ["data", "held"])
def test_nothing_is_overwritten(tmp_path, suffix, which):
    taken = Path(write(tmp_path / "out" / (which + suffix), "mine"))
    with pytest.raises(ValueError, match=rf"{which}\{suffix} exists"):
        build(
            out(tmp_path), [write(tmp_path / "a.txt", "a")], tokenizer="bytes", hold_out=0.5,
            hold_out_prefix=str(tmp_path / "out" / "held"),
        )  # fmt: skip
    assert taken.read_text() == "mine"
    assert files_of(tmp_path / "out") == [which + suffix]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    add = PrefixWriter.add

    def appear(self, *ids):
        write(tmp_path / "out" / "data.idx", "mine")
        add(self, *ids)

    monkeypatch.setattr(PrefixWriter, "add", appear)
    with pytest.raises(ValueError, match=r"data\.idx exists"):
        build(out(tmp_path), [write(tmp_path / "a.txt", "a")], tokenizer="bytes")
    assert files_of(tmp_path / "out") == ["data.idx"]
    assert (tmp_path / "out" / "data.idx").read_text() == "mine"


def test_an_interrupted_build_cleans_up(tmp_path, monkeypatch):
    def interrupt(self, *ids):
        raise KeyboardInterrupt

    monkeypatch.setattr(PrefixWriter, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(out(tmp_path), [write(tmp_path / "a.txt", "a")], tokenizer="bytes")
    assert files_of(tmp_path / "out") == []


def killed_build(prefix, path, owner, name, calls):
    """Kill a build when `owner.name` is called for the `calls`-th time."""
    real, count = getattr(owner, name), 0

    def kill(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, kill)
    build(prefix, [path], tokenizer="bytes")


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [(PrefixWriter, "add", 3), (PrefixWriter, "finish", 1), (PrefixWriter, "publish", 1)]
    + [(os, "rename", calls) for calls in (1, 2, 3)],
)
def test_killed_build_leaves_no_data_set(tmp_path, owner, name, calls):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    arguments = (out(tmp_path), path, owner, name, calls)
    process = multiprocessing.get_context("fork").Process(target=killed_build, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="is missing"):
        read_info(out(tmp_path))
    for leftover in (tmp_path / "out").glob("data.*"):
        leftover.unlink()
    build(out(tmp_path), [path], tokenizer="bytes")
    assert read_back(out(tmp_path)) == TEXTS


@pytest.mark.parametrize(("ids", "wrong"), [([0, 257, EOD], 257), ([-1, 3, EOD], -1), ([65536 + 5, EOD], 65541)])
def test_ids_outside_the_vocabulary(tmp_path, ids, wrong):
    description = {"kind": "test", "vocabulary": 257, "eod": EOD, "sha256": None}
    writer = PrefixWriter(str(tmp_path / "p"), description, "test", None)
    writer.add(np.array([1, EOD]))
    with pytest.raises(ValueError, match=rf"p: document 1 .*token id {wrong} is outside the tokenizer's vocabulary"):
        writer.add(np.array(ids))
    writer.discard()
    assert files_of(tmp_path) == []


def command_line(*arguments):
    parser = argparse.ArgumentParser()
    tool.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *map(str, arguments)])
    args.run(args)


def test_command_line(tmp_path, capsys):
    for i in range(20):
        write(tmp_path / "in" / f"{i}.log", f"document number {i}")
    write(tmp_path / "in" / "x" / "0.log", "excluded")
    prefix, held = tmp_path / "out" / "train", tmp_path / "out" / "eval"
    command = (
        "build", prefix, tmp_path / "in", "--tokenizer", "bytes", "--workers", 1, "--glob", "*.log", "--exclude", "x",
        "--hold-out", 0.3, "--hold-out-prefix", held,
    )  # fmt: skip
    command_line(*command)
    lines = capsys.readouterr().out.splitlines()
    infos = [read_info(str(p)) for p in (prefix, held)]
    assert lines == [f"{info.prefix}: {info.documents} documents, {info.tokens} tokens" for info in infos]
    assert sum(info.documents for info in infos) == 20
    command_line("inspect", held)
    printed = capsys.readouterr().out
    assert f"documents  {infos[1].documents}\n" in printed
    assert repr(read_back(held)[0])[:-1] in printed
    with pytest.raises(ValueError, match=r"train\.bin exists"):
        command_line(*command)
    with pytest.raises(ValueError, match=r"none\.bin is missing"):
        command_line("inspect", tmp_path / "none")


def test_registering_the_command_imports_nothing_heavy():
    script = "import sys, griffin.tools.commands.data; print({'torch', 'numpy', 'megatron', 'tqdm'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b'[{"text": "a"}]', "a JSON array is a data set"),
        ("data.JSON", b"\xef\xbb\xbf\n [1]", "a JSON array is a data set"),
        ("data.json", b" " * 70_000 + b"[1]", "a JSON array is a data set"),
        ("data.parquet", b"PAR1", "Parquet is not supported"),
        ("data.arrow", b"ARROW1", "Arrow is not supported"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_formats_that_are_no_documents_are_refused(tmp_path, name, content, message, named):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    inputs = [str(tmp_path / "in" / name) if named else str(tmp_path / "in")]
    with pytest.raises(ValueError, match=message):
        build(str(tmp_path / "p"), inputs, tokenizer="bytes", globs=["*.json", "*.JSON", "*.txt"])


def test_a_json_object_is_a_document(tmp_path):
    (tmp_path / "one.json").write_text('{"a": [1]}')
    assert build(str(tmp_path / "p"), [str(tmp_path / "one.json")], tokenizer="bytes")[0].documents == 1
