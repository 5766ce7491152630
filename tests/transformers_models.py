"""Small RecurrentGemma models of transformers with random weights, saved to be converted, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from griffin.tools.cli import main

SETTINGS: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "lru_width": 48,
    "head_dim": 16,
    "intermediate_size": 192,
    "num_hidden_layers": 5,  # not a multiple of 3
    "attention_window_size": 12,
    "vocab_size": 200,
}


def make_model(dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any) -> Any:
    """A model whose weights are none of them 0, and whose logits are of the order of 10."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SETTINGS | changes)).to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.dim() == 1 else 1.0 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if name.endswith("recurrent_param"):
                parameter.sub_(3.0)
            if name.endswith("embed_tokens.weight"):
                parameter.mul_(2.0)
    return model.to(dtype).eval()


def save_model(model: Any, folder: Path, *, shard_size: str = "1GB") -> Path:
    from transformers import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens(vocabulary: int = 200, length: int = 40, batch: int = 2) -> Tensor:
    """Not token 0: transformers drops its gradient as padding."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(_bits(found[name]), _bits(value)), name


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().view({2: torch.int16, 4: torch.int32}[value.element_size()])


def convert(*words: object, workers: int | None = 1) -> int:
    """The exit code of `griffin convert`."""
    return main(["convert", *map(str, words), *(["--workers", str(workers)] if workers else [])])


def export(*words: object, workers: int = 1) -> int:
    """The exit code of `griffin export hf`."""
    return main(["export", "hf", *map(str, words), "--workers", str(workers)])


def change_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
