"""Evaluations during training: when they are due, their figures, and several held-out sets."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from griffin.tools.cli import main
from griffin.tools.runs.state import RunReader
from griffin.trainer.data.build import build
from griffin.trainer.data.dataset import open_samples
from griffin.trainer.data.prefix import read_info
from griffin.trainer.evaluation import Evaluation, loss_figures
from griffin.trainer.reporting.console import figure_text
from griffin.trainer.reporting.metrics import NOTHING_PREDICTED, is_predicted
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.settings.complete import load_config
from tests.data_sets import write_prefix
from tests.ranks import RankPool
from tests.small_runs import metrics, run, write_config


@pytest.mark.parametrize(("every", "due"), [(5, [0, 5, 10, 12]), (4, [0, 4, 8, 12]), (0, [])])
def test_is_due(every: int, due: list[int]) -> None:
    evaluation = Evaluation(name="", every=every, run=lambda training: {})
    assert [step for step in range(13) if evaluation.is_due(step, 12)] == due


def test_figures_of_a_set() -> None:
    assert loss_figures("", 2.0, 7, 4.0) == {"eval_loss": 2.0, "eval_loss_tokens": 7}
    assert loss_figures("books", 2.0, 7, 4.0) == {
        "eval_loss/books": 2.0,
        "eval_loss_tokens/books": 7,
        "eval_perplexity/books": pytest.approx(math.exp(2)),
        "eval_bits_per_byte/books": pytest.approx(2 / math.log(2) / 4),
    }
    assert "eval_bits_per_byte/books" not in loss_figures("books", 2.0, 7, None)
    assert loss_figures("books", 1e4, 7, None)["eval_perplexity/books"] == math.inf
    assert math.isnan(loss_figures("books", math.nan, 7, None)["eval_perplexity/books"])


def test_a_set_without_predicted_tokens_has_no_figures() -> None:
    figures = loss_figures("books", 0.0, 0, 4.0) | loss_figures("code", 1.0, 5, 4.0)
    for figure in ("eval_loss", "eval_perplexity", "eval_bits_per_byte"):
        assert not is_predicted(f"{figure}/books", figures)
        assert is_predicted(f"{figure}/code", figures)
    assert figure_text("eval_loss/books", figures) == f"eval_loss/books: {NOTHING_PREDICTED}"
    assert figure_text("eval_loss/code", figures) == "eval_loss/code 1.0000"
    assert figure_text("accuracy/anything", {"accuracy/anything": 0.25}) == "accuracy/anything 0.25"


def test_bytes_of_text_are_counted_when_data_are_built(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("grün " * 20)
    (tmp_path / "b.txt").write_text("blue")
    [info] = build(str(tmp_path / "data"), [str(tmp_path)], tokenizer="bytes", workers=1)
    assert info.text_bytes == 6 * 20 + 4
    assert read_info(info.prefix) == info
    assert info.bytes_per_token == 1.0, "tokens are bytes"
    samples = open_samples([info.prefix], sequence_length=8, seed=0)
    assert samples.bytes_per_token == 1.0
    older = write_prefix(tmp_path / "older", [[1, 2, 3] * 9])
    assert read_info(older).bytes_per_token is None
    text = Path(f"{info.prefix}.json").read_text()
    Path(f"{info.prefix}.json").write_text(text.replace('"text_bytes": 124', '"text_bytes": -1'))
    with pytest.raises(ValueError, match=r"data\.json is damaged: .*text_bytes"):
        read_info(info.prefix)


def test_bytes_of_a_blend(tmp_path: Path) -> None:
    for name, text in (("a", "ab" * 50), ("b", "c" * 40)):
        (tmp_path / f"{name}.txt").write_text(text)
        build(str(tmp_path / name), [str(tmp_path / f"{name}.txt")], tokenizer="bytes")
    path = tmp_path / "b.json"  # as if a token were of four bytes
    path.write_text(path.read_text().replace('"text_bytes": 40', '"text_bytes": 160'))
    entries = [f"3 {tmp_path}/a", f"1 {tmp_path}/b"]
    assert open_samples(entries, sequence_length=8, seed=0).bytes_per_token == pytest.approx(0.75 * 1 + 0.25 * 4)
    path.write_text(re.sub(r'"text_bytes": \d+', '"text_bytes": null', path.read_text()))
    assert open_samples(entries, sequence_length=8, seed=0).bytes_per_token is None


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_config(tmp_path_factory.mktemp("sets"))
    (path.parent / "text.txt").write_text("recurrence " * 100)
    build(str(path.parent / "text"), [str(path.parent / "text.txt")], tokenizer="bytes")
    # All data of a run have one tokenizer: call that of the test's data the bytes that it is.
    description = read_info(str(path.parent / "text")).tokenizer
    for name in ("train", "eval"):
        set_tokenizer(path.parent / f"{name}.json", description)
    return path


def set_tokenizer(path: Path, tokenizer: dict[str, Any]) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"tokenizer": tokenizer, "tokenizer_spec": "bytes"}))


@pytest.fixture(scope="module")
def run_dir(rank_pool: RankPool, config_path: Path) -> Path:
    folder = config_path.parent
    sets = [f"--data.eval={{words = '{folder}/eval', text = '{folder}/text'}}"]
    rank_pool.run(run, 2, load_config(config_path, [*sets, "--parallel.pipeline=2"]), folder / "named")
    return folder / "named"


def test_several_sets_are_evaluated_one_by_one(
    rank_pool: RankPool, config_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = config_path.parent / "plain"
    rank_pool.run(run, 2, load_config(config_path, ["--parallel.pipeline=2"]), plain)
    of_words, of_text, alone = (
        {line["step"]: line for line in metrics(path) if key in line}
        for path, key in ((run_dir, "eval_loss/words"), (run_dir, "eval_loss/text"), (plain, "eval_loss"))
    )
    assert list(of_words) == list(of_text) == list(alone) == [0, 5, 10, 12]
    for step, line in of_words.items():
        assert line["eval_loss/words"] == alone[step]["eval_loss"], "bit by bit: other sets change nothing"
        assert line["eval_perplexity/words"] == pytest.approx(math.exp(line["eval_loss/words"]))
        assert "eval_bits_per_byte/words" not in line, "its bytes are not known"
        text = of_text[step]
        assert text["eval_bits_per_byte/text"] == pytest.approx(text["eval_loss/text"] / math.log(2))
    assert [line["loss"] for line in metrics(run_dir) if "loss" in line] == [
        line["loss"] for line in metrics(plain) if "loss" in line
    ]
    console = (run_dir / "console.log").read_text()
    last = of_text[12]
    assert f"step 12: eval_loss/text {last['eval_loss/text']:.4f}  eval_perplexity/text " in console
    assert re.search(r"^held-out words loss: \d\.\d{3} -> \d\.\d{3} nats per token$", console, re.MULTILINE)
    assert RunReader(run_dir).read().evaluation == 12
    assert main(["monitor", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"held-out text +{last['eval_loss/text']:.4f} at step 12", shown)
    assert (
        f"perplexity {last['eval_perplexity/text']:.3f}, {last['eval_bits_per_byte/text']:.4f} bits per byte" in shown
    )
    assert "held-out loss" not in shown
    assert main(["monitor", str(run_dir), str(plain)]) == 0
    assert f"{of_words[12]['eval_loss/words']:.4f} {last['eval_loss/text']:.4f}" in capsys.readouterr().out


def test_charts_of_named_sets(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = EventAccumulator(str(RunFolder(run_dir).events)).Reload()
    tags = events.Tags()["scalars"]
    assert {"1_loss/eval_loss/words", "1_loss/eval_perplexity/words", "1_loss/eval_bits_per_byte/text"} <= set(tags)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for page in layout.category for chart in page.chart}
    for title, count in (("Loss (nats per token)", 3), ("Perplexity", 2), ("Bits per byte", 1)):
        assert len({tag for tag in tags for pattern in charts[title] if re.match(pattern, tag)}) == count, title
