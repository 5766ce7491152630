"""Repeated key/value heads: the balance of FlexAttention's backward, and the same attention as with a single head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from griffin.kernels.costs import COSTS
from griffin.kernels.local_attention import attention_mask, multi_query_attention
from griffin.kernels.local_attention.flex import flex_attention_mqa
from griffin.kernels.local_attention.groups import BALANCED, backward_imbalance, key_value_groups, repeated
from griffin.kernels.local_attention.reference import multi_query_attention_reference

H100 = 132  # multiprocessors

# Batch, query heads of a rank, length, window and head dim of griffin-14b (tensor 4) and RecurrentGemma.
SHAPES = [(4, 10, 2048, 1024, 128), (8, 10, 2048, 1024, 128), (4, 10, 2048, 2048, 256), (8, 4, 2048, 2048, 256)]


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_balance_the_backward(shape):
    batch, heads, length, window, head_dim = shape
    groups = key_value_groups(*shape, H100)
    assert heads % groups == 0
    assert groups > 1
    assert backward_imbalance(batch, heads, groups, length, window, head_dim, H100) <= BALANCED
    fewer = [g for g in range(1, groups) if heads % g == 0]
    assert all(backward_imbalance(batch, heads, g, length, window, head_dim, H100) > BALANCED for g in fewer)


def test_no_groups_where_there_are_enough_programs():
    """Long sequences of a large batch occupy all multiprocessors."""
    assert key_value_groups(8, 10, 8192, 2048, 128, H100) == 1


@pytest.mark.parametrize("heads", [1, 7])
def test_the_best_divisor_where_none_is_balanced(heads):
    shape = (1, 2048, 1024, 128)
    batch, length, window, head_dim = shape
    found = {g: backward_imbalance(batch, heads, g, length, window, head_dim, H100) for g in {1, heads}}
    assert min(found.values()) > BALANCED
    assert key_value_groups(batch, heads, length, window, head_dim, H100) == min(found, key=found.__getitem__)


@pytest.mark.parametrize(
    ("multiprocessors", "expected"),
    [
        (1, 1.0),
        # A block of keys takes 4 products for each of 2 heads, a block of queries 3 for one: 8, 3, 3 of 14 in all.
        (2, 8 / 7),
        (3, 8 / (14 / 3)),
    ],
)
def test_imbalance_of_one_block(multiprocessors, expected):
    found = backward_imbalance(1, 2, 1, 128, None, 128, multiprocessors)
    assert found == pytest.approx(expected)


def test_wide_heads_are_computed_in_smaller_programs():
    """Of 64 keys or queries, of which there are twice as many."""
    assert backward_imbalance(1, 2, 1, 128, None, 256, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stated_balance_is_that_of_the_groups(shape):
    batch, heads, length, window, head_dim = shape
    groups = key_value_groups(*shape, H100)
    q, k = (torch.empty(batch, count, length, head_dim, dtype=torch.bfloat16, device="meta") for count in (heads, 1))

    def balance(copies: int) -> float:
        keys = k.expand(-1, copies, -1, -1)
        log_sum_exp = torch.empty(batch, heads, length, device="meta")
        given = (q, q, keys, keys, q, log_sum_exp, window)
        return COSTS["griffin::counted_attention_backward"](given, (q, keys, keys)).balance

    assert balance(groups) == pytest.approx(
        1 / backward_imbalance(batch, heads, groups, length, window, head_dim, H100)
    )
    assert balance(groups) >= 1 / BALANCED > balance(1)


def inputs(heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((37, 2, heads, 16), (37, 2, 16), (37, 2, 16))
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 32, [2] * 37])


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_over_repeated_heads(groups):
    """Forward only: FlexAttention has no backward on CPUs."""
    q, k, v = (tensor.detach() for tensor in inputs(6, torch.float64))
    expected = multi_query_attention_reference(q, k, v, DOCUMENTS, 9)
    found = flex_attention_mqa(q, k, v, attention_mask(DOCUMENTS, 9, backend="flex"), groups)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_gradients_of_repeated_heads_are_summed(groups):
    q, k, v = inputs(6, torch.float64)
    mask = attention_mask(DOCUMENTS, None)
    grad = torch.randn(37, 2, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(multi_query_attention(q, k, v, mask), (q, k, v), grad)
    attended = F.scaled_dot_product_attention(
        q.permute(1, 2, 0, 3), repeated(k, groups), repeated(v, groups), attn_mask=mask.blocks[0], enable_gqa=True
    )
    found = torch.autograd.grad(attended.permute(2, 0, 1, 3).flatten(2), (q, k, v), grad)
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0.0, atol=1e-12)
