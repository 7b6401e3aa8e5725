"""The picture and the table of verdicts of the README, of a shipped study or from `experiments/LOG.md`.

    pip install -e '.[plot]'
    python benchmarks/study_picture.py docs/study-verdicts.svg experiments/results/schedule
    python benchmarks/study_picture.py docs/distillation-study.svg

Each writes the picture and prints the table: the first of the report.json in a directory, which may be that
of a study; the second of the entry of the log on distillation.
"""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

from slmjax.studies.report import forest_picture, study_report, verdicts_markdown
from slmjax.telemetry.report.charts import converter, theme

LOG = Path(__file__).resolve().parent.parent / "experiments" / "LOG.md"
QUESTION = "Does a student learn more from a teacher than from the text alone"
COLORS = {"better": "#0072B2", "not resolved": "#8a8a8a", "worse": "#b5482a"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedArm:
    """One row of the study's table, as the log has it."""

    name: str
    bits_per_byte: str  # mean and standard deviation over seeds
    difference: str
    interval: str  # 95 %, paired by seed
    p_value: str  # after Holm's correction
    verdict: str

    def bounds(self) -> tuple[float, float]:
        """Return both ends of the interval."""
        low, high = self.interval.split(" to ")
        return float(low), float(high)


def recorded_arms(question: str = QUESTION) -> list[RecordedArm]:
    """Return the rows of the first table under the entry of the log that asks this question."""
    entries = LOG.read_text(encoding="utf-8").split("\n## ")
    entry = next(entry for entry in entries if question in entry.splitlines()[0])
    rows = [line for line in entry.splitlines() if re.match(r"\| [^-]", line)]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    header = cells[0][:6]
    assert header == ["arm", "bits per byte", "difference", "interval", "p", "verdict"], header
    return [
        RecordedArm(
            name=name,
            bits_per_byte=bits,
            difference=difference,
            interval=interval,
            p_value=p,
            verdict=verdict,
        )
        for name, bits, difference, interval, p, verdict, *_ in cells[1:]
    ]


def verdict_table(arms: list[RecordedArm]) -> str:
    """Return the table in Markdown."""
    lines = ["| arm | bits per byte | difference (95 % interval) | verdict |", "|---|---|---|---|"]
    for arm in arms:
        difference = f"{arm.difference} ({arm.interval})" if arm.difference else "baseline"
        lines.append(f"| {arm.name} | {arm.bits_per_byte} | {difference} | {arm.verdict} |")
    return "\n".join(lines) + "\n"


def specification(arms: list[RecordedArm]) -> dict[str, Any]:
    """Return the chart as Vega-Lite: each arm's difference to the baseline with its interval."""
    points = [
        {
            "arm": arm.name,
            "difference": float(arm.difference),
            "low": arm.bounds()[0],
            "high": arm.bounds()[1],
            "verdict": arm.verdict,
        }
        for arm in sorted(arms, key=lambda arm: float(arm.difference or 0))
        if arm.difference
    ]
    names = [point["arm"] for point in points]
    y = {"field": "arm", "type": "nominal", "sort": names, "title": None, "axis": {"labelLimit": 260}}
    x = {
        "type": "quantitative",
        "title": "difference to cross entropy in bits per byte: left is better",
        "axis": {"tickCount": 5},
    }
    color = {
        "field": "verdict",
        "type": "nominal",
        "scale": {"domain": list(COLORS), "range": list(COLORS.values())},
        "legend": {"title": None, "orient": "top"},
    }
    return {
        "width": 460,
        "height": 210,
        # Viewers have other fonts than the converter, so leave space for labels that come out wider.
        "padding": {"left": 70, "right": 12, "top": 6, "bottom": 6},
        "data": {"values": points},
        "layer": [
            {
                "mark": {"type": "rule", "strokeDash": [4, 4], "color": "#777"},
                "encoding": {"x": {"datum": 0, **x}},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}, "y": y, "color": color},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70},
                "encoding": {"x": {"field": "difference", **x}, "y": y, "color": color},
            },
        ],
    }


def of_study(directory: str | Path) -> tuple[str, str]:
    """Return the picture of a study as SVG, and its table of verdicts in Markdown."""
    report = study_report(directory)
    return forest_picture(report).decode("utf-8"), verdicts_markdown(report)


def of_log() -> tuple[str, str]:
    """Return picture and table of the entry of the log."""
    arms = recorded_arms()
    config = {**theme(dark=False), "background": "white", "font": "Helvetica, Arial, sans-serif"}
    svg = converter().vegalite_to_svg(specification(arms), config=config)
    return f"{svg}\n", verdict_table(arms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("picture", type=Path, help="SVG file to write")
    parser.add_argument("study", nargs="?", help="directory with report.json (none: the log's entry)")
    args = parser.parse_args()
    svg, table = of_log() if args.study is None else of_study(args.study)
    args.picture.write_text(svg, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
