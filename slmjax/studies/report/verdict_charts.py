"""Charts of verdicts as Vega-Lite: the forest plot, and the paired differences of all seeds.

    chart = forest_chart(report)
    svg = forest_picture(report, "svg")               # for a README

Verdicts are named in words, with a mark of another shape for each, and not by their colour alone. Texts of a
row stand above its interval, so that the plot fits a page of any width; the line at zero and the band of
equality are interrupted there, so that no text lies on them.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

from slmjax.studies.report.data import ComparisonReport, StudyReport
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
from slmjax.studies.text_tables import ABSENT, in_words
from slmjax.telemetry.report.charts import FONT, Chart, Spec, chart_spec, converter, drawable, theme

ROW = 50  # pixels of a row of the forest plot
PAIRS_ROW = 38  # pixels of a row of paired differences
AXIS = 34  # pixels below the rows
NARROW = 640  # pixels of a plot; below, the texts of a row are shortened
CHARACTER = 7.3  # pixels of most characters of these texts
# In the order of the colours of a theme, so that each theme has its own: blue, vermilion, green, and grey.
VERDICT_ORDER = (BETTER, WORSE, EQUAL, "", " ", "  ", NOT_RESOLVED)
VERDICT_SHAPES = {BETTER: "circle", EQUAL: "diamond", NOT_RESOLVED: "cross", WORSE: "square"}
BAND = "#009E73"  # of equality; light, so that one colour suits both themes
GREY = "#8C8C8C"
PICTURE_WIDTH = 800
PICTURE_FONT = "Helvetica, Arial, sans-serif"
TITLE_LENGTH = 90  # characters of a line of the picture
SUBTITLE_LENGTH = 115
# The ends of an axis may exceed the range of the differences by this factor; longer intervals are cut.
LONGEST_INTERVAL = 3.0

_ROWS: Spec = {"field": "row", "type": "ordinal", "axis": None}
_DIFFERENCES: Spec = {
    "tickCount": 5,
    "format": "+.3~g",
    "grid": False,
    "labelExpr": "datum.value == 0 ? '0' : datum.label",
}


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
    x["axis"] = _DIFFERENCES
    if report.equal_within is not None:
        margin = report.equal_within
        rows = [{**row, "from": max(-margin, low), "to": min(margin, high)} for row in rows]
        band_mark = {"type": "rule", "color": BAND, "opacity": 0.16, "strokeWidth": ROW - 28, "yOffset": 8}
        encoding = {"y": _ROWS, "x": {**x, "field": "from"}, "x2": {"field": "to"}}
        layers.append({"mark": band_mark, "encoding": encoding})
    layers.append(_zero_marks(x, offset=8, size=ROW - 28))
    layers += _forest_marks(x)
    spec = chart_spec(rows, {"layer": layers})
    # A row for each comparison, above the space of the axis.
    spec["height"] = ROW * len(rows) + AXIS
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
        "long": f"{verdict} · {numbers}",
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
    shared: Spec = {"y": _ROWS, "color": colour, "tooltip": tooltip}
    marks: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 2.5, "yOffset": 8},
            "transform": [{"filter": "datum.has_interval"}],
            "encoding": {**shared, "x": {**x, "field": "low"}, "x2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 85, "opacity": 1, "yOffset": 8},
            "encoding": {**shared, "x": {**x, "field": "difference"}, "shape": shape},
        },
    ]
    # An interval that is longer than the axis ends in an arrow.
    for end, character, align in (("low", "◂", "left"), ("high", "▸", "right")):
        mark = {"type": "text", "align": align, "fontSize": 16, "yOffset": 8, "baseline": "middle"}
        encoding = {**shared, "x": {**x, "field": end}, "text": {"value": character}}
        marks.append({"mark": mark, "transform": [{"filter": f"datum.cut_{end}"}], "encoding": encoding})
    return [*marks, *_forest_texts(colour)]


def _forest_texts(colour: Spec) -> list[Spec]:
    """Return the name of each row on the left, and its verdict on the right."""
    text: Spec = {"type": "text", "baseline": "middle", "fontSize": 12.5, "font": FONT, "yOffset": -12}
    # As much as the text on the right leaves.
    length = f"(width < {NARROW} ? length(datum.short) : length(datum.long))"
    limit = {"expr": f"width - 16 - {CHARACTER} * {length}"}
    verdict = {"condition": {"test": f"width < {NARROW}", "field": "short"}, "field": "long"}
    at_right: Spec = {"x": {"value": "width"}, "y": _ROWS, "text": verdict}
    # Grey would be hard to read: what is not resolved has the colour of texts.
    is_open = f"datum.verdict == '{NOT_RESOLVED}'"
    return [
        {
            "mark": {**text, "align": "left", "fontWeight": 600, "limit": limit},
            "encoding": {"x": {"value": 0}, "y": _ROWS, "text": {"field": "name"}},
        },
        {
            "mark": {**text, "align": "right"},
            "transform": [{"filter": f"!({is_open})"}],
            "encoding": {**at_right, "color": colour},
        },
        {
            "mark": {**text, "align": "right"},
            "transform": [{"filter": is_open}],
            "encoding": at_right,
        },
    ]


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
        "width": PICTURE_WIDTH,
        "height": ROW * len(chart.spec["data"]["values"]),
        # The title must not take its space from the rows.
        "autosize": {"type": "fit-x", "contains": "padding"},
        # Viewers have other fonts than the converter: texts may be wider there.
        "padding": {"left": 14, "right": 14, "top": 8, "bottom": 8},
        "title": {
            "text": textwrap.wrap(report.question or report.study, TITLE_LENGTH),
            "subtitle": textwrap.wrap(f"{chart.title}: {chart.subtitle}", SUBTITLE_LENGTH),
            "anchor": "start",
            "offset": 10,
        },
    }
    config = theme(dark=False)
    # A README scales the picture down, and its background is white, which any theme of the reader shows.
    config |= {"background": "white", "font": PICTURE_FONT}
    config["axis"] = {**config["axis"], "labelFontSize": 13}
    config["title"] = {**config["title"], "fontSize": 16, "subtitleFontSize": 13, "subtitlePadding": 6}
    if kind == "svg":
        return converter().vegalite_to_svg(drawable(spec), config=config).encode() + b"\n"
    if kind == "png":
        return converter().vegalite_to_png(drawable(spec), config=config, scale=2)
    raise ValueError(f"there is no picture of kind {kind!r}: choose svg or png")


def pairs_chart(report: StudyReport) -> Chart | None:
    """Return the measured differences of all seeds as dots, with a line at the mean that was judged."""
    shown = [item for item in report.comparisons if item.differences]
    if not shown:
        return None
    rows = [
        {
            "row": index,
            "name": comparison_name(report, item),
            "seed": seed,
            "value": value,
            "mean": item.difference,
            "is_first": (seed, value) == item.differences[0],
        }
        for index, item in enumerate(shown)
        for seed, value in item.differences
    ]
    spec = chart_spec(rows, {"layer": _pair_marks()})
    spec["height"] = PAIRS_ROW * len(shown) + AXIS
    about = f"{in_words(report.metric)}; a dot for each seed, a line at their mean"
    if any(item.imputed for item in shown):
        about += ", which has the worst value for a run that diverged"
    title = f"Difference to {_references(report, shown)}, seed by seed"
    return Chart(name="pairs", title=title, subtitle=about, spec=spec)


def _pair_marks() -> list[Spec]:
    x: Spec = {
        "type": "quantitative",
        "title": None,
        "scale": {"zero": True, "nice": True},
        "axis": _DIFFERENCES,
    }
    colour: Spec = {"type": "nominal", "scale": {"domain": ["seed", "mean"]}, "legend": None}
    tooltip = [{"field": "name", "title": "arm"}, {"field": "seed"}, {"field": "value", "format": "+.4~g"}]
    first = [{"filter": "datum.is_first"}]
    text: Spec = {"type": "text", "align": "left", "fontSize": 12, "font": FONT, "yOffset": -9}
    return [
        _zero_marks(x, offset=7, size=PAIRS_ROW - 20),
        {
            "mark": {"type": "tick", "thickness": 2, "size": 18, "yOffset": 7},
            "transform": first,
            "encoding": {"x": {**x, "field": "mean"}, "y": _ROWS, "color": {**colour, "datum": "mean"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 0.75, "yOffset": 7},
            "encoding": {
                "x": {**x, "field": "value"},
                "y": _ROWS,
                "color": {**colour, "datum": "seed"},
                "tooltip": tooltip,
            },
        },
        {
            "mark": {**text, "limit": {"expr": "width"}},
            "transform": first,
            "encoding": {"x": {"value": 0}, "y": _ROWS, "text": {"field": "name"}},
        },
    ]


def _zero_marks(x: Spec, *, offset: int, size: int) -> Spec:
    """Return a line at zero, which is interrupted above the interval of each row, where its texts stand."""
    mark = {"type": "tick", "orient": "vertical", "thickness": 1.5, "size": size, "yOffset": offset}
    return {"mark": {**mark, "color": GREY, "opacity": 1}, "encoding": {"x": {**x, "datum": 0}, "y": _ROWS}}
