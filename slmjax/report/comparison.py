"""Runs side by side: curves in the same charts, results in one table, and of the settings what differs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmjax.report.charts import lines
from slmjax.report.page import chart_grid, document, heading, shown, table
from slmjax.report.reading import RunRecords, number, read_run

FIGURES = (
    "status", "step", "loss", "bits_per_byte", "perplexity", "best_loss", "parameters", "tokens", "tokens_per_second", "seconds",
    "skipped", "commit",
)  # fmt: skip
ABSENT = "—"


def write_comparison(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Writes one page that compares runs.

    Raises:
      ValueError: fewer than two runs, one named twice, one that is none, or the `plot` extra is not installed.
    """
    runs = read_runs(paths)
    labels = short_names(runs)
    train = {label: run.train for label, run in zip(labels, runs, strict=True)}
    evals = {label: run.evals for label, run in zip(labels, runs, strict=True)}
    bits = "of UTF-8 text: comparable across tokenizers"
    charts = [
        lines("held-out-loss", "Held-out loss", "nats per token", evals, "loss", marked=labels),
        lines("held-out-bits", "Held-out bits per byte", bits, evals, "bits_per_byte", marked=labels),
        lines("training-loss", "Training loss", "nats per token", train, "loss"),
        lines("gradient-norm", "Gradient norm", "logarithmic", train, "grad_norm", log=True),
        lines("learning-rate", "Learning rate", "", train, "learning_rate", digits=".2~e"),
        lines("throughput", "Throughput", "tokens per second", train, "tokens_per_second", digits="~s"),
        lines("utilisation", "Model FLOPs utilisation", "of the device's peak", train, "mfu", digits=".0%"),
    ]
    drawn = [chart for chart in charts if chart is not None]
    results = table(result_rows(runs), head=("", *labels))
    differences = config_differences(runs)
    settings = table(differences, head=("", *labels)) if differences else '<p class="soft">The settings are the same.</p>'
    title = " and ".join(labels) if len(labels) == 2 else f"{len(labels)} runs"
    body = (
        heading(f"Comparison of {title}", " · ".join(str(run.path) for run in runs))
        + f"<h2>Results</h2>{results}<h2>Curves</h2>{chart_grid(drawn)}<h2>Settings that differ</h2>{settings}"
    )
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(document(title=f"Comparison of {title}", body=body, charts=drawn), encoding="utf-8")
    return target


def read_runs(paths: Sequence[str | Path]) -> list[RunRecords]:
    """The runs to compare. Raises ValueError as `write_comparison` does."""
    if len(paths) < 2:
        raise ValueError(f"a comparison takes two runs or more, and {len(paths)} is named: `slmjax runs` lists those there are")
    seen: dict[Path, str | Path] = {}
    for path in paths:
        if (place := Path(path).resolve()) in seen:
            raise ValueError(f"{path} is named twice: compare different runs")
        seen[place] = path
    return [read_run(path) for path in paths]


def short_names(runs: Sequence[RunRecords]) -> list[str]:
    """Names of the directories; paths where names are equal."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def result_rows(runs: Sequence[RunRecords]) -> list[tuple[str, ...]]:
    """A row for each figure: its name, and what each run has of it."""
    rows = []
    for name in FIGURES:
        values = [_figure(run, name) for run in runs]
        if any(value != ABSENT for value in values):
            rows.append((name.replace("_", " "), *values))
    return rows


def _figure(run: RunRecords, name: str) -> str:
    if name == "status":
        return run.status
    if run.result is not None and name in run.result:
        value = run.result[name]
        return ABSENT if value is None else str(value)[:12] if name == "commit" else shown(value)
    if name == "step":
        return shown(run.last_step)
    last = number(run.evals[-1].get(name)) if run.evals and name in ("loss", "bits_per_byte") else None
    return ABSENT if last is None else shown(last)


def config_differences(runs: Sequence[RunRecords]) -> list[tuple[str, ...]]:
    """A row for each setting that is not the same in all runs: its path, and each run's value."""
    flat = [dict(_flat("", run.config)) for run in runs]
    paths = dict.fromkeys(path for one in flat for path in one)
    rows = ((path, *(shown(one[path]) if path in one else ABSENT for one in flat)) for path in paths)
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return [(prefix, value)]
    return [pair for key, item in items for pair in _flat(f"{prefix}.{key}" if prefix else str(key), item)]
