"""Read the config.json of transformers' RecurrentGemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from griffin.parallel.config import ATTENTION, CONV_WIDTH, RECURRENT, ModelConfig
from griffin.trainer.settings.presets import repeat

MODEL_TYPE = "recurrent_gemma"
ARCHITECTURE = "RecurrentGemmaForCausalLM"
# Keys that must have this value, which is also their default: this project computes nothing else.
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
SAME: dict[str, Any] = {
    "conv1d_width": CONV_WIDTH,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_ONLY = SAME | {"embeddings_scale_by_sqrt_dim": True, "quantization_config": None}
# Defaults: values that the published models share. Sizes in which they differ must be stated.
_DEFAULTS: dict[str, Any] = {"vocab_size": 256_000, "attention_window_size": 2048, "logits_soft_cap": 30.0}
_BLOCK_TYPES = (RECURRENT, RECURRENT, ATTENTION)
_MOST_REPEATS = 100  # of block_types in transformers
_MOST = {"num_attention_heads": 2**12, "head_dim": 2**12}
_MOST_OF_OTHERS = 2**24


def model_of_config(values: Mapping[str, Any]) -> ModelConfig:
    """Return the model that a config.json describes. Raises ValueError naming key, value and what is accepted."""
    if values.get("model_type") != MODEL_TYPE:
        _refuse("model_type", values.get("model_type"), f"must be {MODEL_TYPE!r}")
    for key, only in _ONLY.items():
        if (found := values.get(key, only)) != only:
            _refuse(key, found, f"must be {only!r}, or left out")
    _check_rope(values)
    heads = _integer(values, "num_attention_heads")
    if _integer(values, "num_key_value_heads", heads) != 1:
        _refuse("num_key_value_heads", values.get("num_key_value_heads"), f"must be 1 (left out, it is {heads})")
    width = _integer(values, "hidden_size")
    doubled = _integer(values, "intermediate_size")
    if doubled % (2 * width):
        _refuse("intermediate_size", doubled, f"must be a multiple of 2 x hidden_size = {2 * width}")
    cap = values.get("logits_soft_cap", _DEFAULTS["logits_soft_cap"])
    if not isinstance(cap, int | float) or isinstance(cap, bool) or not 0 < cap <= 1e30:
        _refuse("logits_soft_cap", cap, "must be above 0, and at most 1e30")
    pattern = _pattern(values)
    recurrent_width = _integer(values, "lru_width", width)
    if RECURRENT in pattern and recurrent_width % heads:
        _refuse("lru_width", recurrent_width, f"must be a multiple of num_attention_heads = {heads}")
    head_dim = _integer(values, "head_dim", width // heads)
    if ATTENTION in pattern and head_dim % 4:
        _refuse("head_dim", head_dim, "must be a multiple of 4 (left out, it is hidden_size / num_attention_heads)")
    return ModelConfig(
        pattern=pattern,
        width=width,
        recurrent_width=recurrent_width,
        heads=heads,
        head_dim=head_dim,
        gate_blocks=heads,
        mlp_expansion=doubled // (2 * width),
        window=_window(values),
        vocabulary=_integer(values, "vocab_size", _DEFAULTS["vocab_size"]),
        scale_embedding=True,
        logit_soft_cap=float(cap),
    )


def _refuse(key: str, value: Any, accepted: str) -> NoReturn:
    raise ValueError(f"{key} = {value!r}: {accepted}")


def _integer(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    most = _MOST.get(key, _MOST_OF_OTHERS)
    if type(value) is not int or not 1 <= value <= most:
        _refuse(key, value, f"must be an integer from 1 to {most}")
    return value


def _window(values: Mapping[str, Any]) -> int:
    """Read the window, under either of its names. Raises ValueError if both are there and differ."""
    window = _integer(values, "attention_window_size", _DEFAULTS["attention_window_size"])
    alias = _integer(values, "sliding_window", window)
    if alias != window and "attention_window_size" in values:
        _refuse("sliding_window", alias, f"must be attention_window_size = {window}, or left out")
    return alias


def _check_rope(values: Mapping[str, Any]) -> None:
    """Check the RoPE settings: top-level keys in older files, rope_parameters or rope_scaling in newer ones."""
    for key, only in ROPE.items():
        if (found := values.get(key, only)) != only:
            _refuse(key, found, f"must be {only!r}, or left out")
    accepted = ROPE | {"type": "default"}  # an older name of rope_type
    for name in ("rope_parameters", "rope_scaling"):
        group = {} if values.get(name) is None else values[name]
        if not isinstance(group, Mapping):
            _refuse(name, group, "must be a table")
        for key, found in group.items():
            if key not in accepted:
                _refuse(f"{name}.{key}", found, f"must be left out; known are {', '.join(accepted)}")
            if found != accepted[key]:
                _refuse(f"{name}.{key}", found, f"must be {accepted[key]!r}, or left out")


def _pattern(values: Mapping[str, Any]) -> tuple[str, ...]:
    unit = values.get("block_types")
    if unit is None:
        unit = _BLOCK_TYPES
    if not isinstance(unit, list | tuple) or not unit or any(mixer not in (RECURRENT, ATTENTION) for mixer in unit):
        _refuse("block_types", unit, f"must be a list of {RECURRENT!r} and {ATTENTION!r}")
    blocks = _integer(values, "num_hidden_layers")
    if blocks > _MOST_REPEATS * len(unit):
        _refuse("num_hidden_layers", blocks, f"must be at most {_MOST_REPEATS} times the {len(unit)} of block_types")
    return repeat(tuple(unit), blocks)
