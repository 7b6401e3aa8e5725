"""Charts of runs as Vega-Lite specifications: plain data, drawn by the page or, as PNG, by vl-convert.

    charts = run_charts(records)              # -> [Chart(name="loss", title="Loss", ...)]
    png(chart)                                # -> bytes

Long runs are thinned: a chart shows at most a thousand records of the log, always including the last.
"""

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slmjax.atomic_files import write_text
from slmjax.startup import cache_directory
from slmjax.telemetry.report.reading import RunRecords, number

POINTS = 1000  # most points of a line
COLUMNS = 120  # most columns of a heat map
# The colours of Okabe and Ito, which colour-blind readers can distinguish; the first two are for training and
# held-out text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
DARK_COLOURS = ("#56B4E9", "#E69F00", "#2BC79A", "#E7A3C6", "#F0E442", "#4C9BD6", "#A6A6A6")
DASHES = ([1, 0], [6, 3], [2, 2])  # of lines, one after another where colours are used again
LEGEND_WIDTH = 90  # characters that fit in a row of an image's legend
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Record = Mapping[str, Any]
Spec = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart with its title."""

    name: str  # of its file
    title: str
    subtitle: str
    spec: Spec
    # names of its lines, in the order of their colours, for a legend; pages draw it as text, which wraps
    labels: tuple[str, ...] = ()


def theme(*, dark: bool) -> Spec:
    """Return the Vega-Lite config of all charts."""
    # Dark pages need lighter lines for the same contrast.
    ink, soft, rule = ("#e8e6e3", "#a8a6a2", "#3a3c40") if dark else ("#1c1d1f", "#62656a", "#e3e4e6")
    axis = {
        "labelColor": soft,
        "titleColor": soft,
        "gridColor": rule,
        "domainColor": rule,
        "tickColor": rule,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelFont": FONT,
        "titleFont": FONT,
    }
    legend = {
        "labelColor": ink,
        "titleColor": soft,
        "labelFont": FONT,
        "orient": "top",
        "labelLimit": 320,
        "title": None,
        "symbolStrokeWidth": 3,
    }
    return {
        "background": "white",
        "font": FONT,
        "view": {"stroke": None},
        "axis": axis,
        "legend": legend,
        "range": {"category": list(DARK_COLOURS if dark else COLOURS)},
        "line": {"strokeWidth": 1.6, "strokeJoin": "round"},
        "title": {"font": FONT, "subtitleFont": FONT},
        "text": {"color": ink},
    }


def run_charts(run: RunRecords) -> list[Chart]:
    """Return the charts of one run, without those of values that were not logged."""
    charts = [
        *_loss_charts(run),
        *_optimizer_charts(run),
        *_distillation_charts(run),
        *_quantization_charts(run),
        *_speed_charts(run),
        *_expert_charts(run),
        *_exit_charts(run),
    ]
    return [chart for chart in charts if chart is not None]


def _loss_charts(run: RunRecords) -> list[Chart | None]:
    series = {"training": run.train, "held out": run.on_the_way}
    # Evaluations on all held-out text do not continue the curve of those on a part of it.
    if len(run.on_the_way) < len(run.evals):
        series = {"training": run.train, "part of held out": run.on_the_way}
        series["all held out"] = [record for record in run.evals if record.get("complete")]
    marked = tuple(series)[1:]
    return [
        lines("loss", "Loss", "nats per token", series, "loss", marked=marked),
        lines("bits-per-byte", "Bits per byte", "of UTF-8 text", series, "bits_per_byte", marked=marked),
    ]


def _optimizer_charts(run: RunRecords) -> list[Chart | None]:
    training = {"training": run.train}
    about = "of all parameters, before clipping; logarithmic"
    return [
        lines("learning-rate", "Learning rate", "", training, "learning_rate", digits=".2~e"),
        lines("gradient-norm", "Gradient norm", about, training, "grad_norm", log=True),
        heat("gradient-norm-by-layer", "Gradient norm by layer", "logarithmic", run.train, "grad_norms"),
    ]


def _distillation_charts(run: RunRecords) -> list[Chart | None]:
    training = {"training": run.train}
    held_out = {"held out": run.on_the_way}
    minimised = "nats per token, as it is minimised"
    return [
        lines("divergence", "Divergence from the teacher", minimised, training, "divergence"),
        lines("teacher-kl", "KL from the teacher", "nats per token, temperature 1", held_out, "teacher_kl"),
        lines("temperature", "Temperature", "of the divergence", training, "temperature"),
        lines("soft-weight", "Weight of the divergence", "in the objective", training, "soft_weight"),
    ]


def _exit_charts(run: RunRecords) -> list[Chart | None]:
    training = {"training": run.train}
    return [
        lines("expected-loops", "Expected loops", "of a scored token", training, "expected_loops"),
        lines("exit-entropy", "Entropy of exits", "nats per scored token", training, "exit_entropy"),
    ]


def _quantization_charts(run: RunRecords) -> list[Chart | None]:
    training = {"training": run.train}
    held_out = {"held out": run.on_the_way}
    before = "Loss of weights before rounding"
    since = "fraction, since the line before"
    return [
        lines("loss-before-rounding", before, "nats per token", held_out, "unrounded_loss"),
        lines("flipped-codes", "Codes that changed", since, training, "flipped_codes", digits=".2%"),
    ]


def _speed_charts(run: RunRecords) -> list[Chart | None]:
    training = {"training": run.train}
    waiting = "fraction of the time"
    return [
        lines("throughput", "Throughput", "tokens per second", training, "tokens_per_second", digits="~s"),
        lines(
            "utilisation", "Model FLOPs utilisation", "of the device's peak", training, "mfu", digits=".0%"
        ),
        lines("data-wait", "Waiting for data", waiting, training, "data_wait_share", digits=".1%"),
    ]


def _expert_charts(run: RunRecords) -> list[Chart | None]:
    training = {"training": run.train}
    busiest = "busiest expert over the mean"
    dropped = "by experts that were full, per step"
    charts = [
        lines("expert-imbalance", "Expert imbalance", busiest, training, "expert_imbalance"),
        lines("dropped", "Dropped tokens", dropped, training, "dropped"),
    ]
    layers = dict.fromkeys(layer for record in run.train for layer in record.get("expert_loads") or {})
    for layer in layers:
        loads = [
            {"step": record["step"], "load": _relative_loads((record.get("expert_loads") or {}).get(layer))}
            for record in run.train
        ]
        name = f"experts-{layer.replace('/', '-')}"
        about = "fraction of tokens, over an even fraction"
        charts.append(heat(name, f"Load of experts, {layer}", about, loads, "load", middle=1.0))
    return charts


def _relative_loads(loads: Any) -> dict[str, float]:
    loads = loads if isinstance(loads, list) else []
    fractions = {str(expert): number(load) for expert, load in enumerate(loads)}
    return {expert: load * len(loads) for expert, load in fractions.items() if load is not None}


# Kinds of charts --------------------------------------------------------------------------------------------
def lines(
    name: str,
    title: str,
    subtitle: str,
    series: Mapping[str, Sequence[Record]],
    field: str,
    *,
    log: bool = False,
    digits: str = ".4~g",
    marked: Sequence[str] = (),
) -> Chart | None:
    """Return a chart with one line for each series over the steps; None if there is nothing to draw.

    Args:
      name: name of the file.
      title: title of the chart.
      subtitle: the unit, or what is measured.
      series: records by label.
      field: the field of a record to draw.
      log: logarithmic axis, without values that are not positive.
      digits: format of the axis.
      marked: labels of series that show their points.
    """
    rows = [
        {"step": record["step"], "value": value, "series": label, "marked": label in marked}
        for label, records in series.items()
        for record in _thinned(records, POINTS)
        if (value := number(record.get(field))) is not None and (value > 0 or not log)
    ]
    # A run whose experts never dropped a token needs no chart of zeros.
    if not rows or (field == "dropped" and not any(row["value"] for row in rows)):
        return None
    labels = tuple(label for label in series if any(row["series"] == label for row in rows))
    # A single line needs no legend.
    colour = by_series(labels, has_legend=len(labels) > 1)
    y: Spec = {
        "field": "value",
        "type": "quantitative",
        "title": None,
        "axis": {"format": digits, "tickCount": 5},
    }
    # Fractions and rates start at zero; losses would become flat lines.
    y["scale"] = (
        {"type": "log", "nice": False}
        if log
        else {"zero": field in ("mfu", "data_wait_share", "tokens_per_second"), "nice": True}
    )
    tooltip = [
        {"field": "series", "title": "of"},
        {"field": "step", "format": ","},
        {"field": "value", "format": digits if digits.endswith("%") else ".5~g", "title": title.lower()},
    ]
    encoding = {"x": steps_axis(), "y": y, "color": colour, "tooltip": tooltip}
    layers: list[Spec] = [{"mark": {"type": "line", "clip": True}}]
    # Colours are used again where there are more series than colours, with other dashes.
    if len(labels) > len(COLOURS):
        dashes = [DASHES[index // len(COLOURS) % len(DASHES)] for index in range(len(labels))]
        layers[0]["encoding"] = {"strokeDash": {**colour, "scale": {"domain": list(labels), "range": dashes}}}
    if any(row["marked"] for row in rows):
        layers.append(
            {"mark": {"type": "point", "filled": True, "size": 30}, "transform": [{"filter": "datum.marked"}]}
        )
    # Invisible points, which show their tooltip.
    layers.append({"mark": {"type": "point", "size": 120, "opacity": 0}})
    return Chart(
        name=name,
        title=title,
        subtitle=subtitle,
        spec=chart_spec(rows, {"encoding": encoding, "layer": layers}),
        labels=labels if len(labels) > 1 else (),
    )


def by_series(labels: Sequence[str], *, has_legend: bool) -> Spec:
    """Return the encoding of a colour for each series; the legend is that of images alone."""
    colour: Spec = {
        "field": "series",
        "type": "nominal",
        "sort": list(labels),
        "scale": {"domain": list(labels)},
    }
    # Rows of a legend do not wrap by themselves.
    width = max(map(len, labels)) + 5
    colour["legend"] = {"columns": max(LEGEND_WIDTH // width, 1)} if has_legend else None
    return colour


def log_lines(
    name: str,
    title: str,
    subtitle: str,
    series: Mapping[str, Mapping[float, float]],
    *,
    x_title: str,
) -> Chart | None:
    """Return a chart with a line for each series on two logarithmic axes; None if there is nothing to draw.

    Args:
      name: name of the file.
      title: title of the chart.
      subtitle: the unit, or what is measured.
      series: values by their place on the horizontal axis, by label; values that have no logarithm are left
        out.
      x_title: title of the horizontal axis.
    """
    rows = [
        {"x": x, "value": value, "series": label}
        for label, values in series.items()
        for x, each in values.items()
        if (value := number(each)) is not None and value > 0
    ]
    if not rows:
        return None
    labels = tuple(dict.fromkeys(row["series"] for row in rows))
    colour = by_series(labels, has_legend=len(labels) > 1)
    places = sorted({row["x"] for row in rows})
    # Ticks at the measured places alone, with room at both ends for the points.
    x = {
        "field": "x",
        "type": "quantitative",
        "title": x_title,
        "scale": {"type": "log", "nice": False, "padding": 12},
        "axis": {"values": places, "format": "~s", "grid": False},
    }
    y = {
        "field": "value",
        "type": "quantitative",
        "title": None,
        "scale": {"type": "log", "nice": False, "padding": 8},
        "axis": {"format": ".1~e", "tickCount": 4},
    }
    tooltip = [
        {"field": "series", "title": "of"},
        {"field": "x", "format": ",", "title": x_title},
        {"field": "value", "format": ".4~g"},
    ]
    line: Spec = {"mark": {"type": "line"}}
    if len(labels) > len(COLOURS):
        dashes = [DASHES[index // len(COLOURS) % len(DASHES)] for index in range(len(labels))]
        line["encoding"] = {"strokeDash": {**colour, "scale": {"domain": list(labels), "range": dashes}}}
    layers = [line, {"mark": {"type": "point", "filled": True, "size": 30}}]
    encoding = {"x": x, "y": y, "color": colour, "tooltip": tooltip}
    return Chart(
        name=name,
        title=title,
        subtitle=subtitle,
        spec=chart_spec(rows, {"encoding": encoding, "layer": layers}),
        labels=labels if len(labels) > 1 else (),
    )


def heat(
    name: str,
    title: str,
    subtitle: str,
    records: Sequence[Record],
    field: str,
    *,
    middle: float | None = None,
) -> Chart | None:
    """Return a heat map with a row for each name in a mapping and a column for each step; None if empty.

    Colours are logarithmic, or diverge on both sides of `middle`.
    """
    rows = [
        {"step": record["step"], "row": _short(label), "value": value}
        for record in _thinned(records, COLUMNS)
        for label, each in (record.get(field) or {}).items()
        if (value := number(each)) is not None and (value > 0 or middle is not None)
    ]
    if not rows:
        return None
    # Layers in the order of the model, not of the alphabet.
    order = list(dict.fromkeys(row["row"] for row in rows))
    steps = sorted({row["step"] for row in rows})
    after_last = 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1
    # Each column ends where the next one begins, since steps need not be evenly spaced.
    ends = dict(zip(steps, [*steps[1:], after_last], strict=True))
    for row in rows:
        row["end"] = ends[row["step"]]
    scale: Spec = {"type": "log", "scheme": "viridis"}
    # Loads around an even distribution have a neutral middle; norms span orders of magnitude.
    if middle is not None:
        scale = {"scheme": "blueorange", "domain": [0, 2 * middle], "clamp": True}
    legend = {"orient": "right", "format": ".2~g", "gradientLength": 140}
    encoding = {
        "x": {**steps_axis(), "scale": {"nice": False, "zero": False}},
        "x2": {"field": "end"},
        "y": {"field": "row", "type": "nominal", "sort": order, "title": None},
        "color": {"field": "value", "type": "quantitative", "scale": scale, "legend": legend},
        "tooltip": [
            {"field": "row", "title": "of"},
            {"field": "step", "format": ","},
            {"field": "value", "format": ".4~g"},
        ],
    }
    return Chart(
        name=name,
        title=title,
        subtitle=subtitle,
        spec=chart_spec(rows, {"mark": {"type": "rect"}, "encoding": encoding}),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a chart of points."""

    label: str
    series: str  # decides the colour
    x: float
    y: float
    error: float = 0.0  # half the length of the error bar


