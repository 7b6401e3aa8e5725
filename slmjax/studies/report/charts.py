"""The charts of a report as Vega-Lite: forest plot, paired differences, learning curves, quality and cost.

    charts = report_charts(report)                    # -> {"verdicts": Chart, "curves": [Chart, ...], ...}
    svg = forest_picture(report, "svg")               # for a README

Verdicts are named in words, with a mark of another shape for each, and not by their colour alone. Rows of
the forest plot have their texts above their intervals, so that it fits a page of any width.
"""

import math
from collections.abc import Sequence
from typing import Any

from slmjax.studies.report.data import ComparisonReport, CurveChart, StudyReport, TunedReport
from slmjax.studies.report.pareto import Choice, pareto_front
from slmjax.studies.report.sentences import (
    BETTER,
    EQUAL,
    NOT_RESOLVED,
    WORSE,
    comparison_name,
    confidence_text,
    difference_text,
    interval_of,
    verdict_text,
)
from slmjax.studies.report.tables import COSTS
from slmjax.studies.text_tables import ABSENT, in_words
from slmjax.telemetry.report.charts import (
    COLOURS,
    DASHES,
    FONT,
    Chart,
    Spec,
    by_series,
    chart_spec,
    converter,
    steps_axis,
    theme,
)

ROW = 50  # pixels of a row of the forest plot
NARROW = 640  # pixels of a plot; below, the texts of a row are shortened
WARM_UP = 0.25  # fraction of the steps that do not determine the axis of a learning curve
EQUAL_COST = 0.02  # costs that differ by less are equal
ROUNDING = 1e-9  # of logarithms of learning rates
FEW_ARMS = 12  # most arms that a chart of curves shows with bands
# In the order of the colours of a theme, so that each theme has its own: blue, vermilion, green, and grey.
VERDICT_ORDER = (BETTER, WORSE, EQUAL, "", " ", "  ", NOT_RESOLVED)
VERDICT_SHAPES = {BETTER: "circle", EQUAL: "diamond", NOT_RESOLVED: "cross", WORSE: "square"}
BAND = "#009E73"  # of equality; light, so that one colour suits both themes
# The bounds of an axis may exceed those of the differences by this factor; longer intervals are cut.
LONGEST_INTERVAL = 3.0


# Verdicts ---------------------------------------------------------------------------------------------------
def forest_chart(report: StudyReport) -> Chart | None:
    """Return the verdicts: a row for each comparison, with its difference, interval and verdict in words."""
    shown = [item for item in report.comparisons if item.difference is not None]
    if not shown:
        return None
    low, high = _bounds(report, shown)
    rows = [_forest_row(report, item, index, low, high) for index, item in enumerate(shown)]
    way = "left" if report.lower_is_better else "right"
    metric = in_words(report.metric)
    band = "" if report.equal_within is None else f"; band: equal within {report.equal_within:g}"
    about = f"{metric}, with {confidence_text(report)} intervals; {way} is better{band}"
    layers: list[Spec] = []
    scale = {"domain": [low, high], "nice": False, "zero": False}
    x: Spec = {"type": "quantitative", "scale": scale, "title": None}
    x["axis"] = {"tickCount": 5, "format": "+.3~g", "grid": False}
    if report.equal_within is not None:
        margin = report.equal_within
        edges = {"low": max(-margin, low), "high": min(margin, high)}
        layers.append(
            {
                "data": {"values": [edges]},
                "mark": {"type": "rect", "color": BAND, "opacity": 0.13},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            }
        )
    layers.append(
        {
            "mark": {"type": "rule", "strokeDash": [4, 4], "color": "#8C8C8C"},
            "encoding": {"x": {**x, "datum": 0}},
        }
    )
    layers += _forest_marks(x)
    spec = chart_spec(rows, {"layer": layers})
    # A row for each comparison, above the space of the axis.
    spec["height"] = ROW * len(rows) + 34
    return Chart(
        name="verdicts", title=f"Difference to {_references(report, shown)}", subtitle=about, spec=spec
    )


