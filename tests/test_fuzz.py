"""Bad input to every reader, seeded: none gives a traceback or hangs, and nothing is written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from griffin.tools.checkpoints import rank_files
from griffin.tools.checkpoints.auxiliary_files import find_files, read_object, require_inside
from griffin.tools.commands.logits import read_tokens
from griffin.tools.common.safetensors_files import lay_out, read_entries
from griffin.tools.inference.prompts import read_prompts
from griffin.tools.runs.curves import read_curves
from griffin.tools.runs.monitor_view import render_run, render_runs
from griffin.tools.runs.state import RunReader
from griffin.tools.weights.hf.config import model_of_config
from griffin.trainer.checkpoint import manifest as manifests
from griffin.trainer.checkpoint.manifest import read_manifest
from griffin.trainer.data.prefix import parse_blend, read_description
from griffin.trainer.data.tokenizer import load_tokenizer
from griffin.trainer.reporting.goodput import Goodput
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.lock import Owner, refuse_if_held
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.validate import validate
from tests.small_steps import ARRAYS, save_step

SECONDS = 20  # that one case may take on a busy machine
QUICK, WHOLE = 40, 300  # cases of each reader
ODD: list[Any] = [
    *(None, True, -1, 0, 1.5, 2**31, 2**63, 10**400, float("nan"), float("inf"), "", "x", "\ud800", "a\x00b", [], {}),
    *("..", "/etc/passwd", "model.x/../../planted", "model...", "model./tmp/planted", "\x1b[2J", "x" * 5000),
    *([0], [-1], [2**40, 2**40], ["x"], [[[]]], {"a": {}}, [1] * 100),
]


class HangError(BaseException):
    """No reader takes it for an error of its file."""


@contextmanager
def in_time() -> Iterator[None]:
    def ended(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def changed_value(value: Any, draw: random.Random) -> Any:
    """JSON with one odd thing in it, anywhere."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key, choice = draw.choice(list(value)), draw.random()
        if choice < 0.1:
            return {other: item for other, item in value.items() if other != key}
        if choice < 0.25:
            odd = str(draw.choice(ODD))
            return {odd if other == key else other: item for other, item in value.items()}
        return value | {key: changed_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.5:
        place = draw.randrange(len(value))
        return [*value[:place], changed_value(value[place], draw), *value[place + 1 :]]
    return draw.choice(ODD)


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    choice = draw.randrange(5)
    if choice == 0:
        return bytes(data[: draw.randrange(len(data) + 1)])
    if choice == 1:
        return draw.randbytes(draw.randrange(200))
    if choice == 2:
        return draw.choice([b"[", b'{"a":', b"a = [", b"\xff\xfe", b"\x00"]) * draw.choice([1, 10, 100_000])
    for _ in range(draw.randint(1, 8)):
        if data:
            data[draw.randrange(len(data))] = draw.randrange(256)
    if choice == 3:
        place = draw.randrange(len(data) + 1)
        data[place:place] = draw.randbytes(draw.randint(1, 30))
    return bytes(data)


def special(path: Path, draw: random.Random) -> None:
    """What is no regular file."""
    choice = draw.randrange(4)
    if choice == 0:
        os.mkfifo(path)
    elif choice == 1:
        path.symlink_to("/dev/zero")
    elif choice == 2:
        path.mkdir()
    else:
        path.symlink_to(path.with_name("nowhere"))


def with_checksum(values: Any) -> bytes:
    """As its maker would have signed it, so that what it says is looked at."""
    return signed(values, lambda kept: hashlib.sha256(json.dumps(kept, separators=(",", ":")).encode()).hexdigest())


def sorted_checksum(values: Any) -> bytes:
    return signed(values, rank_files.index_checksum)


def signed(values: Any, checksum: Callable[[Any], str]) -> bytes:
    if not isinstance(values, dict):
        return plain(values)
    kept = {key: value for key, value in values.items() if key != "checksum"}
    return plain({"checksum": checksum(kept)} | kept)


def plain(values: Any) -> bytes:
    return json.dumps(values).encode()


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
}
CONFIG = b"""[model]
pattern = ["recurrent", "attention"]
width = 8
recurrent_width = 8
heads = 2
head_dim = 4
gate_blocks = 2
vocabulary = 257
[data]
train = ["0.5 a", "0.5 b"]
workers = 0
[train]
steps = 10
global_batch = 4
spike_window = 8
[health]
hang_seconds = 60.0
"""
DESCRIPTION = {
    "format": "griffin-data-1",
    "tokenizer": {"kind": "bytes", "vocabulary": 257, "eod": 256, "sha256": None},
    "tokenizer_spec": "bytes",
    "eod_token": None,
    "documents": 2,
    "tokens": 9,
    "sha256": "0" * 64,
    "inputs": ["a.txt"],
    "text_bytes": 7,
}
GEMMA = {
    "model_type": "recurrent_gemma",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "head_dim": 4,
}


