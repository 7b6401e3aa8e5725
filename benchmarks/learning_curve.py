"""The picture of the README: held-out bits per byte of a run over its training, with those of gzip and xz.

pip install -e '.[plot]'
python benchmarks/learning_curve.py RUN_DIR docs/nano.svg
"""

import sys
from pathlib import Path
from typing import Any

from slmjax.telemetry.report import RunRecords, read_run
from slmjax.telemetry.report.charts import converter, theme


def main(run_dir: Path, picture: Path) -> None:
    run = read_run(run_dir)
    assert run.result is not None, f"{run_dir} has not ended: its result is what the picture shows"
    config = {**theme(dark=False), "font": "Helvetica, Arial, sans-serif"}
    svg = converter().vegalite_to_svg(specification(run, run.result), config=config)
    picture.write_text(svg + "\n", encoding="utf-8")


def specification(run: RunRecords, result: dict[str, Any]) -> dict[str, Any]:
    """Return the chart as Vega-Lite."""
    series = {"training batches": run.train, "held-out text": run.on_the_way}
    curves = [
        {"step": record["step"], "bits": record["bits_per_byte"], "series": name}
        for name, records in series.items()
        for record in records
    ]
    rivals = [{"bits": bits, "name": f"{name}: {bits:.2f}"} for name, bits in result["compressors"].items()]
    points = [
        {"step": record["step"], "bits": record["bits_per_byte"]} for record in run.evals
    ]  # the last is on all of the text
    last = {**points[-1], "name": f"{result['bits_per_byte']:.2f}"}
    sizes = f"{result['parameters'] / 1e6:.1f}M parameters, {result['run_tokens'] / 1e6:.2f}M tokens"
    colour = {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": list(series), "range": ["#b8c4d6", "#0072B2"]},
        "legend": {"title": None},
    }
    x = {"field": "step", "type": "quantitative", "title": "steps", "axis": {"grid": False}}
    y = {
        "field": "bits",
        "type": "quantitative",
        "title": "bits per byte",
        "scale": {"domain": [0, 3], "clamp": True},
    }
    text = {"type": "text", "align": "right", "dy": -7, "color": "#8a5a00", "fontSize": 11}
    return {
        "width": 640,
        "height": 240,
        "title": {
            "text": f"{sizes}: bits per byte on text it never saw",
            "anchor": "start",
            "fontWeight": "normal",
            "fontSize": 13,
        },
        "layer": [
            {
                "data": {"values": curves},
                "mark": {"type": "line", "clip": True},
                "encoding": {"x": x, "y": y, "color": colour},
            },
            {
                "data": {"values": points},
                "mark": {"type": "point", "filled": True, "size": 40, "color": "#0072B2"},
                "encoding": {"x": x, "y": y},
            },
            {
                "data": {"values": rivals},
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": "#8a5a00"},
                "encoding": {"y": y},
            },
            {
                "data": {"values": rivals},
                "mark": {**text, "x": "width"},
                "encoding": {"y": y, "text": {"field": "name"}},
            },
            {
                "data": {"values": [last]},
                "mark": {**text, "color": "#0072B2", "dy": 16},
                "encoding": {"x": x, "y": y, "text": {"field": "name"}},
            },
        ],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
