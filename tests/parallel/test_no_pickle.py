"""Nothing from a network peer or from a foreign file is unpickled."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from griffin.parallel.config import ParallelConfig
from griffin.parallel.sharding import ShardHeader, read_parts
from griffin.parallel.world.grid import gather_bytes, rank_grid
from griffin.parallel.world.messages import ForgedError, seal
from griffin.parallel.world.ranks import Ranks
from tests.ranks import RankPool
from tests.strangers import Bomb

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "parallel", "trainer", "tools", "launch")
OBJECTS = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "bcast",  # and those below: mpi4py's, whose namesakes with a capital letter do not pickle
    "allgather",
    "alltoall",
    "allreduce",
}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
READERS = {"load", "loads", "Unpickler", "open"}
ALLOWED = {
    (
        "trainer/checkpoint/saving/process.py",
        "pickle.loads",
    ): "an unnamed memory file that the rank itself has made and handed on",
}


def unpickling(code: str) -> Iterator[str]:
    """Return the calls in some code that unpickle their input."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module in PICKLES:
            yield from (f"{node.module}.{each.name}" for each in node.names if each.name in READERS)
        elif isinstance(node, ast.ImportFrom):
            yield from (each.name for each in node.names if each.name in OBJECTS)
        elif isinstance(node, ast.Attribute) and node.attr in OBJECTS:
            yield node.attr
        elif isinstance(node, ast.Attribute) and node.attr in READERS and ast.unparse(node.value) in PICKLES:
            yield f"{ast.unparse(node.value)}.{node.attr}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safe = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if called == "torch.load" and safe.get("weights_only") != "True":
                yield called
            if safe.get("allow_pickle", "False") != "False":
                yield f"{called}(allow_pickle)"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("dist.all_gather_object(a, b)", "all_gather_object"),
        ("world.bcast(a, root=0)", "bcast"),
        ("from torch.distributed import broadcast_object_list", "broadcast_object_list"),
        ("from pickle import loads", "pickle.loads"),
        ("class Reader(pickle.Unpickler): pass", "pickle.Unpickler"),
        ("torch.load(path)", "torch.load"),
        ("np.load(path, allow_pickle=True)", "np.load(allow_pickle)"),
    ],
)
def test_scan_finds_unpickling_calls(code: str, found: str) -> None:
    assert list(unpickling(code)) == [found]


def test_our_code_unpickles_only_its_own_data() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 50
    found = {
        (str(path.relative_to(ROOT)), name) for path in paths for name in unpickling(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED)


def gather_from_an_attacker(ranks: Ranks, bomb: Path) -> list[str]:
    """Rank 1 sends a pickle, a signed pickle, JSON of another type, and a message signed for rank 0."""
    said = []
    with rank_grid(ParallelConfig(), ranks) as grid:
        pickled = pickle.dumps(Bomb(bomb))
        name = f"message of rank {grid.rank}"
        signed = seal(grid.key, name, "")[:32]
        for forged in (pickled, signed + pickled, seal(grid.key, name, 1), seal(grid.key, "message of rank 0", "a")):
            if ranks.rank == 1:
                gather_bytes(forged, grid.device)
                continue
            try:
                grid.all_gather("a", str)
            except ForgedError as error:
                said.append(str(error))
        assert grid.all_gather(("a", ranks.rank), tuple[str, int]) == [("a", 0), ("a", 1)]
    return said


def test_a_pickle_of_a_peer_is_not_run(rank_pool: RankPool, tmp_path: Path) -> None:
    said, _ = rank_pool.run(gather_from_an_attacker, 2, tmp_path / "bomb")
    assert not (tmp_path / "bomb").exists()
    unsigned = "message of rank 1: a peer sent a value that no rank of this run has signed"
    assert [said[0], said[1], said[3]] == [unsigned] * 3
    assert said[2].startswith("expected str, got b'1'")


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [
        ((2,), "torch.float32", 4),
        ((2,), "torch.float32", 12),
        ((-2, -1), "torch.float32", 8),
        ((2,), "torch.qint8", 2),
    ],
)
def test_bytes_that_do_not_match_their_header_are_refused(shape: tuple[int, ...], dtype: str, size: int) -> None:
    described = ShardHeader(name="a", axis=None, shape=shape, part_shape=shape, dtype=dtype)
    with pytest.raises(ForgedError, match="a peer sent"):
        read_parts([described], bytes(size))