def _references(report: StudyReport, shown: Sequence[ComparisonReport]) -> str:
    """Return what differences are to: the baseline, or the other arm of each row."""
    is_baseline = all(item.against == report.baseline for item in shown)
    return report.baseline if is_baseline else f"{report.baseline}, or between the arms that are named"


def _bounds(report: StudyReport, shown: Sequence[ComparisonReport]) -> tuple[float, float]:
    """Return the ends of the axis. An interval of two seeds may be so long that it would hide all others."""
    points = [0.0, *(item.difference for item in shown if item.difference is not None)]
    if report.equal_within is not None:
        points += [-report.equal_within, report.equal_within]
    ends = [end for item in shown if item.interval is not None and item.error for end in item.interval]
    # Without a difference at all, the axis still needs a length.
    span = (max(points) - min(points)) or max(map(abs, ends), default=0.0) or 1.0
    low = max(min([*points, *ends]), min(points) - LONGEST_INTERVAL * span)
    high = min(max([*points, *ends]), max(points) + LONGEST_INTERVAL * span)
    padding = 0.04 * ((high - low) or 1.0)
    return low - padding, high + padding


def _forest_row(
    report: StudyReport, item: ComparisonReport, index: int, low: float, high: float
) -> dict[str, Any]:
    assert item.difference is not None
    has_interval = item.interval is not None and bool(item.error)
    ends = item.interval if item.interval is not None and has_interval else (item.difference, item.difference)
    interval = interval_of(item)
    verdict = verdict_text(report, item)
    numbers = f"{difference_text(item)}{'' if interval == ABSENT else f' {interval}'}"
    return {
        "row": index,
        "name": comparison_name(report, item),
        "against": item.against,
        "verdict": item.verdict,
        # Of a row's two texts, that on the right is shortened first.
        "short": item.verdict,
        "long": f"{verdict}   {numbers}",
        "numbers": numbers,
        "difference": item.difference,
        "low": max(ends[0], low),
        "high": min(ends[1], high),
        "has_interval": has_interval,
        "cut_low": ends[0] < low,
        "cut_high": ends[1] > high,
        "seeds": len(item.seeds),
    }


def _forest_marks(x: Spec) -> list[Spec]:
    y: Spec = {"field": "row", "type": "ordinal", "axis": None, "scale": {"paddingInner": 0}}
    colour: Spec = {
        "field": "verdict",
        "type": "nominal",
        "scale": {"domain": list(VERDICT_ORDER)},
        "legend": None,
    }
    shape = {**colour, "scale": {"domain": list(VERDICT_SHAPES), "range": list(VERDICT_SHAPES.values())}}
    tooltip = [
        {"field": "name", "title": "arm"},
        {"field": "against", "title": "against"},
        {"field": "verdict"},
        {"field": "numbers", "title": "difference"},
        {"field": "seeds"},
    ]
    text: Spec = {"type": "text", "baseline": "middle", "fontSize": 12.5, "font": FONT, "yOffset": -12}
    short_where_narrow = {"condition": {"test": f"width < {NARROW}", "field": "short"}, "field": "long"}
    marks: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 2.5, "yOffset": 8},
            "transform": [{"filter": "datum.has_interval"}],
            "encoding": {
                "x": {**x, "field": "low"},
                "x2": {"field": "high"},
                "y": y,
                "color": colour,
                "tooltip": tooltip,
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 85, "opacity": 1, "yOffset": 8},
            "encoding": {
                "x": {**x, "field": "difference"},
                "y": y,
                "color": colour,
                "shape": shape,
                "tooltip": tooltip,
            },
        },
        {
            "mark": {
                **text,
                "align": "left",
                "fontWeight": 600,
                # As much as the text on the right leaves, by the width of its characters.
                "limit": {
                    "expr": f"width - 16 - 7.3 * (width < {NARROW} ? length(datum.short) : "
                    "length(datum.long))"
                },
            },
            "encoding": {"x": {"value": 0}, "y": y, "text": {"field": "name"}},
        },
        {
            "mark": {**text, "align": "right"},
            "encoding": {"x": {"value": "width"}, "y": y, "color": colour, "text": short_where_narrow},
        },
    ]
    # An interval that is longer than the axis ends in an arrow.
    for end, character, align in (("low", "◂", "left"), ("high", "▸", "right")):
        marks.append(
            {
                "mark": {"type": "text", "align": align, "fontSize": 16, "yOffset": 8, "baseline": "middle"},
                "transform": [{"filter": f"datum.cut_{end}"}],
                "encoding": {
                    "x": {**x, "field": end},
                    "y": y,
                    "color": colour,
                    "text": {"value": character},
                },
            }
        )
    return marks


