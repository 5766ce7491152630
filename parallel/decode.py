"""Decoding one token at a time from a recurrent state and key/value caches, with the weights of a training stage.

A rank holds all blocks. Tensor ranks shard each block, and communicate, as in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.parallel.block import ResidualBlock, residual_sum
from griffin.parallel.context import DecodePosition, Documents
from griffin.parallel.stage import Stage


class DecodeState:
    """Decoding state of B sequences.

    blocks: state of each block's mixer, a dataclass of tensors. `nbytes` does not grow with the sequences.
    """

    def __init__(self, blocks: list[Any], position: DecodePosition, max_length: int) -> None:
        self.blocks = blocks
        self.position = position
        self.max_length = max_length  # of the sequences, in tokens

    @property
    def nbytes(self) -> int:
        tensors = [value for block in self.blocks for value in vars(block).values()]
        return sum(tensor.nbytes for tensor in (*tensors, self.position.starts))


class Decoder:
    """Decoder of a whole model.

    Args:
        stage: the single stage of a layout without pipeline parallelism.
        compiled: compile a token's step with torch.compile, on first use and when shapes change. That takes seconds,
            and on CPUs a C++ compiler. Only for models that are not sharded.
    """

    def __init__(self, stage: Stage, *, compiled: bool = False) -> None:
        assert stage.pre_process, "a part of the model"
        assert stage.post_process, "a part of the model"
        assert not stage.config.sequence_parallel, "a single token cannot be sharded along the sequence"
        # megatron-core's embedding checks whether a token is among this rank's rows.
        table = stage.embedding
        lookup = table if table.tp_group.size() > 1 else lambda tokens: F.embedding(tokens, table.weight)
        self._stage = stage
        self._embed = lambda tokens: stage.scaled(lookup(tokens))
        self._blocks = [block for block in stage.blocks if isinstance(block, ResidualBlock)]
        # inference_mode is faster, but torch.compile does not support its tensors.
        self._mode = torch.no_grad if compiled else torch.inference_mode
        with self._mode():
            self._final_norm = stage.final_norm.stepper()
            self._steps = [block.stepper() for block in self._blocks]
        self._run = torch.compile(self._forward) if compiled else self._forward

    def prefill(self, prompts: list[Tensor], max_length: int) -> tuple[Tensor, DecodeState]:
        """Process all prompts in one pass.

        Args:
            prompts: int64 [length] each, of any lengths from 1 on.
            max_length: maximum length of the sequences in tokens, including the longest prompt.

        Returns:
            This rank's shard of the next-token logits, float32 [B, padded vocabulary / t], and the state.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        device = self._stage.embedding.weight.device
        tokens, starts = torch.zeros(len(prompts), width, dtype=torch.int64), width - lengths
        for row, prompt in zip(tokens, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        # Left padding is a document of its own, which the prompt does not see.
        positions = torch.arange(width).expand(len(prompts), -1)
        positions = torch.where(positions < starts[:, None], positions, positions - starts[:, None]).to(device)
        states = []
        with self._mode():
            x, documents = self._stage.embed(tokens.to(device)), Documents(positions)
            branch = None
            for block in self._blocks:
                x, branch, state = block.prefill(x, branch, documents, max_length)
                states.append(state)
            logits = self._stage.head(residual_sum(x, branch)[-1:])[0]
        return logits, DecodeState(states, DecodePosition(starts.to(device), width), max_length)

    def step(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """Process the next token of every sequence, int64 [B], and update the state.

        Returns this rank's shard of the next-token logits, float32 [B, padded vocabulary / t].
        """
        position = state.position
        assert position.index < state.max_length, f"sequences can have at most {state.max_length} tokens"
        with self._mode():
            prepared = [
                step.mixer.prepare(block, position) for step, block in zip(self._steps, state.blocks, strict=True)
            ]
            logits = self._run(tokens, prepared, state.blocks)
        position.index += 1
        return logits

    def _forward(self, tokens: Tensor, prepared: list[Any], blocks: list[Any]) -> Tensor:
        x = self._embed(tokens).t().contiguous()  # [D, B]
        for step, state, arguments in zip(self._steps, blocks, prepared, strict=True):
            x = step(x, state, arguments)
        return self._stage.logits.capped(torch.mm(self._stage.embedding.weight, self._final_norm(x)).t())
