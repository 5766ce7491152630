from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from griffin.parallel.config import INITS, RECOMPUTES, ModelConfig, ParallelConfig
from griffin.parallel.mixers import MIXERS
from griffin.tools.cli import main, split_overrides
from griffin.trainer.settings.complete import complete, load_config
from griffin.trainer.settings.load import CONFIGS, find_config, read_settings, to_toml
from griffin.trainer.settings.presets import PRESETS, preset
from griffin.trainer.settings.sections import (
    DTYPES,
    OVERLAPS,
    SCHEDULES,
    WSD_DECAYS,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
)

ROOT = Path(__file__).parents[3]

MODEL = """
[model]
pattern = ["recurrent", "attention"]
width = 32
recurrent_width = 64
heads = 2
head_dim = 16
vocabulary = 300
"""


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *overrides: str) -> Config:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


@pytest.fixture(scope="session")
def bytes_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("to be or not to be, " * 20)
    prefix = str(folder / "bytes")
    assert main(["data", "build", prefix, str(folder / "text.txt"), "--tokenizer", "bytes", "--workers", "1"]) == 0
    return prefix


def test_defaults(load) -> None:
    config = load(MODEL)
    assert config.model == ModelConfig(
        pattern=("recurrent", "attention"), width=32, recurrent_width=64, heads=2, head_dim=16, vocabulary=300
    )
    assert (config.model.gate_blocks, config.model.mlp_expansion, config.model.window) == (16, 3, 1024)
    assert config.parallel == ParallelConfig()
    assert (config.optimizer.weight_decay, config.optimizer.clip, config.optimizer.epsilon) == (0.1, 1.0, 1e-8)


def test_defaults_are_those_of_python(load) -> None:
    """Defaults are the same from a file and in Python, also those that depend on other settings."""
    model = ModelConfig(
        pattern=("recurrent", "attention"), width=32, recurrent_width=64, heads=2, head_dim=16, vocabulary=300
    )
    assert load(MODEL) == Config(model=model)
    lines = '[train]\nsteps = 300\n[optimizer]\nschedule = "wsd"\nlearning_rate = 1e-2\n'
    optimizer = OptimizerConfig(schedule="wsd", learning_rate=1e-2)
    expected = Config(model=model, optimizer=optimizer, train=TrainConfig(steps=300))
    assert load(MODEL + lines) == expected
    assert None not in dataclasses.asdict(expected)["optimizer"].values()


def test_reading_settings_reads_no_data(tmp_path: Path, bytes_data: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[model]\npreset = "griffin-100m"\n[data]\ntrain = "{tmp_path}/absent"\n')
    config = read_settings(path)
    assert config.model.vocabulary is None
    with pytest.raises(ValueError, match="absent"):
        complete(config)
    there = dataclasses.replace(config, data=DataConfig(train=(bytes_data,)))
    assert complete(there).model.vocabulary == 257
    assert complete(there).model == dataclasses.replace(preset("griffin-100m"), vocabulary=257)


def test_every_section(load) -> None:
    config = load(
        MODEL
        + """
[parallel]
tensor = 2
stages = [1, 1]
sequence_parallel = true
[data]
train = ["0.7 data/books", "0.3 data/code"]
eval = "data/held-out"
[optimizer]
learning_rate = 1
[train]
seed = 5
[checkpoint]
interval = 50
keep_last = 2
keep_every = 500
[log]
run_root = "elsewhere"
"""
    )
    assert config.parallel == ParallelConfig(tensor=2, stages=(1, 1), sequence_parallel=True)
    assert config.data.train == ("0.7 data/books", "0.3 data/code")
    assert config.data.eval == ("data/held-out",)
    assert (config.optimizer.learning_rate, type(config.optimizer.learning_rate)) == (1.0, float)
    assert config.train.seed == 5
    assert config.checkpoint == CheckpointConfig(interval=50, keep_last=2, keep_every=500)
    assert config.log.run_root == "elsewhere"


def test_preset_and_what_overrides_it(load) -> None:
    text = '[model]\npreset = "griffin-400m"\nwindow = 512\nvocabulary = 32000\n'
    expected = dataclasses.replace(preset("griffin-400m"), window=512, vocabulary=32_000)
    assert load(text).model == expected
    assert load(text, "--model.window=64").model.window == 64
    assert load(text, "--model.preset", "hawk-100m").model.width == 768
    assert load(text, "--model.pattern", '["recurrent"]').model.blocks == 1


def test_unused_widths_may_be_left_out(load) -> None:
    assert load('[model]\npattern = ["recurrent"]\nwidth = 32\nrecurrent_width = 48\nvocabulary = 9\n').model.heads == 1
    text = '[model]\npattern = ["global_attention"]\nwidth = 32\nheads = 2\nhead_dim = 16\nvocabulary = 9\n'
    assert load(text).model.recurrent_width == 32


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [
        ('["recurrent", "attention"]', "model.head_dim, model.heads, model.recurrent_width, model.width: missing"),
        ('["global_attention"]', "model.head_dim, model.heads, model.width: missing"),
        ('["recurrent"]', "model.recurrent_width, model.width: missing"),
    ],
)
def test_missing_widths_are_named(load, pattern: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"^{missing}"):
        load(f"[model]\npattern = {pattern}\nvocabulary = 300\n")


