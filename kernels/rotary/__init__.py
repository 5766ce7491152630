"""Rotary position embedding of multi-query attention."""

from __future__ import annotations

from torch import Tensor

from griffin.kernels.arguments import FLOATING, check_argument, check_sequences
from griffin.kernels.backends import AUTO
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.rotary import ops
from griffin.kernels.rotary.reference import apply_rotary, rotary_cos_sin, rotary_reference
from griffin.kernels.selection import resolve_backend

__all__ = ["apply_rotary", "rotary_cos_sin", "rotary_qkv"]


def rotary_qkv(
    qkv: Tensor, angles: tuple[Tensor, Tensor], heads: int, *, backend: str = AUTO
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused product into queries, key and value, and rotate the first two by the positions of their tokens.

    The first half of each head's dims is rotated, as `griffin.kernels.rotary.apply_rotary` does. Arithmetic is float32,
    or float64 if qkv is; results are rounded once, and share no memory with qkv. The backward keeps only the angles,
    and returns the gradient of qkv as one tensor.

    Args:
        qkv: [T, B, (H + 2) hd], floating point, with any strides: H query heads, a key head, a value head; hd a
            multiple of 4.
        angles: cosine and sine, float32 or more, [T, B, hd / 4]; from `griffin.kernels.rotary.rotary_cos_sin`,
            computed once for all layers. They have no gradient.
        heads: H.
        backend: "reference" (differentiated by autograd), "cpu", "triton", or "auto", which selects by
            `griffin.kernels.selection.select_backend`.

    Returns:
        q [T, B, H, hd], k and v [T, B, hd], contiguous, in qkv's dtype.

    Raises:
        NotImplementedError: forward-mode differentiation with a backend other than "reference".
        ValueError: the shape, dtype or device of an argument does not match, or the backend is unknown or cannot run.
    """
    check_sequences("qkv", qkv)
    if heads < 1 or qkv.shape[2] % (4 * (heads + 2)):
        raise ValueError(
            f"qkv: shape {list(qkv.shape)}; accepted with {heads} heads: [T, B, {heads + 2} hd], hd a multiple of 4"
        )
    shape = (*qkv.shape[:2], qkv.shape[2] // (heads + 2) // 4)
    for name, part in zip(("cosine", "sine"), angles, strict=True):
        check_argument(f"angles' {name}", part, shape, FLOATING[2:], "qkv", qkv)
    backend = resolve_backend(backend, qkv.device, qkv.dtype)
    cos, sin = (part.to(accumulation_dtype(qkv)).contiguous() for part in angles)
    if backend == "reference":
        return rotary_reference(qkv, cos, sin, heads)
    qkv, cos, sin = without_tangents(qkv.contiguous(), cos, sin)
    return ops.forward(qkv, cos, sin, heads, backend)
