"""Figures of a run over its steps, as JSON lines and in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import TracebackType

from griffin.trainer.run_folder import RunFolder


class MetricsWriter:
    """Appends to a run folder's metrics.jsonl, and to its tensorboard/ where asked for; used by rank 0 only."""

    def __init__(self, folder: RunFolder, tensorboard: bool) -> None:
        self._file = folder.metrics.open("a", encoding="utf-8")
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder.tensorboard))
            text = folder.config.read_text(encoding="utf-8")
            self._tensorboard.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))
            self._tensorboard.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line {"step": step, **values}, flushed. JSON has no infinity or NaN: they are written as null."""
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
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
