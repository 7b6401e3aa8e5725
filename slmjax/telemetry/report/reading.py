"""Run directories as data: settings, log and result of a run, also of one that is killed or in progress.

Files are checked as they are read, so that what reads a `RunRecords` need not: numbers that are needed are
there, and what is a mapping or a list is one. An error names the file, and what to do about it.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slmjax.stored_json import DamagedFile, check_list, check_object, read_json
from slmjax.telemetry.report.settings import changed_settings
from slmjax.telemetry.run_directory import Session, read_log, read_result, sessions_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecords:
    """The files of a run directory. Of a step that was run twice, after a resume, the later record counts."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    data: list[dict[str, Any]]
    result: dict[str, Any] | None  # None while the run is in progress, or if it was killed
    train: list[dict[str, Any]]  # by step
    evals: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    sessions: tuple[Session, ...] = ()  # none in runs of earlier versions

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.resolve().name

    @property
    def status(self) -> str:
        """The outcome of the run, as far as the directory shows it."""
        return "unfinished" if self.result is None else str(self.result.get("status", "finished"))

    @property
    def held_out(self) -> dict[str, Any]:
        """The last evaluation on held-out text, on all of it after a run; empty if there is none."""
        return self.evals[-1] if self.evals else {}

    @property
    def is_complete(self) -> bool:
        """Whether the last evaluation was on all held-out text."""
        documents = [entry["heldout"]["documents"] for entry in self.data if entry.get("heldout")]
        all_documents = sum(documents) or None
        return bool(self.held_out.get("complete")) or self.held_out.get("documents") == all_documents

    @property
    def measured_on(self) -> str | None:
        """The text of the last evaluation; None without one."""
        if not self.held_out:
            return None
        result = (self.result or {}).get("measured_on")
        if self.held_out.get("complete") and isinstance(result, str):
            return result
        return "held-out text" if self.is_complete else "part of the held-out text"

    @property
    def best_measured_on(self) -> str:
        """The text of the result's best loss, that of the evaluations on the way."""
        recorded = (self.result or {}).get("best_measured_on")
        if isinstance(recorded, str):
            return recorded
        # Earlier versions did not record it, and the last step took part only if all had the same text.
        is_part = any(not record.get("complete") for record in self.on_the_way)
        has_other = len({record.get("documents") for record in self.evals}) > 1
        return "part of the held-out text" if is_part and has_other else "held-out text"

    @property
    def on_the_way(self) -> list[dict[str, Any]]:
        """The evaluations for one curve: those on a part of the held-out text, if there are any."""
        # Losses on other documents do not continue the curve of those on a part.
        parts = [record for record in self.evals if not record.get("complete")]
        numbers_of_documents = {record.get("documents") for record in self.evals}
        return self.evals if len(numbers_of_documents) == 1 or not parts else parts

    @property
    def last_step(self) -> int:
        """The last step in the log."""
        return max((record["step"] for record in self.train), default=0)

    def changed_settings(self) -> dict[str, list[tuple[int, Any]]]:
        """Return settings that steps of this run had different values of, as `settings.changed_settings`."""
        return changed_settings(self.config, self.sessions)

    def changed_environment(self) -> dict[str, list[tuple[int, Any]]]:
        """Return what the environment of the steps of this run differs in, as `changed_settings`."""
        sessions = [dataclasses.replace(item, changes=item.environment) for item in self.sessions]
        return changed_settings(self.environment, sessions)


