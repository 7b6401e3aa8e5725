"""Results of runs that slmjax did not train, as a question and members: what `slmjax verdict` analyzes.

    columns = choose_columns(table, arm="lr", seed="seed", metric="val_loss")
    results = read_columns(table, columns, baseline="0.001", rules=Rules())
    findings = analyze_members(results.question, results.members)

A run is a row, or several rows of which the one with the largest step counts. Arms that are equal numbers,
such as 0.001 and 1e-3, are one. The outcome of a run:

| cells | outcome |
|---|---|
| status `diverged`, or a metric of NaN or an infinity | diverged |
| status `failed`, `crashed`, `killed`, ... | failed: left out of its pairs |
| status `running`, `pending`, ... | not finished: left out of its pairs |
| no status, or `finished`; the metric a number | finished |
| the metric is blank | left out of its pairs, with a note |
"""

import dataclasses
import decimal
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slmjax.config import near_names
from slmjax.studies.design import Budget
from slmjax.studies.questions import Question
from slmjax.studies.results_files import ResultsTable, Row
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.study import DIVERGED, FAILED, FINISHED, Member

# Columns that are taken for a role if no other has such a name; compared in lower case.
_ARM = ("arm", "variant", "method", "treatment")
_SEED = ("seed", "run.seed", "config.seed", "config.run.seed", "random_seed")
_STATUS = ("status", "state")
_STEP = ("step", "_step", "global_step", "trainer/global_step")
_METRIC = ("bits_per_byte",)
_NAME = ("name", "run", "run_name")
# Numbers in exports of trackers that are no results; pandas writes the numbers of rows without a name.
_BOOKKEEPING = (
    "",
    "unnamed: 0",
    "runtime",
    "_runtime",
    "_timestamp",
    "created",
    "updated",
    "end time",
    "_wandb.runtime",
)

_STATUSES = {
    FINISHED: "finished completed complete success succeeded ok done",
    DIVERGED: "diverged divergence nan",
    FAILED: "failed failure crashed killed error preempted interrupted stopped timeout cancelled canceled "
    "stopped_early not_saved",
    "running": "running pending queued starting",
}
_STATUS_OF = {name: status for status, names in _STATUSES.items() for name in names.split()}
LARGEST = 1e100  # metric: sums of squares of larger ones overflow
_BLANK = ("", "null", "none", "na", "n/a")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table that have a role."""

    arm: str
    seed: str
    metric: str
    status: str | None = None
    step: str | None = None
    further_metrics: tuple[str, ...] = ()
    budget: str | None = None  # must be equal for all arms
    guessed: tuple[str, ...] = ()  # roles whose columns were not named


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignResults:
    """A question, and the members that answer it."""

    question: Question
    members: tuple[Member, ...]
    columns: Columns


# Columns ----------------------------------------------------------------------------------------------------
def with_names(table: ResultsTable, pattern: str) -> ResultsTable:
    r"""Return the table with the columns that the groups of a pattern find in names of runs.

    Args:
      table: results with a column of names (`Name`, `name`, `run`).
      pattern: a regular expression such as `(?P<arm>.+)-seed(?P<seed>\d+)`, which must match whole names.

    Raises:
      ValueError: it is no pattern, has no named groups, or does not match a name.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern of names {pattern!r} is no regular expression: {error}") from error
    if not compiled.groupindex:
        raise ValueError(
            f"the pattern of names {pattern!r} has no named groups: give one such as "
            r"'(?P<arm>.+)-seed(?P<seed>\d+)'"
        )
    column = _guess(table.columns, _NAME)
    if column is None:
        raise ValueError(f"{table.source} has no column of names: there is none of {', '.join(_NAME)}")
    rows = []
    for row in table.rows:
        name = str(row.cells.get(column, ""))
        match = compiled.fullmatch(name)
        if match is None:
            raise ValueError(f"{row.name}: the name {name!r} does not match the pattern {pattern!r}")
        rows.append(dataclasses.replace(row, cells={**row.cells, **match.groupdict()}))
    return dataclasses.replace(table, rows=tuple(rows))


