"""The report of a hang: which ranks keep the others waiting, from the states that ranks report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from griffin.parallel.world.axes import rank_names
from griffin.trainer.health.rank_state import RankState

SHOWN = 16  # most ranks that lag shown on the console


@dataclass(frozen=True, kw_only=True)
class SilentRank:
    """A rank that does not answer, with the last state that it reported, if any, `seconds` ago."""

    rank: int
    last: RankState | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.last is None:
            return f"rank {self.rank}: has never sent a sign of life"
        return (
            f"{self.last.name}: no sign of life for {self.seconds:.0f} s (its process is stopped, dead or in a call "
            f"that lets no other thread run, or its machine cannot be reached); last heard in {self.last.phase}"
        )


def lagging_ranks(states: Mapping[int, RankState], silent: Iterable[SilentRank]) -> list[str]:
    """A line for each rank that the others wait for; [] if none lags."""
    if silent := list(silent):
        return [str(rank) for rank in silent]
    front = max(state.entered for state in states.values())
    behind = [state for state in states.values() if state.entered < front]
    if behind:
        ahead = next(state for state in states.values() if state.entered == front)
        return [f"{_doing(state)}, while others are in {ahead.phase}" for state in behind]
    if waited_for := _waited_for(states):
        return [f"{_doing(states[rank])}; {why}" for rank, why in waited_for.items()]
    idle = [state for state in states.values() if not state.communication]
    if 0 < len(idle) < len(states):
        return [f"{_doing(state)}, while others wait in communication" for state in idle]
    return []


def compose_report(states: Mapping[int, RankState], silent: Iterable[SilentRank], *, reason: str) -> tuple[str, str]:
    """(summary for the console, whole report)."""
    silent = list(silent)
    found = lagging_ranks(states, silent)
    head = [f"HANG: {reason}"]
    if found:
        head += ["Ranks that lag:", *(f"  {line}" for line in found[:SHOWN])]
        if len(found) > SHOWN:
            head.append(f"  and {len(found) - SHOWN} more ranks, in the report")
    elif len(states) == 1:
        head += [f"  {_doing(state)}" for state in states.values()]
    else:
        head.append("No rank lags: all are in the same place, so communication itself hangs (network, driver, GPU).")
    places: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for state in states.values():
        places[state.phase, state.communication or "no communication", state.where].append(state.rank)
    rows = [f"  {rank_names(ranks)}: {', '.join(place)}" for place, ranks in sorted(places.items())]
    pending = defaultdict(list)
    for state in states.values():
        for collective in state.collectives:
            if collective.pending:
                pending[str(collective)].append(state.rank)
    waits = [f"  {text}: {rank_names(waiting)}" for text, waiting in sorted(pending.items())]
    more = ["", "More ranks that lag:", *(f"  {line}" for line in found[SHOWN:])] if len(found) > SHOWN else []
    body = [
        *more,
        "",
        "Where each rank is:",
        *rows,
        "",
        "Collectives that have not ended, with the ranks in them:",
        *waits,
    ]
    return "\n".join(head), "\n".join([*head, *body, ""])


def _waited_for(states: Mapping[int, RankState]) -> dict[int, str]:
    """Ranks that have not entered a collective in which others wait, with the reason.

    Ranks that themselves wait for others are left out, unless all of them do, in a circle.
    """
    groups: dict[str, dict[int, int]] = defaultdict(dict)  # name -> rank -> number of its last collective
    for state in states.values():
        for collective in state.collectives:
            groups[collective.group][state.rank] = collective.sequence
    found: dict[int, str] = {}
    waiting: set[int] = set()
    for state in states.values():
        for collective in state.collectives:
            if not collective.pending:
                continue
            missing = [rank for rank, last in groups[collective.group].items() if last < collective.sequence]
            if missing:
                waiting.add(state.rank)
            for rank in missing:
                found.setdefault(rank, f"it has not entered {collective}, in which {state.name} waits")
    found = dict(sorted(found.items()))
    return {rank: why for rank, why in found.items() if rank not in waiting} or found


def _doing(state: RankState) -> str:
    call = f", {state.communication}" if state.communication else ""
    return f"{state.name}: for {state.seconds:.0f} s in {state.phase}{call}, at {state.where}"