def read_run(path: str | Path) -> RunRecords:
    """Return the records of a run directory.

    Raises:
      ValueError: the path is not a run directory.
      DamagedFile: a file of the run is damaged.
    """
    path = Path(path)
    # An imported model has a config.json, too.
    if (path / "origin.json").is_file():
        raise ValueError(
            f"{path} is an imported model, which was not trained here: there is nothing to report. `slmjax "
            "eval` measures it"
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is not a run directory: it has no config.json. `slmjax runs` lists the run directories"
        )
    log = _log(path / "log.jsonl") if (path / "log.jsonl").is_file() else []
    # One pass over the log, which may be long.
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in log:
        by_kind.setdefault(record["kind"], []).append(record)
    train = _latest(by_kind.get("train", ()), ("step",))
    result = _result(path)
    # A resumed run writes its result at the end, so an older result may be there.
    if result is not None and train and train[-1]["step"] > result["step"]:
        # Of an earlier session: the run was extended and has not finished since.
        result = None
    return RunRecords(
        path=path,
        config=_config(path / "config.json"),
        environment=_environment(path / "environment.json"),
        data=_data(path / "data.json"),
        result=result,
        train=train,
        # The last step has two: on the text of the evaluations on the way, then on all held-out text.
        evals=_latest(by_kind.get("eval", ()), ("step", "complete")),
        samples=_latest(by_kind.get("sample", ()), ("step", "prompt")),
        messages=by_kind.get("message", []),
        sessions=tuple(sessions_of(log, name=str(path / "log.jsonl"))),
    )


