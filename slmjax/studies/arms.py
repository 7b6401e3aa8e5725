"""The arms of a study: an experiment to train, or models derived from those of another arm without training.

arm = Arm(name="full precision", experiment=from_scratch)   # an Experiment, or a function of the seed
later = Arm(name="QAT", after="full precision", experiment=continued)    # continued(seed, run)
rules = (QuantRule(paths=".", weight=preset("q4_0")),)
derived = Derived(name="rounded", source="full precision", derivation=RoundToNearest(rules=rules))
"""

import abc
import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slmjax.studies.changes import with_changes
from slmjax.training.experiment import Experiment

LONGEST = 200  # characters of a directory's name; most file systems have 255 bytes
# Endings of the files that a study has in its directory, where those of arms are too.
_FILES = frozenset((".json", ".jsonl", ".html", ".md", ".tex", ".csv", ".svg", ".png", ".py"))


def directory_name(name: str) -> str:
    """Convert an arm's name, which may be any text that can be printed, to a valid directory name.

    Letters outside ASCII are replaced by a part of a hash of the name: "β=0.9" is 0.9-5a2f1c03, say.

    Raises:
      ValueError: it is empty, cannot be printed, is too long, or is that of a file of a study.
    """
    check_printable(name, what="an arm's or a study's name")
    if not name.strip():
        raise ValueError(f"an arm or a study is named {name!r}: give it a name that can be seen")
    # A letter with its accent may be one character or two.
    composed = unicodedata.normalize("NFC", name)
    # Names are free text for tables; file systems refuse some of their characters.
    valid = re.sub(r"[^A-Za-z0-9._]+", "-", composed).strip("-.")
    if not valid or any(character.isalnum() and not character.isascii() for character in composed):
        digest = hashlib.sha256(composed.encode()).hexdigest()[:8]
        valid = f"{valid}-{digest}".lstrip("-")
    if len(valid) > LONGEST:
        raise ValueError(
            f"{name[:40]!r}... is a name of {len(valid)} characters, which many file systems refuse: give "
            f"one of at most {LONGEST}"
        )
    if valid.lower() in ("claims", "tuning") or Path(valid.lower()).suffix in _FILES:
        raise ValueError(f"{name!r} may be the name of a file of the study: give another one")
    return valid


def check_printable(text: str, *, what: str) -> None:
    """Raise ValueError if a text has a character that cannot be printed, such as half of a surrogate pair."""
    for character in text:
        if not character.isprintable():
            raise ValueError(
                f"{what} is {text!r}, and U+{ord(character):04X} in it cannot be printed: leave it out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """An arm that is trained."""

    name: str  # shown in tables; any text, and the directory of its runs is named after it
    # the same for all seeds, or a function of the seed (none: the base of the study); with `after`, of the
    # seed and of the directory of the run that the arm builds on
    experiment: Experiment | Callable[..., Experiment] | None = None
    # what differs from that experiment: values by field path, or a function of the experiment
    changes: Mapping[str, Any] | Callable[[Experiment], Experiment] = dataclasses.field(default_factory=dict)
    # the arm whose run of the same seed it builds on, such as a model to continue or a teacher: an arm before
    # it, or (study, arm) of one of the study's `earlier` studies
    after: str | tuple[str, str] | None = None

    def __post_init__(self) -> None:
        directory_name(self.name)
        if self.after is not None and not callable(self.experiment):
            raise ValueError(
                f"arm {self.name!r} is after {self.after!r}: give it a function of the seed and of that run, "
                "experiment=lambda seed, run: ..."
            )

    @property
    def directory(self) -> str:
        """Name of the arm's directory."""
        return directory_name(self.name)

    def then(self, change: Callable[[Experiment], Experiment]) -> "Arm":
        """Return the arm with a further change, after its own."""
        changes = self.changes

        def changed(experiment: Experiment) -> Experiment:
            own = changes(experiment) if callable(changes) else with_changes(experiment, changes)
            return change(own)

        return dataclasses.replace(self, changes=changed)


# An interface, so that a study does not depend on the methods of quantization.
class Derivation(abc.ABC):
    """A way to derive a model from a trained one.

    Subclasses are frozen dataclasses, whose fields are part of the fingerprint of a member.
    """

    @abc.abstractmethod
    def make(self, model: Path, out: Path) -> None:
        """Write a model for `load_model`.

        Args:
          model: a run directory, or the output of another derivation.
          out: directory to write; it does not exist yet.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived:
    """An arm whose members are derived from another arm's, such as by rounding, and evaluated like them."""

    name: str  # as in `Arm`
    source: str  # name of an earlier arm
    derivation: Derivation

    def __post_init__(self) -> None:
        directory_name(self.name)

    @property
    def directory(self) -> str:
        """Name of the arm's directory."""
        return directory_name(self.name)
