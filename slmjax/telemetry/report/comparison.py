"""A page that compares runs: curves in the same charts, results in one table, and settings that differ."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmjax.telemetry.report.charts import Chart, lines
from slmjax.telemetry.report.names import short_names
from slmjax.telemetry.report.page import chart_grid, document, folded, heading, table, write_page
from slmjax.telemetry.report.reading import RunRecords, number, read_run
from slmjax.telemetry.report.settings import History, flat, is_of_stack, setting_text, shown, stack_text

# In the order of the table, with their names there. A metric that no run has is left out.
METRICS = {
    "status": "status",
    "step": "step",
    "sessions": "sessions",
    "measured_on": "measured on",
    "loss": "loss",
    "bits_per_byte": "bits per byte",
    "lost_text": "lost text",
    "perplexity": "perplexity",
    "best_measured_on": "best step selected on",
    "best_step": "best step",
    "best_loss": "its loss there",
    "part_loss": "loss of the last step there",
    "parameters": "parameters",
    "run_tokens": "tokens, all sessions",
    "run_seconds": "seconds, all sessions",
    "session_tokens": "tokens, last session",
    "session_seconds": "seconds, last session",
    "session_tokens_per_second": "tokens/s, last session",
    "skipped": "skipped steps, all sessions",
    "commit": "commit",
    "held_out_text": "held-out text",
}
ABSENT = "—"
MOST_SETTINGS = 20  # rows of settings that are shown at once


def write_comparison(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Write one page that compares runs, and return its path.

    Raises:
      ValueError: fewer than two runs, a run given twice, a path that is not a run, or the `plot` extra is not
        installed.
      DamagedFile: a file of a run is damaged.
    """
    runs = read_runs(paths)
    labels = short_names([run.path for run in runs])
    drawn = _charts(runs, labels)
    differences = shown_differences(runs)
    settings = '<p class="soft">The settings are the same.</p>'
    if differences.rows:
        settings = table(differences.rows, head=("", *labels))
    if differences.further:
        further = table(differences.further, head=("", *labels))
        settings += folded(f"{len(differences.further)} more settings that differ", further)
    # The names of many runs would not fit a title.
    title = " and ".join(labels) if len(labels) == 2 else f"{len(labels)} runs"
    names = table([(label, run.path) for label, run in zip(labels, runs, strict=True)])
    note = f"<p>{text_note(runs)}</p>" if text_note(runs) else ""
    body = heading(f"Comparison of {title}", "") + (
        f"{names}<h2>Results</h2>{table(shown_results(runs), head=('', *labels))}{note}"
        f"<h2>Curves</h2>{chart_grid(drawn)}<h2>Settings that differ</h2>{settings}"
    )
    return write_page(Path(output), document(title=f"Comparison of {title}", body=body, charts=drawn))


def _charts(runs: Sequence[RunRecords], labels: Sequence[str]) -> list[Chart]:
    train = {label: run.train for label, run in zip(labels, runs, strict=True)}
    evals = {label: run.on_the_way for label, run in zip(labels, runs, strict=True)}
    # Bits per byte are comparable across tokenizers only if no text is lost.
    losing = [label for label, run in zip(labels, runs, strict=True) if run.held_out.get("lost_text")]
    comparable = (
        f"not comparable, the tokenizer of {', '.join(losing)} loses text"
        if losing
        else "comparable across tokenizers"
    )
    other_text = "" if len(set(map(_evaluated_text, runs))) <= 1 else "; of different held-out text"
    bits = f"of UTF-8 text: {comparable}{other_text}"
    nats = "nats per token"
    charts = [
        lines("held-out-loss", "Held-out loss", nats + other_text, evals, "loss", marked=labels),
        lines("held-out-bits", "Held-out bits per byte", bits, evals, "bits_per_byte", marked=labels),
        lines("training-loss", "Training loss", nats, train, "loss"),
        lines("gradient-norm", "Gradient norm", "logarithmic", train, "grad_norm", log=True),
        lines("learning-rate", "Learning rate", "", train, "learning_rate", digits=".2~e"),
        lines("throughput", "Throughput", "tokens per second", train, "tokens_per_second", digits="~s"),
        lines("utilisation", "Model FLOPs utilisation", "of the device's peak", train, "mfu", digits=".0%"),
    ]
    return [chart for chart in charts if chart is not None]


def text_note(runs: Sequence[RunRecords]) -> str:
    """Return a sentence where results of runs do not compare, as they are of different text; else nothing."""
    texts = {text for run in runs if (text := _held_out_text(run)) is not None}
    if len(texts) <= 1:
        return ""
    return "The runs hold out different text: their losses and bits per byte do not compare."


def _evaluated_text(run: RunRecords) -> tuple[Any, ...]:
    """Return what identifies the text of a run's evaluations on the way."""
    documents = sorted({record.get("documents") or 0 for record in run.on_the_way})
    return _held_out_text(run), *documents