def forest_picture(report: StudyReport, kind: str = "svg") -> bytes:
    """Return the forest plot as an image on white, for a README.

    Args:
      report: the study.
      kind: "svg" or "png".

    Raises:
      ValueError: no comparison has a difference yet, the kind is another one, or the `plot` extra is not
        installed.
    """
    chart = forest_chart(report)
    if chart is None:
        raise ValueError(f"{report.study} has no comparison with a difference yet: train two arms first")
    spec = {
        **chart.spec,
        "width": 720,
        # Viewers have other fonts than the converter: texts may be wider there.
        "padding": {"left": 14, "right": 14, "top": 8, "bottom": 8},
        "title": {
            "text": report.question or report.study,
            "subtitle": f"{chart.title}: {chart.subtitle}",
            "anchor": "start",
            "offset": 10,
            "limit": 720,
        },
    }
    config = {**theme(dark=False), "background": "white", "font": "Helvetica, Arial, sans-serif"}
    if kind == "svg":
        return converter().vegalite_to_svg(spec, config=config).encode() + b"\n"
    if kind == "png":
        return converter().vegalite_to_png(spec, config=config, scale=2)
    raise ValueError(f"there is no picture of kind {kind!r}: choose svg or png")


def pairs_chart(report: StudyReport) -> Chart | None:
    """Return the differences of all seeds as dots, with a line at their mean."""
    shown = [item for item in report.comparisons if item.differences]
    if not shown:
        return None
    measured = [(item, [s for s in item.seeds if s not in item.imputed]) for item in shown]
    rows = [
        {
            "row": index,
            "name": comparison_name(report, item),
            "seed": seed,
            "value": value,
            "mean": item.difference,
        }
        for index, (item, seeds) in enumerate(measured)
        for seed, value in zip(seeds, item.differences, strict=False)
    ]
    x: Spec = {
        "type": "quantitative",
        "title": None,
        "scale": {"zero": True, "nice": True},
        "axis": {"tickCount": 5, "format": "+.3~g", "grid": False},
    }
    y: Spec = {"field": "row", "type": "ordinal", "axis": None}
    tooltip = [{"field": "name", "title": "arm"}, {"field": "seed"}, {"field": "value", "format": "+.4~g"}]
    colour: Spec = {"type": "nominal", "scale": {"domain": ["seed", "mean"]}, "legend": None}
    first = [{"filter": "datum.first"}]
    for row, previous in zip(rows, [None, *rows[:-1]], strict=True):
        row["first"] = previous is None or previous["row"] != row["row"]
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeDash": [4, 4], "color": "#8C8C8C"},
            "encoding": {"x": {**x, "datum": 0}},
        },
        {
            "mark": {"type": "tick", "thickness": 2, "size": 18, "yOffset": 7},
            "transform": first,
            "encoding": {"x": {**x, "field": "mean"}, "y": y, "color": {**colour, "datum": "mean"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 0.75, "yOffset": 7},
            "encoding": {
                "x": {**x, "field": "value"},
                "y": y,
                "color": {**colour, "datum": "seed"},
                "tooltip": tooltip,
            },
        },
        {
            "mark": {
                "type": "text",
                "align": "left",
                "fontSize": 12,
                "yOffset": -9,
                "limit": {"expr": "width"},
            },
            "transform": first,
            "encoding": {"x": {"value": 0}, "y": y, "text": {"field": "name"}},
        },
    ]
    spec = chart_spec(rows, {"layer": layers})
    spec["height"] = 38 * len(shown) + 34
    about = f"{in_words(report.metric)}; a dot for each seed, a line at their mean"
    title = f"Difference to {_references(report, shown)}, seed by seed"
    return Chart(name="pairs", title=title, subtitle=about, spec=spec)