def _latest(records: Iterable[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    # A later record of the same step replaces an earlier one.
    latest = {tuple(record.get(key) for key in keys): record for record in records}
    return sorted(latest.values(), key=lambda record: (record["step"], bool(record.get("complete"))))


def number(value: Any) -> float | None:
    """Return a number of the log; None if it is missing or not finite (the log has those as text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer that no float can hold
        return None


# Files of a run ---------------------------------------------------------------------------------------------
# Any of them but config.json may be missing while a run starts.

_DELETE_RESULT = "delete it and resume the run"
_REMOVE_LINE = "remove the line to read the rest"
_SET_ASIDE = "move it out of the run directory to read the rest of the run"
# Of the kinds of records that are shown: fields beyond those that every reader of the log needs.
_FIELDS: dict[str, dict[str, type]] = {"train": {"time": float}, "eval": {}, "sample": {}}
_OPTIONAL = {"documents": int, "complete": bool, "grad_norms": dict, "expert_loads": dict}
MAX_STEP = 2**53  # larger integers are no numbers of JavaScript, which draws the charts
MAX_DEPTH = 100  # of nested settings; those of slmjax have a tenth


def _log(path: Path) -> list[dict[str, Any]]:
    records = read_log(path)
    for line, record in enumerate(records, start=1):
        name = f"line {line} of {path}"
        if (fields := _FIELDS.get(record["kind"])) is not None:
            check_object(record, fields, optional=_OPTIONAL, name=name, remedy=_REMOVE_LINE)
            if not 0 <= record["step"] <= MAX_STEP:
                raise DamagedFile(f"{name} has no number of a step as 'step': {_REMOVE_LINE}")
        if record["kind"] == "session":
            _shallow(record, name, _REMOVE_LINE)
    return records


def _config(path: Path) -> dict[str, Any]:
    remedy = "restore it, or delete the run"
    kept = sorted(path.parent.glob("config-*.json"))
    if kept:
        remedy = f"restore it, from a copy or {kept[-1].name} (of the session before), or delete the run"
    config = _shallow(
        check_object(read_json(path, remedy=remedy), name=str(path), remedy=remedy), path, remedy
    )
    # Runs of any version have steps; other settings are shown as they are.
    run = check_object(config.get("run"), {"steps": int}, name=f"'run' in {path}", remedy=remedy)
    if not 0 <= run["steps"] <= MAX_STEP:
        raise DamagedFile(f"{path} has no number of steps as run.steps: {remedy}")
    return config


def _environment(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path, remedy=_SET_ASIDE)
    return _shallow(check_object(value, name=str(path), remedy=_SET_ASIDE), path, _SET_ASIDE)


def _data(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    entries = read_json(path, remedy=_SET_ASIDE)
    check_list(entries, optional={"heldout": dict}, name=str(path), remedy=_SET_ASIDE)
    held_out = [entry for entry in entries if entry.get("heldout") is not None]
    check_list(held_out, {"fingerprint": str}, name=str(path), remedy=_SET_ASIDE)
    sizes = {"documents": int, "bytes": int}
    check_list(
        [entry["heldout"] for entry in held_out], sizes, name=f"'heldout' of {path}", remedy=_SET_ASIDE
    )
    return _shallow(entries, path, _SET_ASIDE)


def _result(run: Path) -> dict[str, Any] | None:
    result = read_result(run)
    if result is not None:
        mappings = {"compressors": dict, "session_seconds_by_category": dict}
        check_object(result, optional=mappings, name=str(run / "result.json"), remedy=_DELETE_RESULT)
    return _shallow(result, run / "result.json", _DELETE_RESULT)


def _shallow(value: Any, name: Path | str, remedy: str) -> Any:
    """Return a JSON value, unless it is nested so deeply that showing it would exhaust the stack."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [part for item in inner for part in item if isinstance(part, dict | list)]
        if not level:
            return value
    raise DamagedFile(f"{name} is nested too deeply for a file of a run: {remedy}")


# The list of runs -------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One line of `slmjax runs`."""

    name: str
    path: str
    status: str  # finished, interrupted, diverged, or unfinished (in progress or killed)
    step: int
    steps: int  # of the settings
    loss: float | None  # on held-out text, by the last evaluation
    bits_per_byte: float | None
    lost_text: float | None  # fraction of the held-out text's bytes that the tokenizer loses; None for 0
    complete: bool  # the last evaluation was on all held-out text
    parameters: int | None
    tokens: int | None  # of all sessions
    seconds: float | None  # of all sessions; None if the log does not have them all
    session_seconds: float | None  # of the last session
    started: float  # seconds since 1970
    changed: dict[str, list[Any]]  # settings that a resumed session changed: [first step, value] of each
    problem: str | None = None  # of a damaged run


def list_runs(directory: str | Path) -> list[RunSummary]:
    """Return the runs in a directory, oldest first. A run with damaged files has the status "damaged".

    Raises:
        ValueError: there is no such directory, or it has no run.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"there is no directory {directory}: name the one that runs are in (`slmjax train` makes them in "
            "runs)"
        )
    # An imported model has a config.json, too.
    paths = (path.parent for path in directory.glob("[!.]*/config.json"))
    runs = [_summary(path) for path in paths if not (path / "origin.json").is_file()]
    if not runs:
        raise ValueError(
            f"{directory.absolute()} holds no run: name the directory that runs are in (`slmjax train` makes "
            "them in runs)"
        )
    return sorted(runs, key=lambda run: run.started)


def _summary(path: Path) -> RunSummary:
    started = 0.0
    try:
        started = (path / "config.json").stat().st_mtime
        run = read_run(path)
    # One damaged run must not hide the others.
    except (ValueError, OSError) as error:
        names = ("loss", "bits_per_byte", "lost_text", "parameters", "tokens", "seconds", "session_seconds")
        return RunSummary(
            name=path.name,
            path=str(path),
            status="damaged",
            step=0,
            steps=0,
            complete=False,
            started=started,
            changed={},
            problem=str(error),
            **dict.fromkeys(names),
        )
    result = run.result or {}
    last = run.held_out
    return RunSummary(
        name=run.name,
        path=str(path),
        status=run.status,
        step=result.get("step", run.last_step),
        steps=run.config["run"]["steps"],
        loss=number(last.get("loss")),
        bits_per_byte=number(last.get("bits_per_byte")),
        lost_text=number(last.get("lost_text")),
        complete=run.is_complete,
        parameters=_count(result.get("parameters")),
        tokens=_count(result.get("run_tokens")),
        seconds=number(result.get("run_seconds")),
        session_seconds=number(result.get("session_seconds")),
        started=number(run.train[0]["time"]) or started if run.train else started,
        changed={name: [list(pair) for pair in history] for name, history in run.changed_settings().items()},
    )


def _count(value: Any) -> int | None:
    return None if number(value) is None else int(value)
