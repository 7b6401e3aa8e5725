"""SIGINT (Ctrl-C) and SIGTERM: a command ends soon, with one line, and a training run saves before it does.

    with StopSignals(is_command=True) as signals:   # a signal raises `Stopped` in the main thread
        ...
        signals.defer()                             # a signal is only noted
        while not signals.requested():
            ...                                     # a step

Python runs its own handler only between two instructions of the main thread, and a compilation or a
collective is a single one that may take minutes. So a second thread receives every signal at once: it ends
the process if the main thread does not end in time, and at a second signal. Python drops what a handler
raises inside a callback of the garbage collector or a `__del__`; such a signal is sent once more.

A shell sets SIGINT to be ignored in what a script starts in the background. It is handled all the same: a
script that is stopped with Ctrl-C should not leave workers behind.

Of several processes, each also hears of the signals of the others (`parallel/processes.py`).
"""

import contextlib
import enum
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Protocol, runtime_checkable

from slmjax.ownership import require_ownership

# Seconds in which the main thread may delete temporary files before the process is ended.
GRACE_SECONDS = 5.0
INTERRUPTED_STATUS = 75  # EX_TEMPFAIL, "try again later": distinct from success and failure for supervisors
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What this process writes to the thread that receives signals, in the place of a signal's number.
_CLOSE = 0
_RESEND = 255


