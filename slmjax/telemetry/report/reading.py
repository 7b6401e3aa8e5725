"""Run directories as data: settings, log and result of a run, also of one that is killed or in progress."""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slmjax.telemetry.run_directory import read_log, read_result


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


def read_run(path: str | Path) -> RunRecords:
    """Return the records of a run directory.

    Raises:
        ValueError: the path is not a run directory.
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
    log = read_log(path / "log.jsonl") if (path / "log.jsonl").is_file() else []
    # One pass over the log, which may be long.
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in log:
        by_kind.setdefault(str(record["kind"]), []).append(record)
    # Any file may be missing while a run starts.
    environment = _json(path / "environment.json")
    data = _json(path / "data.json")
    train = _latest(by_kind.get("train", ()), ("step",))
    result = read_result(path)
    # A resumed run writes its result at the end, so an older result may be there.
    if result is not None and train and train[-1]["step"] > result.get("step", 0):
        # Of an earlier session: the run was extended and has not finished since.
        result = None
    return RunRecords(
        path=path,
        config=_json(path / "config.json") or {},
        environment=environment or {},
        data=data or [],
        result=result,
        train=train,
        # The last step has two: on the text of the evaluations on the way, then on all held-out text.
        evals=_latest(by_kind.get("eval", ()), ("step", "complete")),
        samples=_latest(by_kind.get("sample", ()), ("step", "prompt")),
        messages=by_kind.get("message", []),
    )


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): restore it, or delete the run") from error


def _latest(records: Iterable[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    # A later record of the same step replaces an earlier one.
    latest = {tuple(record.get(key) for key in keys): record for record in records}
    return sorted(latest.values(), key=lambda record: (record["step"], bool(record.get("complete"))))


def number(value: Any) -> float | None:
    """Return a number of the log; None if it is missing or not finite (the log has those as text)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


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
    started: float  # seconds since 1970


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
    runs = [_summary(path.parent) for path in directory.glob("[!.]*/config.json")]
    if not runs:
        raise ValueError(
            f"{directory} holds no run: name the directory that runs are in (`slmjax train` makes them in "
            "runs)"
        )
    return sorted(runs, key=lambda run: run.started)


def _summary(path: Path) -> RunSummary:
    started = (path / "config.json").stat().st_mtime
    try:
        run = read_run(path)
        steps = int(run.config["run"]["steps"])
    # One damaged run must not hide the others.
    except (ValueError, KeyError):
        empty = dict.fromkeys(("loss", "bits_per_byte", "lost_text", "parameters", "tokens", "seconds"))
        return RunSummary(
            name=path.name,
            path=str(path),
            status="damaged",
            step=0,
            steps=0,
            complete=False,
            started=started,
            **empty,
        )
    result = run.result or {}
    last = run.held_out
    return RunSummary(
        name=run.name,
        path=str(path),
        status=run.status,
        step=int(result.get("step", run.last_step)),
        steps=steps,
        loss=number(last.get("loss")),
        bits_per_byte=number(last.get("bits_per_byte")),
        lost_text=number(last.get("lost_text")),
        complete=bool(last.get("complete")),
        parameters=result.get("parameters"),
        tokens=result.get("run_tokens"),
        seconds=result.get("run_seconds"),
        started=run.train[0]["time"] if run.train else started,
    )
