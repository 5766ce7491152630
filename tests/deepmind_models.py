"""DeepMind's files of models of transformers, with the names that its code has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

TOP = {"model.embed_tokens.weight": "embedder.input_embedding", "model.final_norm.weight": "final_norm.scale"}
RECURRENT = {
    "linear_x.weight": "linear_x.weight",
    "linear_x.bias": "linear_x.bias",
    "linear_y.weight": "linear_y.weight",
    "linear_y.bias": "linear_y.bias",
    "linear_out.weight": "linear_out.weight",
    "linear_out.bias": "linear_out.bias",
    "conv_1d.bias": "conv_1d.b",
    "rg_lru.recurrent_param": "rg_lru.a_param",
    "rg_lru.input_gate_weight": "rg_lru.input_gate.w",
    "rg_lru.input_gate_bias": "rg_lru.input_gate.b",
    "rg_lru.recurrent_gate_weight": "rg_lru.a_gate.w",
    "rg_lru.recurrent_gate_bias": "rg_lru.a_gate.b",
}
ATTENTION = {
    "q_proj.weight": "proj_q.weight",
    "k_proj.weight": "proj_k.weight",
    "v_proj.weight": "proj_v.weight",
    "o_proj.weight": "proj_final.weight",
    "o_proj.bias": "proj_final.bias",
}


def torch_state(model: Any) -> dict[str, Tensor]:
    """The state dict that DeepMind's PyTorch code has for a model of transformers."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    made = {name: state[theirs] for theirs, name in TOP.items()}
    for number in range(model.config.num_hidden_layers):
        layer, block = f"model.layers.{number}.", f"blocks.{number}."
        made[f"{block}temporal_pre_norm.scale"] = state[f"{layer}temporal_pre_norm.weight"]
        made[f"{block}channel_pre_norm.scale"] = state[f"{layer}channel_pre_norm.weight"]
        mixer = f"{layer}temporal_block."
        if f"{mixer}q_proj.weight" in state:
            made |= {f"{block}attention_block.{name}": state[mixer + theirs] for theirs, name in ATTENTION.items()}
        else:
            made |= {f"{block}recurrent_block.{name}": state[mixer + theirs] for theirs, name in RECURRENT.items()}
            made[f"{block}recurrent_block.conv_1d.w"] = state[f"{mixer}conv_1d.weight"][:, 0].t().contiguous()
        up = [f"{layer}mlp_block.{name}_proj" for name in ("gate", "up")]
        made[f"{block}mlp_block.ffw_up.w"] = torch.stack([state[f"{name}.weight"].t() for name in up])
        made[f"{block}mlp_block.ffw_up.b"] = torch.stack([state[f"{name}.bias"] for name in up])[:, None, None]
        for kind in ("weight", "bias"):
            made[f"{block}mlp_block.ffw_down.{kind}"] = state[f"{layer}mlp_block.down_proj.{kind}"]
    return made


def numpy_of(value: Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.contiguous().numpy()


def flax_tree(model: Any) -> dict[str, Any]:
    """The parameter tree of DeepMind's JAX code: kernels are transposed, and "blocks.0" is one key."""
    tree: dict[str, Any] = {}
    for name, value in torch_state(model).items():
        if name.endswith(".weight"):
            name, value = name.removesuffix("weight") + "kernel", value.t()
        keys = name.split(".")
        if keys[0] == "blocks":
            keys[:2] = [".".join(keys[:2])]
        place = tree
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = numpy_of(value)
    return tree


def save_orbax(tree: dict[str, Any], folder: Path) -> Path:
    import jax
    import orbax.checkpoint as orbax

    jax.config.update("jax_platforms", "cpu")
    with orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def plain(model: Any, path: Path) -> Path:
    torch.save(torch_state(model), path)
    return path
