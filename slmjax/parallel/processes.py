"""Coordination between the processes of a run: who goes first, shared text, and requests to stop.

A run has one process per host on TPU pods and one per GPU under Slurm (docs/hosts.md). Every process calls
each of these functions; with a single process they do nothing special.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
_TEXT_BYTES = 1024


def process_zero_first(action: Callable[[], T]) -> T:
    """Run `action()` in process 0, then in the others, which find on disk what process 0 made.

    An error in process 0 does not leave the others waiting: they run the action, and fail in the same way.
    """
    if jax.process_count() == 1:
        return action()
    if jax.process_index() == 0:
        # Released after an error too, so that the others do not wait forever.
        try:
            return action()
        finally:
            multihost_utils.sync_global_devices("process zero first")
    multihost_utils.sync_global_devices("process zero first")
    return action()


def broadcast_text(text: str) -> str:
    """Return the text of process 0 (at most 1024 bytes) in every process."""
    if jax.process_count() == 1:
        return text
    encoded = text.encode()
    assert len(encoded) <= _TEXT_BYTES, f"{len(encoded)} bytes are more than {_TEXT_BYTES}: {text}"
    # Collectives need the same shape in every process, and only process 0 knows the length.
    padded = np.frombuffer(encoded.ljust(_TEXT_BYTES, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode(errors="replace")


class StopSignals:
    """Context in which Ctrl-C and SIGTERM only ask the run to stop; a second signal stops it at once.

    With several processes JAX's preemption service handles SIGTERM and makes all of them stop after the same
    step.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def received(self) -> bool:
        """Return whether this process itself received a signal."""
        return self._received is not None

    def requested(self, step: int) -> signal.Signals | None:
        """Return the signal to stop after `step`, if any: the same answer in every process."""
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._received

    def __enter__(self) -> "StopSignals":
        # Only the main thread may install handlers. A run in another thread is stopped by its program.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # The handler is what `signal.signal` itself returned.
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous.clear()
