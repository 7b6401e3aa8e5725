"""Where a run's figures go beside its log: TensorBoard and Weights & Biases, the `track` extra.

    with Trackers(run.trackers, directory=path, name=path.name, config=settings) as trackers:
        trackers.write("train", step=10, loss=3.2, grad_norms={"embed": 0.1})      # train/loss,
        train/grad_norms/embed trackers.write("sample", step=10, prompt="def ", text="main(")

What a tracker does wrong is warned of once, and it is told no more: training goes on. Process 0 alone writes.
"""

import abc
import enum
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)


class Tracker(enum.Enum):
    """A program that shows curves of many runs."""

    TENSORBOARD = "tensorboard"  # event files in the run's directory, by tensorboardX
    WANDB = "wandb"  # Weights & Biases; WANDB_MODE=offline keeps all on this machine


class Sink(abc.ABC):
    """What takes a run's figures."""

    @abc.abstractmethod
    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step, by name."""

    @abc.abstractmethod
    def text(self, step: int, name: str, text: str) -> None:
        """A text of a step."""

    @abc.abstractmethod
    def close(self) -> None:
        """Writes what is pending."""


class _TensorBoard(Sink):
    def __init__(self, *, directory: Path, name: str, config: Mapping[str, Any]) -> None:
        del name, config  # the directory says both
        from tensorboardX import SummaryWriter

        # A name of its own for each session: two that begin within a second would write to one file.
        self._writer = SummaryWriter(
            str(directory / "tensorboard"), flush_secs=10, filename_suffix=f".{time.time_ns()}"
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb(Sink):
    def __init__(self, *, directory: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        # The directory's name is the run's id: a resumed run goes on with its curves.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "slmjax"),
            dir=str(directory),
            id=name,
            name=name,
            config=dict(config),
            resume="allow",
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text, "step": step})

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[Tracker, Callable[..., Sink]] = {Tracker.TENSORBOARD: _TensorBoard, Tracker.WANDB: _Wandb}


class Trackers:
    """The trackers of a run."""

    def __init__(
        self, wanted: Iterable[Tracker], *, directory: Path, name: str, config: Mapping[str, Any]
    ) -> None:
        """Opens the trackers.

        Args:
          wanted: which.
          directory: the run's.
          name: of the run, its id where a tracker wants one.
          config: the run's settings, as they are written to config.json.

        Raises:
          ValueError: a tracker's package is not installed.
        """
        self._sinks: dict[Tracker, Sink] = {}
        for tracker in wanted:
            try:
                self._sinks[tracker] = _SINKS[tracker](directory=directory, name=name, config=config)
            except ImportError as error:
                raise ValueError(
                    f"run.trackers asks for {tracker.value}, which needs a package that is not installed "
                    f"({error}): "
                    "pip install 'slmjax[track]', or leave it out"
                ) from error
            except Exception as error:  # no network, no login, a full disk
                _warn(tracker, error)

    def write(self, kind: str, *, step: int, **values: Any) -> None:
        """A record of the log: numbers, texts, and mappings and sequences of numbers, by name."""
        # What is not finite has no place in a curve; log.jsonl says that it was not.
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

        self._tell(send)

    def _tell(self, call: Callable[[Sink], None]) -> None:
        for tracker, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # whatever it is, it is no reason to lose a run
                del self._sinks[tracker]
                _warn(tracker, error)

    def close(self) -> None:
        """Closes all of them."""
        self._tell(lambda sink: sink.close())
        self._sinks = {}

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _warn(tracker: Tracker, error: Exception) -> None:
    log.warning(
        "%s failed and is told no more, log.jsonl holds all: %s: %s",
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
