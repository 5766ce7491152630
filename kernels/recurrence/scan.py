"""Forward and backward passes of a recurrence as sequences of Triton program launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from griffin.kernels.memory_layout import dense_channels, dense_like, stride_arguments
from griffin.kernels.recurrence import programs
from griffin.kernels.recurrence.plan import (
    CARRIES_BLOCK,
    CARRIES_CHUNKS,
    CARRIES_WARPS,
    Plan,
    select_plan,
    unroll_and_stages,
)
from griffin.kernels.triton_launch import launch, multiprocessors


@dataclass(frozen=True)
class ScanInputs:
    """Inputs of both passes; see `programs`. With an input gate, the terms are computed by RG-LRU gates."""

    term: Tensor
    gate: Tensor
    input_gate: Tensor | None
    rate: Tensor | None
    branch: Tensor | None
    starts: Tensor | None
    initial_state: Tensor
    gate_bias: Tensor | None
    first_is_start: bool
    plan: Plan

    @classmethod
    def of(
        cls,
        term: Tensor,
        gate: Tensor,
        *,
        input_gate: Tensor | None = None,
        rate: Tensor | None = None,
        branch: Tensor | None = None,
        starts: Tensor | None,
        initial_state: Tensor | None,
        gate_bias: Tensor | None = None,
        chunk: int | None,
    ) -> ScanInputs:
        """Collect the inputs. Only tensors without contiguous channels are copied."""
        steps, batch, width = term.shape
        if initial_state is None:
            state = term.new_zeros(batch, width, dtype=torch.float32)
        else:
            state = initial_state.contiguous()
        return cls(
            term=dense_channels(term),
            gate=dense_channels(gate),
            input_gate=None if input_gate is None else dense_channels(input_gate),
            rate=rate,
            branch=None if branch is None else dense_channels(branch),
            starts=starts,
            initial_state=state,
            gate_bias=None if gate_bias is None else gate_bias.contiguous(),
            first_is_start=starts is None and initial_state is None,
            plan=select_plan(steps, batch, width, multiprocessors(term.device), chunk),
        )

    def launch(self, program: Any, chunks: int, **outputs: Any) -> None:
        """Launch a program over `chunks` chunks of time. Tensors among `outputs` may be None."""
        steps, batch, width = self.term.shape
        unroll, stages = unroll_and_stages(program.__name__, self.term.element_size())
        tensors = {
            "term": self.term,
            "gate": self.gate,
            "input": self.input_gate,
            "branch": self.branch,
            "starts": self.starts,
        }
        arguments = {
            **tensors,
            "input_gate": self.input_gate,
            "rate": self.rate,
            "gate_bias": self.gate_bias,
            "initial_state": self.initial_state,
            "first_is_start": int(self.first_is_start),
            "T": steps,
            "B": batch,
            "R": width,
            "L": self.plan.chunk,
            **stride_arguments(tensors),
            "GATED": self.input_gate is not None,
            "HAS_BIAS": self.gate_bias is not None,
            "HAS_BRANCH": self.branch is not None,
            "HAS_STARTS": self.starts is not None,
            "UNROLL": unroll,
            "STAGES": stages,
            **outputs,
        }
        launch(program, chunks, arguments, self.term)

    def new_states(self, chunks: int) -> Tensor:
        return self.term.new_empty((chunks, *self.term.shape[1:]), dtype=torch.float32)


def first_states(inputs: ScanInputs) -> Tensor:
    """Return the initial state of each chunk: [chunks, B, R], or [B, R] for a single chunk."""
    return (
        inputs.initial_state if inputs.plan.chunks == 1 else _chunk_carries(inputs, inputs.initial_state, grad_y=None)
    )


def _chunk_carries(inputs: ScanInputs, first: Tensor, grad_y: Tensor | None) -> Tensor:
    """Return the initial states of the chunks, or with grad_y the gradients of their last states from later chunks."""
    chunks, reverse = inputs.plan.chunks, grad_y is not None
    end, carries = inputs.new_states(chunks), inputs.new_states(chunks)
    product = torch.empty_like(end, dtype=torch.float64)
    # The forward pass does not need the last chunk's summary.
    inputs.launch(
        programs.chunk_summaries,
        chunks if reverse else chunks - 1,
        grad_y=grad_y,
        product=product,
        end=end,
        REVERSE=reverse,
        **stride_arguments({"grad": grad_y}),
    )
    chained = {"product": product, "end": end, "first": first, "carries": carries, "chunks": chunks}
    chained |= {"B": inputs.term.shape[1], "R": inputs.term.shape[2], "REVERSE": reverse, "CHUNKS": CARRIES_CHUNKS}
    launch(programs.chunk_carries, 1, chained, inputs.term, block=CARRIES_BLOCK, warps=CARRIES_WARPS)
    return carries


def forward(inputs: ScanInputs, initial_states: Tensor, *, keep_states: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y, the states if they differ from y (there is a branch) and `keep_states` is set, and the last state."""
    y, last_state = dense_like(inputs.term), inputs.new_states(1)[0]
    states = dense_like(inputs.term) if keep_states and inputs.branch is not None else None
    inputs.launch(
        programs.scan_forward,
        inputs.plan.chunks,
        first_states=initial_states,
        y=y,
        states=states,
        last_state=last_state,
        HAS_STATES=states is not None,
        **stride_arguments({"y": y, "states": states}),
    )
    return y, states, last_state


