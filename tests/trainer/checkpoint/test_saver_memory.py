"""Savers are refused if a machine or control group lacks memory for all of its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from griffin.trainer.checkpoint.saving import saver as saver_module
from griffin.trainer.checkpoint.saving.memory import Request, memory_left, shortages
from tests.saving import Layout, Team

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MACHINE = {
    "proc/sys/kernel/random/boot_id": "0-1-2\n",
    "proc/meminfo": "MemTotal: 16777216 kB\nMemFree:  1024 kB\nMemAvailable:    8388608 kB\n",
}


def values(root: Path) -> list[int]:
    return sorted(memory_left(root).values())


def test_memory_of_the_machine(tmp_path: Path) -> None:
    write(tmp_path, MACHINE)
    assert memory_left(tmp_path) == {"machine 0-1-2": 8 * GIB}
    assert next(iter(memory_left().values())) > 0  # this one's


def test_memory_of_control_groups_v2(tmp_path: Path) -> None:
    """Every enclosing group counts, and its page cache counts as available."""
    groups = "sys/fs/cgroup"
    stat = f"anon {GIB}\nfile {3 * GIB}\ninactive_file {GIB}\nactive_file {GIB}\nshmem {GIB}\n"
    write(tmp_path, MACHINE | {"proc/self/cgroup": "0::/job/task\n"})
    write(tmp_path / groups / "job", {"memory.max": f"{6 * GIB}", "memory.current": f"{5 * GIB}", "memory.stat": stat})
    write(tmp_path / groups / "job/task", {"memory.max": "max\n", "memory.current": "1", "memory.stat": stat})
    assert values(tmp_path) == [3 * GIB, 8 * GIB]
    (tmp_path / groups / "job/task/memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / groups / "job/task/memory.current").write_text(f"{7 * GIB}\n")
    assert values(tmp_path) == [0, 3 * GIB, 8 * GIB]


@pytest.mark.parametrize("place", ["job", "."], ids=["path", "only the mount is seen"])
def test_memory_of_control_groups_v1(tmp_path: Path, place: str) -> None:
    group = tmp_path / "sys/fs/cgroup/memory" / place
    write(tmp_path, MACHINE | {"proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/job\n0::/\n"})
    stat = f"cache 1\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"
    used = {"memory.usage_in_bytes": f"{2 * GIB}\n", "memory.stat": stat}
    write(group, {"memory.limit_in_bytes": "9223372036854771712\n"} | used)
    assert values(tmp_path) == [8 * GIB]
    (group / "memory.limit_in_bytes").write_text(f"{5 * GIB}\n")
    assert values(tmp_path) == [4 * GIB, 8 * GIB]


def test_requests_of_ranks_that_share_memory_are_summed() -> None:
    def request(rank: int, size: int, **left: int) -> Request:
        return Request(rank=rank, host=f"node{rank // 2}", size=size * GIB, left=left)

    assert shortages([request(0, 2, machine0=4, groupA=9)]) != []
    roomy = {"machine0": 4 * GIB, "groupA": 2 * GIB}
    assert shortages([request(0, 2, **roomy), request(1, 2, machine0=4 * GIB, groupB=2 * GIB)]) == []
    assert shortages([request(0, 2, **roomy), request(2, 9, machine1=9 * GIB)]) == []
    assert shortages([request(0, 2, **roomy), request(1, 1, **roomy)]) == [
        "rank 0, rank 1 on node0: no memory for 3.00 GiB of staged state, which checkpoints are saved from: "
        "2.00 GiB are left in their control group"
    ]
    assert shortages([request(0, 3, machine0=4 * GIB), request(1, 2, machine0=5 * GIB)]) == [
        "rank 0, rank 1 on node0: no memory for 5.00 GiB of staged state, which checkpoints are saved from: "
        "4.00 GiB are available"
    ]


class Refused(Team):
    """A team none of whose ranks gets a saver."""

    def __init__(self, layout: Layout, root: Path, message: str) -> None:
        self.message, self.caught = message, 0
        super().__init__(layout, root)

    def each(self, call):
        def attempt(rank: int) -> bool:
            with pytest.raises(MemoryError, match=self.message):
                call(rank)
            return True

        self.caught = sum(super().each(attempt))
        return []


def test_every_rank_refuses_before_anything_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(1, 2)
    sizes = [12 * plan.elements for plan in layout.plans]
    monkeypatch.setattr(saver_module, "memory_left", lambda: {"machine a": sum(sizes) - 1})
    assert max(sizes) < sum(sizes) - 1  # enough for each rank alone
    with monkeypatch.context() as patch:
        patch.delattr(saver_module, "shared_memory")
        refused = Refused(layout, tmp_path, r"rank 0, rank 1 on 127\.0\.0\.1: no memory for 0\.00 GiB of staged state")
    assert refused.caught == 2
    monkeypatch.setattr(saver_module, "memory_left", lambda: {"machine a": sum(sizes)})
    Team(layout, tmp_path).close()


def test_every_rank_reports_a_failed_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(1, 2, seed=1)
    allocate, small = saver_module.shared_memory, 12 * layout.plans[1].elements
    assert small != 12 * layout.plans[0].elements

    def fails_for_rank_1(size: int):
        if size == small:
            raise MemoryError("gone meanwhile")
        return allocate(size)

    monkeypatch.setattr(saver_module, "shared_memory", fails_for_rank_1)
    assert Refused(layout, tmp_path, r"^rank 1 on 127\.0\.0\.1: gone meanwhile$").caught == 2