LOCK = {
    "token": "0" * 32,
    "user": "someone",
    "host": "n0",
    "machine": Owner.current().machine,  # this one: the process is looked at
    "pid": 2**22 + 1,
    "process_started": 1,
    "job": "cluster/1",
    "job_restarts": 0,
    "started": "2024-01-01T00:00:00+0000",
    "command": "griffin train",
}
METRICS = {"step": 3, "time": 1.0, "attempt": 1, "loss": 1.0, "step_seconds": 0.5, "trained_seconds": 2.0}
LEDGER = {"step": 3, "time": 1.0, "kind": "loss", "action": "skip", "samples": [0, 4]}
ATTEMPT = {"attempt": 1, "ended": 2.0, "why": "failed", "exit_code": 1, "step": 3, "error": "ValueError: no"}
STRAGGLERS = {"hosts": [{"host": "n0", "ratio": 1.5}], "ranks": [{"rank": 0, "ratio": 1.5}]}
RUN_FOLDER: dict[str, Any] = {
    "lock": LOCK,
    "metrics.jsonl": METRICS,
    "ledger.jsonl": LEDGER,
    "attempts.jsonl": ATTEMPT,
    "stragglers.json": STRAGGLERS,
    "environment.json": {"started": "2024-01-01T00:00:00+0000"},
    "config.toml": None,
    "console.log": None,
}


class Reader:
    """A reader, a file that it takes, and how that is written again after a change to the values in it."""

    def __init__(self, read: Callable[[Path], object], name: str, content: bytes, values: Any = None, write=plain):
        self.read, self.name, self.content, self.values, self.write = read, name, content, values, write


