"""The loss of a language model from hidden states and the output table, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from griffin.kernels.arguments import FLOATING, check_argument
from griffin.kernels.backends import AUTO
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.linear_cross_entropy.chunks import SummedLoss
from griffin.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference, soft_capped
from griffin.kernels.linear_cross_entropy.terms import FEW_TOKENS, Terms, chunk_tokens, tile_rows
from griffin.kernels.linear_cross_entropy.tiles import TiledLoss
from griffin.kernels.selection import resolve_backend

__all__ = ["linear_cross_entropy", "soft_capped"]


def linear_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    soft_cap: float = 0.0,
    z_loss: float = 0.0,
    valid: int | None = None,
    first: int = 0,
    gather: Callable[[Tensor], Tensor] | None = None,
    main_grad: Tensor | None = None,
    added: Callable[[], Tensor | None] = lambda: None,
    chunk: int | None = None,
    tile: int | None = None,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the tokens' cross-entropies under softmax(logits), and each of them.

        logits = hidden table^T, or c tanh(hidden table^T / c) with a soft cap c     L = log sum_v exp(logits_v)
        loss = L - logits_label          sum = sum_tokens weight (loss + z_loss L^2)

    At most 256 MB of logits are held at a time, or one token's. Tokens are processed in chunks: the logits of a chunk
    are overwritten by their gradient, from which those of hidden states and table are computed at once. The latter are
    kept until the backward multiplies them by the gradient of the sum. Where a chunk would have few tokens, GPUs
    process the table in tiles of rows instead, and the backward computes their logits again: four products of many
    tokens take less time than three of few. Gradients that are not needed are not computed.

    Products are in the dtype of `hidden`; all else is float32, or float64 where `hidden` is, as are the sums of the
    table's gradient over chunks. Gradients flow from the sum to hidden and table, once: not to their own gradients.

    Args:
        hidden: [..., D], floating point.
        table: [V, D], in the dtype of `hidden`; this shard's rows where several ranks share the vocabulary.
        labels: [...] int64. That of a token of weight 0 may be any number.
        weights: [...], floating point; None: 1.
        soft_cap: c; 0 is off.
        z_loss: factor of the squared log-sum-exp (PaLM, arXiv 2204.02311, section 5); 0 is off.
        valid: rows of `table` from which on all are padding: their logits count as -inf. None: there is no padding.
        first: the label of the first row.
        gather: where ranks share the vocabulary, a function that gathers their float32 [3, N] as [ranks, 3, N], called
            once per chunk, or once with tiles. The gradient of `hidden` is then this rank's part, to be summed over
            ranks.
        main_grad: [V, D], float32 or float64, to which the backward adds the table's gradient. None: autograd gets it,
            in the dtype of `table`.
        added: called after that; returns what autograd gets instead.
        chunk: tokens at a time. None: chosen by size.
        tile: rows of the table at a time, instead of tokens. None: chosen by size, if `chunk` is None.
        backend: "reference" (all logits at once, differentiated by autograd; for whole vocabularies), "cpu", "triton",
            or "auto", which selects by `griffin.kernels.selection.select_backend`.

    Returns:
        The sum, float32 [] (float64 where `hidden` is), and losses [...] without z-loss, which have no gradient.

    Raises:
        NotImplementedError: forward-mode differentiation with a backend other than "reference".
        ValueError: the shape, dtype, device or value of an argument does not match, or the backend is unknown or
            cannot run.
    """
    if hidden.ndim < 1 or hidden.dtype not in FLOATING:
        raise ValueError(f"hidden: {hidden.dtype} {list(hidden.shape)}; accepted: [..., D], floating point")
    if table.ndim != 2 or len(table) == 0:
        raise ValueError(f"table: shape {list(table.shape)}; accepted: [V, D], V >= 1")
    tokens = hidden.shape[:-1]
    check_argument("table", table, (len(table), hidden.shape[-1]), (hidden.dtype,), "hidden", hidden)
    check_argument("labels", labels, tokens, (torch.int64,), "hidden", hidden)
    check_argument("weights", weights, tokens, FLOATING, "hidden", hidden)
    for name, value in (("soft_cap", soft_cap), ("z_loss", z_loss)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: {value}; accepted: 0 or more")
    if valid is not None and not 0 <= valid <= len(table):
        raise ValueError(f"valid: {valid}; accepted: 0 to {len(table)}, the rows of table")
    for name, number in (("chunk", chunk), ("tile", tile)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: {number}; accepted: None or at least 1")
    if chunk is not None and tile is not None:
        raise ValueError(f"tile: {tile}; accepted: None with a chunk of {chunk} tokens")
    if main_grad is not None:
        wide = (torch.float32, torch.float64)
        check_argument("main_grad", main_grad, (len(table), hidden.shape[-1]), wide, "hidden", hidden)
    backend = resolve_backend(backend, hidden.device, hidden.dtype)
    weights = hidden.new_ones(tokens, dtype=torch.float32) if weights is None else weights
    valid = len(table) if valid is None else valid
    if backend == "reference":
        if gather is not None or main_grad is not None or first or not valid:
            raise ValueError("backend: 'reference'; accepted without gather, main_grad and first, for all rows")
        return linear_cross_entropy_reference(hidden, table, labels, weights, soft_cap, z_loss, valid)
    terms = Terms(
        soft_cap=soft_cap,
        z_loss=z_loss,
        first=first,
        valid=valid,
        gather=gather,
        main_grad=main_grad,
        added=added,
        backend=backend,
    )
    hidden, table = without_tangents(hidden, table)
    needs = tuple(tensor.requires_grad and torch.is_grad_enabled() for tensor in (hidden, table))
    given = hidden.reshape(-1, hidden.shape[-1]), table, labels.reshape(-1), weights.reshape(-1), terms
    on_cpu = hidden.device.type == "cpu"
    step = chunk or chunk_tokens(len(table), hidden.dtype, on_cpu=on_cpu)
    if tile is None and chunk is None and any(needs) and not on_cpu and step < min(FEW_TOKENS, len(given[0])):
        tile = tile_rows(len(given[0]), len(table), hidden.dtype)
    if tile is None:
        total, losses, _, _ = SummedLoss.apply(*given, step, needs)
    else:
        total, losses = TiledLoss.apply(*given, min(tile, len(table)))
    return total, losses.view(tokens)
