"""A new mixer needs only a module and a registry entry, both of which are in this file for the one below."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from griffin.kernels.linear_scan import linear_scan
from griffin.parallel import sharding
from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig, ParallelConfig
from griffin.parallel.context import Context, DecodePosition, Documents, megatron_config
from griffin.parallel.cost import block_cost, train_flops_per_token
from griffin.parallel.decode import Decoder
from griffin.parallel.layers.linear import ColumnLinear, RowLinear
from griffin.parallel.mixers import MIXERS, kinds, used
from griffin.parallel.mixers.base import Cost, Mixer, Multiple
from griffin.parallel.sharding import Piece, describe
from griffin.parallel.stage import build_stages
from griffin.parallel.world.grid import rank_grid, single_rank_grid
from griffin.trainer.checkpoint.arrays import MODEL
from griffin.trainer.checkpoint.manifest import check, read_manifest
from griffin.trainer.run.step_name import step_name
from griffin.trainer.settings.complete import load_config
from griffin.trainer.settings.sections import Config
from griffin.trainer.settings.validate import validate
from griffin.trainer.summary import count_parameters
from tests.ranks import RankPool
from tests.small_runs import metrics, run, saved_files, saved_steps, write_config

AVERAGE = Mixer(
    name="average",
    kind="ema",
    module="tests.parallel.test_mixers:Average",
    widths=("recurrent_width",),
    shards=("gate_blocks",),
    multiples=(Multiple("recurrent_width", "gate_blocks"),),
)


def ramp(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * 4


@dataclass(frozen=True)
class AverageState:
    average: Tensor  # [R/t, B], float32


class Average(nn.Module):
    """Compute `out(average(value(u)) * silu(gate(u)))`, with a moving average per channel of a learnt rate."""

    def __init__(self, name: str, context: Context):
        super().__init__()
        self.kernels = context.kernels
        R, atoms = context.model.recurrent_width, context.model.gate_blocks
        std = math.sqrt(1 / context.model.width)
        self.value_gate = ColumnLinear(context, (f"{name}.value", f"{name}.gate"), R, atoms=atoms, std=std)
        self.keep = context.parameter(R // context.grid.tensor_size)
        self.out = RowLinear(context, f"{name}.out", R, atoms=atoms)
        piece = Piece(name=f"{name}.keep", shape=(R,), init=ramp, axis=0, atoms=atoms)
        describe(self.keep, piece, weight_decay=False)

    @classmethod
    def build(cls, name: str, context: Context, recompute: str) -> Self:
        return cls(name, context)

    @staticmethod
    def cost(model: ModelConfig, sequence: int) -> Cost:
        return Cost(2.0 * 3 * model.width * model.recurrent_width, 8.0 * model.recurrent_width)

    def forward(self, u: Tensor, documents: Documents) -> Tensor:
        return self._mix(u, documents)[0]

    def prefill(self, u: Tensor, documents: Documents, max_length: int) -> tuple[Tensor, AverageState]:
        mixed, last = self._mix(u, documents)
        return mixed, AverageState(last.t().contiguous())

    def stepper(self) -> AverageStep:
        return AverageStep(self)

    def _mix(self, u: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        value, gate = self.value_gate(u).chunk(2, dim=-1)
        keep = self.keep.sigmoid()
        average, last = linear_scan(
            keep.expand_as(value), (1 - keep) * value, starts=documents.starts, backend=self.kernels
        )
        return self.out(average * nn.functional.silu(gate)), last


class AverageStep:
    def __init__(self, mixer: Average):
        self._value_gate, self._out = mixer.value_gate.stepper(), mixer.out.stepper()
        self._keep = mixer.keep.sigmoid()[:, None]

    def prepare(self, state: AverageState, position: DecodePosition) -> None:
        return None

    def __call__(self, u: Tensor, state: AverageState, prepared: None) -> Tensor:
        value, gate = self._value_gate(u).chunk(2)
        state.average.mul_(self._keep).add_((1 - self._keep) * value)
        return self._out(state.average.to(u.dtype) * nn.functional.silu(gate))


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with mock.patch.dict(MIXERS, {AVERAGE.name: AVERAGE}):
        yield


PATTERN = (AVERAGE.name, ATTENTION, RECURRENT, AVERAGE.name)
STEPS, SAVED = 4, 2
LAYOUT = {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence_parallel": "true"}


def configured(folder: Path, **settings: Any) -> Config:
    stated = {
        "model.pattern": str(list(PATTERN)).replace("'", '"'),
        "train.steps": STEPS,
        "checkpoint.interval": SAVED,
        "log.interval": 1,
        "train.eval_interval": STEPS,
        **settings,
    }
    return load_config(folder / "config.toml", [f"--{name}={value}" for name, value in stated.items()])


def run_registered(ranks: Any, config: Config, run_dir: Path) -> bool:
    with mock.patch.dict(MIXERS, {AVERAGE.name: AVERAGE}):
        return run(ranks, config, run_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixers")
    write_config(folder)
    return folder


@pytest.fixture(scope="module")
def trained(rank_pool: RankPool, folder: Path) -> Path:
    """A run on TP 2 x PP 2."""
    config = configured(folder, **LAYOUT)
    validate(config, 4)
    assert rank_pool.run(run_registered, 4, config, folder / "run") == [False] * 4
    return folder / "run"


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir) if "loss" in line]


def test_it_trains_the_same_on_all_layouts(rank_pool: RankPool, folder: Path, trained: Path) -> None:
    config = configured(folder)
    assert rank_pool.run(run_registered, 1, config, folder / "one-rank") == [False]
    found = losses(trained)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    assert found == pytest.approx(losses(folder / "one-rank"), rel=1e-5)  # sums in another order
    first = next(line for line in metrics(trained) if "grad_norm/ema" in line)
    assert first["grad_norm/ema"] > 0
    squares = [value**2 for key, value in first.items() if key.startswith("grad_norm/")]
    assert math.sqrt(sum(squares)) == pytest.approx(first["grad_norm"], rel=1e-5)


def test_it_is_saved_and_resumed(rank_pool: RankPool, folder: Path, trained: Path) -> None:
    """Resumed from the middle of its run, bitwise."""
    resumed = Path(shutil.copytree(trained, folder / "resumed"))
    shutil.rmtree(resumed / "checkpoints" / step_name(STEPS))
    assert saved_steps(resumed) == [SAVED]
    assert rank_pool.run(run_registered, 4, configured(folder, **LAYOUT), resumed) == [False] * 4
    assert len(losses(resumed)) == STEPS + STEPS - SAVED
    assert saved_files(resumed, STEPS) == saved_files(trained, STEPS)
    first, last = (saved_files(trained, step) for step in (SAVED, STEPS))
    changed = {name for name in first if f"{MODEL}.blocks.0.ema.keep" in name and first[name] != last[name]}
    assert changed, "its own parameter is trained, and saved"


def test_its_parameters_and_flops_are_counted(folder: Path, trained: Path) -> None:
    manifest = read_manifest(trained / "checkpoints" / step_name(STEPS))
    model, sequence = configured(folder).model, 32
    saved = {name: spec.shape for name, spec in manifest.arrays.items() if name.startswith(f"{MODEL}.")}
    with single_rank_grid() as grid:
        assert sum(count_parameters(model, grid)) == sum(map(math.prod, saved.values()))
    R, D = model.recurrent_width, model.width
    own = sum(math.prod(shape) for name, shape in saved.items() if name.startswith(f"{MODEL}.blocks.0.ema."))
    assert own == 3 * R * D + 2 * R + D + R
    assert check(trained / "checkpoints" / step_name(STEPS)).model.pattern == PATTERN

    more = replace(model, pattern=(*PATTERN, AVERAGE.name))
    difference = train_flops_per_token(more, sequence) - train_flops_per_token(model, sequence)
    assert difference == 3 * (2.0 * 3 * D * R + 2.0 * 3 * D * model.mlp_width)
    assert block_cost(model, AVERAGE.name, sequence).bytes > 8.0 * R


def decode_on_two_ranks(ranks: Any, model: ModelConfig) -> None:
    """Compare continuations of prompts of different lengths with whole sequences."""
    max_length, lengths = 20, (1, 3, 9)
    layout = ParallelConfig(tensor=2)
    with mock.patch.dict(MIXERS, {AVERAGE.name: AVERAGE}), rank_grid(layout, ranks) as grid, torch.no_grad():
        (stage,) = build_stages(model, layout, grid, dtype=torch.float32, sequence=max_length)
        sharding.initialize([stage], grid, seed=3)
        stage.embedding.weight.mul_(4)
        ids = torch.randint(0, 200, (len(lengths), max_length), generator=torch.Generator().manual_seed(2))
        positions = torch.arange(max_length).expand(len(lengths), -1)
        whole = stage({"tokens": ids, "positions": positions}).transpose(0, 1)
        decoder = Decoder(stage)
        rows, ends = torch.arange(len(lengths)), torch.tensor(lengths)
        prompts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        logits, state = decoder.prefill(prompts, max_length)
        size = state.nbytes
        assert any(isinstance(block, AverageState) for block in state.blocks)
        for step in range(max_length - max(lengths)):
            torch.testing.assert_close(logits, whole[rows, ends - 1 + step], rtol=0, atol=2e-5)  # other sums
            logits = decoder.step(ids[rows, ends + step], state)
        assert state.nbytes == size


def test_it_decodes(rank_pool: RankPool, folder: Path) -> None:
    rank_pool.run(decode_on_two_ranks, 2, configured(folder).model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.gate_blocks": 3}, r"model\.gate_blocks = 3: must divide model\.recurrent_width = 32"),
        ({"model.gate_blocks": 1, "parallel.tensor": 2}, r"parallel\.tensor = 2: must divide model\.gate_blocks = 1"),
        ({"model.pattern": '["averag"]'}, r"'averag': must be a list of recurrent, attention, .*, average"),
    ],
)
def test_its_settings_are_checked(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(configured(folder, **{"model.pattern": '["average"]'} | settings), 4)


def test_its_widths_must_be_stated(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[model]\npattern = ["average"]\nwidth = 32\nvocabulary = 9\n')
    with pytest.raises(ValueError, match=r"^model\.recurrent_width: missing"):
        load_config(tmp_path / "config.toml", [])


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
def test_any_number_of_projections_is_fused(folder: Path, names: tuple[str, ...]) -> None:
    model, outputs = configured(folder).model, 12
    with single_rank_grid() as grid:
        device = torch.device("cpu")
        megatron = megatron_config(model, ParallelConfig(), torch.float32, device)
        context = Context(model=model, grid=grid, megatron=megatron, device=device, kernels="cpu")
        linear = ColumnLinear(context, names, outputs, atoms=4, std=1.0)
    for place, piece in enumerate(linear.weight.pieces):  # type: ignore[attr-defined]
        assert piece.name == f"{names[place]}.weight"
        rows = linear.weight[place * outputs : (place + 1) * outputs]
        assert piece.view(linear.weight, 1).data_ptr() == rows.data_ptr()
    assert linear.weight.shape == (len(names) * outputs, model.width)
    assert len(linear.bias.pieces) == len(names)  # type: ignore[attr-defined]


def test_every_entry_is_complete() -> None:
    """An entry's class implements the protocol, and its settings are fields of ModelConfig."""
    settings = ModelConfig.__dataclass_fields__.keys()
    for name, mixer in MIXERS.items():
        assert mixer.name == name
        assert {*mixer.widths, *mixer.shards} <= settings
        assert mixer.kind not in ("mlp", "norm", "embedding")
        assert not mixer.kind.endswith("norm")
        module = mixer.load()
        assert issubclass(module, nn.Module)
        assert all(callable(getattr(module, each)) for each in ("build", "cost", "prefill", "stepper")), name


def test_mixers_that_share_a_kind_share_its_norm() -> None:
    assert kinds(used(("global_attention", "attention", "recurrent", "elsewhere"))) == ("recurrent", "attention")