def choose_columns(
    table: ResultsTable,
    *,
    arm: str | None = None,
    seed: str | None = None,
    metric: str | None = None,
    status: str | None = None,
    step: str | None = None,
    further_metrics: Sequence[str] = (),
    budget: str | None = None,
) -> Columns:
    """Return the columns by their full names; those that are None are guessed where only one can be meant.

    A name may be the last part of a column's, `optim.lr` for `config.optim.lr`, or have `*` for the numbers
    of layers where all layers have one value: `model.stack.*.pattern.*.mixer.num_heads`.

    Raises:
      ValueError: there is no such column, several may be meant, or one that is needed cannot be guessed.
    """
    named = {"arm": arm, "seed": seed, "metric": metric, "status": status, "step": step}
    roles = {role: resolve(name, table, role=role) for role, name in named.items() if name is not None}
    # Status and step are optional: no column is found for them in most tables.
    for role, names in (("seed", _SEED), ("status", _STATUS), ("step", _STEP), ("arm", _ARM)):
        if role not in roles and (column := _guess(table.columns, names)) is not None:
            # A column of this name may be about something else, such as the state of a dataset.
            if role != "status" or _has_statuses(table, column):
                roles[role] = column
    if "arm" not in roles and len(changed := _changed_settings(table, roles)) == 1:
        roles["arm"] = changed[0]
    if "metric" not in roles and (column := _guess_metric(table, roles)) is not None:
        roles["metric"] = column
    for role in ("arm", "seed", "metric"):
        if role not in roles:
            raise ValueError(_unknown(role, table, roles))
    further = tuple(resolve(name, table, role="metric") for name in further_metrics)
    return Columns(
        **roles,
        further_metrics=further,
        budget=None if budget is None else resolve(budget, table, role="budget"),
        guessed=tuple(role for role in roles if named[role] is None),
    )


