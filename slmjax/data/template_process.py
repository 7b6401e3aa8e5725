"""Chat templates are rendered in a process of their own, which the operating system limits.

    text = render(template, values)      # the process is started by the first call, and kept

A template is a program from a model's directory. Whatever it computes, it is stopped after MAX_SECONDS of CPU
time or MAX_MEMORY bytes, and training or serving continues. The process has no environment variables of this
one, cannot write files, and ends with this one.
"""

import atexit
import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from slmjax.data.templates import MAX_MESSAGE, message_bytes, read_message

MAX_SECONDS = 5  # of CPU time, for one rendering; templates of released models take milliseconds
MAX_MEMORY = 1 << 30  # bytes, the interpreter included
# Variables without which Python may not start, and the one that `strftime_now` depends on.
_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")

# Random and between noncharacters, so that no text has them.
ANSWER_BEGINS, ANSWER_ENDS = (f"{mark}{secrets.token_hex(8)}{mark}" for mark in "\ufdd2\ufdd3")
_ANSWER_BLOCK = re.compile(r"\{%[-+]?\s*generation\b")


class TemplateFailed(ValueError):
    """A template refuses its values, is no template, or takes more than its limits; the reason."""


def marks_answers(template: str) -> bool:
    """Return whether the template has `generation` blocks."""
    return _ANSWER_BLOCK.search(template) is not None


def render(template: str, values: Mapping[str, Any], *, answers_marked: bool = False) -> str:
    """Return the text of a template.

    Args:
      template: Jinja source. It is not trusted.
      values: plain data, as in JSON.
      answers_marked: put ANSWER_BEGINS and ANSWER_ENDS around the text of `generation` blocks.

    Raises:
      TemplateFailed: the template fails, or takes too much time or memory.
      TypeError, ValueError, RecursionError: the values are not plain data, or more than MAX_MESSAGE bytes.
    """
    request = {
        "template": template,
        "values": values,
        "marks": (ANSWER_BEGINS, ANSWER_ENDS) if answers_marked else None,
        "seconds": MAX_SECONDS,
    }
    sent = message_bytes(request)
    if len(sent) > MAX_MESSAGE:
        raise ValueError(f"it has {len(sent):,} bytes as JSON, and at most {MAX_MESSAGE:,} are rendered")
    answer = _process.ask(sent)
    if "error" in answer:
        raise TemplateFailed(answer["error"])
    return answer["text"]


class _TemplateProcess:
    """The process, started when it is needed. Threads take turns; a forked process starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # id of the process that started it
        self._inherited: list[Any] = []

    def ask(self, request: bytes) -> dict[str, Any]:
        """Return the answer to a request (`message_bytes`), with "text" or "error"."""
        with self._lock:
            process = self._started()
            requests = cast(BinaryIO, process.stdin)
            answers = cast(BinaryIO, process.stdout)
            try:
                requests.write(request)
                requests.flush()
                answer = read_message(answers)
            except BrokenPipeError:
                answer = None
            except BaseException:
                # Interrupted in between: the next answer would be that of this request.
                self._end()
                raise
            if answer is None:
                return {"error": _reason_of_end(self._end())}
            if answer["is_last"]:
                self._end()
            return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner != os.getpid():
            # The process belongs to the one that forked this one, and is left to it.
            self._inherited.append(self._process)
            self._process = None
        # Ended by someone else while it waited.
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            file = Path(__file__).with_name("templates.py")
            # Where jinja2 is found may depend on this process; `-P` keeps the file's own folder out.
            environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(file), str(MAX_MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                # A signal to this process and its group, such as Ctrl-C, is not for the other.
                start_new_session=True,
            )
            self._owner = os.getpid()
        return self._process

    def _end(self) -> int:
        """End the process, and return its exit status."""
        process = self._process
        self._process = None
        assert process is not None, "there is a process while the lock is held"
        # One that is waiting for the next request never ends by itself.
        if process.poll() is None and not _closes(process):
            process.kill()
        status = process.wait()
        for stream in (process.stdin, process.stdout):
            # What was not sent has no reader any more.
            with contextlib.suppress(BrokenPipeError):
                cast(BinaryIO, stream).close()
        return status

    def close(self) -> None:
        """End the process if this one has started it."""
        with self._lock:
            if self._process is not None and self._owner == os.getpid():
                self._end()


def _closes(process: subprocess.Popen[bytes]) -> bool:
    """Return whether the process ends by itself within a moment, as after a limit of the system."""
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


def _reason_of_end(status: int) -> str:
    if status == -signal.SIGXCPU:
        return f"it takes more than {MAX_SECONDS} s of CPU time"
    if status == -signal.SIGKILL:
        return "its process was killed, as a system does that has no memory left"
    if status < 0:
        return f"its process ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}: {sys.executable} cannot run it"


_process = _TemplateProcess()
atexit.register(_process.close)
