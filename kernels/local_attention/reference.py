"""Reference multi-query attention with a dense score matrix, which the other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def multi_query_attention_reference(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int | None) -> Tensor:
    """Return attention [T, B, H * hd] of q [T, B, H, hd] over k, v [T, B, hd] within documents [B, T].

    Arithmetic is float32, or float64 if q is.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    time = torch.arange(q.shape[0], device=q.device)
    distance = time[:, None] - time  # query minus key
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    visible = visible & (documents[:, :, None] == documents[:, None, :])  # [B, T, T]
    scores = torch.einsum("tbhd,sbd->bhts", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,sbd->tbhd", weights, v.to(dtype)).flatten(2).to(q.dtype)
