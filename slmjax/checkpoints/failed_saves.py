"""Failed saves: their reason in a few words, without the tracebacks of Orbax's threads.

    quiet = OrbaxTracebacks()
    quiet.drop()
    ...                                 # saves
    quiet.restore()
    reason_of(error)                    # "No space left on device"

Where a disk is full, each of Orbax's threads logs its own traceback, hundreds of lines in all, and
TensorStore reports its callbacks to event loops that have ended. The failure itself is raised, and logged
by us.
"""

import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

_LONGEST = 300  # characters of a reason
_KNOWN = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")


def reason_of(error: Exception) -> str:
    """Return why a save failed; errors of storage libraries name every layer that they went through."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error) or type(error).__name__
    return next((known for known in _KNOWN if known in text), text[:_LONGEST])


class OrbaxTracebacks:
    """Drops the tracebacks that Orbax's threads log, between `drop` and `restore`."""

    def __init__(self) -> None:
        self._previous: Callable[[Any], Any] | None = None

    def drop(self) -> None:
        """Begin, unless it has begun."""
        if self._previous is None:
            self._previous = sys.unraisablehook
            sys.unraisablehook = self._unraisable
            logging.getLogger("absl").addFilter(self._keeps)
            # Stays: asyncio reports a failed task when it is deleted, which may be at the end of the process.
            logging.getLogger("asyncio").addFilter(_is_no_write_of_orbax)

    def restore(self) -> None:
        """End; errors are reported as before."""
        if self._previous is not None:
            logging.getLogger("absl").removeFilter(self._keeps)
            # Another program may have set its own since.
            if sys.unraisablehook == self._unraisable:
                sys.unraisablehook = self._previous
            self._previous = None

    def _keeps(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    def _unraisable(self, unraisable: Any) -> None:
        is_late_callback = str(unraisable.exc_value) == "Event loop is closed"
        if not is_late_callback and self._previous is not None:
            self._previous(unraisable)


def _is_no_write_of_orbax(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    # Of a task or of a future; its description may name Orbax, or only its traceback does.
    if "exception was never retrieved" not in text:
        return True
    error = record.exc_info[1] if record.exc_info else None
    frames = traceback.extract_tb(None if error is None else error.__traceback__)
    return not ("orbax" in text or any("orbax" in frame.filename for frame in frames))
