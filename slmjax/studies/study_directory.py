"""Study files, and the directory of a study: what was fixed before its first run, and what changed since.

    study = load_study("experiments/deep_or_wide.py")       # a file with `def study() -> Study`
    directory = StudyDirectory.create("runs/studies/deep-or-wide", study)
    directory.changes_since_lock()                          # empty while the study is as it was fixed

Files of the directory, in addition to those of the members:

    DIRECTORY/plan.json                        what was fixed, with a hash; written once
    DIRECTORY/study.py                         the file, and experiment_modules/, the modules of its folder
    DIRECTORY/changes.jsonl                    a line for each later change: when, what, after which members

A file may ask several questions, or have studies that others build on: each has a directory of its own in
DIRECTORY, named like the study, with its own plan.json; DIRECTORY/studies.json names them.
"""

import dataclasses
import datetime
import inspect
import itertools
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.config import differences, fingerprint, from_json, to_json
from slmjax.stored_json import DamagedFile, check_list, check_object, read_object
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.claims import NO_LINKS
from slmjax.studies.matching import Matched
from slmjax.studies.study import (
    MEMBERS,
    OnChange,
    Study,
    member_experiment,
    member_fingerprint,
)
from slmjax.telemetry.run_directory import RunLog, plain, read_log
from slmjax.training.recipes import copy_code, described, errors_named, run_file

log = logging.getLogger(__name__)

SIZES = ("small", "large")
STUDY_FILE = "study.py"
MOST_SEEDS = 1000  # more is a mistake, and planning them would take minutes
PLAN = "plan.json"
CHANGES = "changes.jsonl"
VERSION = 1
_REMEDY = "restore the file from a copy, or use another directory"

# Fields of a study that its plan holds in another form, or that are of no consequence for its results.
_NOT_SETTINGS = ("arms", "base", "earlier", "name")


# Study files ------------------------------------------------------------------------------------------------
def load_study(path: str | Path, *, size: str = "small") -> Study:
    """Return the study of a file that asks one question; the file's code is run.

    Args:
      path: a file with `def study() -> Study`, or the directory of a study.
      size: passed to `def study(size: str) -> Study`: "small" or "large".

    Raises:
      ValueError: there is no such file, its code fails, or it has no function that returns one study.
    """
    studies = list(_returned(Path(path), size))
    if len(studies) > 1:
        names = ", ".join(repr(study.name) for study in studies)
        raise ValueError(f"{path} has {len(studies)} studies ({names}): use load_studies, which returns all")
    return studies[0]


def load_studies(path: str | Path, *, size: str = "small") -> tuple[Study, ...]:
    """Return the studies of a file in the order in which they run: those that others build on come first.

    Arguments and errors as for `load_study`, except that the function may also return a tuple of studies.
    """
    studies: dict[str, Study] = {}
    for study in _returned(Path(path), size):
        for each in _with_earlier(study):
            # Functions of the seed are not equal to each other, so that only settings can be compared.
            if each.name in studies and settings_of(studies[each.name]) != settings_of(each):
                raise ValueError(f"{path} has two studies named {each.name!r}: rename one")
            studies[each.name] = each
    directories = [study.directory.lower() for study in studies.values()]
    if len(set(directories)) < len(directories):
        raise ValueError(
            f"{path}: two of the studies {', '.join(studies)} have the same directory: rename one"
        )
    return tuple(studies.values())


def _with_earlier(study: Study) -> Iterator[Study]:
    for earlier in study.earlier:
        yield from _with_earlier(earlier)
    yield study


