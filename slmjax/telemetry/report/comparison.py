"""A page that compares runs: curves in the same charts, results in one table, and settings that differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmjax.telemetry.report.charts import lines
from slmjax.telemetry.report.page import chart_grid, document, heading, shown, table
from slmjax.telemetry.report.reading import RunRecords, number, read_run

# In the order of the table. A metric that no run has is left out.
METRICS = (
    "status",
    "step",
    "measured_on",
    "loss",
    "bits_per_byte",
    "lost_text",
    "perplexity",
    "best_loss",
    "parameters",
    "run_tokens",
    "run_seconds",
    "session_tokens",
    "session_seconds",
    "session_tokens_per_second",
    "skipped",
    "commit",
    "held_out_text",
)
ABSENT = "—"


def write_comparison(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Write one page that compares runs, and return its path.

    Raises:
      ValueError: fewer than two runs, a run given twice, a path that is not a run, or the `plot` extra is not
        installed.
    """
    runs = read_runs(paths)
    labels = short_names(runs)
    train = {label: run.train for label, run in zip(labels, runs, strict=True)}
    evals = {label: run.on_the_way for label, run in zip(labels, runs, strict=True)}
    # Bits per byte are comparable across tokenizers only if no text is lost.
    losing = [label for label, run in zip(labels, runs, strict=True) if run.held_out.get("lost_text")]
    comparable = (
        f"not comparable, the tokenizer of {', '.join(losing)} loses text"
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
    metrics = table(shown_results(runs), head=("", *labels))
    differences = shown_differences(runs)
    settings = (
        table(differences, head=("", *labels))
        if differences
        else '<p class="soft">The settings are the same.</p>'
    )
    # The names of many runs would not fit a title.
    title = " and ".join(labels) if len(labels) == 2 else f"{len(labels)} runs"
    body = heading(f"Comparison of {title}", " · ".join(str(run.path) for run in runs)) + (
        f"<h2>Results</h2>{metrics}<h2>Curves</h2>{chart_grid(drawn)}<h2>Settings that differ</h2>{settings}"
    )
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(document(title=f"Comparison of {title}", body=body, charts=drawn), encoding="utf-8")
    return target


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


def short_names(runs: Sequence[RunRecords]) -> list[str]:
    """Return the names of the directories, or their paths if names are equal."""
    names = [run.name for run in runs]
    # Runs of different directories may have equal names.
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


Row = tuple[Any, ...]


def results(runs: Sequence[RunRecords]) -> list[Row]:
    """Return a row for each metric: its name, and the value of each run, None if it has none."""
    rows = [(name, *(_metric(run, name) for run in runs)) for name in METRICS]
    return [row for row in rows if any(value is not None for value in row[1:])]


def _metric(run: RunRecords, name: str) -> Any:
    if name == "status":
        return run.status
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
    """Return a row for each setting that differs: its path, and the value of each run, None if absent."""
    flat = [dict(_flat("", run.config)) for run in runs]
    paths = dict.fromkeys(path for settings in flat for path in settings)
    rows = ((path, *(settings.get(path) for settings in flat)) for path in paths)
    # Compared by repr, since NaN differs from itself and 1 equals True.
    return [row for row in rows if any(repr(value) != repr(row[1]) for value in row[2:])]


def shown_results(runs: Sequence[RunRecords]) -> list[tuple[str, ...]]:
    """Return `results` as text."""
    short = {"commit": lambda value: str(value)[:12]}
    return [
        (name.replace("_", " "), *(ABSENT if v is None else short.get(name, shown)(v) for v in values))
        for name, *values in results(runs)
    ]


def shown_differences(runs: Sequence[RunRecords]) -> list[tuple[str, ...]]:
    """Return `config_differences` as text, with all digits: values that differ must look different."""
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