class Stopped(KeyboardInterrupt):
    """A signal ended what was being done. The message is for the user."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status  # exit status of a command that ends with it


@runtime_checkable
class Others(Protocol):
    """The other processes of a run, which stop together with this one."""

    def request_stop(self, number: signal.Signals) -> None:
        """Ask all processes to stop at the same point."""

    def request_end(self, number: signal.Signals) -> None:
        """Ask all processes to end at once."""

    def agreed(self) -> signal.Signals | None:
        """Return the signal to stop for, at a point that every process reaches: the same answer in each."""
        ...

    def loss(self, error: Exception) -> Stopped | None:
        """Return how this process should end if the error is that another process has ended; None if not."""
        ...

    def leave(self) -> None:
        """Do what must precede the end of this process, so that the others can end as well."""

    def close(self) -> None:
        """Hear of no more signals."""


class _Mode(enum.Enum):
    END = "end"  # a signal raises, and ends a process that takes too long
    DEFER = "defer"  # a signal is noted
    RAISE = "raise"  # a signal raises, and what comes after it has all the time it needs
    EXIT = "exit"  # a signal ends the process with the status that is decided already


class StopSignals:
    """Context in which the signals stop what is being done. Where one is entered already, it is that one.

    A signal raises `Stopped` in the main thread, or after `defer` is only noted. Only the main thread can
    install handlers: in another thread a run is stopped by its program.
    """

    _active: "StopSignals | None" = None

    def __init__(self, *, is_command: bool = False) -> None:
        """Create the context.

        Args:
          is_command: whether the process is a command, which may be ended. Otherwise a signal that cannot
            wait raises in the main thread.
        """
        self._is_command = is_command
        self._mode = _Mode.END
        self._others: Others | None = None
        self._received: signal.Signals | None = None
        self._ending = threading.Lock()  # taken by the thread that ends the process
        # Signals that the watching thread and the main thread have seen.
        self._num_watched = 0
        self._num_handled = 0
        self._raised = signal.SIGINT  # what the handler raised for last
        self._num_resent = 0
        self._status = 0  # of the process, in the mode EXIT
        self._previous: dict[signal.Signals, Any] = {}
        self._thread: threading.Thread | None = None
        # What a user should know if a signal ends the command now.
        self.note = ""
        self.sigterm_status = 128 + signal.SIGTERM

    # What the work asks -------------------------------------------------------------------------------------
    @property
    def received(self) -> bool:
        """Return whether this process itself received a signal."""
        return self._received is not None

    def requested(self) -> signal.Signals | None:
        """Return the signal to stop for, if any. Several processes must ask in step: all hear the same.

        Also raises what `require_ownership` does, where the run belongs to another process by now.
        """
        require_ownership()
        return self._received if self._others is None else self._others.agreed()

    def defer(self) -> None:
        """Only note signals from now on: the work asks for them with `requested`. A second one ends it."""
        self._mode = _Mode.DEFER

    def exit_with(self, status: int) -> None:
        """From now on a signal ends the process at once, with this status and without a message.

        For a command that is done while the interpreter still ends: what a handler raised then would be
        printed as an error of whatever is being cleaned up. Signals stay so after this context.
        """
        self._status = status
        self._mode = _Mode.EXIT

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Context at whose end signals are handled as before it."""
        return self._in_mode(self._mode)

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Raise `Stopped` at a signal, after `defer`: for work that may be left out."""
        return self._in_mode(_Mode.RAISE)

    @contextlib.contextmanager
    def _in_mode(self, mode: _Mode) -> Iterator[None]:
        before = self._mode
        self._mode = mode
        try:
            yield
        finally:
            self._mode = before

    # Several processes --------------------------------------------------------------------------------------
    @property
    def is_shared(self) -> bool:
        """Return whether signals are shared with other processes."""
        return self._others is not None

    def share(self, others: Others) -> None:
        """Share signals with the other processes of a run from now on."""
        self._others = others

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context of several processes: one that must end, because of a signal or the others, ends at once.

        The orderly end of the interpreter waits for the other processes, which may have ended.
        """
        try:
            try:
                yield
            except Exception as error:
                if self._others is not None and (stopped := self._others.loss(error)) is not None:
                    self._end(stopped)
                raise
        except Stopped as stopped:
            if self._others is not None:
                self._end(stopped)
            raise

    def told_of_loss(self, stopped: Stopped) -> None:
        """End this process, since another one has ended without saying why."""
        self._end(stopped)

    def stopped_with_others(self, number: signal.Signals) -> Stopped:
        """Return how this process ends if another one received the signal."""
        stopped = self._stopped_by(number)
        return Stopped(f"another process was {stopped}", status=stopped.status)

    def told_to_end(self, number: signal.Signals) -> None:
        """Do as if this process had received the signal, since another one did and cannot wait."""
        if self._mode is not _Mode.END:
            self._end(Stopped(f"another process was ended by {number.name}", status=128 + number))
        elif not self._num_watched:
            # As a signal, since nothing else interrupts what the main thread waits for.
            os.kill(os.getpid(), number)

    # Receiving ----------------------------------------------------------------------------------------------
    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread: raise, or note it."""
        if self._mode is _Mode.EXIT:
            return  # the other thread ends the process
        name = signal.Signals(number)
        self._num_handled += 1
        # Also where it raises: a library may catch what it does not know, and work continues.
        self._received = self._received or name
        self._raised = name
        if self._mode is _Mode.DEFER and (self._num_handled == 1 or self._may_end):
            return  # at a second one the other thread ends the process
        if self._mode is _Mode.END and self._may_end and _is_importing(frame):
            # An exception would be reported as an error of the module that is half imported, or not at all.
            self._end(self._stopped_by(name))
        raise self._stopped_by(name)

    def _unraisable(self, unraisable: Any) -> None:
        """Receive an error that Python cannot raise: one of a handler belongs to the work, not to it."""
        if not isinstance(unraisable.exc_value, Stopped):
            self._previous_hook(unraisable)
            return
        self._num_handled -= 1
        os.write(self._writable, bytes([_RESEND]))

    @property
    def _may_end(self) -> bool:
        # One of several processes that stays would block the others, whoever started them.
        return self._is_command or self._others is not None

    def _stopped_by(self, number: signal.Signals, *, note: str | None = None) -> Stopped:
        note = self.note if note is None else note
        status = self.sigterm_status if number is signal.SIGTERM else 128 + number
        return Stopped(f"stopped by {number.name}{': ' if note else ''}{note}", status=status)

    def _watch(self, readable: int) -> None:
        """Receive signals in a thread of its own, whatever the main thread is doing."""
        pending: signal.Signals | None = None  # for which the main thread should end
        deadline = 0.0
        while True:
            timeout = None if pending is None else max(deadline - time.monotonic(), 0.0)
            if pending is not None and not select.select([readable], [], [], timeout)[0]:
                if self._mode in (_Mode.END, _Mode.EXIT) or self._others is not None:
                    self._end(self._stopped_by(pending))
                pending = None  # the first step was complete just before the handler could raise
            # A program may handle other signals, whose numbers are written as well.
            known = (_CLOSE, _RESEND, *_SIGNALS)
            for number in [number for number in os.read(readable, 64) if number in known]:
                if number == _CLOSE:
                    return
                if number == _RESEND:
                    self._resend()
                    continue
                if self._mode is _Mode.EXIT:
                    os._exit(self._status)
                if self._num_resent:
                    self._num_resent -= 1  # seen before
                    continue
                self._num_watched += 1
                name = signal.Signals(number)
                if self._num_watched > 1:
                    self._end_all(name)
                elif self._mode is not _Mode.END:
                    self._note(name)
                elif self._may_end:
                    pending = name
                    deadline = time.monotonic() + GRACE_SECONDS
                    if self._others is not None:
                        self._others.request_end(name)

    def _resend(self) -> None:
        """Let the handler run once more, after the callback in which it could not raise."""
        time.sleep(0.01)
        self._num_resent += 1
        # To the main thread, since it may wait for something again.
        signal.pthread_kill(threading.main_thread().ident or 0, self._raised)

    def _note(self, name: signal.Signals) -> None:
        self._received = self._received or name
        if self._others is not None:
            self._others.request_stop(name)

    def _end_all(self, name: signal.Signals) -> None:
        if self._may_end:
            if self._others is not None:
                self._others.request_end(name)
            note = "the second signal ends at once, saved checkpoints are kept"
            self._end(Stopped(f"stopped by {name.name}: {note}", status=128 + name))

    def _end(self, stopped: Stopped) -> None:
        """End the process without waiting for anything: files are as sound as after a kill."""
        self._ending.acquire()  # another thread that comes here waits for the end
        if self._mode is _Mode.EXIT:
            os._exit(self._status)
        with contextlib.suppress(OSError, ValueError):
            print(stopped, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        if self._others is not None:
            if self._received is not None:
                # The main thread may come here before the other thread has told them.
                self._others.request_end(self._received)
            self._others.leave()
        os._exit(stopped.status)

    # Entering -----------------------------------------------------------------------------------------------
    def __enter__(self) -> "StopSignals":
        if StopSignals._active is not None:
            return StopSignals._active
        StopSignals._active = self
        if threading.current_thread() is threading.main_thread():
            self._readable, self._writable = os.pipe()
            os.set_blocking(self._writable, False)
            self._previous_descriptor = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
            self._thread = threading.Thread(
                target=self._watch, args=(self._readable,), name="stop signals", daemon=True
            )
            self._thread.start()
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
            self._previous_hook = sys.unraisablehook
            sys.unraisablehook = self._unraisable
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if StopSignals._active is not self:
            return
        if self._mode is _Mode.EXIT:
            if self._others is not None:
                self._others.close()
            return
        StopSignals._active = None
        if self._others is not None:
            if isinstance(error, Stopped):
                # The orderly end of jax waits for the other processes, which may have ended at once.
                self._end(error)
            self._others.close()
        if self._thread is None:
            return
        for number, handler in self._previous.items():
            # None: it was installed by a library in C, which Python cannot install again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        sys.unraisablehook = self._previous_hook
        os.write(self._writable, bytes([_CLOSE]))
        self._thread.join()
        os.close(self._readable)
        os.close(self._writable)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
