"""Names of dtypes in files and on the command line. The canonical one is stored."""

from __future__ import annotations

ALIASES = {
    "float32": ("fp32", "f32", "float"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "f16", "half"),
}
_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in (name, *aliases)}


def canonical_dtype(name: str) -> str:
    """The canonical name: "bfloat16" for "bf16", "torch.bfloat16" or "BF16". Any other string is returned as it is."""
    return _CANONICAL.get(name.lower().removeprefix("torch."), name)