def _returned(path: Path, size: str) -> tuple[Study, ...]:
    """Return what study() of a file returned, as a tuple."""
    if size not in SIZES:
        raise ValueError(f"the size of a study is {' or '.join(SIZES)}, not {size!r}")
    path = path / STUDY_FILE if path.is_dir() else path
    build = getattr(run_file(path), "study", None)
    if not callable(build):
        raise ValueError(
            f"{path} needs a function `def study() -> Study` that returns the study, and has none"
        )
    needed = [
        parameter
        for parameter in inspect.signature(build).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if not needed and size != SIZES[0]:
        raise ValueError(
            f"study() of {path} takes no size, so there is no {size} one: leave out --budget {size}"
        )
    with errors_named(path):
        result: Any = build(size) if needed else build()
    studies = tuple(result) if isinstance(result, tuple | list) else (result,)
    if not studies:
        raise ValueError(f"study() of {path} returned no study: return at least one")
    for study in studies:
        if not isinstance(study, Study):
            raise ValueError(f"study() of {path} returned {described(study)}, not a Study")
        for arm in study.arms:
            # A wrong path or value of an arm would otherwise show only when its turn comes.
            with errors_named(path):
                member_experiment(study, arm.name, study.seeds[0])
    return studies


def copy_study(file: Path, directory: Path) -> None:
    """Copy a study file, and the modules that it imported from its folder, into the study's directory.

    A copy that differs stays, as study-1.py, study-2.py, ...: what earlier members were trained from.
    """
    copy = directory / STUDY_FILE
    if copy.is_file() and copy.read_bytes() != file.read_bytes():
        number = next(n for n in itertools.count(1) if not (directory / f"study-{n}.py").exists())
        copy.replace(directory / f"study-{number}.py")
    directory.mkdir(parents=True, exist_ok=True)
    if file.resolve().parent != directory.resolve():
        copy_code(file, directory, name=STUDY_FILE)
    elif file.resolve() != copy.resolve():
        shutil.copyfile(file, copy)  # the modules of its folder are there


def with_num_seeds(studies: Sequence[Study], number: int) -> tuple[Study, ...]:
    """Return studies with another number of seeds: the first of each, and further ones if there are more.

    A study that others build on keeps its only seed, such as that of a teacher.
    """
    if not 1 <= number <= MOST_SEEDS:
        raise ValueError(f"the number of seeds is {number:,}: give 1 to {MOST_SEEDS:,}")
    built_on = {earlier.name for study in studies for earlier in study.earlier}
    seeds_of = {}
    for study in studies:
        seeds = study.seeds
        if study.name not in built_on or len(seeds) > 1:
            tuning = () if study.tune is None else study.tune.seeds
            candidates = range(len(seeds) + number + len(tuning))
            unused = [seed for seed in candidates if seed not in (*seeds, *tuning)]
            seeds = (*seeds, *unused)[:number]
        seeds_of[study.name] = seeds
    return with_seeds(studies, seeds_of)


def with_seeds(studies: Sequence[Study], seeds_of: Mapping[str, tuple[int, ...]]) -> tuple[Study, ...]:
    """Return studies, of which later ones may build on earlier ones, with other seeds by the study's name."""
    changed: dict[str, Study] = {}
    for study in studies:
        earlier = tuple(changed[each.name] for each in study.earlier)
        seeds = seeds_of.get(study.name, study.seeds)
        changed[study.name] = dataclasses.replace(study, seeds=seeds, earlier=earlier)
    return tuple(changed.values())


# What is fixed ----------------------------------------------------------------------------------------------
def settings_of(study: Study) -> dict[str, Any]:
    """Return the settings of a study, besides its arms, as JSON."""
    settings = {
        field.name: to_json(plain_mapping(getattr(study, field.name)))
        for field in dataclasses.fields(study)
        if field.name not in _NOT_SETTINGS
    }
    return {**settings, "earlier": [earlier.name for earlier in study.earlier]}


def _state(study: Study) -> dict[str, Any]:
    return plain({"settings": settings_of(study), "arms": arms_of(study)})


def _unmatched_hash(study: Study) -> str:
    """Return a hash of all that the choices of `match_arms` depend on; the number of seeds is not."""
    arms = {name: _without_hashes(arm) for name, arm in arms_of(study).items()}
    return fingerprint({"arms": arms, "baseline": study.baseline, "matched": study.matched})


def plain_mapping(value: Any) -> Any:
    """Return a mapping of any kind as a dict, and other values as they are."""
    return dict(value) if isinstance(value, Mapping) else value


def arms_of(study: Study) -> dict[str, Any]:
    """Return the arms of a study as JSON: experiments of the first seed, and fingerprints of all seeds."""
    arms: dict[str, Any] = {}
    for arm in study.arms:
        about: dict[str, Any] = {}
        if isinstance(arm, Derived):
            about |= {"derived_from": arm.source, "derivation": to_json(arm.derivation)}
        elif isinstance(arm, Arm) and arm.after is not None:
            about |= {"after": arm.after if isinstance(arm.after, str) else list(arm.after)}
        if isinstance(arm, Arm):
            about |= {"experiment": to_json(member_experiment(study, arm.name, study.seeds[0]))}
        hashes = {str(seed): member_fingerprint(study, arm.name, seed) for seed in study.seeds}
        arms[arm.name] = {**about, "fingerprints": hashes}
    return arms


# The directory ----------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """Changes of a study after it was fixed."""

    time: str  # ISO 8601, UTC
    members_ended: int  # runs whose results could be known when it was changed
    what: tuple[str, ...]  # "arm deep: optim.lr was 0.01, now 0.02"

    @property
    def text(self) -> str:
        """The changes in one sentence."""
        return f"changed on {self.time[:10]}, after {self.members_ended} members had ended: " + "; ".join(
            self.what
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyDirectory:
    """The directory of one study."""

    path: Path

    @classmethod
    def create(
        cls,
        path: str | Path,
        study: Study,
        *,
        size: str = "small",
        asked: Study | None = None,
        matched: Sequence[Matched] = (),
        plan: Callable[[], Any] | None = None,
        on_change: OnChange = OnChange.REFUSE,
    ) -> "StudyDirectory":
        """Fix a study in a directory before its first run; of a study that is fixed already, record changes.

        Of several processes that call this at once, one writes the plan and the others compare with it.

        Args:
          path: the directory; created if it does not exist.
          study: as it will be run.
          size: that its file was asked for.
          asked: as it was before its arms were matched (none: it is that).
          matched: the choices of `match_arms`, which hold as long as `asked` is the same.
          plan: makes the entry "plan" of plan.json, such as costs and power; called if there is no such file.
          on_change: handling of members whose experiment has changed.

        Raises:
          ValueError: the directory is of another study, or a changed arm has members that ended and
            `on_change` is not REDO; nothing is written.
        """
        directory = cls(path=Path(path))
        directory.path.mkdir(parents=True, exist_ok=True)
        state = _state(study)
        choices = [to_json(choice) | {"text": choice.text} for choice in matched]
        origin = {"asked": _unmatched_hash(asked or study), "matched": choices}
        lock = {
            "version": VERSION,
            "study": study.name,
            "size": size,
            "hash": fingerprint(state),
            "locked_at": _iso_time(time.time()),
            **origin,
            **state,
        }
        if plan is not None and not (directory.path / PLAN).is_file():
            lock["plan"] = plan()
        if not _create(directory.path / PLAN, json.dumps(plain(lock), indent=2) + "\n"):
            directory._record_change(study, {**state, **origin}, on_change)
        return directory

    @classmethod
    def open(cls, path: str | Path) -> "StudyDirectory":
        """Return the directory of a study that was fixed. Raises ValueError for another one."""
        directory = cls(path=Path(path))
        if not (directory.path / PLAN).is_file():
            raise ValueError(
                f"{path} is not the directory of a study: it has no {PLAN}. `slmjax ablate STUDY.py` makes it"
            )
        _ = directory.plan  # which checks it
        return directory

    @property
    def plan(self) -> dict[str, Any]:
        """What was fixed before the first run: the content of plan.json."""
        kinds = {"study": str, "size": str, "hash": str, "locked_at": str, "settings": dict, "arms": dict}
        kinds |= {"asked": str, "matched": list}
        path = self.path / PLAN
        return _checked(read_object(path, kinds, remedy=_REMEDY), name=str(path))

    @property
    def arms(self) -> dict[str, Any]:
        """The arms that the study had last, by name: their experiments, and what they build on."""
        return (self._records() or [self.plan])[-1]["arms"]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that the study had last."""
        latest = (self._records() or [self.plan])[-1]
        return tuple(latest["settings"]["seeds"])

    def matched_before(self, asked: Study) -> tuple[Matched, ...] | None:
        """Return the choices that were made for the arms of this study; None if it was another one then."""
        if not (self.path / PLAN).is_file():
            return None
        latest = (self._records() or [self.plan])[-1]
        if latest["asked"] != _unmatched_hash(asked):
            return None
        choices = [
            {name: value for name, value in each.items() if name != "text"} for each in latest["matched"]
        ]
        try:
            return tuple(from_json(Matched, choice) for choice in choices)
        except ValueError as error:
            raise DamagedFile(f"'matched' of {self.path / PLAN}: {error}. Way out: {_REMEDY}") from error

    def changes_since_lock(self) -> tuple[Change, ...]:
        """Return the changes after the study was fixed, oldest first."""
        return tuple(
            Change(
                time=_iso_time(record["time"]),
                members_ended=record["members_ended"],
                what=tuple(record["what"]),
            )
            for record in self._records()
        )

    @property
    def on_change(self) -> OnChange:
        """Handling of members whose experiment has changed, as it was decided when a change was recorded."""
        # An interrupted study resumes the training of its changed members without being asked once more.
        is_redone = any(record["redo"] for record in self._records())
        return OnChange.REDO if is_redone else OnChange.REFUSE

    def _records(self) -> list[dict[str, Any]]:
        path = self.path / CHANGES
        kinds = {"time": float, "members_ended": int, "what": list, "redo": bool}
        kinds |= {"settings": dict, "arms": dict, "asked": str, "matched": list}
        name = f"a record of {path}"
        return [
            _checked(check_object(record, kinds, name=name, remedy=_REMEDY), name=name)
            for record in (read_log(path, kind="change") if path.is_file() else [])
        ]

    def _record_change(self, study: Study, state: dict[str, Any], on_change: OnChange) -> None:
        """Record how a study differs from what was fixed, or changed last."""
        plan = self.plan
        if plan["study"] != study.name:
            raise ValueError(
                f"{self.path} is the directory of the study {plan['study']!r}, not of {study.name!r}: use "
                "another one, with --directory"
            )
        latest = (self._records() or [plan])[-1]
        what = tuple(_described_changes(latest, state))
        if not what:
            return
        ended = self._ended()
        stale = sorted({arm for arm, seed in ended if _is_changed(latest, state, arm, seed)})
        # Results of different experiments must never be compared under one name.
        if stale and on_change is OnChange.REFUSE:
            raise ValueError(
                f"{self.path}: members of {', '.join(stale)} were trained with another experiment than the "
                f"study has now ({'; '.join(what)}). Undo the change, use another directory (--directory), "
                "or train them again with --redo, which keeps the old runs"
            )
        with RunLog(self.path / CHANGES) as records:
            records.write("change", members_ended=len(ended), what=what, redo=bool(stale), **state)
        log.warning("study %s has changed since it was fixed: %s", study.name, "; ".join(what))

    def _ended(self) -> set[tuple[str, int]]:
        """Return arm and seed of the members that ended."""
        path = self.path / MEMBERS
        records = read_log(path, kind="member") if path.is_file() else []
        return {(record["arm"], record["seed"]) for record in records}


def _checked(state: dict[str, Any], *, name: str) -> dict[str, Any]:
    """Return a state of a study whose parts are what they should be. Raises DamagedFile if one is not."""
    check_object(state["settings"], {"seeds": list}, name=f"'settings' of {name}", remedy=_REMEDY)
    if any(type(seed) is not int for seed in state["settings"]["seeds"]):
        raise DamagedFile(f"{name} has seeds that are no integers: {_REMEDY}")
    fields = {"fingerprints": dict}
    optional = {"experiment": dict, "derived_from": str}
    for arm, about in state["arms"].items():
        check_object(about, fields, optional=optional, name=f"arm {arm!r} of {name}", remedy=_REMEDY)
    check_list(state["matched"], name=f"'matched' of {name}", remedy=_REMEDY)
    if any(not isinstance(what, str) for what in state.get("what", ())):
        raise DamagedFile(f"{name} has changes that are no text: {_REMEDY}")
    return state


def _is_changed(before: Mapping[str, Any], after: Mapping[str, Any], arm: str, seed: int) -> bool:
    """Return whether a member that both states have is another one in each."""
    hashes = [state["arms"].get(arm, {}).get("fingerprints", {}).get(str(seed)) for state in (before, after)]
    return None not in hashes and hashes[0] != hashes[1]


def _described_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between two states of a study."""
    # A setting that only one version of the program has is no change of the study.
    shared = before["settings"].keys() & after["settings"].keys()
    old, new = ({name: state["settings"][name] for name in sorted(shared)} for state in (before, after))
    for path, pair in differences(old, new):
        yield f"{path} was {json.dumps(pair[0])}, now {json.dumps(pair[1])}"
    for name in dict.fromkeys((*before["arms"], *after["arms"])):
        old, new = (state["arms"].get(name) for state in (before, after))
        if old is None or new is None:
            yield f"arm {name}: {'added' if old is None else 'removed'}"
            continue
        seeds = [seed for seed in old["fingerprints"] if seed in new["fingerprints"]]
        if all(old["fingerprints"][seed] == new["fingerprints"][seed] for seed in seeds):
            continue
        # The first seeds of both may differ, which is no difference of the arm.
        fields = [
            f"{path} was {json.dumps(pair[0])}, now {json.dumps(pair[1])}"
            for path, pair in differences(_without_hashes(old), _without_hashes(new))
            if path not in ("experiment.run.seed", "experiment.data.seed")
        ]
        yield f"arm {name}: {', '.join(fields) or 'what it builds on'}"


def _without_hashes(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arm.items() if name != "fingerprints"}


def _iso_time(seconds: float) -> str:
    """Return seconds since 1970 as ISO 8601; those of a damaged file may be of no year."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return "an unknown day"


def _create(path: Path, text: str) -> bool:
    """Write a file atomically and return True; return False if it exists, or another process is first."""
    if path.is_file():
        return False
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        # A link, unlike a rename, never replaces a file.
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        # One process alone may run a study on a file system without links (`claims.py`).
        if error.errno not in NO_LINKS:
            raise
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True