LABEL_WIDTH = 1.25  # width of most labels on the logarithmic axis, as a factor


def points(
    name: str, title: str, subtitle: str, shown: Sequence[Point], *, x_title: str, y_title: str
) -> Chart | None:
    """Return a chart of points with error bars, x logarithmic; None if there are none."""
    if not shown:
        return None
    rows = [
        {**dataclasses.asdict(point), "low": point.y - point.error, "high": point.y + point.error}
        for point in shown
    ]
    for row, label_y in zip(rows, _labels_apart(shown), strict=True):
        row["label_y"] = label_y
    labels = tuple(dict.fromkeys(point.series for point in shown))
    # Axes of differences need not start at zero.
    quantitative: Spec = {"type": "quantitative", "scale": {"zero": False, "nice": True}}
    x = {
        **quantitative,
        "field": "x",
        "title": x_title,
        "scale": {"type": "log", "nice": False, "padding": 60},
    }
    y = {**quantitative, "title": y_title, "axis": {"format": ".4~g", "tickCount": 5}}
    tooltip = [
        {"field": "label", "title": "of"},
        {"field": "x", "format": ",.4~s", "title": x_title},
        {"field": "y", "format": ".5~g", "title": y_title},
    ]
    encoding = {
        "x": {**x, "axis": {"format": "~s", "grid": False, "tickCount": 6}},
        "color": by_series(labels, has_legend=True),
        "tooltip": tooltip,
    }
    layers: list[Spec] = [
        {"mark": {"type": "rule"}, "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}}},
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
            "encoding": {"y": {**y, "field": "y"}},
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 7, "fontSize": 10.5, "font": FONT},
            "encoding": {"y": {**y, "field": "label_y"}, "text": {"field": "label"}},
        },
    ]
    spec = {**chart_spec(rows, {"encoding": encoding, "layer": layers}), "height": 340}
    return Chart(name=name, title=title, subtitle=subtitle, spec=spec, labels=labels)


