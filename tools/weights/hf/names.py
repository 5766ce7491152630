"""Map canonical tensors and settings to those of transformers' RecurrentGemma."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig
from griffin.tools.weights.axis_map import AxisMap, ExtraAxis, identity_axes

if TYPE_CHECKING:
    from torch import Tensor

_TOP = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.final_norm.weight"}
_BLOCK = {
    "mixer_norm": "temporal_pre_norm",
    "mlp_norm": "channel_pre_norm",
    "mlp.gate": "mlp_block.gate_proj",
    "mlp.up": "mlp_block.up_proj",
    "mlp.down": "mlp_block.down_proj",
    "attention.q": "temporal_block.q_proj",
    "attention.k": "temporal_block.k_proj",
    "attention.v": "temporal_block.v_proj",
    "attention.out": "temporal_block.o_proj",
    "recurrent.lin_x": "temporal_block.linear_x",
    "recurrent.lin_y": "temporal_block.linear_y",
    "recurrent.out": "temporal_block.linear_out",
    "recurrent.conv": "temporal_block.conv_1d",
    "recurrent.input_gate": "temporal_block.rg_lru.input_gate_",
    "recurrent.recurrence_gate": "temporal_block.rg_lru.recurrent_gate_",
    "recurrent.decay": "temporal_block.rg_lru.recurrent_param",
}


def transformers_name(name: str) -> str:
    """Return the transformers name: `blocks.3.mlp.up.bias` -> `model.layers.3.mlp_block.up_proj.bias`."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blocks\.(\d+)\.(.*?)(?:\.(weight|bias))?", name)
    assert match, name
    part, suffix = _BLOCK[match[2]], match[3]
    if suffix and not part.endswith("_"):
        part += "."
    return f"model.layers.{match[1]}.{part}{suffix or ''}"


def transformers_axes(name: str, dimensions: int) -> AxisMap:
    """Return the map of axes from a canonical tensor of this many dimensions to that of transformers."""
    if name.endswith(".conv.weight"):  # [taps, R] -> [R, 1, taps]
        return AxisMap((1, ExtraAxis(), 0))
    return identity_axes(dimensions)


def from_transformers(tensors: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Return the canonical tensors `names` of a RecurrentGemma state dict, or of its gradients by the same names."""
    found = {}
    for name in names:
        value = tensors[transformers_name(name)]
        # [R, 1, taps] -> [taps, R]
        found[name] = value.squeeze(1).t().contiguous() if name.endswith("conv.weight") else value
    return found


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the RecurrentGemma state dict for canonical tensors, without the tied output projection."""
    return {
        transformers_name(name): value.t().unsqueeze(1).contiguous() if name.endswith("conv.weight") else value
        for name, value in tensors.items()
    }


def gate_heads(model: ModelConfig) -> int:
    """Return num_attention_heads for a model, which in transformers is also the number of its gates' diagonal blocks.

    If gate blocks are a multiple of the heads, adjacent ones form one block that is zero outside of them: the same
    function. Without attention, the number of heads is free. Raises ValueError in all other cases.
    """
    if RECURRENT not in model.pattern:
        return model.heads
    if ATTENTION not in model.pattern:
        return model.gate_blocks
    if model.gate_blocks % model.heads:
        raise ValueError(f"model.gate_blocks = {model.gate_blocks}: must be a multiple of model.heads = {model.heads}")
    return model.heads


def differences(model: ModelConfig) -> list[str]:
    """List the settings that transformers cannot express, each with its value and what it must be; empty if none."""
    found = []
    if foreign := set(model.pattern) - {RECURRENT, ATTENTION}:
        found.append(f"model.pattern = {min(foreign)!r}: must hold {RECURRENT} and {ATTENTION} only")
    if model.logit_soft_cap <= 0:
        found.append(f"model.logit_soft_cap = {model.logit_soft_cap:g}: must be above 0")
    if not model.scale_embedding:
        found.append("model.scale_embedding = false: must be true")
    try:
        gate_heads(model)
    except ValueError as error:
        found.append(str(error))
    return found


def transformers_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of RecurrentGemmaConfig for the same model. Raises ValueError if it cannot express it."""
    if found := differences(model):
        raise ValueError("; ".join(found))
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "intermediate_size": 2 * model.mlp_width,  # halved inside
        "num_hidden_layers": model.blocks,
        "num_attention_heads": gate_heads(model),
        "num_key_value_heads": 1,
        "head_dim": model.head_dim,
        "lru_width": model.recurrent_width,
        "attention_window_size": model.window,
        "logits_soft_cap": model.logit_soft_cap,
        "block_types": list(model.pattern),
        "tie_word_embeddings": True,
    }
