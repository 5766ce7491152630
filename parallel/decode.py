"""One token at a time: the same weights as in training, with a state in the place of the tokens before.

A rank holds all blocks; tensor ranks share each, as in training, and communicate where training does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from griffin.parallel.block import ResidualBlock
from griffin.parallel.context import Clock, Documents
from griffin.parallel.stage import Stage


class State:
    """What a model keeps of B sequences of tokens.

    blocks: each mixer's, a dataclass of tensors. `nbytes` does not change while sequences grow.
    """

    def __init__(self, blocks: list[Any], clock: Clock, longest: int) -> None:
        self.blocks = blocks
        self.clock = clock
        self.longest = longest  # tokens that there is room for

    @property
    def nbytes(self) -> int:
        tensors = [value for block in self.blocks for value in vars(block).values()]
        return sum(tensor.nbytes for tensor in (*tensors, self.clock.starts))


class Decoder:
    """A whole model that goes on with sequences.

    Args:
        stage: the only one of a layout without pipeline parallelism.
        compiled: let torch.compile make one program of a token's step, at the first of them and when shapes change: it
            takes seconds, and on CPUs a C++ compiler. For a model that is not sharded.
    """

    def __init__(self, stage: Stage, *, compiled: bool = False) -> None:
        assert stage.pre_process, "a part of the model"
        assert stage.post_process, "a part of the model"
        assert not stage.config.sequence_parallel, "a token is not cut"
        # megatron-core's looks whether the token is among this rank's rows.
        table = stage.embedding
        lookup = table if table.tp_group.size() > 1 else lambda tokens: F.embedding(tokens, table.weight)
        self._stage = stage
        self._embed = lambda tokens: stage.scaled(lookup(tokens))
        self._blocks = [block for block in stage.blocks if isinstance(block, ResidualBlock)]
        # torch.compile knows no tensors of inference_mode, which is faster.
        self._mode = torch.no_grad if compiled else torch.inference_mode
        with self._mode():
            self._final_norm = stage.final_norm.stepper()
            self._steps = [block.stepper() for block in self._blocks]
        self._run = torch.compile(self._forward) if compiled else self._forward

    def prefill(self, prompts: list[Tensor], longest: int) -> tuple[Tensor, State]:
        """Take prompts in, all in one pass.

        Args:
            prompts: int64 [its length] each, at least one token; of any lengths.
            longest: tokens that the sequences may come to have, the longest prompt's included.

        Returns:
            This rank's part of the logits that follow each prompt, float32 [B, padded vocabulary / t], and the state.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        device = self._stage.embedding.weight.device
        tokens, starts = torch.zeros(len(prompts), width, dtype=torch.int64), width - lengths
        for row, prompt in zip(tokens, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        # What fills a row up in front of a prompt is a document of its own, which the prompt does not see.
        positions = torch.arange(width).expand(len(prompts), -1)
        positions = torch.where(positions < starts[:, None], positions, positions - starts[:, None]).to(device)
        states = []
        with self._mode():
            x, documents = self._stage.embed(tokens.to(device)), Documents(positions)
            for block in self._blocks:
                x, state = block.prefill(x, documents, longest)
                states.append(state)
            logits = self._stage.head(x[-1:])[0]
        return logits, State(states, Clock(starts.to(device), width), longest)

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """Take the next token of every sequence in, int64 [B], and change the state.

        Returns this rank's part of the logits that follow, float32 [B, padded vocabulary / t].
        """
        clock = state.clock
        assert clock.time < state.longest, f"there is room for {state.longest} tokens"
        with self._mode():
            now = [step.mixer.now(block, clock) for step, block in zip(self._steps, state.blocks, strict=True)]
            logits = self._run(tokens, now, state.blocks)
        clock.time += 1
        return logits

    def _forward(self, tokens: Tensor, now: list[Any], blocks: list[Any]) -> Tensor:
        x = self._embed(tokens).t().contiguous()  # [D, B]
        for step, state, at in zip(self._steps, blocks, now, strict=True):
            x = step(x, state, at)
        return self._stage.logits.capped(torch.mm(self._stage.embedding.weight, self._final_norm(x)).t())
