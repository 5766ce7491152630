"""Writing the figures of a run to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from griffin.trainer.reporting.charts import grouped, layout
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.log_file import LogFile

if TYPE_CHECKING:  # the import takes a second
    from torch.utils.tensorboard import SummaryWriter


NOTHING_PREDICTED = "no token was predicted"
# Figures that are means over predicted tokens -> the figure of the number of these tokens.
_TOKENS = {"loss": "loss_tokens"} | dict.fromkeys(
    ("eval_loss", "eval_perplexity", "eval_bits_per_byte"), "eval_loss_tokens"
)


def is_predicted(key: str, values: Mapping[str, float]) -> bool:
    """Whether a figure has a value: the loss over no token, by "loss_tokens" among `values`, is 0.0 and has none.

    The figures of a named held-out set are FIGURE/NAME.
    """
    figure, slash, name = key.partition("/")
    return not (figure in _TOKENS and values.get(f"{_TOKENS[figure]}{slash}{name}") == 0)


class MetricsWriter:
    """Appends to metrics.jsonl of a run folder and, if `tensorboard`, to its TensorBoard files. Used by rank 0 only.

    `attempt` is the number of this start of the run, and `start` the step after which it continues. Figures of later
    steps, from an attempt that continued after its last checkpoint, stay in metrics.jsonl under that attempt's number
    and are hidden from TensorBoard's curves.

    TensorBoard shows the figures in groups, under the run's name, except for a run that an older version began. With
    `named_sets`, its charts show the figures of held-out sets by name.

    What cannot be written is lost, and nothing is raised; `say` is called once for each of the two. Writing
    metrics.jsonl is tried again with each line. TensorBoard is given up: its writer's thread ends with its first error.
    """

    def __init__(
        self,
        folder: RunFolder,
        tensorboard: bool,
        attempt: int = 1,
        start: int = 0,
        say: Callable[[str], object] = print,
        named_sets: bool = False,
    ) -> None:
        self._attempt = attempt
        self._say = say
        self._file = LogFile(folder.metrics, say)
        self._folder = folder
        self._tag: Callable[[str], str] = str if folder.begun_flat else grouped
        self._tensorboard: SummaryWriter | None = None
        if tensorboard:
            # A run from scratch repeats the evaluation before the first step, at step 0.
            self._open(None if attempt == 1 and start == 0 else start + 1 if start else 0)
        if self._tensorboard is not None:
            text = folder.config.read_text(encoding="utf-8")
            with self._tensorboard_errors():
                self._tensorboard.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), start)
                self._tensorboard.add_custom_scalars(layout(self._tag, named_sets=named_sets))
                self._tensorboard.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the line {"step", "attempt", "time", **values}, flushed; the time is in Unix seconds.

        Infinity and NaN, which JSON does not have, become null.
        """
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = {"step": step, "attempt": self._attempt, "time": round(time.time(), 3), **line}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            with self._tensorboard_errors():
                for key, value in values.items():
                    if is_predicted(key, values):
                        self._tensorboard.add_scalar(self._tag(key), value, step)
                    else:  # a gap in the curve, and why
                        self._tensorboard.add_text(self._tag(key), f"step {step}: {NOTHING_PREDICTED}", step)
                self._tensorboard.flush()

    def histograms(self, step: int, histograms: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
        """Write histograms, (ascending upper ends of bins, counts) by figure, to TensorBoard only."""
        if self._tensorboard is None:
            return
        with self._tensorboard_errors():
            for figure, (ends, counts) in histograms.items():
                filled = [end for end, count in zip(ends, counts, strict=True) if count]
                self._tensorboard.add_histogram_raw(
                    self._tag(figure),
                    min=filled[0],
                    max=filled[-1],
                    num=int(sum(counts)),
                    sum=sum(end * count for end, count in zip(ends, counts, strict=True)),
                    sum_squares=sum(end**2 * count for end, count in zip(ends, counts, strict=True)),
                    bucket_limits=ends,
                    bucket_counts=counts,
                    global_step=step,
                )
            self._tensorboard.flush()

    def rewind(self, step: int) -> None:
        """Hide the figures after `step`, from which training continues, from TensorBoard's curves.

        In metrics.jsonl, the last line of a step is the valid one.
        """
        if self._tensorboard is not None:
            with self._tensorboard_errors():
                self._tensorboard.close()
                self._open(step + 1)

    def _open(self, purge: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with self._tensorboard_errors():
            self._tensorboard = SummaryWriter(str(self._events()), purge_step=purge)

    def _events(self) -> Path:
        """The folder of event files. It is renamed if the run folder was renamed or copied, to continue its curves."""
        events = self._folder.events
        if not (self._folder.begun_flat or events.exists()) and self._folder.tensorboard.is_dir():
            earlier = [path for path in self._folder.tensorboard.iterdir() if any(path.glob("events.out.tfevents.*"))]
            if len(earlier) == 1:
                earlier[0].rename(events)
        return events

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            with self._tensorboard_errors():
                self._tensorboard.close()

    @contextmanager
    def _tensorboard_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # an OSError, or the exception that TensorBoard's file system library turns it into
            self._say(f"tensorboard/ cannot be written: {error}; training continues without it")
            writer, self._tensorboard = self._tensorboard, None
            if writer is not None:
                with suppress(Exception):  # closing flushes, which fails again, but ends its thread
                    writer.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
