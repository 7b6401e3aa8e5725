"""The text, the JSON and the page of a coordinate check.

print("\\n".join(check_lines(check)))
write_check(check, Path("checks"))    # coordinates.html and coordinates.json
"""

import dataclasses
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmjax.atomic_files import write_text
from slmjax.planning.coordinates import CoordinateCheck, Row
from slmjax.telemetry.columns import column_lines
from slmjax.telemetry.report import charts, page

ACTIVATIONS = ("mixer_output", "ffn_output", "block_output")
MEASURES = {"size": "size", "change": "change since the first step", "update": "update of the last step"}


def check_json(check: CoordinateCheck) -> dict[str, Any]:
    """Return a check with its trends and verdicts as values that JSON can hold."""
    rows = [{**dataclasses.asdict(row), "trend": row.trend, "judged": row.is_judged} for row in check.rows]
    verdicts = [
        {
            "parameterization": verdict.parameterization,
            "axis": verdict.axis,
            "holds": verdict.holds,
            "rows": verdict.num_rows,
            "flat": verdict.num_flat,
            "text": verdict.text,
        }
        for verdict in check.verdicts
    ]
    return {**dataclasses.asdict(check), "rows": rows, "verdicts": verdicts}


def settings_text(check: CoordinateCheck) -> str:
    """Return what was measured, in a sentence."""
    width, depth = check.base
    heads = "more heads" if check.heads == "number" else "larger heads"
    rate = f"{check.learning_rate:g}"
    if check.muon_lr is not None:
        rate = f"{check.muon_lr:g} ({rate} outside the layers)"
    return (
        f"{check.experiment}: {check.steps[-1]} steps of {check.optimizer} at learning rate {rate}, "
        f"{check.tokens} tokens, {check.seeds} seed(s); base of width {width} and "
        f"{depth} layers, {heads} with the width; flat: an exponent of less than {check.tolerance:g}"
    )


def check_lines(check: CoordinateCheck, *, width: int | None = None) -> list[str]:
    """Return a table for each parameterization and axis, after the last step, and then the verdicts.

    Args:
      width: columns of the terminal; None for no limit.
    """
    lines = [settings_text(check)]
    for (kind, axis), rows in _groups(check).items():
        sizes = rows[0].sizes
        head = ("layer", "quantity", "", *(f"{axis} {size}" for size in sizes), "slope", "trend")
        cells = [
            (
                row.layer,
                row.name,
                row.measure,
                *(f"{value:.3g}" for value in row.values),
                "" if row.slope is None else f"{row.slope:+.2f}",
                row.trend if row.is_judged else f"({row.trend})",
            )
            for row in rows
        ]
        right = range(3, 4 + len(sizes))
        lines += ["", f"{kind} over {axis}s", *column_lines(head, cells, right=right, width=width)]
    lines += ["", *(verdict.text for verdict in check.verdicts)]
    return [*lines, "in parentheses: not judged, since theory does not ask for a flat row"]


def _groups(check: CoordinateCheck) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in check.last_rows:
        groups.setdefault((row.parameterization, row.axis), []).append(row)
    return groups


# Page -------------------------------------------------------------------------------------------------------
def write_check(check: CoordinateCheck, directory: Path) -> tuple[Path, Path]:
    """Write coordinates.html and coordinates.json to a directory, and return their paths.

    Raises:
      ValueError: the `plot` extra is not installed, or a file cannot be written.
    """
    drawn = check_charts(check)
    target = directory / "coordinates.html"
    text = page.document(title=_title(check), body=_body(check, drawn), charts=drawn)
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "coordinates.json"
    # A value that is not finite, as of a model that diverged, has no number in JSON.
    write_text(data, json.dumps(_finite(check_json(check)), indent=2, allow_nan=False) + "\n")
    return page.write_page(target, text), data


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def check_charts(check: CoordinateCheck) -> list[charts.Chart]:
    """Return the charts: for each parameterization and axis the sizes of activations, and their changes."""
    result = []
    for (kind, axis), rows in _groups(check).items():
        for measure, about in MEASURES.items():
            series = {
                " ".join(filter(None, (row.layer, row.name.replace("_", " ")))): dict(
                    zip(map(float, row.sizes), row.values, strict=True)
                )
                for row in _shown_rows(rows, measure)
            }
            chart = charts.log_lines(
                f"{kind}-{axis}-{measure}",
                f"{kind}, over {axis}s: {about}",
                "root mean square; both axes are logarithmic",
                series,
                x_title=axis,
            )
            if chart is not None:
                result.append(chart)
    return result


def _shown_rows(rows: list[Row], measure: str) -> list[Row]:
    """Return the rows of a chart: of many layers the first, the middle and the last."""
    layers = list(dict.fromkeys(row.layer for row in rows if row.layer.isdigit()))
    layers.sort(key=int)
    shown = {"", "first", "middle", "last", *layers[:1], *layers[len(layers) // 2 :][:1], *layers[-1:]}
    return [row for row in rows if row.measure == measure and row.layer in shown]


def _title(check: CoordinateCheck) -> str:
    return f"Coordinate check of {check.experiment}"


def _body(check: CoordinateCheck, drawn: list[charts.Chart]) -> str:
    parts = [page.heading(_title(check), settings_text(check)), "<h2>Verdicts</h2>"]
    parts.append(
        page.table(
            [(verdict.parameterization, f"{verdict.axis}s", verdict.text) for verdict in check.verdicts],
            head=("parameterization", "over", "verdict"),
        )
    )
    parts.append(f"<h2>After {check.steps[-1]} steps</h2>{page.chart_grid(drawn)}")
    for (kind, axis), rows in _groups(check).items():
        head = ("quantity", "measure", *(str(size) for size in rows[0].sizes), "slope", "trend")
        cells = [
            (
                f"layer {row.layer} {row.name}" if row.layer else row.name,
                row.measure,
                *(f"{value:.3g}" for value in row.values),
                "" if row.slope is None else f"{row.slope:+.2f}",
                row.trend if row.is_judged else f"({row.trend})",
            )
            for row in rows
        ]
        parts.append(page.folded(f"{kind} over {axis}s", page.table(cells, head=head)))
    note = "In parentheses: not judged, since theory does not ask for a flat row."
    return "".join([*parts, f'<p class="soft">{html.escape(note)}</p>'])
