"""The display of a run in progress: a live bar on a terminal, plain lines in a file or a pipe.

with Progress(num_steps=2000) as progress:
    progress.advance(9)                                     # every step: moves the bar
    progress.update(10, metrics=meter.measure(...), loss=3.2, learning_rate=1e-3)   # every log interval
    progress.print("checkpoint saved at step 10")
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from slmjax.telemetry.meter import Throughput

log = logging.getLogger(__name__)

BAR_WIDTH = 16


class Progress:
    """Shows the steps of a run up to `num_steps`; only process 0 prints.

    If `console` (standard output by default) is a terminal, a live bar is drawn, else each update is one
    line.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        process_index: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._num_steps = num_steps
        self._is_silent = process_index != 0
        self._clock = clock
        self._first_update: tuple[int, float] | None = None
        self._console = console or Console()
        columns = (
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
        )
        bar = Bar(*columns, console=self._console, refresh_per_second=5)
        self._task = bar.add_task("compiling", total=num_steps)
        # On other processes the bar exists but is never drawn.
        self._bar = bar if self._console.is_terminal and not self._is_silent else None

    def set_length(self, num_steps: int) -> None:
        """Take the number of steps of the run, where it becomes known after the display was made."""
        self._num_steps = num_steps
        if self._bar is not None:
            self._bar.update(self._task, total=num_steps)

    def advance(self, step: int) -> None:
        """Move the bar to `step`. Without a terminal this does nothing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def update(
        self,
        step: int,
        *,
        metrics: Throughput,
        loss: float,
        learning_rate: float | None = None,
        grad_norm: float | None = None,
        divergence: float | None = None,
    ) -> None:
        """Show the metrics of `step`, and the time left at the mean pace since the first update.

        If the terminal is too narrow, metrics are dropped from the last to the first; the time left stays.

        Args:
          step: the number of steps that are done.
          metrics: throughput since the last update.
          loss: nats per token.
          learning_rate: that of the step.
          grad_norm: of the gradient before clipping.
          divergence: from the teachers, in distillation.
        """
        parts = [f"loss {loss:.4f}", f"{metrics.bits_per_byte:.3f} bits/byte"]
        parts += [] if learning_rate is None else [f"lr {learning_rate:.2e}"]
        parts += [] if grad_norm is None else [f"grad norm {grad_norm:.3g}"]
        # The first step of a session compiles, so its pace is unknown.
        has_pace = not math.isnan(metrics.tokens_per_second)
        if has_pace:
            parts += [f"{metrics.tokens_per_second:,.0f} tokens/s"]
        parts += [] if divergence is None else [f"divergence {divergence:.4f}"]
        if has_pace:
            parts += [] if metrics.mfu is None else [f"MFU {metrics.mfu:.0%}"]
            parts += [f"data wait {metrics.data_wait_share:.0%}"]
        left = self._time_left(step)
        last = [] if left is None else [f"{left} left"]
        if self._bar is not None:
            # Without the bar, the count of steps, and the spaces between columns.
            width = self._console.width - BAR_WIDTH - 2 * len(str(self._num_steps)) - 3
            while len(parts) > 1 and len("  ".join([*parts, *last])) > width:
                parts.pop()
            self._bar.update(self._task, completed=step, description="  ".join([*parts, *last]))
        else:
            count = f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}"
            self.print("  ".join([count, *parts, *last]))

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._is_silent:
            return
        with self._unless_unread():
            # Text may contain brackets, which rich reads as markup, and paths, which must not be wrapped.
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            # A run in a pipe or a file should be visible line by line.
            self._console.file.flush()

    @contextlib.contextmanager
    def _unless_unread(self) -> Iterator[None]:
        """Print what is printed within, or continue without: a run does not end with its display.

        The reader of a pipe may have ended, the terminal may be gone, or the output's disk may be full.
        """
        try:
            yield
        except (BrokenPipeError, SystemExit) as error:
            # rich makes a console quiet and exits where a pipe is closed; other exits are none of this.
            if isinstance(error, SystemExit) and not self._console.quiet:
                raise
            self._is_silent = True
            self._bar = None
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._console.file.fileno())
            # The log of the run keeps it.
            log.warning("nobody reads the output any more: the run continues, and its log has the rest")
        # A full disk may have space again at the next line.
        except OSError as error:
            log.debug("a line of the display is lost: %s", error)

    def _time_left(self, step: int) -> str | None:
        """Return the time left for people; None where the pace is not known yet."""
        now = self._clock()
        if self._first_update is None or step <= self._first_update[0]:
            # The time before the first update is compilation, which does not show the pace.
            self._first_update = (step, now)
            return "0s" if step >= self._num_steps else None
        first_step, first_time = self._first_update
        return format_seconds((now - first_time) / (step - first_step) * (self._num_steps - step))

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            with self._unless_unread():
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with self._unless_unread():
                self._bar.stop()


def format_seconds(seconds: float) -> str:
    """Return a duration in at most two units, for people: 42s, 3m05s, 2h07m, 3d04h."""
    total = max(round(seconds), 0)
    minutes = total // 60
    hours = total // 3600
    days = total // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{total % 60:02d}s" if minutes else f"{total}s"
