"""Messages of the modules: shown once, with their level, and kept in the log of a run."""

import logging
import warnings
from pathlib import Path

import pytest

from slmjax.telemetry.messages import MessageHandler
from slmjax.telemetry.progress import Progress
from slmjax.telemetry.run_directory import RunLog, read_log
from tests.telemetry.test_progress import make_console

log = logging.getLogger("slmjax.some.module")


def test_messages_are_shown_with_their_level() -> None:
    shown: list[str] = []
    with MessageHandler(shown.append):
        log.debug("not shown")
        log.info("prepared %s", "[bold] text")
        log.warning("beware")
    assert shown == ["prepared [bold] text", "WARNING: beware"]


def test_an_inner_handler_replaces_the_outer_one_and_all_is_restored() -> None:
    logger = logging.getLogger("slmjax")
    before = (logger.level, logger.propagate, list(logger.handlers))
    outer: list[str] = []
    inner: list[str] = []
    with MessageHandler(outer.append):
        with MessageHandler(inner.append):
            log.info("of the run")
        log.info("of the command")
    assert outer == ["of the command"] and inner == ["of the run"]
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_the_run_log_has_the_messages_from_before_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with MessageHandler(lambda text: None) as messages, RunLog(path) as run_log:
        log.info("early")
        messages.write_to(run_log)
        log.error("late")
    records = read_log(path, kind="message")
    assert [(record["level"], record["text"]) for record in records] == [("INFO", "early"), ("ERROR", "late")]


def test_other_processes_show_nothing() -> None:
    console, stream = make_console(is_terminal=False)
    for index in (1, 0):
        with (
            Progress(num_steps=2, process_index=index, console=console) as progress,
            MessageHandler(progress.print),
        ):
            log.info("from process %d", index)
    assert stream.getvalue() == "from process 0\n"


def test_a_full_compilation_cache_is_said_once() -> None:
    lines: list[str] = []
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
        with MessageHandler(lines.append):
            for name in ("a", "b"):
                entry = f"Error writing persistent compilation cache entry for '{name}'"
                warnings.warn(f"{entry}: OSError: [Errno 28] No space left on device", stacklevel=1)
            warnings.warn("another", stacklevel=1)
    reason = "[Errno 28] No space left on device"
    expected = f"WARNING: the compilation cache cannot be used ({reason}): programs are compiled again"
    assert lines == [expected] and shown == ["another"]