def resolve(name: str, table: ResultsTable, *, role: str) -> str:
    """Return the column of a name: the same, the same but for case, or the only one that ends in it.

    Raises:
      ValueError: there is none, or several end in it; the message has near names.
    """
    columns = table.columns
    lower = name.lower().replace("-", "_")
    if "*" in name and (matches := _layers(lower, table)):
        return matches[0]
    tests = (
        lambda column: column == name,
        lambda column: column.lower().replace("-", "_") == lower,
        lambda column: column.lower().endswith((f".{lower}", f"/{lower}")),
    )
    for test in tests:
        matches = [column for column in columns if test(column)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(
                f"--{role} {name} may be one of several columns of {table.source}: {_listed(matches)}. Write "
                "one of them in full"
            )
    # The last part of a path says most.
    last_parts = {column.rpartition(".")[2]: column for column in columns}
    near = near_names(name, columns) or near_names(name.rpartition(".")[2], last_parts)
    raise ValueError(
        f"--{role} {name}: {table.source} has no such column.{near} Columns are {_listed(columns)}"
    )


def _layers(pattern: str, table: ResultsTable) -> list[str]:
    """Return the columns of a path with `*` in it, which every run has one value of.

    Raises:
      ValueError: a run has several.
    """
    parts = (r"[^.]+" if part == "*" else re.escape(part) for part in pattern.split("."))
    compiled = re.compile(r"\.".join(parts))
    columns = [column for column in table.columns if compiled.fullmatch(column.lower())]
    for row in table.rows:
        values = {column: row.cells[column] for column in columns if column in row.cells}
        if len(set(map(str, values.values()))) > 1:
            raise ValueError(
                f"{row.name} has several values of {pattern}: "
                f"{_listed([f'{column} = {value}' for column, value in values.items()])}. Name one of these"
            )
    return columns


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:20])
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _guess(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the column that has the first of these names that any column has; None if several have it."""
    columns = list(columns)
    for name in names:
        if matches := [column for column in columns if column.lower() == name]:
            return matches[0] if len(matches) == 1 else None
    return None


def _has_statuses(table: ResultsTable, column: str) -> bool:
    return any(str(row.cells.get(column)).strip().lower() in _STATUS_OF for row in table.rows)


def _changed_settings(table: ResultsTable, roles: Mapping[str, str]) -> list[str]:
    """Return the settings in which runs differ, without those that say which seed and directory they have."""
    skipped = {"run.seed", "data.seed", "run.directory", *roles.values()}
    return [
        column
        for column in table.columns
        if column in table.settings - skipped and len({str(row.cells.get(column)) for row in table.rows}) > 1
    ]


def _guess_metric(table: ResultsTable, roles: Mapping[str, str]) -> str | None:
    if (column := _guess(table.columns, _METRIC)) is not None:
        return column
    numeric = _numeric_columns(table, roles)
    return numeric[0] if len(numeric) == 1 else None


def _numeric_columns(table: ResultsTable, roles: Mapping[str, str]) -> list[str]:
    skipped = {*roles.values(), *table.settings}
    return [
        column
        for column in table.columns
        if column not in skipped
        and column.lower() not in _BOOKKEEPING
        and any(number(row.cells.get(column)) is not None for row in table.rows)
    ]


def _unknown(role: str, table: ResultsTable, roles: Mapping[str, str]) -> str:
    """Return the message for a column that is needed and not named."""
    if role == "metric":
        candidates = _numeric_columns(table, roles) or [*table.columns]
    elif role == "arm":
        candidates = _changed_settings(table, roles) or [*table.columns]
    else:
        candidates = [*table.columns]
    about = {
        "arm": "the column that says which arm a run belongs to",
        "seed": "the column with the seed of a run",
        "metric": "the column that is compared",
    }[role]
    hint = ""
    if role != "metric" and (names := _guess(table.columns, _NAME)) is not None:
        # As in exports of W&B, whose charts have nothing else.
        hint = rf". If {names} says it, give --name-pattern, such as '(?P<arm>.+)-seed(?P<seed>\d+)'"
    return f"name {about} with --{role}. Columns of {table.source} are {_listed(candidates)}{hint}"


# Members ----------------------------------------------------------------------------------------------------
def read_columns(
    table: ResultsTable, columns: Columns, *, baseline: str | None, rules: Rules, tolerance: float = 0.0
) -> ForeignResults:
    """Return the question that a table answers, and its members.

    Args:
      table: the rows.
      columns: their roles.
      baseline: the arm that every other is compared with; None: the one named baseline, base or control.
      rules: what turns results into verdicts.
      tolerance: of the budget, as a fraction.

    Raises:
      ValueError: a cell is not what its column should have, a run is there twice, or there is no such
        baseline.
    """
    runs: dict[tuple[str, int], list[Row]] = {}
    # By number, the name that an arm has first.
    names: dict[decimal.Decimal, str] = {}
    for row in table.rows:
        arm = _arm(row, columns)
        if (value := _exact(arm)) is not None:
            arm = names.setdefault(value, arm)
        runs.setdefault((arm, _seed(row, columns)), []).append(row)
    name = _guess(table.columns, _NAME)
    members = tuple(
        _member(_last(rows, columns, table, name=name), columns, *key) for key, rows in runs.items()
    )
    arms = [*dict.fromkeys(member.arm for member in members)]
    if len(arms) < 2:
        raise ValueError(
            f"{table.source} has one arm by the column {columns.arm}, {arms[0]}: a comparison needs two"
        )
    chosen = _baseline(baseline, arms, columns)
    # Runs of several steps compare if they ended at the same one.
    has_steps = columns.step is not None and any(len(rows) > 1 for rows in runs.values())
    budget = columns.budget or (columns.step if has_steps else None)
    question = Question(
        name=table.source,
        arms=tuple(arms),
        seeds=tuple(sorted({member.seed for member in members})),
        baseline=chosen,
        metric=columns.metric,
        rules=rules,
        text=f"Which {columns.arm} is better than {chosen}, by {columns.metric}?",
        further_metrics=columns.further_metrics,
        budget=None if budget is None else Budget(metric=budget, tolerance=tolerance),
    )
    return ForeignResults(question=question, members=members, columns=columns)


def _arm(row: Row, columns: Columns) -> str:
    value = row.cells.get(columns.arm)
    if value is None or not str(value).strip():
        raise ValueError(f"{row.name} has no {columns.arm}: every run needs an arm")
    return str(value).strip()


def _seed(row: Row, columns: Columns) -> int:
    cell = row.cells.get(columns.seed)
    value = number(cell)
    if value is None or not math.isfinite(value) or value != int(value):
        raise ValueError(
            f"{row.name} has {cell!r} as {columns.seed}: seeds are whole numbers, and runs of two arms with "
            "the same number are a pair"
        )
    try:
        # Seeds of 64 bits have more digits than a float.
        return int(str(cell))
    except ValueError:
        return int(value)


def _exact(arm: str) -> decimal.Decimal | None:
    """Return the name of an arm as a number, without rounding; None if it is none."""
    try:
        value = decimal.Decimal(arm)
    except decimal.InvalidOperation:
        return None
    return value if value.is_finite() else None


def _last(rows: Sequence[Row], columns: Columns, table: ResultsTable, *, name: str | None) -> Row:
    """Return the row that has the final value of a run; `name` is the column of the names of runs."""
    if len(rows) == 1:
        return rows[0]
    first, second = _two_runs(rows, columns, name=name)
    if second is not None:
        raise ValueError(
            f"{first.name} and {second.name} are both of arm {first.cells[columns.arm]}, seed "
            f"{first.cells[columns.seed]}: {_way_out(first, second, columns, table)}"
        )
    # Many steps of a history have no evaluation.
    measured = [row for row in rows if number(row.cells.get(columns.metric)) is not None] or list(rows)
    # Of a step that was trained again after a stop, the later row is of the model.
    return max(reversed(measured), key=lambda row: _step(row, columns.step or ""))


def _two_runs(rows: Sequence[Row], columns: Columns, *, name: str | None) -> tuple[Row, Row | None]:
    """Return two rows that are of different runs; the second is None if all may be steps of one run."""
    first = rows[0]
    # Rows of one step alone are no history of a run, but several runs.
    is_history = columns.step is not None and not any(row.is_run for row in rows)
    if not is_history or len({_step(row, columns.step or "") for row in rows}) == 1:
        return first, rows[1]
    if name is None or name == columns.arm:
        return first, None
    return first, next((row for row in rows if row.cells.get(name) != first.cells.get(name)), None)


def _way_out(first: Row, second: Row, columns: Columns, table: ResultsTable) -> str:
    """Return what to do about two runs of one arm with one seed."""
    if first.study != second.study and None not in (first.study, second.study):
        return (
            "they are of two studies. Name the directory of one, or judge all studies of a directory by "
            "their own arms with --campaign"
        )
    others = [
        setting
        for setting in _changed_settings(table, {"arm": columns.arm})
        if str(first.cells.get(setting)) != str(second.cells.get(setting))
    ]
    if others:
        return f"they differ in {_listed(others)}. Name one of these with --arm, or leave out one of the runs"
    if first.is_run:
        return "leave out one of them"
    return "remove one, or, if they are steps of one run, name the column of steps with --step"


def _step(row: Row, column: str) -> float:
    value = number(row.cells.get(column))
    if value is None or not math.isfinite(value):
        raise ValueError(f"{row.name} has {row.cells.get(column)!r} as {column}: steps are numbers")
    return value


def _member(row: Row, columns: Columns, arm: str, seed: int) -> Member:
    value = row.cells.get(columns.metric)
    metric = number(value)
    if metric is None and not _is_blank(value):
        raise ValueError(f"{row.name} has {value!r} as {columns.metric}, which is no number: repair the cell")
    numbers = {name: parsed for name, cell in row.cells.items() if (parsed := number(cell)) is not None}
    for name in (columns.metric, *columns.further_metrics):
        if LARGEST < abs(numbers.get(name, 0.0)) < math.inf:
            raise ValueError(
                f"{row.name} has {numbers[name]:g} as {name}, whose square is no number any more: write "
                "inf if the run has diverged, or use a larger unit"
            )
    status = _status(row, columns)
    # Whatever the status: a value that is not finite is what divergence looks like.
    if metric is not None and not math.isfinite(metric):
        status = DIVERGED
    error = None
    if status not in (FINISHED, DIVERGED):
        error = f"status {row.cells.get(columns.status or '')!r}"
    return Member(
        arm=arm,
        seed=seed,
        fingerprint="",
        status=status if status in (FINISHED, DIVERGED) else FAILED,
        result=numbers,
        evaluation={},
        error=error,
    )


def _status(row: Row, columns: Columns) -> str:
    value = row.cells.get(columns.status) if columns.status is not None else None
    if _is_blank(value):
        return FINISHED
    if (status := _STATUS_OF.get(re.sub("[ -]", "_", str(value).strip().lower()))) is None:
        near = near_names(str(value), _STATUS_OF)
        raise ValueError(
            f"{row.name} has {value!r} as {columns.status}, which is no known status.{near} Write finished, "
            "diverged, failed or running, or name another column with --status"
        )
    return status


def _baseline(name: str | None, arms: Sequence[str], columns: Columns) -> str:
    if name is None:
        usual = [arm for arm in arms if arm.lower() in ("baseline", "base", "control")]
        if len(usual) == 1:
            return usual[0]
        raise ValueError(
            f"name the arm that the others are compared with, --baseline: one of {_listed(arms)}"
        )
    if name in arms:
        return name
    value = _exact(name)
    matches = [arm for arm in arms if value is not None and _exact(arm) == value]
    if len(matches) == 1:
        return matches[0]
    raise ValueError(
        f"--baseline {name} is no arm by the column {columns.arm}.{near_names(name, arms)} Arms are "
        f"{_listed(arms)}"
    )


def number(value: Any) -> float | None:
    """Return a cell as a number, which may be NaN or infinite; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _BLANK)
