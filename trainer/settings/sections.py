"""The sections of a run's settings, with the default, meaning and accepted values of each setting."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from griffin.kernels.backends import ATTENTION_BACKENDS, AUTO, BACKENDS
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
        '`"PREFIX"` of a data set built by `griffin data build`, or a list of `"PREFIX"` or `"WEIGHT PREFIX"`; default '
        "weights are proportional to tokens",
    )
    eval: EvalSets = field(
        default=(),
        hash=False,  # a dict has no hash
        metadata=about(
            'held-out data, stated likewise; a table `[data.eval]` of `NAME = ["PREFIX"]` names several sets, each '
            "with figures of its own; `--data.eval.NAME PREFIX` adds or replaces one, `none` removes it",
            default_means='`"none"`',
        ),
    )
    sequence_length: int = setting(2048, "tokens per sequence", least=2, most=2**24)
    cache: str = setting("", "folder of the sample index", default_means="beside the data")
    workers: int = setting(2, "data loader processes per rank; 0 loads data in the rank itself", least=0, most=256)

    @property
    def eval_sets(self) -> dict[str, Blend]:
        """The held-out sets by name; the name of a single, unnamed one is ""."""
        if isinstance(self.eval, dict):
            return self.eval
        return {"": self.eval} if self.eval else {}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; lengths are in optimizer steps.

    Settings that are None get a default that depends on other settings when they become part of a `Config`.
    """

    learning_rate: float = setting(3e-4, "peak learning rate", above=0.0)
    min_learning_rate: float = setting(
        None, "learning rate at the end of the decay", least=0.0, default_means="a tenth of `learning_rate`"
    )
    beta1: float = setting(0.9, "decay rate of Adam's first moment, the mean of gradients", least=0.0, below=1.0)
    beta2: float = setting(
        0.95, "decay rate of Adam's second moment, the mean of squared gradients", least=0.0, below=1.0
    )
    epsilon: float = setting(1e-8, "added to the square root of the second moment", above=0.0)
    weight_decay: float = setting(0.1, "decoupled weight decay; 0 is off", least=0.0, off=True)
    clip: float = setting(1.0, "maximum gradient norm of the whole model; 0 is off", least=0.0, off=True)
    schedule: str = setting(
        "cosine",
        'learning-rate schedule; or `"linear"`, `"wsd"` (warm-up, stable, decay), `"constant"`',
        choices=SCHEDULES,
    )
    warmup_steps: int = setting(
        None,
        "steps of linear warm-up from 0",
        least=0,
        most=COUNT,
        default_means="a tenth of `train.steps`, at most 1000",
    )
    decay_steps: int = setting(
        None,
        "steps of the decay: after the warm-up, or for `wsd` at the end; later steps keep `min_learning_rate`",
        least=0,
        most=COUNT,
        default_means="all after the warm-up; for `wsd` a fifth of `train.steps`",
    )
    decay_end: int = setting(0, "step at which the decay of `wsd` ends; 0 is the last step", least=0, most=COUNT)
    wsd_decay: str = setting(
        "linear", 'shape of the decay of `wsd`; or `"cosine"`, `"exponential"`, `"minus_sqrt"`', choices=WSD_DECAYS
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = setting(10_000, "optimizer steps", least=1, most=COUNT)
    global_batch: int = setting(256, "sequences per step over all ranks", least=1, most=2**24)
    micro_batch: int = setting(1, "sequences per micro-batch", least=1, most=2**20)
    seed: int = setting(0, "random seed of initial weights and sample order", least=0, most=LAST_SEED - 1)
    dtype: str = setting(
        "bfloat16",
        'compute dtype, of parameters and activations; or `"float32"` (`"bf16"` and `"fp32"` are accepted); master '
        "weights and gradients are float32",
        choices=DTYPES,
    )
    recompute: str = setting(
        "none",
        'activation recomputation: what each block computes again in its backward pass, `"gather"` (all-gathers inputs '
        'of linears again with sequence parallelism, which all that follow do too), `"states"` (of the recurrence), '
        '`"norms+gelu"` (the outputs of the norms and of the gated GeLU: no matrix product), `"mixer"`, `"mlp"` or '
        '`"block"`',
        choices=RECOMPUTES,
    )
    z_loss: float = setting(
        0.0,
        "factor of the squared log-sum-exp of the logits in the trained loss; reported losses are without it; 0 is off",
        least=0.0,
    )
    kernels: str = setting(
        AUTO,
        'backend of all operators but attention: `"triton"` (GPUs), `"cpu"` (any machine), `"reference"` (a loop)',
        choices=(AUTO, *BACKENDS),
    )
    attention: str = setting(
        AUTO,
        'backend of attention: `"flash"` (the package flash_attn_interface, FlashAttention 3), `"varlen"` (PyTorch\'s '
        'varlen_attn), `"flex"` (FlexAttention), `"sdpa"` (any machine); by default the first of them that can run, '
        "with bitwise reproducible gradients",
        choices=(AUTO, *ATTENTION_BACKENDS),
    )
    overlap: str = setting(
        "auto",
        'overlap data-parallel communication with computation: `"on"`, `"off"`, or on GPUs only',
        choices=OVERLAPS,
    )
    cuda_graphs: bool = setting(
        False,
        "replay forward and backward passes as a CUDA graph, for small models on GPUs; without pipelines, overlapped "
        "communication, observations of the RG-LRU, profiles, and the comparison of ranks' own work",
    )
    eval_interval: int = setting(
        500,
        "steps between evaluations, which also run before the first and after the last step; 0 is never",
        least=0,
        most=COUNT,
    )
    eval_batches: int = setting(10, "global batches per evaluation", least=1, most=COUNT)
    spike: str = setting(
        "off",
        'response to a loss or gradient norm that is not finite, or far above earlier ones: `"skip"` skips the update, '
        '`"rewind"` returns to the last checkpoint and continues with later data; with `"off"`, only a value that is '
        "not finite matters, and ends the run",
        choices=SPIKES,
    )
    spike_deviations: float = setting(
        12.0, "robust standard deviations above the median from which a value is a spike", least=1.0
    )
    spike_window: int = setting(
        128, "steps over which the median is taken; detection starts after half of them", least=8, most=2**16
    )
    spike_limit: int = setting(
        10, "most spikes within `spike_window` steps; one more ends the run", least=1, most=COUNT
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval: int = setting(1000, "steps between checkpoints; 0 saves at the end only", least=0, most=COUNT)
    keep_last: int = setting(0, "number of newest checkpoints to keep; 0 keeps all", least=0, most=COUNT)
    keep_every: int = setting(
        0, "keep checkpoints whose step is a multiple of this for good; 0 is none", least=0, most=COUNT
    )


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Detection of failing hardware."""

    preflight: bool = setting(True, "check every rank's machine and links before the first step")
    hang_seconds: float = setting(
        600.0,
        "a step that takes longer ends the run, with a report of the ranks that lag; 0 is off: communication then "
        "times out after half an hour",
        least=1.0,
        most=7 * 86400.0,  # a week
        off=True,
    )
    replica_interval: int = setting(
        1000, "steps between comparisons of replicated weights; 0 is never", least=0, most=COUNT
    )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    interval: int = setting(
        10,
        "steps between logged steps; the first one after a start and the last are always logged",
        least=1,
        most=COUNT,
    )
    health_interval: int = setting(
        100, "steps between observations of the RG-LRU's gates, likewise; 0 is never", least=0, most=COUNT
    )
    peak_tflops: float = setting(
        0.0,
        "peak TFLOP/s of one device, for the MFU; 0 takes the known figure of a GPU, or measures",
        least=0.0,
        default_means="known or measured",
    )
    tensorboard: bool = setting(True, "write the figures to TensorBoard too")
    profile_steps: tuple[int, ...] = setting(
        (), "steps of which torch.profiler writes a trace, and on GPUs a memory snapshot, to `profiles/` of the run"
    )
    profile_ranks: tuple[int, ...] = setting((0,), "ranks that write them")
    run_root: str = setting("runs", "folder of the run folders that `--run-dir` does not name")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run.

    Defaults that depend on other settings are filled in here, so that they are the same in a file and in Python. Only
    `model.vocabulary` may stay None, until `complete` takes it from the data.
    """

    model: ModelConfig = field(
        metadata=about(
            "a `preset`, or a `pattern` with the widths that its mixers use; further keys change the preset."
        )
    )
    parallel: ParallelConfig = field(
        default_factory=ParallelConfig,
        metadata=about("the data-parallel size is the number of ranks over tensor x pipeline."),
    )
    data: DataConfig = field(default_factory=DataConfig, metadata=about("training and held-out data."))
    optimizer: OptimizerConfig = field(
        default_factory=OptimizerConfig,
        metadata=about("AdamW. Norms, biases, the embedding and the RG-LRU's parameters are not decayed."),
    )
    train: TrainConfig = field(
        default_factory=TrainConfig, metadata=about("length, batch sizes, numerics, evaluation and loss spikes.")
    )
    checkpoint: CheckpointConfig = field(
        default_factory=CheckpointConfig,
        metadata=about("a checkpoint is also written at the end of the run, and when it is stopped on request."),
    )
    health: HealthConfig = field(
        default_factory=HealthConfig, metadata=about("detection of hangs and failing hardware.")
    )
    log: LogConfig = field(default_factory=LogConfig, metadata=about("metrics and the run folder."))

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", _fill_schedule(self.optimizer, self.train.steps))


def _fill_schedule(optimizer: OptimizerConfig, steps: int) -> OptimizerConfig:
    """`optimizer` with the defaults that depend on its other settings and the number of steps."""
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
TYPES["model"]["preset"] = str  # only in files: a Config holds the settings that it stands for
# Setting by "section.key".
SETTINGS: dict[str, Setting] = {
    f"{name}.{field.name}": setting_of(field)
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
}
