"""Results of runs as rows of columns, from files that slmjax did not write and from run directories.

    table = read_results(["sweep.csv"])
    table.columns                                 # ("lr", "seed", "val_loss")
    table.rows[0].cells["val_loss"]               # "1.53": cells of CSV are text

| source | rows |
|---|---|
| `.csv`, `.tsv` | its lines; separated by commas, semicolons or tabs |
| `.jsonl`, `.ndjson` | its objects |
| `.json` | a list of objects, `{"columns": ..., "data": ...}`, or columns by name, as pandas writes them |
| W&B, table of runs | a row for each run; `State` is its status |
| W&B, chart | a row for each run and step: columns such as `NAME - val/loss` become `Name` and `val/loss` |
| a run directory, or several in one | a row for each run: settings by path (`optim.lr`), result, evaluation |
| the directory of a study, or several | a row for each member: the same, and `arm`, `seed`, `status` |

Runs that a study does not count, such as those that tune a learning rate, are left out where its directory is
named. Of several studies the arms are named `STUDY: ARM`.

Nested objects become columns with dots in their names (`config.optim.lr`).
"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.stored_json import check_object, parse_json, read_json
from slmjax.studies.arms import directory_name
from slmjax.studies.claims import recorded_members
from slmjax.studies.study import MEMBERS, Member, member_of
from slmjax.studies.study_directory import PLAN, StudyDirectory
from slmjax.telemetry.run_directory import read_log, read_result

Cells = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run, or one step of a run."""

    name: str  # for messages, such as "line 3 of results.csv"
    cells: Cells  # by column; a column without a value may be absent
    is_run: bool = False  # a whole run of slmjax, never one step of several
    study: Path | None = None  # directory of the study that it is a member of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultsTable:
    """The rows of one or several sources."""

    source: str  # for messages
    rows: tuple[Row, ...]
    settings: frozenset[str] = frozenset()  # the columns that are settings of slmjax runs

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, in the order in which they appear."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.cells))


def read_results(paths: Sequence[str | Path]) -> ResultsTable:
    """Read the results of all these files and directories.

    Raises:
      ValueError: there is none, one does not exist, or it is not what its name says.
    """
    if not paths:
        raise ValueError(
            "there are no results to read: name a .csv, .jsonl or .json file, or run directories"
        )
    tables = [_read(Path(path)) for path in paths]
    return ResultsTable(
        source=", ".join(str(path) for path in paths),
        rows=_told_apart([row for table in tables for row in table.rows]),
        settings=frozenset().union(*(table.settings for table in tables)),
    )


def _read(path: Path) -> ResultsTable:
    if path.is_dir():
        return _read_directory(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a file of results, or run directories")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path} is no file of results: its name must end in {', '.join(_READERS)}; or name directories "
            "of runs"
        )
    rows = tuple(reader(path))
    if not rows:
        raise ValueError(f"{path} has no results: it needs a row for each run")
    return ResultsTable(source=str(path), rows=rows)


# Files ------------------------------------------------------------------------------------------------------
def _text(path: Path) -> str:
    try:
        # With "-sig", the mark that spreadsheets write before the first name is not part of it.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at {error.start}): export it again as UTF-8"
        ) from error


def _csv_rows(path: Path) -> Iterator[Row]:
    text = _text(path)
    # The first line decides: csv.Sniffer is misled by names of runs with other separators in them.
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        names = [name.strip() for name in next(lines, [])]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path} has two columns named {twice!r}: rename one")
        rows = []
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"line {lines.line_num} of {path} has {len(cells)} cells and the first line {len(names)} "
                    "names: repair the line, or put quotes around cells with separators in them"
                )
            rows.append(
                Row(name=f"line {lines.line_num} of {path}", cells=dict(zip(names, cells, strict=True)))
            )
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV ({error}): export it again") from error
    yield from _from_chart(rows, names)


def _from_chart(rows: Sequence[Row], names: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each run and step of a chart that W&B exported; other rows as they are."""
    # Each line of the chart has three columns: the value, and its extremes where steps were combined.
    lines = [name for name in names if f"{name}__MIN" in names and f"{name}__MAX" in names]
    others = [name for name in names if re.sub("__(MIN|MAX)$", "", name) not in lines]
    if not lines or len(others) != 1 or not all(" - " in name for name in lines):
        yield from rows
        return
    for row in rows:
        for line in lines:
            run, _, metric = line.rpartition(" - ")
            cells = {"Name": run, "_step": row.cells[others[0]], metric: row.cells[line]}
            yield Row(name=f"{row.name}, {run}", cells=cells)


def _json_line_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            name = f"line {number} of {path}"
            value = parse_json(line, name=name, remedy="repair or remove the line")
            yield Row(name=name, cells=flattened(check_object(value, name=name, remedy="remove the line")))


def _json_rows(path: Path) -> Iterator[Row]:
    value = parse_json(_text(path), name=str(path), remedy="export it again")
    for number, item in enumerate(_json_objects(value, path), start=1):
        name = f"entry {number} of {path}"
        yield Row(name=name, cells=flattened(check_object(item, name=name, remedy="export it again")))


def _json_objects(value: Any, path: Path) -> list[Any]:
    """Return the objects of a JSON file in any of the usual orientations."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        names = value.get("columns")
        data = value.get("data")
        if isinstance(names, list) and isinstance(data, list):
            return [
                dict(zip(map(str, names), item, strict=False)) if isinstance(item, list) else item
                for item in data
            ]
        if value and all(isinstance(column, list) for column in value.values()):
            if len({len(column) for column in value.values()}) == 1:
                return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
        elif value and all(isinstance(column, dict) for column in value.values()):
            keys = dict.fromkeys(key for column in value.values() for key in column)
            return [{name: column.get(key) for name, column in value.items()} for key in keys]
    raise ValueError(
        f"{path} has no rows: give a list of objects, one for each run, or an object of columns of equal "
        "length"
    )


_READERS = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".json": _json_rows,
}