def test_neither_pattern_nor_preset(load) -> None:
    with pytest.raises(ValueError, match=r"model: must state model\.pattern .* or model\.preset \(griffin-100m"):
        load("[model]\nwidth = 32\n")


@pytest.mark.parametrize(
    ("words", "section", "key", "value"),
    [
        (["--train.steps", "7"], "train", "steps", 7),
        (["--train.steps=7"], "train", "steps", 7),
        (["--train.steps", "1e6"], "train", "steps", 1_000_000),
        (["--parallel.stages", "[1.0, 2]"], "parallel", "stages", (1, 2)),
        (["--train.dtype", "bf16"], "train", "dtype", "bfloat16"),
        (["--train.dtype", "torch.float32"], "train", "dtype", "float32"),
        (["--optimizer.learning_rate", "1"], "optimizer", "learning_rate", 1.0),
        (["--optimizer.learning_rate", "1e-3"], "optimizer", "learning_rate", 1e-3),
        (["--optimizer.learning_rate", "-1"], "optimizer", "learning_rate", -1.0),
        (["--parallel.sequence_parallel", "true"], "parallel", "sequence_parallel", True),
        (["--parallel.stages", "[1, 1]"], "parallel", "stages", (1, 1)),
        (["--data.train", "data/a"], "data", "train", ("data/a",)),
        (["--data.train", "0.5 data/a"], "data", "train", ("0.5 data/a",)),
        (["--data.train", '["data/a", "data/b"]'], "data", "train", ("data/a", "data/b")),
        (["--data.train", "2024"], "data", "train", ("2024",)),
        (["--log.run_root", "2024"], "log", "run_root", "2024"),
        (["--log.run_root", '"quoted"'], "log", "run_root", "quoted"),
        (["--log.run_root", ""], "log", "run_root", ""),
        (["--log.run_root=a=b"], "log", "run_root", "a=b"),
        (["--train.dtype", "float32"], "train", "dtype", "float32"),
        (["--train.steps", "7", "--train.steps", "8"], "train", "steps", 8),
    ],
)
def test_overrides(load, words: list[str], section: str, key: str, value: object) -> None:
    loaded = getattr(getattr(load(MODEL + "[train]\nsteps = 3\n", *words), section), key)
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.step", "7"], r"train\.step: no such setting; did you mean train\.steps\?"),
        (["--trian.steps", "7"], r"trian\.steps: no such setting; did you mean train\.steps\?"),
        (["--train.steps"], r"--train\.steps: needs a value, an integer"),
        (["--train.steps", "--train.seed", "1"], r"--train\.steps: needs a value, an integer"),
        (["--train.steps", "many"], r"train\.steps = 'many': must be an integer"),
        (["--train.steps", "1e300"], r"train\.steps = '1e300': must be an integer"),
        (["--train.steps", "inf"], r"train\.steps = 'inf': must be an integer"),
        (["--train.steps", "1.5"], r"train\.steps = '1\.5': must be an integer"),
        (["--train.steps", "1\nb = 2"], r"train\.steps = '1\\nb = 2': must be an integer"),
        (["--parallel.sequence_parallel", "1"], r"parallel\.sequence_parallel = '1': must be true or false"),
        (["--steps", "7"], r"--steps: must be --section\.key value"),
        (["7"], r"7: must be --section\.key value"),
    ],
)
def test_refused_overrides(load, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        load(MODEL, *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidht = 3", r"model\.widht: no such setting; did you mean model\.width\?"),
        ("[train]\nsequence_length = 3", r"train\.sequence_length: no such setting; did you mean data\.sequence_len"),
        ("[trian]\nsteps = 3", r"\[trian\]: no such section; did you mean \[train\]\?"),
        ("steps = 3", r"steps = 3: is outside of any section; did you mean train\.steps\?"),
        ("[model]\nwidth = '3'", r"model\.width = '3': must be an integer"),
        ("[model]\nwidth = 3.5", r"model\.width = 3\.5: must be an integer"),
        ("[model]\nwidth = true", r"model\.width = True: must be an integer"),
        ("[model]\nwidth = [3]", r"model\.width = \[3\]: must be an integer"),
        ("[model]\npreset = 3", r"model\.preset = 3: must be a string"),
        ("[model]\npattern = [1]", r"model\.pattern = \[1\]: must be a string or a list of strings"),
        ("[optimizer]\nbeta1 = true", r"optimizer\.beta1 = True: must be a number"),
        ("[optimizer]\nbeta1 = 'a'", r"optimizer\.beta1 = 'a': must be a number"),
        ("[parallel]\nstages = 1", r"parallel\.stages = 1: must be a list of integers"),
        ("[parallel]\nstages = [1, true]", r"parallel\.stages = \[1, True\]: must be a list of integers"),
        ("[parallel]\nsequence_parallel = 1", r"parallel\.sequence_parallel = 1: must be true or false"),
        ("[model]\nwidth = \n", r".*config\.toml: not a TOML file: .*line 2"),
    ],
)
def test_refused_files(load, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        load(text)


def test_other_names_of_numbers_and_dtypes_in_files(load) -> None:
    config = load(MODEL + '[train]\nsteps = 1e6\ndtype = "bf16"\n')
    assert (config.train.steps, type(config.train.steps), config.train.dtype) == (1_000_000, int, "bfloat16")


def test_model_that_is_not_stated_is_found(load, tmp_path: Path) -> None:
    model = load(MODEL).model
    path = tmp_path / "none.toml"
    path.write_text("[train]\nsteps = 3\n")
    assert load_config(path, find_model=lambda: model).model == model
    changed = load_config(path, ["--model.window=9"], find_model=lambda: model).model
    assert changed == dataclasses.replace(model, window=9)
    assert load_config(path, ["--model.preset=hawk-100m", "--model.vocabulary=9"], find_model=lambda: model).model == (
        dataclasses.replace(preset("hawk-100m"), vocabulary=9)
    )
    with pytest.raises(ValueError, match="the model is that of the checkpoint"):
        load_config(path)


def test_packaged_config_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of that name takes precedence; no config has the name of a preset."""
    monkeypatch.chdir(tmp_path)
    names = {path.stem for path in CONFIGS.glob("*.toml")}
    assert "demo" in names
    assert not names & set(PRESETS)
    assert {find_config(name) for name in names} == set(CONFIGS.glob("*.toml"))
    (tmp_path / "demo").write_text(MODEL)
    assert find_config("demo") == Path("demo")
    with pytest.raises(
        FileNotFoundError, match=r"dem: no such config file, and no packaged config of that name: demo, "
    ):
        find_config("dem")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.toml: no such config file"):
        load_config(tmp_path / "absent.toml")


def test_config_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.toml: not a TOML file"):
        load_config(tmp_path / "config.toml")


@pytest.mark.parametrize(
    ("text", "minimum", "warmup", "decay"),
    [
        ("", 3e-5, 50, 450),
        ("learning_rate = 1e-3", 1e-4, 50, 450),
        ("warmup_steps = 0", 3e-5, 0, 500),
        ("warmup_steps = 500", 3e-5, 500, 1),
        ("decay_steps = 9\nmin_learning_rate = 0", 0.0, 50, 9),
        ('schedule = "wsd"', 3e-5, 50, 100),
        ('schedule = "constant"', 3e-5, 50, 0),
    ],
)
def test_schedule_left_out(load, text: str, minimum: float, warmup: int, decay: int) -> None:
    optimizer = load(f"{MODEL}[train]\nsteps = 500\n[optimizer]\n{text}\n").optimizer
    assert optimizer.min_learning_rate == pytest.approx(minimum, rel=1e-12)
    assert (optimizer.warmup_steps, optimizer.decay_steps) == (warmup, decay)


def test_vocabulary_left_out_is_the_tokenizers(load, bytes_data: str) -> None:
    text = MODEL.replace("vocabulary = 300\n", "")
    assert load(text, "--data.train", bytes_data).model.vocabulary == 257
    assert load('[model]\npreset = "griffin-100m"\n', "--data.train", bytes_data).model.vocabulary == 257
    with pytest.raises(ValueError, match=r"data\.train = \[\]: must name at least one PREFIX"):
        load(text)
    with pytest.raises(ValueError, match="absent"):
        load(text, "--data.train", "absent")


def test_stated_vocabulary_needs_no_data(load) -> None:
    assert load(MODEL, "--data.train", "absent").model.vocabulary == 300


def eval_sets() -> st.SearchStrategy:
    """One blend, or several by name."""
    entries = st.lists(st.text(st.characters(codec="utf-8")))
    names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
    sets = st.dictionaries(names, entries.filter(bool).map(tuple), max_size=3)
    return entries.map(tuple) | sets


def of_type(section: type, **strategies: st.SearchStrategy) -> st.SearchStrategy:
    """Any values of the types of a section, sensible or not: loading does not validate them."""
    by_type = {
        "int": st.integers(-(2**63), 2**63 - 1),
        "float": st.floats(allow_nan=False),
        "bool": st.booleans(),
        "str": st.text(st.characters(codec="utf-8")),
        "tuple[str, ...]": st.lists(st.text(st.characters(codec="utf-8"))).map(tuple),
        "EvalSets": eval_sets(),
        "tuple[int, ...]": st.lists(st.integers(-(2**63), 2**63 - 1)).map(tuple),
    }
    fields = {field.name: by_type[str(field.type)] for field in dataclasses.fields(section)}
    return st.builds(section, **fields | strategies)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Config,
        model=of_type(
            ModelConfig, pattern=st.lists(st.sampled_from([*MIXERS])).map(tuple), init=st.sampled_from(INITS)
        ),
        parallel=of_type(ParallelConfig),
        data=of_type(DataConfig),
        optimizer=of_type(OptimizerConfig, schedule=st.sampled_from(SCHEDULES), wsd_decay=st.sampled_from(WSD_DECAYS)),
        train=of_type(
            TrainConfig,
            dtype=st.sampled_from(DTYPES),
            recompute=st.sampled_from(RECOMPUTES),
            overlap=st.sampled_from(OVERLAPS),
        ),
        checkpoint=of_type(CheckpointConfig),
        log=of_type(LogConfig),
    )
)
def test_config_survives_toml(load, config: Config) -> None:
    text = to_toml(config)
    assert load(text) == config
    assert "preset" not in tomllib.loads(text)["model"]


def test_demo_config(bytes_data: str) -> None:
    from griffin.trainer.settings.validate import validate, validate_data

    words = ["--data.train", bytes_data, "--data.eval", bytes_data]
    config = load_config(ROOT / "trainer/configs/demo.toml", words)
    assert config.model.vocabulary == 257
    validate(config, config.parallel.model_ranks)
    validate_data(config)


def test_reading_a_config_imports_no_torch() -> None:
    modules = ", ".join(f"griffin.trainer.settings.{name}" for name in ("complete", "reference", "validate"))
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("words", "rest", "train"),
    [
        (["--data.train", "0.7 a", "0.3 b", "c.toml"], ["c.toml"], ("0.7 a", "0.3 b")),
        (["c.toml", "--data.train", "0.7 a", "0.3 b", "--ranks", "2"], ["c.toml", "--ranks", "2"], ("0.7 a", "0.3 b")),
        (["--data.train", "a", "c.toml"], ["c.toml"], ("a",)),
        (["--data.train=a", "c.toml"], ["c.toml"], ("a",)),
        (["--data.train", '["a", "b"]', "c.toml"], ["c.toml"], ("a", "b")),
    ],
)
def test_a_blend_on_the_command_line(tmp_path, words, rest, train):
    found, overrides = split_overrides(words)
    assert found == rest
    (tmp_path / "c.toml").write_text('[model]\npreset = "hawk-100m"\nvocabulary = 100\n[data]\neval = "held-out"\n')
    config = load_config(tmp_path / "c.toml", [*overrides, "--data.eval", "none"])
    assert config.data.train == train
    assert config.data.eval == ()