# Curves -----------------------------------------------------------------------------------------------------
def curves_chart(report: StudyReport, chart: CurveChart) -> Chart | None:
    """Return learning curves of all arms, with bands from the lowest to the highest of the seeds."""
    arms = [arm.name for arm in report.arms]
    labels = [arm for arm in arms if any(item.arm == arm for item in (*chart.curves, *chart.diverged))]
    if not labels:
        return None
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
        area = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
        layers.insert(
            0,
            {
                "mark": {"type": "area", "opacity": 0.18, "clip": True},
                "transform": [{"filter": "!datum.diverged"}],
                "encoding": area,
            },
        )
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
    charts = [_tradeoff(report, name) for name, cost in COSTS.items() if cost.axis]
    return [chart for chart in charts if chart is not None]


def _tradeoff(report: StudyReport, name: str) -> tuple[Chart, str] | None:
    shown = [arm for arm in report.arms if arm.metric is not None and arm.costs.get(name, 0.0) > 0]
    choices = [
        Choice(arm.name, cost=arm.costs[name], quality=arm.metric.mean)
        for arm in shown
        if arm.metric is not None
    ]
    costs = [choice.cost for choice in choices]
    # Arms that were made equal have nothing to trade.
    if len(choices) < 2 or max(costs) <= (1 + EQUAL_COST) * min(costs):
        return None
    on_front = [choice.name for choice in pareto_front(choices, lower_is_better=report.lower_is_better)]
    # Numbers on the points and names in the legend, which wraps: names would hide each other.
    labels = tuple(f"{index} {choice.name}" for index, choice in enumerate(choices, start=1))
    rows = []
    for index, (arm, choice) in enumerate(zip(shown, choices, strict=True)):
        interval = arm.metric.interval if arm.metric is not None else None
        low, high = interval or (choice.quality, choice.quality)
        row = {"series": labels[index], "number": str(index + 1), "x": choice.cost, "y": choice.quality}
        rows.append({**row, "low": low, "high": high, "is_on_front": choice.name in on_front})
    cost = COSTS[name]
    metric = in_words(report.metric)
    # A logarithmic axis of a narrow range has hardly a tick.
    is_log = max(costs) > 4 * min(costs)
    scale = {"type": "log", "nice": False} if is_log else {"zero": False, "nice": False}
    x: Spec = {
        "field": "x",
        "type": "quantitative",
        "title": cost.axis,
        "scale": {**scale, "padding": 24},
        "axis": {"format": ".3~s", "grid": False, "tickCount": 4},
    }
    y: Spec = {
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": True, "padding": 14},
        "axis": {"format": ".4~g", "tickCount": 5},
    }
    encoding = {"color": by_series(labels, has_legend=True)}
    marks = _tradeoff_marks(x, y, title=cost.axis, metric=metric)
    spec = chart_spec(rows, {"encoding": encoding, "layer": marks})
    spec["height"] = 270
    way = "lower" if report.lower_is_better else "higher"
    about = f"{metric} ({way} is better) with {confidence_text(report)} intervals; filled: Pareto front"
    chart = Chart(
        name=f"cost-{name}", title=f"Quality and {cost.axis}", subtitle=about, spec=spec, labels=labels
    )
    return chart, f"Pareto front over {cost.axis}: {', '.join(on_front)}."


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
        {
            "mark": {"type": "text", "align": "left", "dx": 7, "dy": -8, "fontSize": 11.5, "font": FONT},
            "encoding": {"x": x, "y": mean, "text": {"field": "number"}},
        },
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
    chosen = [{"rate": item.rate, "series": item.arm, "value": _value_at(item)} for item in report.tuned]
    chosen = [row for row in chosen if row["value"] is not None]
    x: Spec = {
        "field": "rate",
        "type": "quantitative",
        "title": "learning rate",
        "scale": {"type": "log", "nice": False, "padding": 20},
        "axis": {"format": ".2~g", "grid": False, "tickCount": 5},
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
    (first, low), (second, high) = below[-1], above[0]
    return low if second <= first else low + (high - low) * (rate - first) / (second - first)
