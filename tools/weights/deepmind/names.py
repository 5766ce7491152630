"""Map canonical names to the tensors of DeepMind's RecurrentGemma code, and derive the model from their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig
from griffin.tools.weights.axis_map import AxisMap, ExtraAxis, identity_axes
from griffin.trainer.checkpoint.zarr_io import CheckpointError

EMBEDDING = "embedder.input_embedding"
# Gemma's tokenizer has 256,000 ids; the remaining rows of the published tables are padding.
PADDED_ROWS, PUBLISHED_VOCABULARY = 256_128, 256_000

_PARTS = {
    "mixer_norm.weight": "temporal_pre_norm.scale",
    "mlp_norm.weight": "channel_pre_norm.scale",
    "recurrent.conv.weight": "recurrent_block.conv_1d.w",
    "recurrent.conv.bias": "recurrent_block.conv_1d.b",
    "recurrent.input_gate.weight": "recurrent_block.rg_lru.input_gate.w",
    "recurrent.input_gate.bias": "recurrent_block.rg_lru.input_gate.b",
    "recurrent.recurrence_gate.weight": "recurrent_block.rg_lru.a_gate.w",
    "recurrent.recurrence_gate.bias": "recurrent_block.rg_lru.a_gate.b",
    "recurrent.decay": "recurrent_block.rg_lru.a_param",
}
_LINEARS = {
    "mlp.down": "mlp_block.ffw_down",
    "attention.q": "attention_block.proj_q",
    "attention.k": "attention_block.proj_k",
    "attention.v": "attention_block.proj_v",
    "attention.out": "attention_block.proj_final",
    "recurrent.lin_x": "recurrent_block.linear_x",
    "recurrent.lin_y": "recurrent_block.linear_y",
    "recurrent.out": "recurrent_block.linear_out",
}
# Gate and up projection are stacked in one tensor, [2, D, F], with a bias [2, 1, 1, F].
_UNSTACKED = {"mlp.gate": 0, "mlp.up": 1}


def deepmind_place(name: str, dimensions: int, flax: bool) -> tuple[str, AxisMap]:
    """Return the DeepMind name of a canonical tensor of this many dimensions, and the map of its axes.

    `flax`: for the parameter tree of the JAX code, whose linear weights are [in, out] kernels.
    """
    if name == "embedding.weight":
        return EMBEDDING, identity_axes(2)
    if name == "final_norm.weight":
        return "final_norm.scale", identity_axes(1)
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    assert match, name
    block, rest = match.groups()
    if rest in _PARTS:
        return f"{block}.{_PARTS[rest]}", identity_axes(dimensions)
    part, _, suffix = rest.rpartition(".")
    if part in _UNSTACKED:
        stacked = ExtraAxis(2, _UNSTACKED[part])
        if suffix == "bias":
            return f"{block}.mlp_block.ffw_up.b", AxisMap((stacked, ExtraAxis(), ExtraAxis(), 0))
        return f"{block}.mlp_block.ffw_up.w", AxisMap((stacked, 1, 0))
    if suffix == "weight" and flax:
        return f"{block}.{_LINEARS[part]}.kernel", AxisMap((1, 0))
    return f"{block}.{_LINEARS[part]}.{suffix}", identity_axes(dimensions)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Settings of the model that DeepMind's files do not store."""

    window: int = 2048  # its attention_window_size
    soft_cap: float = 30.0  # its logits_soft_cap; 0 is off
    scale_embedding: bool = True
    vocabulary: int | None = None  # rows of the table that are tokens; None: all, but 256,000 of 256,128


class _Shapes:
    """Shapes by name; a missing or wrong one raises CheckpointError."""

    def __init__(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._path, self._shapes = path, shapes

    def get(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"{self._path}: {name} is missing: these are not the weights of RecurrentGemma")
        shape = self._shapes[name]
        if len(shape) != dimensions or 0 in shape:
            raise CheckpointError(f"{self._path}: {name} is {list(shape)}, must have {dimensions} dimensions")
        return shape


def model_of_shapes(path: str, shapes: Mapping[str, tuple[int, ...]], flax: bool, options: ModelOptions) -> ModelConfig:
    """Derive the model from names and shapes of its tensors. Not all tensors are checked against it here.

    Raises CheckpointError naming a tensor, and ValueError naming an option.
    """
    known = _Shapes(path, shapes)
    rows, width = known.get(EMBEDDING, 2)
    pattern = _pattern(path, shapes)
    expanded = known.get("blocks.0.mlp_block.ffw_up.w", 3)[2]
    if expanded % width:
        raise CheckpointError(f"{path}: the MLP width {expanded} must be a multiple of the model's width {width}")
    recurrent_width, gate_blocks = width, 1
    if RECURRENT in pattern:
        block = f"blocks.{pattern.index(RECURRENT)}.recurrent_block.rg_lru"
        (recurrent_width,) = known.get(f"{block}.a_param", 1)
        gate_blocks = known.get(f"{block}.a_gate.w", 3)[0]
        if recurrent_width % gate_blocks:
            raise CheckpointError(f"{path}: {block}.a_gate.w has {gate_blocks} blocks; must divide {recurrent_width}")
    heads, head_dim = gate_blocks, max(1, width // gate_blocks)
    if ATTENTION in pattern:
        block = f"blocks.{pattern.index(ATTENTION)}.attention_block"
        suffix, out = ("kernel", 1) if flax else ("weight", 0)
        head_dim = known.get(f"{block}.proj_k.{suffix}", 2)[out]
        heads = max(1, known.get(f"{block}.proj_q.{suffix}", 2)[out] // head_dim)
        if head_dim % 4:
            raise CheckpointError(f"{path}: {block}.proj_k makes heads of {head_dim}; must be a multiple of 4")
    return ModelConfig(
        pattern=pattern,
        width=width,
        recurrent_width=recurrent_width,
        heads=heads,
        head_dim=head_dim,
        gate_blocks=gate_blocks if RECURRENT in pattern else heads,
        mlp_expansion=expanded // width,
        window=_window(options.window),
        vocabulary=_vocabulary(options.vocabulary, rows),
        scale_embedding=options.scale_embedding,
        logit_soft_cap=_soft_cap(options.soft_cap),
    )


def _pattern(path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    mixers: dict[int, str] = {}
    for name in shapes:
        if match := re.match(r"blocks\.(\d+)\.(recurrent|attention)_block\.", name):
            mixers[int(match[1])] = {"recurrent": RECURRENT, "attention": ATTENTION}[match[2]]
    missing = [number for number in range(max(mixers, default=0) + 1) if number not in mixers]
    if missing:
        raise CheckpointError(
            f"{path}: blocks.{missing[0]} has no recurrent_block and no attention_block: these are not all the weights "
            "of RecurrentGemma"
        )
    return tuple(mixers[number] for number in sorted(mixers))


def _window(stated: int) -> int:
    """Convert DeepMind's window to ours, which counts the query's own key: their code sees one key more."""
    if stated < 1:
        raise ValueError(f"--window {stated}: must be at least 1")
    return stated + 1


def _soft_cap(stated: float) -> float:
    if not 0 <= stated < float("inf"):
        raise ValueError(f"--soft-cap {stated:g}: must be 0 (off) or more")
    return stated


def _vocabulary(stated: int | None, rows: int) -> int:
    if stated is None:
        return PUBLISHED_VOCABULARY if rows == PADDED_ROWS else rows
    if not 1 <= stated <= rows:
        raise ValueError(f"--vocabulary {stated}: must be 1 to {rows}, the rows of {EMBEDDING}")
    return stated
