"""The operations of a model at the sizes that one tensor-parallel rank has. This module imports torch.

Dimension names: T positions, B sequences, N = T B, D model width, F MLP width, R recurrent width, V vocabulary, H query
heads of hd dims; F, R, V and H are a rank's part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch

from griffin.kernels.backends import ATTENTION_BACKENDS, AUTO
from griffin.kernels.conv1d import TRITON_WIDTH
from griffin.kernels.gated_gelu import gated_gelu
from griffin.kernels.linear_cross_entropy import linear_cross_entropy
from griffin.kernels.linear_scan import linear_scan
from griffin.kernels.local_attention import AttentionMask, attention_mask, multi_query_attention, resolve_backend
from griffin.kernels.products import add_product
from griffin.kernels.recurrent_block import recurrent_block
from griffin.kernels.rms_norm import add_rms_norm, rms_norm
from griffin.kernels.rotary import rotary_cos_sin, rotary_qkv
from griffin.parallel.config import ModelConfig
from griffin.tools.bench.kernels.operations import Arguments, Inputs, Operation, Random, Tensors


@dataclass(frozen=True, kw_only=True)
class RankShape:
    """A model, and the micro-batch of one of its tensor-parallel ranks."""

    name: str
    model: ModelConfig
    tensor: int
    steps: int  # T
    batch: int  # B

    @property
    def tokens(self) -> tuple[int, int]:
        return self.steps, self.batch

    @property
    def mlp_width(self) -> int:
        return self.model.mlp_width // self.tensor

    @property
    def recurrent_width(self) -> int:
        return self.model.recurrent_width // self.tensor

    @property
    def heads(self) -> int:
        return self.model.heads // self.tensor

    @property
    def vocabulary(self) -> int:
        return self.model.padded_vocabulary // self.tensor

    def __str__(self) -> str:
        return f"{self.name}, tensor {self.tensor}: T {self.steps}, B {self.batch}"


def _make_norm(shape: RankShape, random: Random) -> Inputs:
    full = (*shape.tokens, shape.model.width)
    leaves = {"x": random.normal(*full), "weight": random.parameter(full[-1])}
    return random.inputs(leaves, grads={"y": random.normal(*full)})


def _norm(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    return {"y": rms_norm(**inputs, backend=backend)}


def _make_add_norm(shape: RankShape, random: Random) -> Inputs:
    full = (*shape.tokens, shape.model.width)
    leaves = {name: random.normal(*full) for name in ("x", "branch")}
    leaves |= {name: random.parameter(full[-1]) for name in ("weight", "bias")}
    return random.inputs(leaves, grads={name: random.normal(*full) for name in ("sum", "y")})


def _add_norm(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    total, y = add_rms_norm(**inputs, backend=backend)
    return {"sum": total, "y": y}


def _make_gated_gelu(shape: RankShape, random: Random) -> Inputs:
    leaves = {"x": random.normal(*shape.tokens, 2 * shape.mlp_width), "bias": random.parameter(2 * shape.mlp_width)}
    return random.inputs(leaves, grads={"y": random.normal(*shape.tokens, shape.mlp_width)})


def _gated_gelu(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    return {"y": gated_gelu(**inputs, backend=backend)}


def _make_rotary(shape: RankShape, random: Random) -> Inputs:
    head_dim = shape.model.head_dim
    positions = torch.arange(shape.steps, device=random.device)[:, None].expand(shape.tokens)
    cos, sin = rotary_cos_sin(positions, head_dim)
    grads = {
        "q": random.normal(*shape.tokens, shape.heads, head_dim),
        "k": random.normal(*shape.tokens, head_dim),
        "v": random.normal(*shape.tokens, head_dim),
    }
    qkv = random.normal(*shape.tokens, (shape.heads + 2) * head_dim)
    return random.inputs({"qkv": qkv}, grads=grads, fixed={"cos": cos, "sin": sin, "heads": shape.heads})


def _rotary(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    turned = rotary_qkv(inputs["qkv"], (inputs["cos"], inputs["sin"]), inputs["heads"], backend=backend)
    return dict(zip("qkv", turned, strict=True))


def _make_attention(shape: RankShape, random: Random) -> Inputs:
    head_dim = shape.model.head_dim
    leaves = {
        "q": random.normal(*shape.tokens, shape.heads, head_dim),
        "k": random.normal(*shape.tokens, head_dim),
        "v": random.normal(*shape.tokens, head_dim),
    }
    grads = {"y": random.normal(*shape.tokens, shape.heads * head_dim)}
    return random.inputs(leaves, grads=grads, fixed={"window": shape.model.window})


def _attention(inputs: Arguments, backend: str, chunk: int | None, attention: str) -> Tensors:
    q = inputs["q"]
    mask = _mask(*q.shape[:2], inputs["window"], q.device, "sdpa" if backend == "cpu" else attention)
    return {"y": multi_query_attention(q, inputs["k"], inputs["v"], mask)}


@cache
def _mask(steps: int, batch: int, window: int, device: torch.device, attention: str) -> AttentionMask:
    """Return the mask of sequences of one document each. A model makes one for all blocks, so it is not timed."""
    documents = torch.zeros(batch, steps, dtype=torch.int64, device=device)
    return attention_mask(documents, window, backend=AUTO if device.type == "meta" else attention)


def _refuses_attention(shape: RankShape, dtype: torch.dtype, device: torch.device, attention: str) -> str | None:
    if attention == "sdpa" and device.type == "cuda":
        return "it is for CPUs"
    try:
        resolve_backend(attention, device, dtype, shape.model.head_dim)
    except ValueError as error:
        return str(error)
    return None


def _attention_with(backend: str) -> Operation:
    """Return attention with a backend. Its floor is what FlexAttention states, which is counted for all of them."""
    run = partial(_attention, attention=backend)
    refuses = partial(_refuses_attention, attention=backend)
    return Operation(f"attention, {backend}", _make_attention, run, refuses=refuses)


def _make_scan(shape: RankShape, random: Random) -> Inputs:
    full = (*shape.tokens, shape.recurrent_width)
    leaves = {"a": random.normal(*full).sigmoid_(), "b": random.normal(*full)}
    return random.inputs(leaves, grads={"h": random.normal(*full)})


def _scan(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    h, last_state = linear_scan(**inputs, backend=backend, chunk=chunk)
    return {"h": h, "last_state": last_state}


def _make_block(shape: RankShape, random: Random) -> Inputs:
    width, blocks = shape.recurrent_width, shape.model.gate_blocks // shape.tensor
    block = width // blocks
    leaves = {
        "xy": random.normal(*shape.tokens, 2 * width),
        "conv_weight": random.parameter(TRITON_WIDTH, width, scale=0.5),
        "conv_bias": random.parameter(width),
        "gate_weight": random.normal(blocks, block, 2 * block, scale=block**-0.5),
        "gate_bias": random.parameter(2, width),
        "decay": random.decay(width),
        "xy_bias": random.parameter(2 * width),
    }
    return random.inputs(leaves, grads={"y": random.normal(*shape.tokens, width)})


def _block(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    y, last_state = recurrent_block(**inputs, backend=backend)
    return {"y": y, "last_state": last_state}


def _make_loss(shape: RankShape, random: Random) -> Inputs:
    width = shape.model.width
    leaves = {
        "hidden": random.normal(*shape.tokens, width),
        "table": random.normal(shape.vocabulary, width, scale=width**-0.5),
    }
    fixed = {"labels": random.integers(shape.vocabulary, *shape.tokens), "soft_cap": shape.model.logit_soft_cap}
    sums = {"main_grad": random.sum(shape.vocabulary, width)}
    return random.inputs(leaves, grads={"loss": random.sum() + 1}, fixed=fixed, sums=sums)


def _loss(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    loss, losses = linear_cross_entropy(**inputs, backend=backend)
    return {"loss": loss, "losses": losses}


def _make_product(shape: RankShape, random: Random) -> Inputs:
    """The gradient of the MLP's input weights."""
    tokens, width, rows = shape.steps * shape.batch, shape.model.width, 2 * shape.mlp_width
    fixed = {"a": random.normal(tokens, rows), "b": random.normal(tokens, width)}
    return random.inputs({}, grads={}, fixed=fixed, sums={"total": random.sum(rows, width)})


def _product(inputs: Arguments, backend: str, chunk: int | None) -> Tensors:
    add_product(**inputs)
    return {}


OPERATIONS = (
    Operation("rms_norm", _make_norm, _norm),
    Operation("add_rms_norm", _make_add_norm, _add_norm),
    Operation("gated_gelu", _make_gated_gelu, _gated_gelu),
    Operation("rotary_qkv", _make_rotary, _rotary),
    *map(_attention_with, ATTENTION_BACKENDS),
    Operation("linear_scan", _make_scan, _scan, in_chunks=True),
    Operation("recurrent_block", _make_block, _block),
    Operation("linear_cross_entropy", _make_loss, _loss),
    Operation("add_product", _make_product, _product),
)
