"""The steps of the loss on a chunk of logits as custom operators.

They have no gradient: the loss that they are part of has one, in `griffin.kernels.linear_cross_entropy.chunks`.
"""

# No `from __future__ import annotations`: operator schemas are inferred from the annotations.

import torch
from torch import Tensor

from griffin.kernels.costs import OperatorCost, states_cost, touched
from griffin.kernels.memory_layout import accumulation_dtype
from griffin.kernels.selection import implementation


@torch.library.custom_op("griffin::linear_cross_entropy_statistics", mutates_args=("logits",))
def statistics_(logits: Tensor, labels: Tensor, soft_cap: float, first: int, valid: int, backend: str) -> Tensor:
    """Return each row's maximum, its sum of exp(logit - maximum), and its label's logit, [3, N], of logits [N, V].

    Labels are int64 [N]; label `first` is that of the first of `valid` columns, and another column's logit counts as 0.
    Logits are soft-capped first, and are left as `gradient_` of the same backend expects them. The result is float32,
    or float64 if logits are.
    """
    return implementation("linear_cross_entropy", backend).statistics_(logits, labels, soft_cap, first, valid)


@statistics_.register_fake
def _(logits, labels, soft_cap, first, valid, backend):
    return logits.new_empty((3, logits.shape[0]), dtype=accumulation_dtype(logits))


@torch.library.custom_op("griffin::linear_cross_entropy_gradient", mutates_args=("logits",))
def gradient_(
    logits: Tensor,
    labels: Tensor,
    maxima: Tensor,
    scales: Tensor,
    weights: Tensor,
    soft_cap: float,
    first: int,
    valid: int,
    backend: str,
    is_raw: bool,
) -> None:
    """Replace logits [N, V] by the gradient of the loss with respect to them, 0 from column `valid` on.

    It is scale exp(logit - maximum), less the weight at the row's label, through the soft cap. Logits are as
    `statistics_` left them, or with `is_raw` as before it. Maxima, scales and weights are [N] in the dtype of the
    statistics.
    """
    implementation("linear_cross_entropy", backend).gradient_(
        logits, labels, maxima, scales, weights, soft_cap, first, valid, is_raw
    )


@gradient_.register_fake
def _(logits, labels, maxima, scales, weights, soft_cap, first, valid, backend, is_raw):
    return None


@states_cost(statistics_)
def _(given, results) -> OperatorCost:
    return OperatorCost(kind="loss", bytes=touched(given) + touched(results), kernels=1)


@states_cost(gradient_)
def _(given, results) -> OperatorCost:
    return OperatorCost(kind="loss", bytes=touched(given) + touched(given[:1]), kernels=1)
