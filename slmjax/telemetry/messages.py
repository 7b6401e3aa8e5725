"""The messages of slmjax's modules: from `logging` to the terminal and to the log of a run.

    log = logging.getLogger(__name__)                       # in every module
    log.info("prepared %s", name)
    with MessageHandler(progress.print) as messages:        # in a program: shows each message as a line
        ...
        messages.write_to(run_log)                          # and keeps it in log.jsonl

A program enters one handler: a training run one that prints above its progress bar, every other command
one that prints to standard error. Without a handler Python shows warnings alone.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

log = logging.getLogger(__name__)


@runtime_checkable
class Records(Protocol):
    """What messages are written to: a `RunLog`, or the logs of several runs."""

    def write(self, kind: str, **values: Any) -> None:
        """Append a record."""


class MessageHandler(logging.Handler):
    """Shows what slmjax's modules log while entered; an inner handler replaces an outer one.

    Messages from INFO are shown. The log of a run has those of DEBUG too, such as which kernels were chosen.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        """Create a handler.

        Args:
          show: prints a line.
        """
        super().__init__(logging.DEBUG)
        self._show = show
        self._logger = logging.getLogger("slmjax")
        self._run_log: Records | None = None
        # Messages that come before the run directory exists, for example while data is prepared.
        self._early: list[logging.LogRecord] = []
        self._warned_of_cache = False

    def write_to(self, run_log: Records) -> None:
        """Write messages to the log of a run from now on, beginning with the earlier ones."""
        self._run_log = run_log
        for record in self._early:
            _write(record, run_log)

    def _show_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *options: Any
    ) -> None:
        """Show a warning of Python, and those of jax's compilation cache as one message."""
        text = str(message)
        if "persistent compilation cache entry" not in text:
            self._showwarning_before(message, category, filename, lineno, *options)
        elif not self._warned_of_cache:
            # One for each program says no more than one for all.
            self._warned_of_cache = True
            reason = text.rpartition(": ")[2]
            log.warning("the compilation cache cannot be used (%s): programs are compiled again", reason)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, and write it to the log of the run (called by the logging module)."""
        if record.levelno >= logging.INFO:
            # Information is shown as plain text; only the level of a warning or an error matters to a user.
            prefix = "" if record.levelno < logging.WARNING else f"{record.levelname}: "
            self._show(prefix + record.getMessage())
        if self._run_log is None:
            self._early.append(record)
        else:
            _write(record, self._run_log)

    def __enter__(self) -> "MessageHandler":
        self._level_before = self._logger.level
        self._propagate_before = self._logger.propagate
        self._replaced = [handler for handler in self._logger.handlers if isinstance(handler, MessageHandler)]
        for handler in self._replaced:
            self._logger.removeHandler(handler)
        self._logger.addHandler(self)
        self._logger.setLevel(logging.DEBUG)
        # Imported libraries give the root logger handlers that would show every message a second time.
        self._logger.propagate = False
        self._showwarning_before = warnings.showwarning
        warnings.showwarning = self._show_warning
        return self

    def __exit__(self, *_: object) -> None:
        warnings.showwarning = self._showwarning_before
        self._logger.removeHandler(self)
        for handler in self._replaced:
            self._logger.addHandler(handler)
        self._logger.propagate = self._propagate_before
        self._logger.setLevel(self._level_before)


def _write(record: logging.LogRecord, run_log: Records) -> None:
    run_log.write("message", level=record.levelname, text=record.getMessage())
