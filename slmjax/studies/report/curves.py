"""Learning curves over seeds, thinned: for each arm the mean of its finished runs, with lowest and highest.

    charts = curve_charts(runs, statuses=statuses, metric="bits_per_byte")     # runs by arm and seed

Losses of training are averaged over a range of steps for each point. A run that diverged has a curve of its
own: within a mean it would make the last steps those of other seeds than the first ones.
"""

from collections.abc import Mapping, Sequence

from slmjax.studies.report.data import Curve, CurveChart, DivergedCurve
from slmjax.studies.study import DIVERGED, FINISHED
from slmjax.studies.text_tables import in_words
from slmjax.telemetry.report.reading import RunRecords, number

POINTS = 120  # most points of a curve
DIGITS = 5  # significant digits of its values

Runs = Mapping[tuple[str, int], RunRecords]
Points = dict[int, float]  # values by step


def curve_charts(
    runs: Runs, *, statuses: Mapping[tuple[str, int], str], metric: str
) -> tuple[CurveChart, ...]:
    """Return the charts of learning curves.

    Args:
      runs: records of the runs by arm and seed.
      statuses: how each of them ended.
      metric: of the verdicts, shown on held-out text if it was logged there; otherwise the loss is.
    """
    evaluations = {key: run.on_the_way for key, run in runs.items()}
    field = next(
        (name for name in (metric, "loss") if any(_points(item, name) for item in evaluations.values())), None
    )
    charts = []
    if field is not None:
        held_out = {key: _thinned(_points(records, field)) for key, records in evaluations.items()}
        title = f"Held-out {in_words(field)}"
        charts.append(_chart("held-out", title, "evaluations during training", held_out, statuses))
    longest = max((run.last_step for run in runs.values()), default=0)
    width = -(-longest // POINTS) or 1
    training = {key: _averaged(_points(run.train, "loss"), width) for key, run in runs.items()}
    about = "nats per token" if width == 1 else f"nats per token, averaged over {width:,} steps"
    charts.append(_chart("training", "Training loss", about, training, statuses))
    return tuple(chart for chart in charts if _has_lines(chart))


def _has_lines(chart: CurveChart) -> bool:
    """Return whether there is a line to draw: a run with a single evaluation has none."""
    return any(len(curve.steps) > 1 for curve in (*chart.curves, *chart.diverged))


def _chart(
    name: str,
    title: str,
    about: str,
    points: Mapping[tuple[str, int], Points],
    statuses: Mapping[tuple[str, int], str],
) -> CurveChart:
    arms = dict.fromkeys(arm for arm, _ in points)
    curves = []
    for arm in arms:
        finished = [
            item for key, item in points.items() if key[0] == arm and statuses.get(key) == FINISHED and item
        ]
        if finished:
            curves.append(_curve(arm, finished))
    diverged = tuple(
        DivergedCurve(arm=arm, seed=seed, steps=tuple(item), values=tuple(map(_rounded, item.values())))
        for (arm, seed), item in points.items()
        if statuses.get((arm, seed)) == DIVERGED and item
    )
    return CurveChart(name=name, title=title, about=about, curves=tuple(curves), diverged=diverged)


def _curve(arm: str, runs: Sequence[Points]) -> Curve:
    by_step: dict[int, list[float]] = {}
    for points in runs:
        for step, value in points.items():
            by_step.setdefault(step, []).append(value)
    # A step that some runs did not log would be a mean over other seeds than its neighbours.
    most = max(map(len, by_step.values()))
    steps = sorted(step for step, values in by_step.items() if len(values) == most)
    return Curve(
        arm=arm,
        steps=tuple(steps),
        mean=tuple(_rounded(sum(by_step[step]) / most) for step in steps),
        low=tuple(_rounded(min(by_step[step])) for step in steps),
        high=tuple(_rounded(max(by_step[step])) for step in steps),
        num_runs=most,
    )


def _points(records: Sequence[Mapping[str, object]], field: str) -> Points:
    points = {}
    for record in records:
        step = record["step"]
        value = number(record.get(field))
        if isinstance(step, int) and value is not None:
            points[step] = value
    return points


def _averaged(points: Points, width: int) -> Points:
    """Return means over ranges of `width` steps, each at the last step of its range."""
    ranges: dict[int, list[float]] = {}
    for step, value in points.items():
        ranges.setdefault(-(-step // width) * width, []).append(value)
    return {step: sum(values) / len(values) for step, values in ranges.items()}


def _thinned(points: Points) -> Points:
    steps = sorted(points)
    stride = -(-len(steps) // POINTS) or 1
    # Counted from the end, so that the last evaluation is always shown.
    return {step: points[step] for step in sorted(steps[::-1][::stride])}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
