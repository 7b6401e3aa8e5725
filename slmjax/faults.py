"""Injected faults: the one hook by which tests and `benchmarks/chaos.py` break a run at a known place.

    SLMJAX_FAULT="checkpoint.committed:30=kill" slmjax train nano   # killed as the save of step 30 commits
    SLMJAX_FAULT="log.write:12@1=full" slmjax train nano            # process 1 finds a full disk at step 12

A fault is `POINT[:STEP][@PROCESS]=ACTION`; several are separated by commas. It happens once, the first time
that the point is executed (at this step, in this process); with `POINT:*`, every time. Where a point has no
step, STEP counts its executions in this process: `file.replace:3=kill` is the third file.

Points, each a call of `at`:

- `run.created`: the files of a new run are complete, and about to appear under its name
- `step`: a train step is complete (also `taints`: the state that it returned can be made non-finite)
- `evaluation.batch`: a batch of held-out text was evaluated
- `log.write`: a record of the log is about to be written
- `file.replace`: a temporary file is complete, and about to be renamed to its final name
- `checkpoint.save`, `checkpoint.committed`, `checkpoint.verified`: a save begins, its arrays are on disk,
  its manifest too
- `data.part`: a part of the data was prepared

Actions: `kill` (SIGKILL to this process), `term`, `int` (those signals), `full` and `readonly` (the OSError
of such a disk), `sleep` (for an hour, as a process that is stuck), and `nan` (at `step` alone).

Without the variable the hook costs one comparison.
"""

import collections
import dataclasses
import errno
import os
import signal
import time

VARIABLE = "SLMJAX_FAULT"
POINTS = (
    "run.created",
    "step",
    "evaluation.batch",
    "log.write",
    "file.replace",
    "checkpoint.save",
    "checkpoint.committed",
    "checkpoint.verified",
    "data.part",
)
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
_ERRORS = {"full": errno.ENOSPC, "readonly": errno.EROFS}
ACTIONS = (*_SIGNALS, *_ERRORS, "sleep", "nan")


@dataclasses.dataclass(kw_only=True)
class Fault:
    """One fault: where and when it happens, and what."""

    point: str
    step: int | None
    process: int | None
    action: str
    repeats: bool = False
    is_done: bool = False

    def is_due(self, point: str, step: int | None) -> bool:
        """Return whether the fault happens now."""
        if self.point != point or (self.is_done and not self.repeats):
            return False
        return (self.step is None or self.step == step) and self.process in (None, _process_index())


def parse(text: str) -> list[Fault]:
    """Return the faults that the variable describes.

    Raises:
      ValueError: the description is not of the form above.
    """
    faults = []
    for description in filter(None, text.split(",")):
        place, equals, action = description.partition("=")
        place, at, process = place.partition("@")
        point, colon, step = place.partition(":")
        is_number = all(
            not is_set or value.isdigit() for is_set, value in ((at, process), (colon, step))
        ) or (step == "*" and (not at or process.isdigit()))
        if point not in POINTS or not equals or action not in ACTIONS or not is_number:
            raise ValueError(
                f"{VARIABLE}: {description!r} is not POINT[:STEP][@PROCESS]=ACTION, where POINT is one of "
                f"{', '.join(POINTS)} and ACTION one of {', '.join(ACTIONS)}"
            )
        faults.append(
            Fault(
                point=point,
                step=int(step) if step.isdigit() else None,
                process=int(process) if process else None,
                action=action,
                repeats=step == "*",
            )
        )
    return faults


_faults: list[Fault] | None = None
_executions: collections.Counter[str] = collections.Counter()  # of points without a step


def at(point: str, step: int | None = None) -> None:
    """Let the faults of this point happen, if there are any.

    Raises:
      OSError: the disk is full, or cannot be written to.
    """
    for fault in _due(point, step):
        if fault.action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[fault.action])
        elif fault.action in _ERRORS:
            number = _ERRORS[fault.action]
            raise OSError(number, f"{os.strerror(number)} (injected by {VARIABLE})")
        elif fault.action == "sleep":
            time.sleep(3600)


def taints(step: int) -> bool:
    """Return whether the state after this step is to be made non-finite."""
    return any(fault.action == "nan" for fault in _due("step", step, action="nan"))


def _due(point: str, step: int | None, *, action: str | None = None) -> list[Fault]:
    global _faults
    if _faults is None:
        _faults = parse(os.environ.get(VARIABLE, ""))
    if not _faults:
        return []
    if step is None:
        _executions[point] += 1
        step = _executions[point]
    # `nan` is asked for by `taints` alone.
    due = [
        fault
        for fault in _faults
        if (fault.action == "nan") is (action == "nan") and fault.is_due(point, step)
    ]
    for fault in due:
        fault.is_done = True
    return due


def _process_index() -> int:
    import jax

    return jax.process_index()
