"""Verdicts: survived as promised, refused cleanly, or a defect, which is everything else."""

import dataclasses
import enum
import random
import re
from collections.abc import Sequence

from benchmarks.injections.sessions import End


class Verdict(enum.Enum):
    """The three ends of an injection."""

    SURVIVED = "survived"
    REFUSED = "refused"
    DEFECT = "defect"


class Defect(Exception):
    """A promise was broken; the text says which."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A verdict with its reason."""

    verdict: Verdict
    reason: str


@dataclasses.dataclass(kw_only=True)
class Case:
    """One injection: its kind and number decide everything random in it."""

    kind: str
    number: int
    seed: int
    variant: str = ""  # for the record: what is injected, and where

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}:{self.kind}:{self.number}")

    def describe(self, text: str) -> None:
        """Add to what is injected."""
        self.variant = f"{self.variant}; {text}" if self.variant else text


def survived(reason: str) -> Outcome:
    """Return the outcome of a promise that was kept."""
    return Outcome(verdict=Verdict.SURVIVED, reason=reason)


def refused(end: End) -> Outcome:
    """Return the outcome of a clean refusal, with its message."""
    return Outcome(verdict=Verdict.REFUSED, reason=error_line(end) or f"status {end.status}")


# What no user should see. The names of XLA and of C++ libraries are those of their fatal messages.
_UNCLEAN = (
    "Traceback (most recent call last)",
    "Exception ignored in",
    "Fatal Python error",
    "*** SIG",
    "Check failed:",
    "terminate called",
    "Segmentation fault",
)
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit|File)\b|Exception ignored|File \"")
# A refusal names a way out. These are the verbs that messages of the package use for it.
_WAYS_OUT = re.compile(
    r"\b(add|ask|begin|change|check|choose|convert|copy|create|delete|download|export|free|give|import|"
    r"increase|install|leave|lower|make|move|name|prepare|put|raise|remove|rename|repair|replace|restore|"
    r"resume|run|save|see|set|show|start|train|try|use|write)\b",
    re.IGNORECASE,
)


def require_clean(end: End, *, activity: str) -> None:
    """Raise Defect if the session hung or printed a traceback of anyone's."""
    if end.status is None:
        raise Defect(f"{activity}: hangs, killed after {end.seconds:.0f} s: {tail(end)}")
    for mark in _UNCLEAN:
        if mark in end.output:
            # The last lines of a traceback say most.
            at = end.output.index(mark)
            lines = [line.strip() for line in end.output[at : at + 20_000].splitlines() if line.strip()]
            errors = [line for line in lines if _ERROR.match(line)]
            raise Defect(f"{activity}: status {end.status} with {mark!r}: {errors[:3]} {tail(end, 400)}")


def require_refusal(end: End, *, activity: str, names: Sequence[str] = ()) -> None:
    """Raise Defect unless the session was refused with one error that names the file and a way out.

    Args:
      names: texts of which the message must contain one, such as the name of the damaged file.
    """
    require_clean(end, activity=activity)
    if end.status is None or end.status <= 0:
        raise Defect(f"{activity}: status {end.status} instead of an error: {tail(end)}")
    message = error_line(end)
    if not message:
        raise Defect(f"{activity}: status {end.status} without an error message: {tail(end)}")
    if names and not any(name in message for name in names):
        raise Defect(f"{activity}: the message does not name {' or '.join(names)}: {message}")
    # Without paths, which may have such words.
    if not _WAYS_OUT.search(" ".join(word for word in message.split() if "/" not in word)):
        raise Defect(f"{activity}: the message names no way out: {message}")


def error_line(end: End) -> str:
    """Return the error message of a session; empty if it printed none."""
    _, mark, message = end.output.rpartition("error: ")
    return " ".join(message.partition("(set SLMJAX_TRACEBACK")[0].split())[:600] if mark else ""


def tail(end: End, length: int = 700) -> str:
    """Return the end of what a session printed, on one line."""
    return " | ".join(line.strip() for line in end.output.splitlines() if line.strip())[-length:]
