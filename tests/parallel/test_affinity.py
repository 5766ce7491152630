"""Ranks are bound to the cores near their GPUs."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from griffin.parallel.world.affinity import bind_near, near_cores

ADDRESS = "0001:3b:00.0"
MINE = os.sched_getaffinity(0)


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Return a function that writes which cores are near the GPU, and returns the stand-in for /sys."""
    found = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    folder = tmp_path / "bus/pci/devices" / ADDRESS
    folder.mkdir(parents=True)

    def write(cores):
        (folder / "local_cpulist").write_text(f"{cores}\n")
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def affinity_is_restored():
    yield
    os.sched_setaffinity(0, MINE)
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), MINE)


@pytest.mark.parametrize(
    ("text", "cores"),
    [("3", {3}), ("0-3", {0, 1, 2, 3}), ("0-1,8-9,12", {0, 1, 8, 9, 12}), ("", set()), ("all", set())],
)
def test_lists_of_cores(card, text, cores):
    assert near_cores(ADDRESS, card(text)) == cores


def test_unknown_devices_have_no_near_cores(card):
    assert near_cores("0000:00:00.0", card("0-3")) == set()


def test_all_threads_and_children_are_bound(card):
    first = min(MINE)
    stop = threading.Event()
    earlier = threading.Thread(target=stop.wait)
    earlier.start()
    assert bind_near(torch.device("cuda", 0), card(first)) == {first}
    of_thread = os.sched_getaffinity(earlier.native_id)
    stop.set()
    earlier.join()
    program = "import os; print(os.sched_getaffinity(0))"
    later = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (os.sched_getaffinity(0), of_thread, later.stdout.strip()) == ({first}, {first}, f"{{{first}}}")


@pytest.mark.parametrize("cores", ["", "100000-100001"])
def test_disallowed_cores_change_nothing(card, cores):
    assert bind_near(torch.device("cuda", 0), card(cores)) == set()
    assert os.sched_getaffinity(0) == MINE


def test_a_device_without_an_address_changes_nothing(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="GPU"))
    assert bind_near(torch.device("cuda", 0), card(min(MINE))) == set()
    assert os.sched_getaffinity(0) == MINE


def test_a_container_that_forbids_binding_is_tolerated(card, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    bind_near(torch.device("cuda", 0), card(min(MINE)))
    monkeypatch.undo()
    assert os.sched_getaffinity(0) == MINE


def test_affinity_is_only_narrowed(card):
    first = min(MINE)
    os.sched_setaffinity(0, {first})
    assert bind_near(torch.device("cuda", 0), card("0-1023")) == {first}


def test_ranks_without_a_gpu_are_not_bound(card):
    assert bind_near(torch.device("cpu"), card(min(MINE))) == set()
    assert os.sched_getaffinity(0) == MINE
