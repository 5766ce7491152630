"""The registry of temporal mixers. One more is a file in this folder with its module, and an entry below.

What an entry says: `griffin.parallel.mixers.base.Mixer`; what the module has: `MixerModule` beside it. Blocks,
decoding, costs, checks of settings, gradient norms, checkpoints and parameter counts know mixers from here alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT
from griffin.parallel.mixers.base import Mixer, Multiple

_HERE = "griffin.parallel.mixers"
_ROTARY = Multiple("head_dim", 4, why="rotary embedding turns half of it in pairs")

# By name. Entries do not change in a process that has begun to use them.
MIXERS: dict[str, Mixer] = {
    mixer.name: mixer
    for mixer in (
        Mixer(
            name=RECURRENT,
            kind="recurrent",
            module=f"{_HERE}.recurrent:RecurrentMixer",
            widths=("recurrent_width",),
            shards=("gate_blocks",),
            multiples=(Multiple("recurrent_width", "gate_blocks"),),
        ),
        Mixer(
            name=ATTENTION,
            kind="attention",
            module=f"{_HERE}.attention:LocalAttention",
            widths=("heads", "head_dim"),
            shards=("heads",),
            multiples=(_ROTARY,),
        ),
        Mixer(
            name=GLOBAL_ATTENTION,
            kind="attention",
            module=f"{_HERE}.attention:GlobalAttention",
            widths=("heads", "head_dim"),
            shards=("heads",),
            multiples=(_ROTARY,),
        ),
    )
}


def used(pattern: Iterable[str]) -> list[Mixer]:
    """The mixers that a pattern names, each once, in the registry's order; names that are in none are left out."""
    names = set(pattern)
    return [mixer for mixer in MIXERS.values() if mixer.name in names]


def kinds(mixers: Iterable[Mixer]) -> tuple[str, ...]:
    """Their kinds, each once, in their order."""
    return tuple(dict.fromkeys(mixer.kind for mixer in mixers))
