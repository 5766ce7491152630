"""Messages between ranks are decoded unchanged; what an attacker puts into the store is rejected and never executed."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from griffin.parallel.config import ParallelConfig
from griffin.parallel.world.grid import SignedStore, rank_grid
from griffin.parallel.world.messages import ForgedError, pack, seal, unpack, unseal
from griffin.parallel.world.ranks import LOOPBACK, Ranks, serve_store
from griffin.trainer.preflight import agreement
from griffin.trainer.preflight.agreement import Agreement, PreflightError, RankLocation
from griffin.trainer.preflight.links import Exchanges, Link
from tests.ranks import RankPool
from tests.strangers import Bomb, sockets_of

KEY = b"k" * 32


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Exchanges(links=(Link(pair=(0, 1), seconds=0.5, bandwidth=1.0),), failures=("a",)), Exchanges),
        ((Path("a"), None, frozenset({2, 1})), tuple[Path, int | None, frozenset[int]]),
        ([{"a": (True, 2)}], list[dict[str, tuple[bool, int]]]),
        (b"\0\xff", bytes),
    ],
)
def test_values_are_decoded_unchanged(value: Any, kind: Any) -> None:
    assert unseal(KEY, "name", seal(KEY, "name", value), kind) == value


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"1", str),
        (b"true", int),
        (b"[1]", tuple[int, int]),
        (b"{}", RankLocation),
        (b"[" * 100_000, Any),
        (b"\xff", Any),
        (pickle.dumps(1), Any),
        (b"1" + b"0" * 400, float),
        (b"1" + b"0" * 400, float | None),
        (b"1" * 5000, int),
    ],
)
def test_other_types_are_refused(text: bytes, kind: Any) -> None:
    with pytest.raises(ForgedError):
        unpack(text, kind)


@pytest.mark.parametrize(("key", "name"), [(b"other", "name"), (KEY, "another name")])
def test_other_keys_and_names_are_refused(key: bytes, name: str) -> None:
    with pytest.raises(
        ForgedError, match="name: the rendezvous store holds a value that no rank of this run has signed"
    ):
        unseal(KEY, "name", seal(key, name, 1), int)
    with pytest.raises(ForgedError):
        unseal(KEY, "name", pack(1), int)


def test_values_for_gloo_are_signed() -> None:
    """Otherwise gloo would parse any bytes as the address of a peer."""
    store = dist.HashStore()
    groups = dist.PrefixStore("0", _kept := SignedStore(store, KEY))
    groups.set("address", "of a peer")
    assert groups.get("address") == b"of a peer"
    for forged in (pickle.dumps(1), b"", store.get("0/address")[:-1] + b"?"):
        store.set("0/address", forged)  # type: ignore[arg-type]
        with pytest.raises(ForgedError, match="0/address: the rendezvous store holds a value that no rank"):
            groups.get("address")


def listening(inodes: set[str]) -> set[str]:
    """Return the addresses, in hexadecimal digits, at which sockets listen."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def test_a_local_store_listens_only_on_loopback() -> None:
    before = sockets_of(os.getpid())
    store = serve_store(LOOPBACK, 0, None)
    assert listening(sockets_of(os.getpid()) - before) == {"0100007F"}
    with socket.create_connection((LOOPBACK, store.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    store.set("key", "value")
    assert store.get("key") == b"value"


def meet(ranks: Ranks, bomb: Path) -> tuple[str, set[str]]:
    """Two ranks communicate while an attacker puts a pickle under the key of rank 1's or rank 0's message."""
    with mock.patch.object(agreement, "GRACE_SECONDS", 0.2), rank_grid(ParallelConfig(), ranks) as grid:
        addresses = listening(sockets_of(os.getpid()))
        agreement_of_ranks = Agreement(grid, RankLocation(rank=ranks.rank, local_rank=0, host="n0"), 1.0)
        stranger = dist.TCPStore(LOOPBACK, ranks.port, is_master=False, wait_for_workers=False)
        said = ""
        if ranks.rank == 1:
            stranger.set("griffin/preflight/first/1", pickle.dumps(Bomb(bomb)))  # type: ignore[arg-type]
            stranger.add("griffin/preflight/first/count", 1)
            stranger.set("griffin/preflight/second", pickle.dumps(Bomb(bomb)))  # type: ignore[arg-type]
        try:
            if ranks.rank == 0:
                agreement_of_ranks.agree("first", 1, int, sum, int)
            else:
                agreement_of_ranks.agree("second", 1, int, sum, int)
        except PreflightError as error:
            said = str(error)
    return said, addresses


def test_a_pickle_in_the_store_is_not_run(rank_pool: RankPool, tmp_path: Path) -> None:
    answers = rank_pool.run(meet, 2, tmp_path / "bomb")
    assert not (tmp_path / "bomb").exists()
    for (said, addresses), name in zip(answers, ("first/1", "second"), strict=True):
        assert (
            f"griffin/preflight/{name}: the rendezvous store holds a value that no rank of this run has signed" in said
        )
        assert addresses
        assert addresses <= {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    pickle.loads(pickle.dumps(Bomb(tmp_path / "bomb")))
    assert (tmp_path / "bomb").exists()  # it would have gone off
