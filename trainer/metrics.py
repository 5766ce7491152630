"""Figures of a run over its steps, as JSON lines and in TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from griffin.trainer.run_folder import RunFolder


class MetricsWriter:
    """Appends to a run folder's metrics.jsonl, and to its tensorboard/ where asked for; used by rank 0 only.

    `attempt` counts the run's starts and `start` is the step after which this one goes on. Figures of later steps,
    from an attempt that ended after its last checkpoint, stay in metrics.jsonl under that attempt's number, and are
    hidden from TensorBoard's curves.
    """

    def __init__(self, folder: RunFolder, tensorboard: bool, attempt: int = 1, start: int = 0) -> None:
        self._attempt = attempt
        self._file = folder.metrics.open("a", encoding="utf-8")
        if _ends_within_a_line(folder.metrics):  # an attempt that was killed while it wrote
            self._file.write("\n")
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Before the first step there may have been an evaluation, which a run from scratch does again.
            purge = None if attempt == 1 and start == 0 else start + 1 if start else 0
            self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=purge)
            text = folder.config.read_text(encoding="utf-8")
            self._tensorboard.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), start)
            self._tensorboard.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line {"step", "attempt", **values}, flushed. JSON has no infinity or NaN: they become null."""
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, "attempt": self._attempt, **line}, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ends_within_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
