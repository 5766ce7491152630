"""The sections of a run's settings: for each setting its default, what it means and which values it takes."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from griffin.kernels.backends import AUTO, BACKENDS
from griffin.parallel.config import RECOMPUTES, ModelConfig, ParallelConfig
from griffin.parallel.setting import COUNT, Setting, about, setting, setting_of
from griffin.trainer.data.prefix import LAST_SEED
from griffin.trainer.settings.eval_sets import Blend, EvalSets

SCHEDULES = ("cosine", "linear", "wsd", "constant")
WSD_DECAYS = ("linear", "cosine", "exponential", "minus_sqrt")
DTYPES = ("float32", "bfloat16")
OVERLAPS = ("auto", "on", "off")
SPIKES = ("off", "skip", "rewind")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[str, ...] = setting(
        (),
        '`"PREFIX"` of data built by `griffin data build`, or a list of them, or of `"WEIGHT PREFIX"`; without '
        "weights in proportion to tokens",
    )
    eval: EvalSets = field(
        default=(),
        hash=False,  # a dict has no hash
        metadata=about(
            'the same, for held-out evaluation; in a table `[data.eval]` several sets, `NAME = ["PREFIX"]` each, with '
            "figures of their own; `--data.eval.NAME PREFIX` adds or replaces one, `none` leaves it out",
            default_means='`"none"`',
        ),
    )
    sequence_length: int = setting(2048, "tokens per sequence", least=2, most=2**24)
    cache: str = setting("", "folder of the sample index", default_means="beside the data")
    workers: int = setting(2, "loader processes per rank; 0 loads in the rank itself", least=0, most=256)

    @property
    def eval_sets(self) -> dict[str, Blend]:
        """The blends of `eval` by name; one without a name is ""."""
        if isinstance(self.eval, dict):
            return self.eval
        return {"": self.eval} if self.eval else {}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; lengths are in optimizer steps.

    A Config fills in the defaults of None, which depend on other settings (see `Config`).
    """

    learning_rate: float = setting(3e-4, "the peak", above=0.0)
    min_learning_rate: float = setting(
        None, "where the decay ends", least=0.0, default_means="a tenth of `learning_rate`"
    )
    beta1: float = setting(0.9, "decay of the mean of gradients", least=0.0, below=1.0)
    beta2: float = setting(0.95, "decay of the mean of squared gradients", least=0.0, below=1.0)
    epsilon: float = setting(1e-8, "added to the root of the mean of squared gradients", above=0.0)
    weight_decay: float = setting(0.1, "decoupled from the gradient; 0 is off", least=0.0, off=True)
    clip: float = setting(1.0, "largest gradient norm of the whole model; 0 is off", least=0.0, off=True)
    schedule: str = setting(
        "cosine",
        'of the learning rate; or `"linear"`, `"wsd"` (warm-up, stable, decay), `"constant"`',
        choices=SCHEDULES,
    )
    warmup_steps: int = setting(
        None, "linear, from 0", least=0, most=COUNT, default_means="a tenth of `train.steps`, at most 1000"
    )
    decay_steps: int = setting(
        None,
        "length of the decay: after the warm-up, or for `wsd` at the end; later steps run at `min_learning_rate`",
        least=0,
        most=COUNT,
        default_means="the rest; a fifth of `train.steps` for `wsd`",
    )
    decay_end: int = setting(0, "step after which `wsd`'s decay has ended; 0 is the last", least=0, most=COUNT)
    wsd_decay: str = setting(
        "linear", 'shape of `wsd`\'s decay; or `"cosine"`, `"exponential"`, `"minus_sqrt"`', choices=WSD_DECAYS
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = setting(10_000, "optimizer steps", least=1, most=COUNT)
    global_batch: int = setting(256, "sequences per step over all ranks", least=1, most=2**24)
    micro_batch: int = setting(1, "sequences that a rank computes at a time", least=1, most=2**20)
    seed: int = setting(0, "of initial weights and sample order", least=0, most=LAST_SEED - 1)
    dtype: str = setting(
        "bfloat16",
        'of parameters and activations; or `"float32"`, also as `"bf16"`, `"fp32"`; master weights and gradients are '
        "float32",
        choices=DTYPES,
    )
    recompute: str = setting(
        "none",
        'what each block computes again in its backward pass: `"states"` (the recurrence\'s), `"mixer"`, `"mlp"`, '
        '`"block"`',
        choices=RECOMPUTES,
    )
    kernels: str = setting(
        AUTO,
        'what computes all operators but attention: `"triton"` (on GPUs), `"cpu"` (anywhere), `"reference"` (a loop)',
        choices=(AUTO, *BACKENDS),
    )
    overlap: str = setting(
        "auto",
        'data-parallel communication behind computation: `"on"`, `"off"`, or on GPUs only',
        choices=OVERLAPS,
    )
    eval_interval: int = setting(
        500,
        "steps between evaluations, also before the first and after the last step; 0 is never",
        least=0,
        most=COUNT,
    )
    eval_batches: int = setting(10, "global batches per evaluation", least=1, most=COUNT)
    spike: str = setting(
        "off",
        'what a loss or gradient norm that is not finite, or far above those before, leads to: `"skip"` (no update), '
        '`"rewind"` (back to the last checkpoint, on with later data); `"off"`: what is not finite ends the run',
        choices=SPIKES,
    )
    spike_deviations: float = setting(12.0, "robust standard deviations above the median that make a spike", least=1.0)
    spike_window: int = setting(128, "steps that the median is of; it judges from half of them on", least=8, most=2**16)
    spike_limit: int = setting(10, "spikes within `spike_window` steps after which the run ends", least=1, most=COUNT)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval: int = setting(1000, "steps between checkpoints; 0 is none between", least=0, most=COUNT)
    keep_last: int = setting(0, "newest checkpoints that are kept; 0 keeps all", least=0, most=COUNT)
    keep_every: int = setting(
        0, "checkpoints whose step is a multiple of this are kept for good; 0 is none", least=0, most=COUNT
    )


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """How a run notices that hardware, not the user, has gone wrong."""

    preflight: bool = setting(True, "check every rank's machine and links before the first step")
    hang_seconds: float = setting(
        600.0,
        "a step that takes longer ends the run, with a report of who lags; 0 is off: communication then fails after "
        "half an hour",
        least=1.0,
        most=7 * 86400.0,  # a week
        off=True,
    )
    replica_interval: int = setting(
        1000, "steps between comparisons of data-parallel replicas' weights; 0 is never", least=0, most=COUNT
    )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    interval: int = setting(
        10, "steps between logged steps; step 1 and the last are always logged", least=1, most=COUNT
    )
    health_interval: int = setting(
        100, "steps between looks at the RG-LRU's gates, likewise; 0 is never", least=0, most=COUNT
    )
    peak_tflops: float = setting(
        0.0,
        "of one device, for the MFU; 0: a GPU's known figure, elsewhere a measured one",
        least=0.0,
        default_means="known or measured",
    )
    tensorboard: bool = setting(True, "write the figures for TensorBoard")
    run_root: str = setting("runs", "where run folders go that `--run-dir` does not name")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run.

    Defaults that follow from other settings are filled in here, so that they are the same from a file and from
    Python. `model.vocabulary` alone may stay None, until `complete` finds it in the data.
    """

    model: ModelConfig = field(
        metadata=about(
            "a `preset`, or a `pattern` with the widths that its mixers use; further keys change the preset."
        )
    )
    parallel: ParallelConfig = field(
        default_factory=ParallelConfig, metadata=about("the data-parallel size is what these leave of the ranks.")
    )
    data: DataConfig = field(default_factory=DataConfig, metadata=about("what is trained and evaluated on."))
    optimizer: OptimizerConfig = field(
        default_factory=OptimizerConfig,
        metadata=about("AdamW. Norms, biases, the embedding and the RG-LRU's parameters are not decayed."),
    )
    train: TrainConfig = field(
        default_factory=TrainConfig, metadata=about("the training's length, batches, numbers and spikes.")
    )
    checkpoint: CheckpointConfig = field(
        default_factory=CheckpointConfig,
        metadata=about("besides these, a checkpoint is written at the end and when the run is told to stop."),
    )
    health: HealthConfig = field(default_factory=HealthConfig, metadata=about("how failing machines are noticed."))
    log: LogConfig = field(default_factory=LogConfig, metadata=about("what is written down, and where."))

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", _fill_schedule(self.optimizer, self.train.steps))


def _fill_schedule(optimizer: OptimizerConfig, steps: int) -> OptimizerConfig:
    """`optimizer` with the defaults that follow from its other settings and the number of steps."""
    warmup = optimizer.warmup_steps if optimizer.warmup_steps is not None else max(0, min(1000, steps // 10))
    decay = {"constant": 0, "wsd": max(1, steps // 5)}.get(optimizer.schedule, max(1, steps - warmup))
    defaults: dict[str, Any] = {
        "min_learning_rate": optimizer.learning_rate / 10,
        "warmup_steps": warmup,
        "decay_steps": decay,
    }
    missing = {key: value for key, value in defaults.items() if getattr(optimizer, key) is None}
    return dataclasses.replace(optimizer, **missing)


SECTIONS: dict[str, type] = typing.get_type_hints(Config)
TYPES: dict[str, dict[str, Any]] = {name: typing.get_type_hints(section) for name, section in SECTIONS.items()}
TYPES["model"]["preset"] = str  # a setting of files only: a Config holds what it stands for
# By "section.key".
SETTINGS: dict[str, Setting] = {
    f"{name}.{field.name}": setting_of(field)
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
}
