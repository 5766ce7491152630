"""Suggestions for unknown settings: the nearest name, or the one that another training system's name stands for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names of each setting in Megatron-LM, transformers, torchtitan, nanoGPT and others.
OTHER_NAMES = {
    "model.preset": "model_name model_type model_size size arch architecture flavor",
    "model.pattern": "num_layers n_layers n_layer layers num_hidden_layers depth num_blocks blocks layer_types "
    "block_types layers_block_type",
    "model.width": "hidden_size hidden_dim hidden d_model dim model_dim n_embd embed_dim embedding_dim emb_dim",
    "model.recurrent_width": "lru_width lru_dim d_rnn rnn_width recurrent_size d_inner",
    "model.heads": "num_heads n_heads n_head nhead num_attention_heads attention_heads",
    "model.head_dim": "kv_channels head_size d_head d_kv dim_head",
    "model.mlp_expansion": "ffn_hidden_size ffn_dim intermediate_size d_ff mlp_ratio mlp_expanded_width mlp_dim "
    "expansion_factor ffn_dim_multiplier",
    "model.window": "window_size attention_window_size sliding_window local_window attention_window",
    "model.vocabulary": "vocab vocab_size n_vocab padded_vocab_size",
    "model.scale_embedding": "embeddings_scale_by_sqrt_dim scale_embeddings",
    "model.logit_soft_cap": "softcap soft_cap logits_soft_cap final_logit_softcapping",
    "model.init": "init_method initializer",
    "parallel.tensor": "tp tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size "
    "tensor_parallel_degree model_parallel_size mp",
    "parallel.pipeline": "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size "
    "pipeline_parallel_degree",
    "parallel.virtual_pipeline": "vp vpp virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage",
    "parallel.sequence_parallel": "sp enable_sequence_parallel",
    "data.train": "train_data train_data_path train_file train_files data_path data_prefix dataset train_dataset",
    "data.eval": "eval_data valid valid_data valid_data_path val val_data validation validation_file eval_dataset",
    "data.sequence_length": "seq_len seq_length max_seq_len max_seq_length max_length block_size context_length "
    "n_ctx ctx_len max_position_embeddings",
    "data.cache": "cache_dir data_cache_path",
    "data.workers": "num_workers n_workers dataloader_num_workers",
    "optimizer.learning_rate": "lr max_lr peak_lr",
    "optimizer.min_learning_rate": "min_lr lr_min final_lr",
    "optimizer.beta1": "b1 betas adam_beta1",
    "optimizer.beta2": "b2 adam_beta2",
    "optimizer.epsilon": "eps adam_eps adam_epsilon",
    "optimizer.weight_decay": "wd",
    "optimizer.clip": "grad_clip clip_grad grad_norm_clip max_grad_norm gradient_clipping gradient_clip_val "
    "max_norm clip_norm",
    "optimizer.schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type lr_decay_style",
    "optimizer.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_iters lr_warmup_steps warmup_ratio "
    "lr_warmup_fraction",
    "optimizer.decay_steps": "decay_iters lr_decay_iters lr_decay_steps",
    "optimizer.wsd_decay": "lr_wsd_decay_style wsd_decay_style",
    "train.steps": "max_steps num_steps total_steps train_steps train_iters max_iters iters iterations "
    "num_iterations epochs num_epochs num_train_epochs",
    "train.global_batch": "batch batch_size global_batch_size gbs bsz total_batch_size train_batch_size",
    "train.micro_batch": "micro_batch_size mbs per_device_train_batch_size per_device_batch_size device_batch_size "
    "local_batch_size",
    "train.seed": "random_seed rng_seed",
    "train.dtype": "precision torch_dtype mixed_precision param_dtype params_dtype bf16 fp16 fp32 bfloat16",
    "train.recompute": "activation_checkpointing gradient_checkpointing activation_checkpoint "
    "checkpoint_activations recompute_granularity recompute_modules recompute_method remat",
    "train.cuda_graphs": "enable_cuda_graph cuda_graph_impl cuda_graph_scope external_cuda_graph",
    "train.overlap": "overlap_grad_reduce overlap_param_gather",
    "train.eval_interval": "eval_steps eval_every eval_freq val_interval val_check_interval",
    "train.eval_batches": "eval_iters val_batches limit_val_batches",
    "checkpoint.interval": "save_interval save_steps save_every ckpt_interval checkpoint_interval checkpoint_every",
    "checkpoint.keep_last": "save_total_limit keep_latest_k max_to_keep",
    "health.hang_seconds": "timeout timeout_seconds nccl_timeout distributed_timeout_minutes ddp_timeout",
    "log.interval": "log_interval log_every log_freq logging_steps log_every_n_steps",
    "log.tensorboard": "use_tensorboard enable_tensorboard tensorboard_dir",
    "log.run_root": "out_dir output_dir save_dir log_dir logdir root_dir",
}
# Settings of others that have no counterpart here, by what they follow from.
ABSENT = {
    "data parallelism takes the ranks that parallel.tensor x parallel.pipeline leave": (
        "dp dp_size data_parallel data_parallel_size data_parallel_degree dp_replicate"
    ),
    "micro-batches per step are train.global_batch / (train.micro_batch x data-parallel size)": (
        "gradient_accumulation_steps gradient_accumulation grad_accum grad_accum_steps accumulation_steps "
        "accumulate_grad_batches"
    ),
    "sequences are not split over ranks; parallel.sequence_parallel shards activations between blocks": (
        "cp cp_size context_parallel context_parallel_size"
    ),
    "multi-query attention has one key/value head": "num_key_value_heads num_query_groups n_kv_heads kv_heads",
}
OTHER_SECTIONS = {
    "model": "architecture network",
    "parallel": "parallelism distributed layout",
    "data": "dataset datasets",
    "optimizer": "optim optimiser lr_scheduler scheduler",
    "train": "training trainer",
    "checkpoint": "checkpoints checkpointing ckpt save",
    "log": "logging logger metrics",
}


def _reversed(names: dict[str, str]) -> dict[str, str]:
    return {other: ours for ours, others in names.items() for other in others.split()}


_SETTINGS, _ABSENT, _SECTIONS = _reversed(OTHER_NAMES), _reversed(ABSENT), _reversed(OTHER_SECTIONS)


def _normal(name: str) -> str:
    return name.lower().replace("-", "_").strip()


def suggest_setting(section: str, key: str, known: Iterable[str]) -> str:
    """A hint for "section.key", which is not one of the `known` settings; either part may be wrong, or ""."""
    known, key = list(known), _normal(key)
    if key in _ABSENT:
        return _ABSENT[key]

    def likeness(setting: str) -> float:
        its_section, _, its_key = setting.partition(".")
        return difflib.SequenceMatcher(None, key, its_key).ratio() + 0.1 * (its_section == section)

    if key in _SETTINGS:
        return f"did you mean {_SETTINGS[key]}?"
    exact = [setting for setting in known if setting.partition(".")[2] == key]
    return f"did you mean {max(exact or known, key=likeness)}?"


def suggest_section(section: str, known: Iterable[str]) -> str:
    """The one of the `known` sections that `section` most likely stands for."""
    section = _normal(section)
    return _SECTIONS.get(section) or difflib.get_close_matches(section, known, n=1, cutoff=0.0)[0]