def _labels_apart(shown: Sequence[Point]) -> list[float]:
    """Return the y of each point's label: that of the point, or above the labels it would overlap."""
    gap = 0.045 * (max(point.y for point in shown) - min(point.y for point in shown))
    label_y: dict[int, float] = {}
    # From bottom to top, so that a label only has to avoid those below it.
    for index in sorted(range(len(shown)), key=lambda index: shown[index].y):
        y = shown[index].y
        x = shown[index].x
        near = sorted(
            label_y[other] for other in label_y if 1 / LABEL_WIDTH < shown[other].x / x < LABEL_WIDTH
        )
        for other_y in near:
            if abs(y - other_y) < gap:
                y = other_y + gap
        label_y[index] = y
    return [label_y[index] for index in range(len(shown))]


def _short(label: str) -> str:
    return label.removeprefix("layers/")


def steps_axis() -> Spec:
    """Return the encoding of steps on the horizontal axis."""
    return {
        "field": "step",
        "type": "quantitative",
        "title": "step",
        "axis": {"format": "~s", "grid": False, "tickCount": 6},
    }


def chart_spec(rows: Sequence[Record], drawn: Spec) -> Spec:
    """Return a specification as wide as its place on the page: the data, and the marks in `drawn`."""
    return {
        "data": {"values": list(rows)},
        "width": "container",
        "height": 230,
        "autosize": {"type": "fit", "contains": "padding"},
        **drawn,
    }