def flattened(value: Mapping[str, Any], *, prefix: str = "") -> Cells:
    """Return the values of nested objects by their path; lists of numbers and texts are JSON texts."""
    cells: Cells = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        # W&B stores settings as {"value": ..., "desc": ...}.
        if isinstance(item, Mapping) and "value" in item and set(item) <= {"value", "desc"}:
            item = item["value"]
        if isinstance(item, list) and any(isinstance(element, Mapping) for element in item):
            item = {str(index): element for index, element in enumerate(item)}
        if isinstance(item, Mapping):
            cells |= flattened(item, prefix=f"{name}.")
        else:
            cells[name] = json.dumps(item) if isinstance(item, list) else item
    return cells


# Directories ------------------------------------------------------------------------------------------------
def _read_directory(path: Path) -> ResultsTable:
    studies = [path] if _is_study(path) else _studies_below(path)
    inside = [] if _is_study(path) else _runs_below(path, studies)
    if not studies and not inside:
        raise ValueError(
            f"{path} has no runs: name a run directory, a directory of several, or that of a study"
        )
    rows = []
    settings: set[str] = set()
    for run in inside:
        own = _settings(run)
        settings |= set(own)
        rows.append(Row(name=str(run), cells={**own, **_outcome(run)}, is_run=True))
    for study in studies:
        for member in _members(study):
            own = _member_settings(study, member)
            settings |= set(own)
            rows.append(_member_row(study, member, own))
    if not rows:
        raise ValueError(f"{path} has no member that has ended yet: run the study first (slmjax ablate)")
    return ResultsTable(source=str(path), rows=tuple(rows), settings=frozenset(settings))


def _is_study(path: Path) -> bool:
    return (path / PLAN).is_file() or (path / MEMBERS).is_file()


def _studies_below(path: Path) -> list[Path]:
    """Return the studies in a directory, without those that tune another one and lie in its directory."""
    studies = sorted({file.parent for name in (PLAN, MEMBERS) for file in path.rglob(name)})
    return [study for study in studies if not any(parent in studies for parent in study.parents)]


def _runs_below(path: Path, studies: Sequence[Path]) -> list[Path]:
    """Return the run directories that are in no study."""
    runs = [path] if _is_run(path) else sorted(file.parent for file in path.rglob("config.json"))
    return [run for run in runs if _is_run(run) and not any(study in run.parents for study in studies)]


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "log.jsonl").is_file()


def _settings(run: Path) -> Cells:
    remedy = "move the run out of the directory"
    config = read_json(run / "config.json", remedy=remedy)
    return flattened(check_object(config, name=str(run / "config.json"), remedy=remedy))


def _outcome(run: Path) -> Cells:
    """Return the result and the last complete evaluation of a run; of one that has not ended its status."""
    evaluations = [record for record in read_log(run / "log.jsonl", kind="eval") if record.get("complete")]
    evaluation = {} if not evaluations else evaluations[-1]
    result = read_result(run) or {"status": "running"}
    return flattened({**evaluation, **result, "run": run.name})


# Studies ----------------------------------------------------------------------------------------------------
def _members(study: Path) -> list[Member]:
    """Return the members of a study that ended, as they were recorded last."""
    path = study / MEMBERS
    records = [
        (f"a record of {path}", record)
        for record in (read_log(path, kind="member") if path.is_file() else [])
    ]
    # The log may lack lines of other hosts.
    records += [(str(file), record) for file, record in recorded_members(study)]
    members = [member_of(record, name=name) for name, record in records]
    return list({(member.arm, member.seed): member for member in members}.values())


def _member_settings(study: Path, member: Member) -> Cells:
    """Return the settings of a member: those of its run, or of its arm in the plan where it left no run."""
    recorded = member.result.get("run_dir")
    if isinstance(recorded, str):
        # The study may have been moved since.
        moved = study / directory_name(member.arm) / f"seed-{member.seed}" / Path(recorded).name
        for run in (Path(recorded), moved):
            if (run / "config.json").is_file():
                return _settings(run)
    arms = StudyDirectory.open(study).arms if (study / PLAN).is_file() else {}
    arm = arms.get(member.arm, {})
    # A derived arm has the settings of what it is derived from, which may be derived, too.
    for _ in arms:
        arm = arm if "experiment" in arm else arms.get(arm.get("derived_from"), arm)
    return flattened(arm.get("experiment", {}))


def _member_row(study: Path, member: Member, settings: Cells) -> Row:
    outcome = flattened({**member.evaluation, **member.result})
    about = {"arm": member.arm, "seed": member.seed, "status": member.status}
    return Row(
        name=f"{member.arm}, seed {member.seed} of {study}",
        cells={**settings, **outcome, **about},
        is_run=True,
        study=study,
    )


def _told_apart(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return rows whose arms are named after their studies, too, if they are of several."""
    studies = list(dict.fromkeys(row.study for row in rows if row.study is not None))
    if len(studies) < 2:
        return tuple(rows)
    names = [study.resolve().name for study in studies]
    is_clear = len(set(names)) == len(names)
    labels = {study: name if is_clear else str(study) for study, name in zip(studies, names, strict=True)}
    return tuple(
        row
        if row.study is None
        else dataclasses.replace(
            row,
            cells={
                **row.cells,
                "study": labels[row.study],
                "arm": f"{labels[row.study]}: {row.cells['arm']}",
            },
        )
        for row in rows
    )
