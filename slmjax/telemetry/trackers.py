"""Metrics of a run in other programs: TensorBoard, Weights & Biases and Trackio (the `track` extra).

    with Trackers(run.trackers, directory=path, name=path.name, config=settings) as trackers:
        trackers.write("train", step=10, loss=3.2, grad_norms={"embed": 0.1})
        # train/loss, train/grad_norms/embed
        trackers.write("sample", step=10, prompt="def ", text="main(")

A tracker that fails is disabled with a warning, and training continues. Only process 0 writes.
"""

import abc
import contextlib
import enum
import errno
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)


class Tracker(enum.Enum):
    """A program that shows curves of many runs."""

    TENSORBOARD = "tensorboard"  # event files in the run's directory, by tensorboardX
    WANDB = "wandb"  # Weights & Biases; nothing leaves this machine with WANDB_MODE=offline
    TRACKIO = "trackio"  # Trackio, which keeps its project on this machine unless its own variables say else


class Sink(abc.ABC):
    """A receiver of metrics."""

    @abc.abstractmethod
    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step, by name."""

    @abc.abstractmethod
    def text(self, step: int, name: str, text: str) -> None:
        """Write a text of a step."""

    @abc.abstractmethod
    def close(self) -> None:
        """Write what is pending."""

    @abc.abstractmethod
    def abandon(self) -> None:
        """Write nothing more, after a write has failed."""


# What is pending in tensorboardX must still fit.
_LEAST_FREE_BYTES = 4 * 2**20


class _TensorBoard(Sink):
    def __init__(self, *, directory: Path, name: str, group: str | None, config: Mapping[str, Any]) -> None:
        # All three are in the run directory, or in its path.
        del name, group, config
        from tensorboardX import SummaryWriter

        # A suffix for each session: two sessions that begin within a second would write to one file.
        self._directory = directory
        others = set(threading.enumerate())
        self._writer = SummaryWriter(
            str(directory / "tensorboard"), flush_secs=10, filename_suffix=f".{time.time_ns()}"
        )
        self._threads = set(threading.enumerate()) - others

    def _check(self) -> None:
        """Raise OSError where a write would fail: in a thread of its own, after which the next ones wait."""
        if shutil.disk_usage(self._directory).free < _LEAST_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not all(thread.is_alive() for thread in self._threads):
            raise OSError(errno.EIO, "the thread that writes has ended")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._check()
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._check()
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        try:
            if all(thread.is_alive() for thread in self._threads):
                self._writer.close()
        finally:
            # Otherwise it is closed again at the end of the process, and fails with a traceback.
            file_writer: Any = self._writer.file_writer
            file_writer.event_writer._closed = True


class _Wandb(Sink):
    def __init__(self, *, directory: Path, name: str, group: str | None, config: Mapping[str, Any]) -> None:
        import wandb

        # The id is the name of the directory, so that a resumed run continues its curves.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "slmjax"),
            dir=str(directory),
            id=name,
            name=name,
            group=group,
            config=dict(config),
            resume="allow",
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text, "step": step})

    def close(self) -> None:
        self._run.finish()

    def abandon(self) -> None:
        pass


class _Trackio(Sink):
    def __init__(self, *, directory: Path, name: str, group: str | None, config: Mapping[str, Any]) -> None:
        # Its database holds all runs of a project, in a directory of its own.
        del directory
        # It prints where the dashboard is; standard output may be read by a program.
        with contextlib.redirect_stdout(sys.stderr):
            import trackio

            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "slmjax"),
                name=name,
                group=group,
                config=dict(config),
                resume="allow",
                embed=False,
            )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()

    def abandon(self) -> None:
        pass


_SINKS: dict[Tracker, Callable[..., Sink]] = {
    Tracker.TENSORBOARD: _TensorBoard,
    Tracker.WANDB: _Wandb,
    Tracker.TRACKIO: _Trackio,
}


class Trackers:
    """The trackers of a run."""

    def __init__(
        self,
        trackers: Iterable[Tracker],
        *,
        directory: Path,
        name: str,
        config: Mapping[str, Any],
        group: str | None = None,
    ) -> None:
        """Open the trackers.

        Args:
          trackers: the kinds of trackers.
          directory: the run directory.
          name: the name of the run, which is its id where a tracker needs one.
          config: the settings of the run, as in config.json.
          group: what the run is shown under together with others, such as its study.

        Raises:
          ValueError: the package of a tracker is not installed.
        """
        self._sinks: dict[Tracker, Sink] = {}
        for tracker in trackers:
            try:
                self._sinks[tracker] = _SINKS[tracker](
                    directory=directory, name=name, group=group, config=config
                )
            except ImportError as error:
                raise ValueError(
                    f"run.trackers has {tracker.value}, which needs a package that is not installed "
                    f"({error}): pip install 'slmjax[track]', or leave it out"
                ) from error
            # Even opening a tracker must not keep a run from starting.
            except Exception as error:  # no network, no login, a full disk
                _warn(tracker, error)

    def write(self, kind: str, *, step: int, **values: Any) -> None:
        """Write a record of the log: numbers and texts, and mappings and sequences of them, by name."""
        # Curves cannot show values that are not finite. log.jsonl has them.
        numbers = {
            name: float(value)
            for name, value in _flat(kind, values)
            if isinstance(value, int | float) and math.isfinite(value)
        }
        texts = {name: value for name, value in _flat(kind, values) if isinstance(value, str)}

        def send(sink: Sink) -> None:
            if numbers:
                sink.numbers(step, numbers)
            for name, text in texts.items():
                sink.text(step, name, text)

        self._for_each(send)

    def _for_each(self, call: Callable[[Sink], None]) -> None:
        for tracker, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # no error of a tracker may end the run
                # A tracker that failed once would probably fail at every step.
                del self._sinks[tracker]
                with contextlib.suppress(Exception):
                    sink.abandon()
                _warn(tracker, error)

    def close(self) -> None:
        """Close all trackers."""
        self._for_each(lambda sink: sink.close())
        self._sinks = {}

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _warn(tracker: Tracker, error: Exception) -> None:
    log.warning(
        "%s failed and is disabled for this run; log.jsonl still has every record: %s: %s",
        tracker.value,
        type(error).__name__,
        error,
    )


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{prefix}/{name}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _flat(f"{prefix}/{index}", item)
    else:
        yield prefix, value
