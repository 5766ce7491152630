"""The console of a run: a progress bar in a terminal, plain lines elsewhere, and everything in console.log."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from griffin.trainer.reporting.metrics import NOTHING_PREDICTED, is_predicted
from griffin.trainer.run.folder import RunFolder
from griffin.trainer.run.log_file import LogFile
from griffin.trainer.run.signals import is_interrupt


class Console:
    """Rank 0's output. A context manager, which writes the traceback of an error that leaves it to console.log.

    `steps` is the last step of the run, and `start` the step after which it begins. Text that cannot be written (a full
    disk, a closed terminal) is lost; nothing is raised.
    """

    def __init__(self, folder: RunFolder, steps: int, start: int = 0, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._log = LogFile(folder.console, self._show)
        self._steps = steps
        self._first: tuple[int, float] | None = None  # the first step done, and its time
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=steps, initial=start, file=self._stream, unit="step", dynamic_ncols=True)

    def print(self, text: str) -> None:
        """Print `text` above the progress bar, if there is one, and to console.log."""
        self._show(text)
        self._log.write(f"{text}\n")

    def _show(self, text: str) -> None:
        with suppress(OSError):
            if self._bar is None:
                print(text, file=self._stream, flush=True)
            else:
                self._bar.write(text, file=self._stream)

    def step(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Report that `step` is done, with its figures `values` if it is a logged step."""
        now = time.monotonic()
        # The remaining time is estimated without the first step, which compiles and allocates.
        self._first = self._first or (step, now)
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(step - self._bar.n)
        if values is None:
            return
        text = f"step {step:>{len(str(self._steps))}}/{self._steps}  " + "  ".join(
            figure_text(key, values) for key in _FORMATS if key in values
        )
        if step > self._first[0]:
            left = (now - self._first[1]) / (step - self._first[0]) * (self._steps - step)
            text += f"  {tqdm.format_interval(left)} left"
        if self._bar is None:
            self._show(text)
        else:
            shown = [figure_text(key, values) for key in ("loss", "tokens_per_second") if key in values]
            with suppress(OSError):
                self._bar.set_postfix_str(", ".join(shown))
        self._log.write(f"{text}\n")

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()
        self._log.close()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_interrupt(error):
            self._log.write(
                "Stopped by Ctrl-C. Start it again with this run folder to resume from its newest checkpoint.\n"
            )
        elif error is not None:
            self._log.write("".join(traceback.format_exception(error)))
        self.close()


def figure_text(key: str, values: Mapping[str, float]) -> str:
    """A figure with its name, for the console."""
    if not is_predicted(key, values):
        return f"{key}: {NOTHING_PREDICTED}"
    return _FORMATS[key](values[key]) if key in _FORMATS else f"{key} {values[key]:{_OTHERS.get(_stem(key), '.4g')}}"


def _stem(key: str) -> str:
    return key.partition("/")[0]


_FORMATS = {
    "loss": "loss {:.4f}".format,
    "eval_loss": "eval_loss {:.4f}".format,
    "grad_norm": "grad_norm {:.3f}".format,
    "learning_rate": "learning_rate {:.2e}".format,
    "tokens_per_second": "{:,.0f} tokens/s".format,
}
_OTHERS = {"eval_loss": ".4f", "eval_perplexity": ".3f", "eval_bits_per_byte": ".4f"}  # FIGURE/NAME
