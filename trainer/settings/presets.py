"""Presets: the paper's three families in seven sizes (arXiv 2402.19427, Table 2), and RecurrentGemma."""

from __future__ import annotations

import difflib

from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT, ModelConfig

# Mixers of each family, repeated up to the number of blocks.
FAMILIES = {
    "griffin": (RECURRENT, RECURRENT, ATTENTION),
    "hawk": (RECURRENT,),
    "mqa": (GLOBAL_ATTENTION,),
}

# size: (width, recurrent width, blocks, heads); head_dim is 128 throughout.
LADDER = {
    "100m": (768, 1024, 12, 6),
    "200m": (1024, 1536, 12, 8),
    "400m": (1536, 2048, 12, 12),
    "1.3b": (2048, 2560, 24, 16),
    "3b": (3072, 4096, 24, 24),
    "7b": (4096, 5632, 32, 32),
    "14b": (5120, 8192, 40, 40),
}

VOCABULARY = 256_000  # of both papers

# size: (width = recurrent width, blocks, heads = gate blocks), arXiv 2404.07839.
RECURRENT_GEMMA = {"2b": (2560, 26, 10), "9b": (4096, 38, 16)}


def repeat(unit: tuple[str, ...], blocks: int) -> tuple[str, ...]:
    """Repeat `unit` up to `blocks` items: (R, R, A) over 4 blocks is (R, R, A, R)."""
    return tuple(unit[i % len(unit)] for i in range(blocks))


def _paper(family: str, size: str) -> ModelConfig:
    width, recurrent_width, blocks, heads = LADDER[size]
    return ModelConfig(
        pattern=repeat(FAMILIES[family], blocks),
        width=width,
        recurrent_width=recurrent_width,
        heads=heads,
        head_dim=128,
        window=1024,
        vocabulary=VOCABULARY,
    )


def _recurrent_gemma(size: str) -> ModelConfig:
    width, blocks, heads = RECURRENT_GEMMA[size]
    return ModelConfig(
        pattern=repeat(FAMILIES["griffin"], blocks),
        width=width,
        recurrent_width=width,
        heads=heads,
        head_dim=256,
        gate_blocks=heads,
        window=2048,
        vocabulary=VOCABULARY,
        scale_embedding=True,
        logit_soft_cap=30.0,
    )


PRESETS: dict[str, ModelConfig] = {
    **{f"{family}-{size}": _paper(family, size) for family in FAMILIES for size in LADDER},
    **{f"recurrentgemma-{size}": _recurrent_gemma(size) for size in RECURRENT_GEMMA},
}


def preset(name: str) -> ModelConfig:
    """The preset of that name. ValueError naming the nearest ones if there is none."""
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.0)
        raise ValueError(
            f"model.preset = {name!r}: no such preset; nearest: {', '.join(nearest)}; all: {', '.join(PRESETS)}"
        )
    return PRESETS[name]
