"""The hook for injected faults: what it understands, when a fault happens, and what it does then."""

import collections
import errno
import os
import signal
import time

import pytest

from slmjax import faults


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch):
    """Sets the variable, as a new process would have it."""

    def set_variable(text: str) -> None:
        monkeypatch.setenv(faults.VARIABLE, text)
        monkeypatch.setattr(faults, "_faults", None)
        monkeypatch.setattr(faults, "_executions", collections.Counter())

    return set_variable


def test_parse() -> None:
    text = "checkpoint.committed:30=kill,log.write:12@1=full,step:*=nan,data.part=readonly"
    committed, log, step, part = faults.parse(text)
    assert (committed.point, committed.step, committed.process) == ("checkpoint.committed", 30, None)
    assert committed.action == "kill"
    assert not committed.repeats
    assert (log.step, log.process, log.action) == (12, 1, "full")
    assert (step.step, step.action, step.repeats) == (None, "nan", True)
    assert (part.step, part.process, part.action) == (None, None, "readonly")
    assert faults.parse("") == []


@pytest.mark.parametrize(
    "text",
    [
        *("step", "step=", "step=crash", "steps=kill", "step:x=kill", "step:-1=kill", "step:=kill"),
        *("step@x=kill", "step@=kill", "step:*@x=kill", "=kill", "step:3=kill,,log.write", "step:1.5=kill"),
    ],
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not POINT\[:STEP\]\[@PROCESS\]=ACTION"):
        faults.parse(text)


@pytest.mark.parametrize(("action", "number"), [("full", errno.ENOSPC), ("readonly", errno.EROFS)])
def test_disks(inject, action: str, number: int) -> None:
    inject(f"log.write:3={action}")
    faults.at("log.write", 2)
    faults.at("checkpoint.save", 3)
    with pytest.raises(OSError, match="injected by SLMJAX_FAULT") as raised:
        faults.at("log.write", 3)
    assert raised.value.errno == number
    # It happens once.
    faults.at("log.write", 3)


def test_every_time(inject) -> None:
    inject("log.write:*=full")
    for step in (1, 1, 2):
        with pytest.raises(OSError, match="No space left"):
            faults.at("log.write", step)


def test_without_a_step_executions_are_counted(inject) -> None:
    inject("file.replace:3=full")
    faults.at("file.replace")
    faults.at("data.part")
    faults.at("file.replace")
    with pytest.raises(OSError, match="No space left"):
        faults.at("file.replace")
    faults.at("file.replace")


def test_another_process(inject, monkeypatch: pytest.MonkeyPatch) -> None:
    inject("step:1@1=full")
    faults.at("step", 1)
    monkeypatch.setattr(faults, "_process_index", lambda: 1)
    with pytest.raises(OSError, match="No space left"):
        faults.at("step", 1)


def test_signals_and_sleep(inject, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(time, "sleep", lambda seconds: sent.append(seconds))
    inject("step:1=kill,step:2=term,step:3=int,step:4=sleep")
    for step in range(1, 5):
        faults.at("step", step)
    pid = os.getpid()
    assert sent == [(pid, signal.SIGKILL), (pid, signal.SIGTERM), (pid, signal.SIGINT), 3600]


def test_taints(inject) -> None:
    inject("step:2=nan,step:3=full")
    assert not faults.taints(1)
    # The point itself does nothing: the state is the trainer's to change.
    faults.at("step", 2)
    assert faults.taints(2)
    assert not faults.taints(2)
    with pytest.raises(OSError, match="No space left"):
        faults.at("step", 3)


def test_nothing_happens_without_the_variable(inject) -> None:
    inject("")
    for point in faults.POINTS:
        faults.at(point, 1)
        faults.at(point)
    assert not faults.taints(1)


def test_every_point_is_documented() -> None:
    assert faults.__doc__
    assert all(f"`{point}`" in faults.__doc__ for point in faults.POINTS)
    assert all(f"`{action}`" in faults.__doc__ for action in faults.ACTIONS)
