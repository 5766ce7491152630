"""Registry of temporal mixers. To add one, write its module in this folder and add an entry below.

Entries are `griffin.parallel.mixers.base.Mixer`; modules implement `MixerModule`. Blocks, decoding, costs, validation
of settings, gradient norms, checkpoints and parameter counts get all mixers from this registry.
"""

from __future__ import annotations

from collections.abc import Iterable

from griffin.parallel.config import ATTENTION, GLOBAL_ATTENTION, RECURRENT
from griffin.parallel.mixers.base import Mixer, Multiple

_HERE = "griffin.parallel.mixers"
_ROTARY = Multiple("head_dim", 4, why="rotary embedding rotates half of it in pairs")

# By name. Do not change entries once a process has used them.
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
    """Return the mixers in a pattern, each once, in the registry's order. Unknown names are ignored."""
    names = set(pattern)
    return [mixer for mixer in MIXERS.values() if mixer.name in names]


def kinds(mixers: Iterable[Mixer]) -> tuple[str, ...]:
    """Return the kinds of mixers, each once, in order."""
    return tuple(dict.fromkeys(mixer.kind for mixer in mixers))
