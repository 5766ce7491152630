"""The names that a dtype goes by, in files and on the command line; one of each is stored."""

from __future__ import annotations

ALIASES = {
    "float32": ("fp32", "f32", "float"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "f16", "half"),
}
_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in (name, *aliases)}


def canonical_dtype(name: str) -> str:
    """ "bfloat16" for "bf16", "torch.bfloat16" or "BF16"; what is no dtype's name stays as it is."""
    return _CANONICAL.get(name.lower().removeprefix("torch."), name)