def _thinned(records: Sequence[Record], most: int) -> Sequence[Record]:
    # Thinned evenly, since a browser draws thousands of points slowly.
    stride = -(-len(records) // most)
    if stride <= 1:
        return records
    thinned = list(records[::stride])
    return thinned if thinned[-1] is records[-1] else [*thinned, records[-1]]


# Drawing ----------------------------------------------------------------------------------------------------
def converter() -> Any:
    """Return the package that draws charts.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise ValueError(
            f"reports need vl-convert-python, which is not installed ({error}): pip install 'slmjax[plot]'"
        ) from error
    return vl_convert


# What XML does not allow, and with it SVG: the converter would end the process.
_NOT_XML = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


def drawable(value: Any) -> Any:
    """Return a specification without characters that no image can have, such as those of a name."""
    if isinstance(value, str):
        return _NOT_XML.sub("\ufffd", value)
    if isinstance(value, dict):
        return {drawable(key): drawable(item) for key, item in value.items()}
    return [drawable(item) for item in value] if isinstance(value, list | tuple) else value


def png(chart: Chart) -> bytes:
    """Return the chart as an image on white, 1280 pixels wide."""
    spec = {
        **chart.spec,
        "width": 560,
        "title": {"text": chart.title, "subtitle": chart.subtitle, "anchor": "start", "offset": 12},
    }
    # Twice the resolution, for screens with a high density.
    return converter().vegalite_to_png(drawable(spec), config=theme(dark=False), scale=2)


@functools.cache
def drawing_code(snippet: str) -> str:
    """Return the JavaScript that draws charts in a page: Vega, Vega-Lite, vega-embed and `snippet`.

    Bundling it takes seconds, so that it is kept in the cache directory, with its hash.
    """
    package = converter()
    name = hashlib.sha256(f"{package.__version__} {snippet}".encode()).hexdigest()[:16]
    path = cache_directory() / "drawing" / f"{name}.js"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        digest, _, kept = path.read_text(encoding="utf-8").partition("\n")
        # What a page runs must be what was bundled.
        if digest == _digest(kept):
            return kept
    code: str = package.javascript_bundle(snippet)
    with contextlib.suppress(OSError):  # without a place for it, the next report takes seconds again
        write_text(path, f"{_digest(code)}\n{code}")
    return code


def _digest(code: str) -> str:
    return f"// sha256 {hashlib.sha256(code.encode()).hexdigest()}"
