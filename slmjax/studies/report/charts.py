"""Charts of a report as Vega-Lite: learning curves, quality against cost, learning rates."""

import math
from collections.abc import Sequence
from typing import Any

from slmjax.studies.report.data import ArmReport, CurveChart, StudyReport, TunedReport
from slmjax.studies.report.pareto import Choice, front_text, pareto_front
from slmjax.studies.report.sentences import confidence_text
from slmjax.studies.report.tables import COSTS
from slmjax.studies.text_tables import in_words
from slmjax.telemetry.report.charts import (
    COLOURS,
    DASHES,
    FONT,
    Chart,
    Spec,
    by_series,
    chart_spec,
    steps_axis,
)

WARM_UP = 0.25  # fraction of the steps that do not determine the axis of a learning curve
EQUAL_COST = 0.02  # costs that differ by less are equal
WIDE_RANGE = 4  # costs that differ by a larger factor have a logarithmic axis
ROUNDING = 1e-9  # of logarithms of learning rates
CLOSE = 0.06  # of a chart's width and height: letters of closer points would overlap
FEW_ARMS = 12  # most arms that a chart of curves shows with bands


# Curves -----------------------------------------------------------------------------------------------------
def curves_chart(report: StudyReport, chart: CurveChart) -> Chart | None:
    """Return learning curves of all arms, with bands from the lowest to the highest of the seeds."""
    arms = [arm.name for arm in report.arms]
    labels = [arm for arm in arms if any(item.arm == arm for item in (*chart.curves, *chart.diverged))]
    if not labels:
        return None
    rows = _curve_rows(chart)
    colour = by_series(labels, has_legend=len(labels) > 1)
    scale = {"zero": False, "nice": True, "domain": _curve_domain(chart)}
    y: Spec = {
        "type": "quantitative",
        "title": None,
        "scale": scale,
        "axis": {"format": ".4~g", "tickCount": 5},
    }
    tooltip = [
        {"field": "run", "title": "of"},
        {"field": "step", "format": ","},
        {"field": "value", "format": ".5~g", "title": chart.title.lower()},
        {"field": "low", "format": ".5~g", "title": "lowest seed"},
        {"field": "high", "format": ".5~g", "title": "highest seed"},
    ]
    value: Spec = {**y, "field": "value"}
    line: Spec = {"mark": {"type": "line", "clip": True}, "encoding": {"y": value}}
    line["transform"] = [{"filter": "!datum.diverged"}]
    if len(labels) > len(COLOURS):
        dashes = [DASHES[index // len(COLOURS) % len(DASHES)] for index in range(len(labels))]
        line["encoding"]["strokeDash"] = {**colour, "scale": {"domain": labels, "range": dashes}}
    layers: list[Spec] = [line]
    has_bands = any(curve.num_runs > 1 for curve in chart.curves) and len(labels) <= FEW_ARMS
    if has_bands:
        area = {"type": "area", "opacity": 0.18, "clip": True}
        edges = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
        layers.insert(0, {"mark": area, "transform": [{"filter": "!datum.diverged"}], "encoding": edges})
    if chart.diverged:
        layers += _diverged_marks(value)
    # Invisible points, which show their tooltip.
    layers.append(
        {"mark": {"type": "point", "size": 120, "opacity": 0, "clip": True}, "encoding": {"y": value}}
    )
    encoding = {"x": steps_axis(), "color": colour, "detail": {"field": "run"}, "tooltip": tooltip}
    about = chart.about + ("; band: lowest to highest seed" if has_bands else "")
    about += "; dashed with a cross: runs that diverged" if chart.diverged else ""
    return Chart(
        name=chart.name,
        title=chart.title,
        subtitle=about,
        spec=chart_spec(rows, {"encoding": encoding, "layer": layers}),
        labels=tuple(labels) if len(labels) > 1 else (),
    )


def _curve_rows(chart: CurveChart) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": step, "value": mean, "low": low, "high": high, "series": curve.arm, "run": curve.arm}
        for curve in chart.curves
        for step, mean, low, high in zip(curve.steps, curve.mean, curve.low, curve.high, strict=True)
    ]
    for item in chart.diverged:
        run = f"{item.arm}, seed {item.seed}, diverged"
        rows += [
            {"step": step, "value": value, "series": item.arm, "run": run, "diverged": True}
            for step, value in zip(item.steps, item.values, strict=True)
        ]
        rows[-1]["last"] = True
    return rows


def _diverged_marks(value: Spec) -> list[Spec]:
    line: Spec = {"type": "line", "strokeDash": [3, 3], "opacity": 0.8, "clip": True}
    cross: Spec = {"type": "point", "shape": "cross", "angle": 45, "size": 90, "filled": True, "opacity": 1}
    return [
        {"mark": line, "transform": [{"filter": "datum.diverged"}], "encoding": {"y": value}},
        {
            "mark": {**cross, "clip": True},
            "transform": [{"filter": "datum.diverged && datum.last"}],
            "encoding": {"y": value},
        },
    ]


def _curve_domain(chart: CurveChart) -> list[float]:
    """Return the ends of the axis: the first steps, whose values are far from all others, are left out."""
    points = [
        (step, value)
        for curve in chart.curves
        for series in (curve.low, curve.high)
        for step, value in zip(curve.steps, series, strict=True)
    ] or [
        (step, value)
        for curve in chart.diverged
        for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    last = max(step for step, _ in points)
    values = [value for step, value in points if step >= WARM_UP * last]
    padding = 0.05 * ((max(values) - min(values)) or abs(max(values)) or 1.0)
    return [min(values) - padding, max(values) + padding]


# Quality and cost -------------------------------------------------------------------------------------------
def tradeoffs(report: StudyReport) -> list[tuple[Chart, str]]:
    """Return quality against each cost that differs between arms, and a sentence on each Pareto front."""
    names = [name for name, cost in COSTS.items() if cost.axis]
    # Wall time, with compilation and evaluations, only where the time of training is not known.
    if all("training_seconds" in arm.costs for arm in report.arms if "seconds" in arm.costs):
        names.remove("seconds")
    charts = [_tradeoff(report, name) for name in names]
    return [chart for chart in charts if chart is not None]


def _tradeoff(report: StudyReport, name: str) -> tuple[Chart, str] | None:
    shown = [arm for arm in report.arms if arm.metric is not None and arm.costs.get(name, 0.0) > 0]
    choices = [
        Choice(arm.name, cost=arm.costs[name], quality=arm.metric.mean)
        for arm in shown
        if arm.metric is not None
    ]
    costs = [choice.cost for choice in choices]
    # Arms that were made equal have nothing to trade, nor have those that differ by what else a machine did.
    if len(choices) < 2 or max(costs) - min(costs) <= max(EQUAL_COST * min(costs), _cost_noise(shown, name)):
        return None
    on_front = [choice.name for choice in pareto_front(choices, lower_is_better=report.lower_is_better)]
    # Letters at the points and names in the legend, which wraps: names would hide each other, and numbers
    # look like part of names such as "2 layers".
    letters = [_letters(index) for index in range(len(choices))]
    labels = tuple(f"{letter}: {choice.name}" for letter, choice in zip(letters, choices, strict=True))
    rows = []
    for index, (arm, choice) in enumerate(zip(shown, choices, strict=True)):
        interval = arm.metric.interval if arm.metric is not None else None
        low, high = interval or (choice.quality, choice.quality)
        row = {"series": labels[index], "letter": letters[index], "x": choice.cost, "y": choice.quality}
        rows.append({**row, "low": low, "high": high, "is_on_front": choice.name in on_front})
    for row, side in zip(rows, _sides([(row["x"], row["y"]) for row in rows]), strict=True):
        row["letter_at"] = side
    cost = COSTS[name]
    metric = in_words(report.metric)
    # A logarithmic axis of a narrow range has hardly a tick.
    is_log = max(costs) > WIDE_RANGE * min(costs)
    scale = {"type": "log", "nice": False} if is_log else {"zero": False, "nice": False}
    x: Spec = {
        "field": "x",
        "type": "quantitative",
        "title": cost.axis,
        "scale": {**scale, "padding": 24},
        # The last label is moved inward where it would be cut.
        "axis": {"format": ".3~s", "grid": False, "tickCount": 4, "labelFlush": 16},
    }
    y: Spec = {
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": True, "padding": 14},
        "axis": {"format": ".4~g", "tickCount": 5},
    }
    encoding = {"color": by_series(labels, has_legend=True)}
    marks = _tradeoff_marks(x, y, title=cost.axis, metric=metric)
    # Vega warns of a layer without rows.
    without_rows = {side for side in ("left", "right") if all(row["letter_at"] != side for row in rows)}
    marks = [mark for mark in marks if mark.get("name") not in without_rows]
    spec = chart_spec(rows, {"encoding": encoding, "layer": marks})
    spec["height"] = 270
    way = "lower" if report.lower_is_better else "higher"
    about = f"{metric}, {way} is better, with {confidence_text(report)} intervals; filled: front of the means"
    chart = Chart(
        name=f"cost-{name}", title=f"Quality and {cost.axis}", subtitle=about, spec=spec, labels=labels
    )
    return chart, front_text(report, choices, cost=cost.axis)


def _cost_noise(arms: Sequence[ArmReport], name: str) -> float:
    """Return the difference of a measured cost that may be chance: two standard errors of a difference."""
    errors = [dict(arm.cost_errors).get(name, 0.0) for arm in arms]
    return 2 * math.sqrt(2) * max(errors)


def _sides(points: Sequence[tuple[float, float]]) -> list[str]:
    """Return the side of each point at which its letter stands: the left, if a close point has the right."""
    spans = [(max(values) - min(values)) or 1.0 for values in zip(*points, strict=True)]
    sides: list[str] = []
    for index, point in enumerate(points):
        taken = [
            sides[other]
            for other in range(index)
            if all(abs(point[i] - points[other][i]) < CLOSE * spans[i] for i in range(2))
        ]
        sides.append("left" if taken.count("right") > taken.count("left") else "right")
    return sides


def _letters(index: int) -> str:
    """Return A to Z, then AA, AB, ..."""
    before = _letters(index // 26 - 1) if index >= 26 else ""
    return before + chr(ord("A") + index % 26)


def _tradeoff_marks(x: Spec, y: Spec, *, title: str, metric: str) -> list[Spec]:
    on_front = {"filter": "datum.is_on_front"}
    off_front = {"filter": "!datum.is_on_front"}
    grey = {"value": "#8C8C8C"}
    tooltip = [
        {"field": "series", "title": "arm"},
        {"field": "x", "format": ",.4~g", "title": title},
        {"field": "y", "format": ".5~g", "title": metric},
        {"field": "is_on_front", "title": "on the Pareto front"},
    ]
    mean: Spec = {**y, "field": "y"}
    point: Spec = {"type": "point", "size": 80, "opacity": 1}
    order = {"field": "x", "type": "quantitative"}
    return [
        {
            "mark": {"type": "line", "strokeWidth": 1.5, "strokeDash": [4, 3]},
            "transform": [on_front],
            "encoding": {"x": x, "y": mean, "order": order, "color": grey},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.7},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "mark": {**point, "filled": True},
            "transform": [on_front],
            "encoding": {"x": x, "y": mean, "tooltip": tooltip},
        },
        {
            "mark": {**point, "filled": False, "strokeWidth": 2},
            "transform": [off_front],
            "encoding": {"x": x, "y": mean, "tooltip": tooltip},
        },
        *(
            {
                "name": side,
                "mark": {"type": "text", "align": align, "dx": dx, "dy": -8, "fontSize": 11.5, "font": FONT},
                "transform": [{"filter": f"datum.letter_at == '{side}'"}],
                "encoding": {"x": x, "y": mean, "text": {"field": "letter"}},
            }
            for side, align, dx in (("right", "left", 7), ("left", "right", -7))
        ),
    ]


# Learning rates ---------------------------------------------------------------------------------------------
def tuned_rates(report: StudyReport) -> Chart | None:
    """Return the metric of each arm against its learning rate, with the chosen rates marked."""
    rows = [
        {"rate": rate, "value": value, "series": item.arm}
        for item in report.tuned
        for rate, value in item.tried
        if value is not None
    ]
    if not rows:
        return None
    labels = list(dict.fromkeys(row["series"] for row in rows))
    rates = sorted({row["rate"] for row in rows})
    chosen = [{"rate": item.rate, "series": item.arm, "value": _value_at(item)} for item in report.tuned]
    chosen = [row for row in chosen if row["value"] is not None]
    x: Spec = {
        "field": "rate",
        "type": "quantitative",
        "title": "learning rate",
        "scale": {"type": "log", "nice": False, "padding": 20},
        # A tick at each rate that was tried, as far as there is space.
        "axis": {"format": ".2~g", "grid": False, "values": rates, "labelOverlap": "greedy"},
    }
    y: Spec = {
        "field": "value",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": True},
        "axis": {"format": ".4~g", "tickCount": 5},
    }
    tooltip = [
        {"field": "series", "title": "arm"},
        {"field": "rate", "format": ".3~g"},
        {"field": "value", "format": ".5~g"},
    ]
    encoding = {
        "x": x,
        "y": y,
        "color": by_series(labels, has_legend=len(labels) > 1),
        "tooltip": tooltip,
    }
    layers: list[Spec] = [
        {"mark": {"type": "line"}},
        {"mark": {"type": "point", "filled": True, "size": 36}},
        {
            "data": {"values": chosen},
            "mark": {"type": "point", "shape": "diamond", "size": 190, "strokeWidth": 2, "filled": False},
        },
    ]
    return Chart(
        name="rates",
        title=f"{in_words(report.metric).capitalize()} by learning rate",
        subtitle="on tuning seeds, which never judge; diamond: the chosen rate",
        spec=chart_spec(rows, {"encoding": encoding, "layer": layers}),
        labels=tuple(labels) if len(labels) > 1 else (),
    )


def _value_at(item: TunedReport) -> float | None:
    """Return the metric at the chosen rate, interpolated in log(rate) between the rates that were tried."""
    tried = sorted((math.log(rate), value) for rate, value in item.tried if value is not None)
    rate = math.log(item.rate)
    below = [each for each in tried if each[0] <= rate + ROUNDING]
    above = [each for each in tried if each[0] >= rate - ROUNDING]
    if not below or not above:
        return None
    first, low = below[-1]
    second, high = above[0]
    return low if second <= first else low + (high - low) * (rate - first) / (second - first)
