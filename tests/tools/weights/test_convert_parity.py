"""Converted models compute what transformers computes, on one rank and sharded, and can be fine-tuned."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from griffin.parallel.config import ParallelConfig
from griffin.tools.weights.hf.names import from_transformers
from griffin.trainer.checkpoint.manifest import check
from griffin.trainer.checkpoint.source import InitFrom
from griffin.trainer.settings.complete import load_config
from tests.closeness import assert_all_close
from tests.converted_models import LAYOUTS, batch, compute
from tests.ranks import RankPool
from tests.small_runs import run, series, write_config
from tests.transformers_models import convert, logits, make_model, save_model


@pytest.fixture(scope="module", params=["12", "6"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint and its transformers model, whose window is shorter than the sequence."""
    changes: dict[str, Any] = {
        "12": {},
        "6": {"attention_window_size": 6, "num_attention_heads": 2, "head_dim": 24, "num_hidden_layers": 4},
    }[request.param]
    folder = tmp_path_factory.mktemp("converted")
    model = make_model(**changes)
    assert convert("hf", save_model(model, folder / "model"), folder / "step") == 0
    return folder / "step", model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients(rank_pool: RankPool, converted: tuple[Path, Any], layout: str) -> None:
    folder, model = converted
    data = batch(model.config.vocab_size)
    expected = logits(model, data["tokens"])
    assert expected.abs().max() > 5
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(
        model(data["tokens"], use_cache=False).logits.flatten(0, 1), data["labels"].flatten()
    )
    loss.backward()
    answers = rank_pool.run(compute, LAYOUTS[layout].model_ranks, LAYOUTS[layout], folder)
    parts = [answer["logits"] for answer in answers if answer["logits"] is not None]
    found = torch.cat(parts, dim=-1).transpose(0, 1)[..., : model.config.vocab_size]
    # float32 over 5 blocks, sums in another order: 3e-6 measured, on logits up to 12.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = list(answers[0]["gradients"])
    for name, gradient in from_transformers(gradients, names).items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        for answer in answers:
            assert_all_close({name: answer["gradients"][name]}, {name: gradient}, atol=2e-5 * scale)  # 2e-6 was seen
    assert len(names) == len(gradients)
    for answer in answers:
        torch.testing.assert_close(answer["loss"], loss.item(), rtol=1e-6, atol=0)


def test_training_begins_with_converted_weights(
    rank_pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config has the [model] section that the conversion prints; losses are the same in any layout."""
    model = make_model(vocab_size=257)
    assert convert("hf", save_model(model, tmp_path / "model"), tmp_path / "step") == 0
    printed = capsys.readouterr().out
    section = printed[printed.index("[model]") :]
    path = write_config(tmp_path)
    text = path.read_text()
    path.write_text(section + text[text.index("[data]") :])
    config = load_config(path, ["--train.steps", "3", "--train.eval_interval", "3", "--log.interval", "1"])
    assert config.model == check(tmp_path / "step").model
    assert tomllib.loads(section).keys() == {"model"}
    losses = {}
    for name, layout in {"1": ParallelConfig(), "4": ParallelConfig(tensor=2, pipeline=2)}.items():
        settings = dataclasses.replace(config, parallel=layout)
        start = InitFrom(path=tmp_path / "step", everything=False)
        assert not any(rank_pool.run(run, layout.model_ranks, settings, tmp_path / f"run-{name}", start))
        losses[name] = series(tmp_path / f"run-{name}", "loss")
        assert str(tmp_path) in (tmp_path / f"run-{name}/console.log").read_text()
    assert losses["1"].keys() == {1, 2, 3}
    for step, loss in losses["1"].items():
        assert losses["4"][step] == pytest.approx(loss, rel=1e-5)
    # Random weights start at a loss of log(257) = 5.5, the converted ones far above.
    assert losses["1"][1] > 6.5