def readers(folder: Path) -> dict[str, Reader]:
    step = save_step(folder / "checkpoints", 3, arrays=ARRAYS, extras={"ramp": [1]})
    text = (step / manifests.MANIFEST).read_bytes()
    index = json.loads(text) | {"stages": [1, 1], "layout": {"tensor": 1, "pipeline": 1, "virtual_pipeline": 2}}
    header, entries = lay_out([("a.weight", "float32", (2, 3)), ("b.weight", "bfloat16", (4,))])
    np.save(folder / "tokens.npy", np.arange(12).reshape(3, 4))

    def read_config(path: Path) -> None:
        validate(load_config(path), 1)

    def read_model(path: Path) -> None:
        read_manifest(path.parent).model  # noqa: B018

    return {
        "manifest": Reader(read_model, "manifest.json", text, json.loads(text), with_checksum),
        "rank index": Reader(
            lambda path: rank_files.open_rank_folder(path.parent), "index.json", plain(index), index, sorted_checksum
        ),
        "safetensors": Reader(read_entries, "x.safetensors", header + bytes(sum(entry.nbytes for entry in entries))),
        "safetensors header": Reader(
            read_entries,
            "x.safetensors",
            header,
            json.loads(header[8:]),
            lambda values: len(plain(values)).to_bytes(8, "little") + plain(values) + bytes(32),
        ),
        "npy": Reader(lambda path: read_tokens(path, 257), "x.npy", (folder / "tokens.npy").read_bytes()),
        "tokenizer": Reader(lambda path: load_tokenizer(str(path)), "x.json", plain(TOKENIZER), TOKENIZER),
        "sentencepiece": Reader(
            lambda path: load_tokenizer(str(path)), "x.model", b"\x0a\x08\x0a\x01a\x15\x00\x00\x80"
        ),
        "prompts": Reader(read_prompts, "x.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\n', {"prompt": "a"}),
        "config": Reader(read_config, "x.toml", CONFIG),
        "prefix": Reader(lambda path: read_description(str(path)[:-5]), "x.json", plain(DESCRIPTION), DESCRIPTION),
        "config.json": Reader(lambda path: model_of_config(read_object(path)), "config.json", plain(GEMMA), GEMMA),
    }


def overrides(draw: random.Random) -> list[str]:
    names = ("data.workers", "train.steps", "model.mlp_expansion", "health.hang_seconds", "optimizer.clip", "model.x")
    odd = "".join(draw.choice(string.printable) for _ in range(draw.randrange(20)))
    return [f"--{draw.choice(names)}={draw.choice([*map(str, ODD), odd, '[' * 100_000, '1e999', '2147483648'])}"]


def read_overridden(config: Path, words: list[str]) -> None:
    validate(load_config(config, words), 1)


def run_cases(folder: Path, count: int) -> int:
    """So many cases of each reader; how many were run."""
    done = 0
    valid = folder / "valid.toml"
    made = readers(folder)
    outside = folder / "outside"
    outside.mkdir()
    for name, reader in made.items():
        accepted = folder / name / reader.name
        accepted.parent.mkdir()
        for case in range(count):
            draw = random.Random(f"{name} {case}")
            path = outside / str(done) / reader.name
            path.parent.mkdir()
            choice, content = draw.random(), b""
            if choice < 0.06:
                special(path, draw)
            else:
                if reader.values is not None and choice < 0.7:
                    content = reader.write(changed_value(reader.values, draw))
                else:
                    content = changed_bytes(reader.content, draw)
                path.write_bytes(content)
            before = sorted(str(found) for found in folder.rglob("*"))
            expect_refusal(partial(reader.read, path), f"{name}, case {case}")
            assert sorted(str(found) for found in folder.rglob("*")) == before, f"{name}, case {case}: wrote files"
            if content:
                assert path.read_bytes() == content, f"{name}, case {case}: changed its input"
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
            path.parent.rmdir()
            done += 1
    valid.write_bytes(CONFIG)
    for case in range(count):
        words = overrides(random.Random(case))
        expect_refusal(partial(read_overridden, valid, words), f"overrides, case {case}")
        expect_refusal(partial(parse_blend, [words[0][2:], "0.5 a"]), f"blend, case {case}")
        done += 2
    return done


def expect_refusal(read: Callable[[], object], case: str) -> None:
    """Read, in time; what it raises is an error that a user gets one line of."""
    with in_time():
        try:
            read()
        except HangError:
            raise AssertionError(f"{case}: hangs") from None
        except (ValueError, OSError):
            pass
        except BaseException as error:
            raise AssertionError(f"{case}: {error!r}") from error


def read_run(path: Path) -> None:
    """All that a monitor, a newcomer to the folder and the next attempt read."""
    state = RunReader(path).read()
    Console(file=io.StringIO(), width=120).print(render_run(state), render_runs([state]))
    with suppress(ValueError, OSError):  # one line for who asked for a plot
        curves = read_curves(path, ["loss"])
        for figure in curves.figures:
            curves.over(figure, "seconds")
    with suppress(ValueError):  # held by a process that runs
        refuse_if_held(path)
    Goodput(RunFolder(path, 2), 3).values()


def test_bad_files_of_a_run_folder(tmp_path):
    """Whatever the other files are, what can be read is shown: nothing is raised."""
    for name, values in RUN_FOLDER.items():
        good = CONFIG if values is None else plain(values) + b"\n"
        for case in range(QUICK):
            draw = random.Random(f"{name} {case}")
            folder = tmp_path / f"{name}-{case}"
            folder.mkdir()
            for other, kept in RUN_FOLDER.items():
                (folder / other).write_bytes(CONFIG if kept is None else plain(kept) + b"\n")
            path, choice = folder / name, draw.random()
            if choice < 0.1:
                path.unlink()
                special(path, draw)
            elif values is not None and choice < 0.7:
                path.write_bytes(plain(changed_value(values, draw)) + b"\n")
            else:
                path.write_bytes(changed_bytes(good, draw))
            with in_time():
                try:
                    read_run(folder)
                except BaseException as error:
                    raise AssertionError(f"{name}, case {case}: {error!r}") from error


def test_bad_input_to_every_reader(tmp_path):
    assert run_cases(tmp_path, QUICK) == QUICK * 13


@pytest.mark.slow
def test_thousands_of_bad_inputs_to_every_reader(tmp_path):
    assert run_cases(tmp_path, WHOLE) >= 3000


@pytest.mark.parametrize("name", ["model.x/../../planted", "model./planted", "model...", "model.a/b", "../x", "model."])
def test_an_array_is_named_for_a_place_in_its_folder(tmp_path, name):
    step = save_step(tmp_path / "checkpoints", 3, arrays=ARRAYS)
    path = step / manifests.MANIFEST
    values = json.loads(path.read_bytes())
    first = next(iter(values["arrays"]))
    values["arrays"] = {name if key == first else key: value for key, value in values["arrays"].items()}
    values["files"] = {key.replace(first, name): value for key, value in values["files"].items()}
    path.write_bytes(with_checksum(values))
    with pytest.raises(ValueError, match="is no array's name"):
        read_manifest(step)


def test_a_link_is_not_followed_out_of_a_folder(tmp_path):
    secret, folder = tmp_path / "secret", tmp_path / "stranger"
    secret.write_text("{}")
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ValueError, match="leads out of"):
        find_files(folder)


def test_links_of_a_cache_are_followed(tmp_path):
    """To `blobs` beside `snapshots`, as Hugging Face lays its cache out."""
    snapshot, blob = tmp_path / "snapshots" / "1", tmp_path / "blobs" / "a"
    for place in (snapshot, blob.parent):
        place.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/a")
    assert find_files(snapshot) == {"config.json": snapshot / "config.json"}


@pytest.mark.parametrize(
    "setting",
    [
        "data.workers=257",
        "train.steps=1000000000000",
        "train.spike_window=1000000",
        "model.mlp_expansion=2147483648",
        "health.hang_seconds=1e-9",
    ],
)
def test_settings_are_bounded(tmp_path, setting):
    config = tmp_path / "valid.toml"
    config.write_bytes(CONFIG)
    validate(load_config(config), 1)
    with pytest.raises(ValueError, match=setting.partition("=")[0]):
        read_overridden(config, [f"--{setting}"])


def test_links_out_of_a_folder_named_snapshots_are_refused(tmp_path):
    secret, folder = tmp_path / "secret", tmp_path / "snapshots" / "weights"
    folder.mkdir(parents=True)
    secret.write_text("{}")
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(ValueError, match="leads out of"):
        require_inside(folder, "config.json")
