"""Rank 0's assessment of the results of all ranks: failures, which end the run, warnings, and the summary."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from griffin.parallel.sharding import named_pieces
from griffin.parallel.stage import meta_stage
from griffin.parallel.world.axes import Axes, rank_name, rank_names
from griffin.parallel.world.grid import Grid
from griffin.trainer.preflight.agreement import PreflightError, RankLocation
from griffin.trainer.preflight.links import AllReduce, Exchanges, Link
from griffin.trainer.preflight.machine import GIB, Machine, Rates
from griffin.trainer.run.folder import changed_settings
from griffin.trainer.settings.sections import Config

DEVICE_SHARE = 0.7  # a device below this share of the median rate of devices of its name is slow
LINK_SHARE = 0.5  # a link below this share of the usual bandwidth of its kind is slow
# A run never compares the clocks of two machines, but people compare their logs.
SKEW_SECONDS = 1.0
TOKEN_BYTES = 64  # most bytes per token of a sample in shared memory
PREFETCHED = 2  # batches that each data loader process prefetches
MOST_WARNINGS = 8  # of each kind
WITHIN, BETWEEN = "within a host", "between hosts"


class Assessment:
    """Collects the results of all ranks on rank 0. Its methods raise PreflightError for a reason not to train."""

    def __init__(self, config: Config | None, grid: Grid, run_dir: Path) -> None:
        self._config, self._grid, self._run_dir = config, grid, run_dir
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self._failures: list[str] = []
        self._hosts: dict[int, str] = {}
        self._machines: list[Machine] = []
        self._rates: list[Rates] = []
        self._links: dict[tuple[int, int], Link] = {}

    def add_ranks(self, locations: Sequence[RankLocation]) -> None:
        self._hosts = {location.rank: location.host for location in locations}
        counts = Counter(self._hosts.values())
        if len(set(counts.values())) == 1 and len(counts) > 2:
            spread = f"{len(counts)} hosts, {next(iter(counts.values()))} on each"
        else:
            spread = ", ".join(f"{count} on {host}" for host, count in counts.items())
        self.lines.append(f"ranks: {len(locations)}: {spread}")

    def add_machines(
        self, machines: Sequence[Machine], unseen: Sequence[int], skews: Mapping[int, float]
    ) -> frozenset[int]:
        """Returns the ranks whose devices must be measured again, as slow ones are reported after two measurements.

        `unseen` are ranks whose files in the run folder rank 0 does not see, `skews` clock differences by rank.
        """
        self._machines = list(machines)
        self._rates = [machine.device.rates for machine in machines]
        self._versions_and_settings()
        self._devices()
        self._folder(unseen)
        self._clocks(skews)
        self._memory()
        self._raise_failures()
        return frozenset(self._slow())

    def add_second_rates(self, rates: Sequence[Rates | None]) -> None:
        for rank, new in enumerate(rates):
            if new is not None:
                old = self._rates[rank]
                self._rates[rank] = Rates(tflops=max(old.tflops, new.tflops), copy=max(old.copy, new.copy))

    def conclude_devices(self) -> None:
        """Report the speed of devices, once no device is measured again."""
        self._warn(list(self._slow().values()))
        for name in dict.fromkeys(machine.device.name for machine in self._machines):
            mine = [
                rates for rates, machine in zip(self._rates, self._machines, strict=True) if machine.device.name == name
            ]
            products = _spread([rates.tflops for rates in mine], 1.0)
            copies = _spread([rates.copy for rates in mine], 1e9)
            self.lines.append(f"devices: {len(mine)} x {name}: {products} TFLOP/s, copies at {copies} GB/s")

    def add_links(self, exchanges: Sequence[Exchanges]) -> bool:
        """Returns whether all links must be measured again."""
        self._add_failures([each.failures for each in exchanges])
        for link in (link for each in exchanges for link in each.links):
            old = self._links.get(link.pair)
            self._links[link.pair] = link if old is None or link.bandwidth > old.bandwidth else old
        return bool(self._slow_links())

    def add_all_reduce(self, results: Sequence[AllReduce]) -> None:
        self._add_failures([each.failures for each in results])
        self._conclude_links()
        slowest = max(results, key=lambda each: each.seconds)
        size = len(results)
        bus = 2 * (size - 1) / size * slowest.bytes / slowest.seconds
        self.lines.append(
            f"all-reduce: {slowest.bytes / 2**20:g} MiB over {size} ranks in {slowest.seconds * 1e3:.2f} ms, "
            f"{_gigabytes(bus)} of bus bandwidth, exact"
        )

    def _conclude_links(self) -> None:
        self._warn(self._slow_links())
        for kind, links in self._kinds().items():
            slowest, fastest = (choose(links, key=lambda link: link.bandwidth) for choose in (min, max))
            latency = median(link.seconds for link in links)
            self.lines.append(
                f"links {kind}: {len(links)}, median {_gigabytes(median(link.bandwidth for link in links))}, "
                f"{latency * 1e6:.0f} us; slowest {self._named(slowest)}; fastest {self._named(fastest)}"
            )

    def _raise_failures(self) -> None:
        if self._failures:
            raise PreflightError(self._failures, self.warnings, self.lines)

    def _warn(self, texts: Sequence[str]) -> None:
        self.warnings += texts[:MOST_WARNINGS]
        if len(texts) > MOST_WARNINGS:
            self.warnings.append(f"and {len(texts) - MOST_WARNINGS} more like the last")

    def _add_failures(self, failures: Sequence[Sequence[str]]) -> None:
        """Add the failures that each rank has found, and raise them if there are any."""
        for rank, texts in enumerate(failures):
            self._failures += [f"{text} (rank {rank} is on {self._hosts[rank]})" for text in texts]
        self._raise_failures()

    def _versions_and_settings(self) -> None:
        versions = [machine.versions for machine in self._machines]
        differing = disagreements(versions, self._hosts)
        self._failures += differing
        if not differing:
            names = ("Python", "torch", "megatron-core", "NCCL", "griffin's code")
            self.lines.append(f"versions: {', '.join(f'{name} {versions[0][name]}' for name in names)}")
        self._failures += differing_settings([machine.config for machine in self._machines], self._hosts)
        self._warn(disagreements([machine.variables for machine in self._machines], self._hosts))

    def _devices(self) -> None:
        users: dict[str, list[int]] = {}
        for rank, machine in enumerate(self._machines):
            where = f"{rank_name(rank, self._hosts[rank])}: {machine.device.name}"
            self._failures += [f"{where}: {text}" for text in machine.device.faults]
            self._warn([f"{where}: {text}" for text in machine.device.oddities])
            if machine.device.uuid:
                users.setdefault(machine.device.uuid, []).append(rank)
        self._failures += [
            f"{rank_names(ranks, self._hosts)}: share GPU {uuid}, each rank needs one of its own"
            for uuid, ranks in users.items()
            if len(ranks) > 1
        ]
        names = [{"device": machine.device.name} for machine in self._machines]
        self._warn(disagreements(names, self._hosts))

    def _folder(self, unseen: Sequence[int]) -> None:
        problems = [
            (rank, machine.folder_problem) for rank, machine in enumerate(self._machines) if machine.folder_problem
        ]
        self._failures += [f"{self._hosts[rank]} (rank {rank}) {text}" for rank, text in problems]
        if unseen:
            path = self._run_dir.absolute()
            self._failures.append(f"{rank_names(unseen, self._hosts)}: rank 0 does not see what they write in {path}")
        free = shutil.disk_usage(self._run_dir).free
        text = f"run folder: {_size(free)} free"
        if self._config is not None:
            needed = checkpoint_bytes(self._config, self._grid)
            text += f", a checkpoint takes {_size(needed)}"
            if free < needed:
                self._failures.append(
                    f"{self._run_dir.absolute()}: {_size(free)} free, must be at least {_size(needed)}, the size of "
                    "one checkpoint"
                )
        self.lines.append(text)

    def _clocks(self, skews: Mapping[int, float]) -> None:
        self._warn(
            [
                f"{self._hosts[rank]}: its clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} that of "
                f"{self._hosts[0]}, at most {SKEW_SECONDS:g} s are expected"
                for rank, skew in skews.items()
                if abs(skew) > SKEW_SECONDS
            ]
        )
        if skews:
            rank = max(skews, key=lambda rank: abs(skews[rank]))
            self.lines.append(f"clocks: within {abs(skews[rank]):.3f} s of {self._hosts[0]}'s ({self._hosts[rank]})")

    def _memory(self) -> None:
        rank = min(range(len(self._machines)), key=lambda rank: self._machines[rank].memory)
        text = f"memory: at least {_size(self._machines[rank].memory)} left ({self._hosts[rank]})"
        shared = {
            self._hosts[rank]: machine.shared_memory
            for rank, machine in enumerate(self._machines)
            if machine.shared_memory is not None
        }
        if shared:
            least = min(shared, key=lambda host: shared[host])
            text += f", {_size(shared[least])} of shared memory ({least})"
        self.lines.append(text)
        if self._config is None:
            return
        data, counts = self._config.data, Counter(self._hosts.values())
        sample = self._config.train.micro_batch * data.sequence_length * TOKEN_BYTES
        texts = []
        for host, free in shared.items():
            needed = counts[host] * data.workers * PREFETCHED * sample
            if free < needed:
                texts.append(
                    f"{host}: {_size(free)} free in /dev/shm, {_size(needed)} are expected for data.workers = "
                    f"{data.workers} of {counts[host]} ranks"
                )
        self._warn(texts)

    def _slow(self) -> dict[int, str]:
        """A text for each slow device, by rank."""
        texts: dict[int, str] = {}
        for name in dict.fromkeys(machine.device.name for machine in self._machines):
            ranks = [rank for rank, machine in enumerate(self._machines) if machine.device.name == name]
            rates = {rank: self._rates[rank] for rank in ranks}
            if name == "CPU":  # ranks share a machine's cores with each other and with others: its best rank counts
                rates = self._best_of_hosts(ranks)
            middle = Rates(
                tflops=median(each.tflops for each in rates.values()), copy=median(each.copy for each in rates.values())
            )
            for rank, mine in rates.items():
                where = f"{rank_name(rank, self._hosts[rank])}: {name}"
                if mine.tflops < DEVICE_SHARE * middle.tflops:
                    texts[rank] = f"{where} is slow: {mine.tflops:.3g} TFLOP/s, the median is {middle.tflops:.3g}"
                elif mine.copy < DEVICE_SHARE * middle.copy:
                    texts[rank] = f"{where} is slow: copies {_gigabytes(mine.copy)}, median {_gigabytes(middle.copy)}"
        return texts

    def _best_of_hosts(self, ranks: Sequence[int]) -> dict[int, Rates]:
        """The best rates of each host, by the first of `ranks` on it."""
        firsts: dict[str, int] = {}
        best: dict[int, Rates] = {}
        for rank in ranks:
            first, mine = firsts.setdefault(self._hosts[rank], rank), self._rates[rank]
            known = best.setdefault(first, mine)
            best[first] = Rates(tflops=max(known.tflops, mine.tflops), copy=max(known.copy, mine.copy))
        return best

    def _kinds(self) -> dict[str, list[Link]]:
        kinds: dict[str, list[Link]] = {}
        for link in self._links.values():
            a, b = (self._hosts[rank] for rank in link.pair)
            kinds.setdefault(WITHIN if a == b else BETWEEN, []).append(link)
        return kinds

    def _slow_links(self) -> list[str]:
        """A text for each host whose links of a kind are all slow, and for each other slow link."""
        texts = []
        # Ranks on a machine without GPUs share its cores, which slows down exchanges between them.
        shared = {self._hosts[rank] for rank, machine in enumerate(self._machines) if machine.device.name == "CPU"}
        for kind, all_links in self._kinds().items():
            links = [link for link in all_links if kind == BETWEEN or not self._ends(link) & shared]
            if not links:
                continue
            rates = sorted(link.bandwidth for link in links)
            # On a ring of few hosts, one faulty host has half of all links: the upper quartile is the usual bandwidth.
            usual = median(rates) if kind == WITHIN else rates[3 * len(rates) // 4]
            slow = [link for link in links if link.bandwidth < LINK_SHARE * usual]
            of_host = Counter(host for link in links for host in self._ends(link))
            slow_of_host = Counter(host for link in slow for host in self._ends(link))
            culprits = [host for host, count in slow_of_host.items() if count == of_host[host] > 1]
            others = f"usual is {_gigabytes(usual)}"
            for host in culprits:
                rates = [link.bandwidth for link in slow if host in self._ends(link)]
                texts.append(f"{host}: all its links {kind} are slow: at most {_gigabytes(max(rates))}, {others}")
            texts += [
                f"slow link {kind}: {self._named(link)}, {others}"
                for link in slow
                if not self._ends(link) & set(culprits)
            ]
        return texts

    def _ends(self, link: Link) -> set[str]:
        return {self._hosts[rank] for rank in link.pair}

    def _named(self, link: Link) -> str:
        ends = [f"rank {rank} ({self._hosts[rank]})" for rank in link.pair]
        return f"{' - '.join(ends)} {_gigabytes(link.bandwidth)}"


def disagreements(values: Sequence[Mapping[str, str]], hosts: Mapping[int, str]) -> list[str]:
    """A text for each name whose value differs between ranks: the ranks whose value is not that of most."""
    texts = []
    for name in sorted({name for mine in values for name in mine}):
        ranks: dict[str, list[int]] = {}
        for rank, mine in enumerate(values):
            ranks.setdefault(mine.get(name, "unset"), []).append(rank)
        usual = max(ranks, key=lambda value: len(ranks[value]))  # on a tie, that of the lowest rank
        texts += [
            f"{name} differs: {value} on {rank_names(others, hosts)}; {usual} on {_others(len(ranks[usual]))}"
            for value, others in ranks.items()
            if value != usual
        ]
    return texts


def differing_settings(configs: Sequence[Config | None], hosts: Mapping[int, str]) -> list[str]:
    """A text for each config that is not that of most ranks: its ranks, and the settings that differ."""
    ranks: dict[Config | None, list[int]] = {}
    for rank, config in enumerate(configs):
        ranks.setdefault(config, []).append(rank)
    usual = max(ranks, key=lambda config: len(ranks[config]))
    texts = []
    for config, others in ranks.items():
        if config != usual and config is not None and usual is not None:
            changed = changed_settings(usual, dataclasses.asdict(config))
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            texts.append(
                f"settings differ: {rank_names(others, hosts)} against {_others(len(ranks[usual]))}: "
                f"{', '.join(changed[:3])}{more}"
            )
    return texts


def checkpoint_bytes(config: Config, grid: Grid) -> int:
    """Bytes of a checkpoint: weights, master weights unless weights are float32, and Adam's two moments."""
    whole = dataclasses.replace(grid, rank=0, axes=Axes.of())
    parameters = sum(math.prod(piece.shape) for piece, _ in named_pieces([meta_stage(config.model, whole)]))
    weight = {"float32": 4, "bfloat16": 2 + 4}[config.train.dtype]
    return (weight + 2 * 4) * parameters


def _others(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _spread(values: Sequence[float], unit: float) -> str:
    least, most = (f"{choose(values) / unit:.3g}" for choose in (min, max))
    return least if least == most else f"{least} to {most}"


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def _size(count: int) -> str:
    if count < GIB:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / GIB:.1f} GiB" if count < 1024 * GIB else f"{count / GIB / 1024:.1f} TiB"