@dataclass(frozen=True)
class Gradients:
    term: Tensor
    gate: Tensor
    input_gate: Tensor | None
    rate: Tensor | None
    initial_state: Tensor
    gate_bias: Tensor | None


def backward(
    inputs: ScanInputs, states: Tensor, grad_y: Tensor, grad_last: Tensor, grad_branch: Tensor | None = None
) -> Gradients:
    """Return the gradients of all inputs. `states` is h of every step in the dtype of y.

    The gradient of the branch is written to `grad_branch`.
    """
    chunks = inputs.plan.chunks
    grad_y, grad_last = dense_channels(grad_y), grad_last.contiguous()
    dense_grad_branch = None if grad_branch is None else dense_channels(grad_branch)
    carries = grad_last if chunks == 1 else _chunk_carries(inputs, grad_last, grad_y)
    grads = {
        "grad_term": dense_like(inputs.term),
        "grad_gate": dense_like(inputs.gate),
        "grad_input": None if inputs.input_gate is None else dense_like(inputs.input_gate),
        "grad_branch": dense_grad_branch,
    }
    grad_rates = None if inputs.rate is None else inputs.new_states(chunks)
    grad_biases = None if inputs.gate_bias is None else inputs.new_states(2 * chunks)
    grad_initial_state = inputs.new_states(1)[0]
    inputs.launch(
        programs.scan_backward,
        chunks,
        states=states,
        grad_y=grad_y,
        first_carries=carries,
        grad_input_gate=grads["grad_input"],
        grad_rates=grad_rates,
        grad_biases=grad_biases,
        grad_initial_state=grad_initial_state,
        **grads,
        **stride_arguments({"states": states, "grad": grad_y, **grads}),
    )
    if grad_branch is not None and dense_grad_branch is not None and dense_grad_branch is not grad_branch:
        grad_branch.copy_(dense_grad_branch)
    return Gradients(
        term=grads["grad_term"],  # type: ignore[arg-type]
        gate=grads["grad_gate"],  # type: ignore[arg-type]
        input_gate=grads["grad_input"],
        # Summed in a fixed order: deterministic.
        rate=None if grad_rates is None else grad_rates.sum((0, 1)),
        initial_state=grad_initial_state,
        gate_bias=None if grad_biases is None else grad_biases.unflatten(0, (2, chunks)).sum((1, 2)),
    )
