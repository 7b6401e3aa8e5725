"""Runs side by side: curves in the same charts, results in one table, and of the settings what differs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmjax.telemetry.report.charts import lines
from slmjax.telemetry.report.page import chart_grid, document, heading, shown, table
from slmjax.telemetry.report.reading import RunRecords, number, read_run

FIGURES = (
    "status",
    "step",
    "measured_on",
    "loss",
    "bits_per_byte",
    "lost_text",
    "perplexity",
    "best_loss",
    "parameters",
    "tokens",
    "tokens_per_second",
    "seconds",
    "skipped",
    "commit",
    "held_out_text",
)
ABSENT = "—"


def write_comparison(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Writes one page that compares runs.

    Raises:
      ValueError: fewer than two runs, one named twice, one that is none, or the `plot` extra is not
        installed.
    """
    runs = read_runs(paths)
    labels = short_names(runs)
    train = {label: run.train for label, run in zip(labels, runs, strict=True)}
    evals = {label: run.on_the_way for label, run in zip(labels, runs, strict=True)}
    losing = [label for label, run in zip(labels, runs, strict=True) if run.held_out.get("lost_text")]
    comparable = (
        f"not comparable, for the tokenizer of {', '.join(losing)} loses text"
        if losing
        else "comparable across tokenizers"
    )
    bits = f"of UTF-8 text: {comparable}"
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
    figures = table(shown_results(runs), head=("", *labels))
    differences = shown_differences(runs)
    settings = (
        table(differences, head=("", *labels))
        if differences
        else '<p class="soft">The settings are the same.</p>'
    )
    title = " and ".join(labels) if len(labels) == 2 else f"{len(labels)} runs"
    body = heading(f"Comparison of {title}", " · ".join(str(run.path) for run in runs)) + (
        f"<h2>Results</h2>{figures}<h2>Curves</h2>{chart_grid(drawn)}<h2>Settings that differ</h2>{settings}"
    )
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(document(title=f"Comparison of {title}", body=body, charts=drawn), encoding="utf-8")
    return target


def read_runs(paths: Sequence[str | Path]) -> list[RunRecords]:
    """The runs to compare. Raises ValueError as `write_comparison` does."""
    if len(paths) < 2:
        raise ValueError(
            f"a comparison takes two runs or more, and {len(paths)} is named: `slmjax runs` lists those "
            "there are"
        )
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


Row = tuple[Any, ...]


def results(runs: Sequence[RunRecords]) -> list[Row]:
    """A row for each figure: its name, and what each run has of it, None where it has none."""
    rows = [(name, *(_figure(run, name) for run in runs)) for name in FIGURES]
    return [row for row in rows if any(value is not None for value in row[1:])]


def _figure(run: RunRecords, name: str) -> Any:
    if name == "status":
        return run.status
    if name == "held_out_text":
        return _held_out_text(run)
    if name in ("loss", "bits_per_byte", "lost_text"):
        return number(run.held_out.get(name))
    if run.result is not None and name in run.result:
        return run.result[name]
    return run.last_step if name == "step" else None


def _held_out_text(run: RunRecords) -> str | None:
    """The held-out text of a run, in words: runs with other text do not compare. None where its record does
    not say.
    """
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
    """A row for each setting that is not the same in all runs: its path, and each run's value, None where it
    has no such setting.
    """
    flat = [dict(_flat("", run.config)) for run in runs]
    paths = dict.fromkeys(path for one in flat for path in one)
    rows = ((path, *(one.get(path) for one in flat)) for path in paths)
    return [row for row in rows if any(repr(value) != repr(row[1]) for value in row[2:])]


def shown_results(runs: Sequence[RunRecords]) -> list[tuple[str, ...]]:
    """`results` for people."""
    short = {"commit": lambda value: str(value)[:12]}
    return [
        (name.replace("_", " "), *(ABSENT if v is None else short.get(name, shown)(v) for v in values))
        for name, *values in results(runs)
    ]


def shown_differences(runs: Sequence[RunRecords]) -> list[tuple[str, ...]]:
    """`config_differences` for people, to the last digit: what differs must look different."""
    return [
        (path, *(repr(v) if isinstance(v, float) else shown(v) for v in values))
        for path, *values in config_differences(runs)
    ]


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if items is None:
        return [(prefix, value)]
    return [pair for key, item in items for pair in _flat(f"{prefix}.{key}" if prefix else str(key), item)]
