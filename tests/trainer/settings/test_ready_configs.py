"""The ready configurations of trainer/configs: they hold for what their first lines say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from griffin.parallel.world.grid import single_rank_grid
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.validate import validate, validate_data
from griffin.trainer.summary import count_parameters
from tests.data_sets import write_prefix

CONFIGS = Path(__file__).parents[3] / "trainer/configs"
# bfloat16 values of the model's width that a block keeps per token for its backward pass, counted with
# torch.autograd.graph.saved_tensors_hooks; tensor ranks with sequence parallelism share them.
KEPT = {"recurrent": 28.6, "attention": 26.5}


# By name: GPUs, and memory of each in GB.
GPUS = {
    "griffin-400m-1gpu": (1, 80),
    "griffin-1.3b-8gpu": (8, 80),
    "griffin-14b-h100-8x8": (64, 80),
    "griffin-14b-h200-8x8": (64, 141),
}


def test_all_are_covered() -> None:
    assert {file.stem for file in CONFIGS.glob("*.toml")} == {"demo", *GPUS}  # `make demo` runs that one


@pytest.mark.parametrize("name", GPUS)
def test_on_gpus(name: str, tmp_path: Path) -> None:
    """The memory in the comment follows from the settings, and leaves a fifth of the GPU free."""
    path, (ranks, memory) = CONFIGS / f"{name}.toml", GPUS[name]
    prefix = write_prefix(tmp_path / "data", [[0] * 3000], vocabulary=256_000)
    config = load_config(path, [f"--data.train={prefix}", f"--data.eval={prefix}"])
    validate(config, ranks)
    validate_data(config)

    model, tensor, tokens = config.model, config.parallel.tensor, config.train.micro_batch * config.data.sequence_length
    with single_rank_grid() as grid:
        parameters = sum(count_parameters(model, grid))
    kept = sum(KEPT[mixer] for mixer in model.pattern)
    terms = [
        6 * parameters / tensor,
        12 * parameters / ranks,
        kept * 2 * model.width * tokens / tensor,
        10 * tokens * model.padded_vocabulary / tensor,
    ]
    stated = [float(figure) for figure in re.findall(r"^#.* ([\d.]+)$", path.read_text(), flags=re.MULTILINE)]
    assert stated[:-1] == pytest.approx([term / 1e9 for term in terms], abs=0.1)
    assert stated[-1] == pytest.approx(sum(terms) / 1e9, abs=0.6)
    assert stated[-1] < 0.8 * memory
