"""One rank's share of a save: the values that it sends to other ranks, and the chunks that it assembles and writes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from griffin.parallel.world.axes import rank_name
from griffin.trainer.checkpoint.arrays import EXP_AVG, EXP_AVG_SQ, MASTER, MODEL, ArraySpec, numpy_dtype
from griffin.trainer.checkpoint.plan import ChunkPlan, Segment
from griffin.trainer.checkpoint.regions import put, take
from griffin.trainer.checkpoint.saving.coordinator import describe
from griffin.trainer.checkpoint.saving.exchange import VALUES, Exchange
from griffin.trainer.checkpoint.saving.protocol import ROWS, Setup
from griffin.trainer.checkpoint.zarr_io import SYNCS, Array, FileRecord, Write, create_array

WRITERS = 4  # chunks being written at a time, of at most 64 MiB each
# Written chunks are synchronised to disk together, once there are so many or so large (plus WRITERS more).
OPEN_FILES = 128
OPEN_BYTES = 2**30
JOIN_SECONDS = 30.0  # to wait for the writes in progress of a failed save

T = TypeVar("T")


class Share:
    """One rank's share of one save. One thread sends values to the owners of chunks, one writes the rank's own chunks.

    The first failure, or `abort`, ends it: no further chunk is started.
    """

    def __init__(self, setup: Setup, staged: np.ndarray, exchange: Exchange, folder: Path, report: Callable) -> None:
        """`report` is called once, with {"files": {path: [size, checksum]}} or {"error": text}."""
        self._plan, self._staged, self._exchange, self._folder = setup.plan, staged, exchange, folder
        self._timeout, self._name, self._report = setup.timeout, rank_name(setup.rank, setup.host), report
        self._arrays: dict[str, Array] = {}
        self._files: dict[str, FileRecord] = {}
        self._running, self._has_failed = 2, False
        self._lock = threading.Lock()
        self._creations: dict[str, threading.Lock] = {}  # by array
        self._aborted = threading.Event()
        self._writers, self._syncers = ThreadPoolExecutor(WRITERS), ThreadPoolExecutor(SYNCS)
        self._writes: deque[Future[tuple[str, Write]]] = deque()  # in progress, at most WRITERS
        self._written: list[tuple[str, Write]] = []  # not yet synchronised
        self._syncs: deque[Future[tuple[str, FileRecord]]] = deque()  # in progress, of chunks
        self._array_syncs: deque[Future[None]] = deque()  # of the arrays' metadata and folders, last of all
        self._threads = [
            threading.Thread(target=self._run, args=(task,), daemon=True) for task in (self._send, self._write)
        ]
        for thread in self._threads:
            thread.start()

    def abort(self) -> None:
        """Start no further chunk. `Exchange.abort` ends the wait for values."""
        self._aborted.set()

    def join(self) -> bool:
        """Wait until no thread runs or reads the staged state; False if one still does after JOIN_SECONDS.

        For a share that has ended or was aborted.
        """
        deadline = time.monotonic() + min(self._timeout, JOIN_SECONDS)
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        in_progress: list[Future[Any]] = [*self._writes, *self._syncs, *self._array_syncs]
        _, running = wait(in_progress, max(0, deadline - time.monotonic()))
        for pool in (self._writers, self._syncers):
            pool.shutdown(wait=False)
        if running:
            return False
        # A removed file keeps its disk space while it is open.
        for _, write in [*self._written, *(future.result() for future in self._writes if not future.exception())]:
            write.close()
        return True

    def _run(self, task: Callable[[], None]) -> None:
        error: str | None = None
        try:
            task()
        except Exception as caught:
            error = describe(caught)
        with self._lock:
            self._running -= 1
            is_report_due = not self._has_failed and (error is not None or self._running == 0)
            self._has_failed = self._has_failed or error is not None
        if error is not None:
            self.abort()
        if is_report_due and error is not None:
            self._report({"error": f"{self._name}: {error}"})
        elif is_report_due:
            self._report({"files": {name: [record.size, record.checksum] for name, record in self._files.items()}})

    def _send(self) -> None:
        for chunk in self._plan.chunks:
            if chunk.owner == self._plan.rank:
                continue
            for row in range(ROWS):
                self._check_not_aborted()
                for segment in chunk.segments:
                    if segment.rank == self._plan.rank:
                        self._exchange.connect(chunk.owner, VALUES).send(self._take(row, segment))

    def _write(self) -> None:
        for chunk in self._plan.chunks:
            if chunk.owner != self._plan.rank:
                continue
            for row in range(ROWS):
                self._check_not_aborted()
                values = self._assemble(chunk, row)
                for spec in self._arrays_of(chunk, row):
                    if len(self._writes) >= WRITERS:
                        self._finish()
                    self._writes.append(self._writers.submit(self._write_chunk, spec, chunk.index, values))
        while self._writes:
            self._finish()
        self._synchronise()
        self._array_syncs.extend(self._syncers.submit(array.synchronise) for array in self._arrays.values())
        while self._array_syncs:
            self._first(self._array_syncs)

    def _finish(self) -> None:
        """Wait for the oldest write in progress."""
        self._written.append(self._first(self._writes))
        size = sum(write.size for _, write in self._written)
        if len(self._written) >= OPEN_FILES or size >= OPEN_BYTES:
            self._synchronise()

    def _synchronise(self) -> None:
        """Synchronise the written chunks to disk."""
        self._syncs.extend(self._syncers.submit(self._sync, name, write) for name, write in self._written)
        self._written.clear()
        while self._syncs:
            name, record = self._first(self._syncs)
            assert name not in self._files, f"{name} is written twice"
            self._files[name] = record

    def _first(self, futures: deque[Future[T]]) -> T:
        """Remove the first future and return its result. If it does not end in time, it stays."""
        try:
            result = futures[0].result(self._timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{self._folder}: a write has not ended within {self._timeout:g} s") from error
        futures.popleft()
        return result

    def _sync(self, name: str, write: Write) -> tuple[str, FileRecord]:
        try:
            self._check_not_aborted()
        except ConnectionError:
            write.close()
            raise
        return name, write.result()

    def _check_not_aborted(self) -> None:
        if self._aborted.is_set():
            raise ConnectionError("the save was aborted")

    def _write_chunk(self, spec: ArraySpec, index: tuple[int, ...], values: np.ndarray) -> tuple[str, Write]:
        self._check_not_aborted()
        with self._lock:
            creation = self._creations.setdefault(spec.name, threading.Lock())
        with creation:
            array = self._arrays.get(spec.name)
            if array is None:
                array = self._arrays[spec.name] = create_array(self._folder, spec)
        shape = tuple(extent.stop - extent.start for extent in spec.box(index))
        # Rounds to nearest even where the array has fewer bits.
        values = values.astype(numpy_dtype(spec.dtype), copy=False).reshape(shape)
        return spec.file(index), array.write(index, values)

    def _arrays_of(self, chunk: ChunkPlan, row: int) -> list[ArraySpec]:
        """The arrays whose chunks are written from a row of the staged state."""
        kinds = [[MODEL], [EXP_AVG], [EXP_AVG_SQ]][row]
        if row == 0 and self._plan.dtype != "float32":
            kinds = [MODEL, MASTER]
        return [
            ArraySpec(
                kind=kind,
                tensor=chunk.tensor,
                dtype=self._plan.dtype if kind == MODEL else "float32",
                chunks=chunk.chunks,
            )
            for kind in kinds
        ]

    def _take(self, row: int, segment: Segment) -> np.ndarray:
        shard = self._plan.shards[segment.parameter]
        held = self._staged[row, shard.offset : shard.offset + shard.stop - shard.start]
        return take(held, segment.local, segment.first, segment.last, origin=shard.start)

    def _assemble(self, chunk: ChunkPlan, row: int) -> np.ndarray:
        """The chunk's values, flat; a view of the staged state if this rank holds them contiguously."""
        if len(chunk.segments) == 1 and chunk.segments[0].rank == self._plan.rank:
            return self._take(row, chunk.segments[0])
        values = np.empty(chunk.size, np.float32)
        for segment in chunk.segments:
            place = segment.chunk, segment.first, segment.last
            if segment.rank == self._plan.rank:
                put(values, *place, self._take(row, segment))
                continue
            channel = self._exchange.accept(segment.rank, VALUES)
            if segment.chunk.rows == 1:
                channel.receive_values(take(values, *place))
            else:
                received = np.empty(segment.count, np.float32)
                channel.receive_values(received)
                put(values, *place, received)
        return values
