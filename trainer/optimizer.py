"""AdamW and the learning-rate schedule, built on megatron-core's."""

from __future__ import annotations

from collections.abc import Sequence

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from griffin.parallel import megatron_device
from griffin.trainer.settings.sections import Config

_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}


def build_optimizer(
    config: Config, chunks: Sequence[DistributedDataParallel], dtype: torch.dtype, *, overlap: bool
) -> MegatronOptimizer:
    """Build AdamW with states sharded over data-parallel ranks (ZeRO-1), and float32 master weights for bfloat16.

    Parameters with the attribute `no_weight_decay` (RG-LRU parameters, embedding, norms, biases) are not decayed.
    """
    settings = config.optimizer
    with megatron_device.cuda_type_names():
        return get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=settings.learning_rate,
                min_lr=settings.min_learning_rate,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.epsilon,
                clip_grad=settings.clip,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
                overlap_param_gather=overlap,
            ),
            list(chunks),
            config_overrides={ParamKey(attr="no_weight_decay"): {"wd_mult": 0.0}},
            use_gloo_process_groups=False,
        )


def schedule_end(config: Config) -> int:
    """The step at which the learning rate reaches `min_learning_rate`; the last step if it does not decay."""
    settings = config.optimizer
    if settings.schedule == "constant":
        return config.train.steps
    if settings.schedule == "wsd":
        return settings.decay_end or config.train.steps
    return settings.warmup_steps + settings.decay_steps


def build_schedule(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the schedule: linear warm-up from 0, then the configured decay; later steps keep `min_learning_rate`.

    Steps count from 1: the first step trains with learning_rate / warmup_steps.
    """
    settings = config.optimizer
    wsd = settings.schedule == "wsd"
    last = schedule_end(config)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(last, settings.warmup_steps + 1),
        lr_decay_style=_STYLES[settings.schedule],
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=config.train.steps,
        wd_incr_style="constant",
        wsd_decay_steps=settings.decay_steps if wsd else None,
        lr_wsd_decay_style=settings.wsd_decay if wsd else None,
    )


def optimizer_name() -> str:
    """The Adam implementation that megatron-core uses: fused, of Transformer Engine or Apex, or else PyTorch's."""
    adam = megatron_optimizer.Adam
    return f"{adam.__module__.split('.')[0]} {adam.__name__}"