def read_runs(paths: Sequence[str | Path]) -> list[RunRecords]:
    """Return the runs to compare. Raises ValueError as `write_comparison` does."""
    if len(paths) < 2:
        raise ValueError(
            f"a comparison needs two runs or more, got {len(paths)}: `slmjax runs` lists the run directories"
        )
    seen: dict[Path, str | Path] = {}
    for path in paths:
        if (resolved := Path(path).resolve()) in seen:
            raise ValueError(f"{path} is given twice: compare different runs")
        seen[resolved] = path
    return [read_run(path) for path in paths]


Row = tuple[Any, ...]


def results(runs: Sequence[RunRecords]) -> list[Row]:
    """Return a row for each metric: its name, and the value of each run, None if it has none."""
    rows = [(name, *(_metric(run, name) for run in runs)) for name in METRICS]
    return [row for row in rows if any(value is not None for value in row[1:])]


def _metric(run: RunRecords, name: str) -> Any:
    if name == "status":
        return run.status
    if name == "sessions":
        return len(run.sessions) if len(run.sessions) > 1 else None
    if name == "measured_on":
        return run.measured_on
    if name == "commit" and (commits := run.changed_environment().get("commit")) is not None:
        return ", ".join(f"{str(commit)[:12]} from step {step:,}" for step, commit in commits)
    if name == "best_measured_on":
        return run.best_measured_on if (run.result or {}).get("best_loss") is not None else None
    if name == "held_out_text":
        return _held_out_text(run)
    # From the last evaluation, since a run in progress has no result yet.
    if name in ("loss", "bits_per_byte", "lost_text"):
        return number(run.held_out.get(name))
    if run.result is not None and name in run.result:
        return run.result[name]
    return run.last_step if name == "step" else None


def _held_out_text(run: RunRecords) -> str | None:
    """Describe the held-out text of a run, since runs with other text do not compare; None if unknown."""
    parts = [
        (
            f"{entry['heldout']['documents']:,} documents of {entry['fingerprint'][:8]}, "
            f"{entry['heldout']['bytes']:,} bytes"
        )
        for entry in run.data
        if entry.get("heldout") is not None
    ]
    return "; ".join(parts) or None


def config_differences(runs: Sequence[RunRecords]) -> list[Row]:
    """Return a row for each setting that differs, between runs or between steps of a run.

    A row has the path of the setting, and the value of each run: None if it is absent, and a `History` if
    steps of the run had different values.
    """
    flattened = [settings_of(run) for run in runs]
    paths = dict.fromkeys(path for settings in flattened for path in settings)
    rows = ((path, *(settings.get(path) for settings in flattened)) for path in paths)
    # Compared by repr, since NaN differs from itself and 1 equals True.
    return [
        row
        for row in rows
        if any(isinstance(value, History) or repr(value) != repr(row[1]) for value in row[1:])
    ]


def settings_of(run: RunRecords) -> dict[str, Any]:
    """Return the settings of a run by their path; a `History` for each that a session changed."""
    histories = {path: History(tuple(values)) for path, values in run.changed_settings().items()}
    return {**flat(run.config), **histories}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differences:
    """Settings that differ, as text."""

    rows: list[tuple[str, ...]]  # what is shown first
    further: list[tuple[str, ...]]  # the others


def shown_results(runs: Sequence[RunRecords]) -> list[tuple[str, ...]]:
    """Return `results` as text."""
    return [
        (METRICS[name], *(ABSENT if value is None else _shown_metric(name, value) for value in values))
        for name, *values in results(runs)
    ]


def _shown_metric(name: str, value: Any) -> str:
    is_hash = name == "commit" and re.fullmatch("[0-9a-f]{40}", str(value))
    return str(value)[:12] if is_hash else shown(value)


def shown_differences(runs: Sequence[RunRecords], *, most: int | None = MOST_SETTINGS) -> Differences:
    """Return `config_differences` as text, with all digits: values that differ must look different.

    Where the stacks of layers differ in structure, a row that describes each stands for their settings, which
    follow after the others. Of the rest, `most` rows are shown first; None shows all.
    """
    differences = config_differences(runs)
    inner = [row for row in differences if is_of_stack(row[0])]
    stacks = [stack_text(run.config) for run in runs]
    summary: list[tuple[str, ...]] = []
    # Settings of layers compare one by one where each has its counterpart.
    if len(set(stacks)) > 1:
        summary = [("model.stack", *stacks)]
        differences = [row for row in differences if not is_of_stack(row[0])]
    else:
        inner = []
    rows = [*summary, *((path, *map(setting_text, values)) for path, *values in differences)]
    rest = [(path, *map(setting_text, values)) for path, *values in inner]
    shown_first = len(rows) if most is None else most
    if most is None:
        return Differences(rows=[*rows, *rest], further=[])
    return Differences(rows=rows[:shown_first], further=[*rows[shown_first:], *rest])
