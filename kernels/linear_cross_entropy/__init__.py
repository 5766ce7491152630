"""The loss of a language model from hidden states and the output table, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from griffin.kernels.arguments import FLOATING, check_argument
from griffin.kernels.backends import AUTO
from griffin.kernels.forward_mode import without_tangents
from griffin.kernels.linear_cross_entropy.chunks import SummedLoss, Terms
from griffin.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference, soft_capped
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
    add_to_table: Callable[[Tensor, Tensor], Tensor | None] | None = None,
    chunk: int | None = None,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the tokens' cross-entropies under softmax(logits), and each of them.

        logits = hidden table^T, or c tanh(hidden table^T / c) with a soft cap c     L = log sum_v exp(logits_v)
        loss = L - logits_label          sum = sum_tokens weight (loss + z_loss L^2)

    Tokens pass in chunks. The logits of a chunk are overwritten by their gradient, from which those of hidden states
    and table are found at once; they are kept until the gradient of the sum is known, by which they are multiplied.
    Where no gradient is asked for none is computed. At most 256 MB of logits are there at a time, or one token's.

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
        gather: where ranks share the vocabulary, what gathers their float32 [3, N] as [ranks, 3, N], once a chunk. Then
            the gradient of `hidden` is this rank's part, to be summed over ranks.
        add_to_table: called in the backward with the float32 gradient of the table for the sum, and the sum's gradient
            [], by which it is to be multiplied, to do what it wants with it; returns what autograd gets as the table's
            gradient. None: their product, in the dtype of `table`.
        chunk: tokens at a time. None: chosen by size.
        backend: "reference" (all logits at once, differentiated by autograd; for whole vocabularies), "cpu", "triton",
            or "auto" for what `griffin.kernels.selection.select_backend` says.

    Returns:
        The sum, float32 [] (float64 where `hidden` is), and losses [...] without z-loss, which have no gradient.

    Raises:
        NotImplementedError: forward-mode differentiation by another backend than "reference".
        ValueError: an argument's shape, dtype, device or value does not fit, or the backend is unknown or cannot run.
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
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: {chunk}; accepted: None or a number of tokens of at least 1")
    backend = resolve_backend(backend, hidden.device, hidden.dtype)
    weights = hidden.new_ones(tokens, dtype=torch.float32) if weights is None else weights
    valid = len(table) if valid is None else valid
    if backend == "reference":
        if gather is not None or add_to_table is not None or first or not valid:
            raise ValueError("backend: 'reference'; accepted without gather, add_to_table and first, for all rows")
        return linear_cross_entropy_reference(hidden, table, labels, weights, soft_cap, z_loss, valid)
    terms = Terms(
        soft_cap=soft_cap,
        z_loss=z_loss,
        first=first,
        valid=valid,
        gather=gather,
        add_to_table=add_to_table,
        chunk=chunk,
        backend=backend,
    )
    hidden, table = without_tangents(hidden, table)
    needs = tuple(tensor.requires_grad and torch.is_grad_enabled() for tensor in (hidden, table))
    total, losses, _, _ = SummedLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]), table, labels.reshape(-1), weights.reshape(-1), terms, needs
    )
    return total, losses.view(tokens)
