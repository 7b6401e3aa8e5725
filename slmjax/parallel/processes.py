"""Coordination between the processes of a run: who goes first, shared text, and signals.

A run has one process per host on TPU pods and one per GPU under Slurm (docs/hosts.md). Every process calls
each of these functions; with a single process they do nothing special.
"""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

# The client of the coordination service has no public name.
from jax._src import distributed
from jax.experimental import multihost_utils

from slmjax.stop_signals import GRACE_SECONDS, INTERRUPTED_STATUS, Stopped, StopSignals

T = TypeVar("T")
_TEXT_BYTES = 1024
# Texts of errors of communication, which have no type: of gloo, NCCL and jax's coordination service.
_LOST = re.compile(
    "gloo|nccl|connection (closed|reset|refused|aborted)|socket closed|broken pipe|coordination service",
    re.IGNORECASE,
)


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


# Signals ----------------------------------------------------------------------------------------------------
def share_signals(signals: StopSignals) -> None:
    """Share signals with the other processes of the run, if there are any and it was not done yet."""
    state = distributed.global_state
    if state.client is None or (state.num_processes or 1) == 1 or signals.is_shared:
        return
    index = state.process_id or 0
    signals.share(SharedSignals(state.client, index=index, count=state.num_processes, signals=signals))


class SharedSignals:
    """Tells the other processes of signals, and agrees with them on where to stop.

    Processes tell each other through the key-value store of jax's coordination service, which works while
    devices compute or a program is compiled. Points at which all can stop (after a step, after a batch of an
    evaluation) are counted alike everywhere. To agree, each process says how many it has passed and passes no
    further one until it knows all answers: they stop at the next point after the furthest. Nothing is
    exchanged at a point itself. jax's own service for preemption does the same for SIGTERM alone, and only
    between steps.
    """

    POLL_SECONDS = 0.5
    HEAR_SECONDS = 3.0  # that a process waits, before it ends, for the others to hear of the signal
    _num_created = 0

    def __init__(self, client: Any, *, index: int, count: int, signals: StopSignals) -> None:
        """Begin to listen.

        Args:
          client: the client of jax's coordination service.
          index: the index of this process.
          count: the number of processes.
          signals: the signals of this process, which end it if another process cannot wait.
        """
        self._client = client
        self._index = index
        self._count = count
        self._signals = signals
        # Keys are never deleted. Every process trains the same runs in the same order.
        SharedSignals._num_created += 1
        self._prefix = f"slmjax/signals/{SharedSignals._num_created}/"
        self._lock = threading.Lock()
        self._point = 0
        self._stop_at: int | None = None
        self._signal: signal.Signals | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="shared signals", daemon=True)
        self._thread.start()

    def request_stop(self, number: signal.Signals) -> None:
        """Ask all processes to stop at the same point."""
        self._set("stop", str(int(number)))

    def request_end(self, number: signal.Signals) -> None:
        """Ask all processes to end at once."""
        self._set("end", str(int(number)))

    def agreed(self) -> signal.Signals | None:
        """Return the signal to stop for at this point, if any: the same answer in every process."""
        with self._lock:
            self._point += 1
            return self._signal if self._stop_at is not None and self._point >= self._stop_at else None

    def loss(self, error: Exception) -> Stopped | None:
        """Return how this process should end if the error is that another process has ended; None if not.

        That of a collective comes before the listening thread hears why the other one has ended.
        """
        if not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
            return None
        notices = self._read("")
        if "end" in notices:
            return self._signals.stopped_with_others(signal.Signals(int(notices["end"])))
        if "stop" in notices:
            name = signal.Signals(int(notices["stop"])).name
            return Stopped(f"another process was stopped by {name} and has ended", status=INTERRUPTED_STATUS)
        self._set("lost", str(self._index))
        return self._lost()

    def _lost(self) -> Stopped:
        return Stopped(
            "error: another process of this run has ended, and its output says why. Saved checkpoints are "
            "kept: start all processes again with --resume RUN",
            status=1,
        )

    def leave(self) -> None:
        """Wait until the others have heard of the end; in process 0, whose end aborts them, for theirs."""
        others = {str(index) for index in range(self._count)} - {str(self._index)}
        is_agreed = "end" in self._read("")
        if is_agreed:
            # Else all that they know is that a collective with this process fails.
            self._wait_for(others, ("heard", "gone"), seconds=self.HEAR_SECONDS)
        self._set(f"gone/{self._index}", "")
        if self._index == 0:
            # Those that were killed never say that they go.
            self._wait_for(others, ("gone",), seconds=GRACE_SECONDS + 2 if is_agreed else 1.0)
            time.sleep(0.2)  # they set the key just before their end

    def _wait_for(self, others: set[str], keys: tuple[str, ...], *, seconds: float) -> None:
        """Wait until each of the other processes has set one of the keys, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            notices = self._read("")
            if all(any(f"{key}/{index}" in notices for key in keys) for index in others):
                return
            time.sleep(0.05)

    def close(self) -> None:
        """Hear of no more signals."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _listen(self) -> None:
        while not self._closed.wait(self.POLL_SECONDS):
            notices = self._read("")
            if "end" in notices:
                self._set(f"heard/{self._index}", "")
                self._signals.told_to_end(signal.Signals(int(notices["end"])))
                return
            if "lost" in notices:
                self._signals.told_of_loss(self._lost())
            if "stop" in notices and self._signal is None:
                self._agree(signal.Signals(int(notices["stop"])))

    def _agree(self, number: signal.Signals) -> None:
        """Find the point to stop at. No point is passed meanwhile."""
        with self._lock:
            self._signal = number
            self._set(f"point/{self._index}", str(self._point))
            while len(points := self._read("point/")) < self._count:
                # One of them may have left: then all of them do.
                if self._closed.wait(0.02) or "end" in self._read(""):
                    return
            self._stop_at = max(map(int, points.values())) + 1

    def _set(self, name: str, value: str) -> None:
        # It is there already if another process was faster, and not reached if the coordinator has ended.
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(self._prefix + name, value)

    def _read(self, folder: str) -> dict[str, str]:
        """Return the keys in a folder, without its name, and their values."""
        prefix = self._prefix + folder
        try:
            return {key.removeprefix(prefix): value for key, value in self._client.key_value_dir_get(prefix)}
        except RuntimeError:
            return {}
