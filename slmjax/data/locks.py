"""A lock between processes: one does the work, the others wait and say so.

    with exclusive(path, what="book.txt") as is_alone:
        ...                                        # at most one process at a time, if is_alone

The lock is `flock` on a file, which the system releases when its owner ends in any way. The owner also renews
the time of the file every `_RENEW_SECONDS`. If it is not renewed for `STALE_SECONDS`, its owner is stuck (for
example stopped, or on a host that is gone), and those who wait continue without the lock: all of them must
write the same, and put it in place by one rename. The same holds on file systems without locks.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)

STALE_SECONDS = 120
_RENEW_SECONDS = 10
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 60


@contextlib.contextmanager
def exclusive(path: Path, *, what: str) -> Iterator[bool]:
    """Yield True once this process has the lock; False if its owner is stuck, or there are no locks here.

    Args:
      path: the file of the lock, which is created and deleted.
      what: name of the work, for messages.

    Raises:
      OSError: the file cannot be created.
    """
    stream = _acquire(path, what=what)
    if stream is None:
        yield False
        return
    with stream:
        stream.truncate(0)
        stream.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        stream.flush()
        done = threading.Event()
        renewing = threading.Thread(target=_renew, args=(path, done), daemon=True)
        renewing.start()
        try:
            yield True
        finally:
            done.set()
            renewing.join()
            # Before the lock is released, so that nobody holds the lock of a file without a name.
            path.unlink(missing_ok=True)


def _acquire(path: Path, *, what: str) -> TextIO | None:
    """Return the open file with the lock; None to continue without it."""
    reported = 0.0
    while True:
        stream = path.open("a+", encoding="utf-8")
        try:
            is_locked = _try_lock(stream)
        except (OSError, ImportError) as error:
            log.warning("%s: no locks between processes here (%s): another may do the same work", path, error)
            stream.close()
            return None
        # The owner before has deleted the file: the lock is of a file that nobody else will open.
        if is_locked and _is_same_file(stream, path):
            return stream
        stream.close()
        if is_locked:
            continue
        if (age := _age(path)) > STALE_SECONDS:
            log.warning(
                "%s, which makes %s, is stuck for %.0f s: continuing without it", _owner(path), what, age
            )
            return None
        if time.monotonic() - reported > _REPORT_SECONDS:
            log.info("%s is made by %s: waiting for it", what, _owner(path))
            reported = time.monotonic()
        time.sleep(_POLL_SECONDS)


def _try_lock(stream: TextIO) -> bool:
    """Return whether this process has the lock now. OSError or ImportError where there are no locks."""
    # Not on every system.
    import fcntl

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(stream: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _age(path: Path) -> float:
    """Return the seconds since the owner of a lock has renewed it; 0 if it has released it."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _owner(path: Path) -> str:
    try:
        owner: Any = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    # The owner has not written it yet, or has ended.
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(_RENEW_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
