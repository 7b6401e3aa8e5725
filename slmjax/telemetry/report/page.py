"""The report page of a run: one HTML file that loads nothing else."""

import html
import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slmjax.atomic_files import atomic_file, write_text
from slmjax.telemetry.progress import format_seconds
from slmjax.telemetry.report import charts as chart_module
from slmjax.telemetry.report.charts import Chart, run_charts, theme
from slmjax.telemetry.report.reading import RunRecords, number, read_run
from slmjax.telemetry.report.settings import shown

log = logging.getLogger(__name__)

# Colours are variables, so that the dark theme changes nothing else.
STYLE = """
:root { --paper: #f6f7f8; --card: #fff; --ink: #1c1d1f; --soft: #62656a; --rule: #e3e4e6; --accent: #0072B2; --code: #f1f2f4; }
:root[data-theme=dark] { --paper: #131416; --card: #1c1e21; --ink: #e8e6e3; --soft: #a8a6a2; --rule: #33363a; --accent: #56B4E9; --code: #25282c; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 FONT; -webkit-text-size-adjust: 100%; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
header { display: flex; gap: 16px; align-items: flex-start; justify-content: space-between; }
h1 { font-size: 22px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 36px 0 12px; }
.soft { color: var(--soft); } .about { color: var(--soft); margin: 4px 0 0; }
button { font: inherit; font-size: 13px; color: var(--soft); background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: 4px 10px; cursor: pointer; white-space: nowrap; }
button:hover { color: var(--ink); }
.metrics { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 12px; margin-top: 20px; }
.metric, .chart, .box { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.metric { padding: 12px 14px; } .metric b { display: block; font-size: 22px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.metric span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
.chart { padding: 14px 16px 8px; min-width: 0; } .chart h3 { margin: 0; font-size: 14px; } .chart p { margin: 0 0 6px; color: var(--soft); font-size: 12.5px; min-height: 1.5em; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; margin: 0 0 6px; overflow-wrap: anywhere; } .chart .legend { color: var(--ink); }
.legend i { display: inline-block; width: 18px; border-top: 3px solid var(--c); margin-right: 6px; vertical-align: 4px; } .legend .d1 { border-top-style: dashed; } .legend .d2 { border-top-style: dotted; }
.canvas { width: 100%; } .canvas .vega-embed { width: 100%; padding: 0; }
header + .box { margin-top: 20px; } .box { padding: 4px 16px; overflow-x: auto; } .box + .box, .charts + .box { margin-top: 12px; }
.box ul { margin: 10px 0; padding-left: 20px; overflow-wrap: anywhere; } .lead { font-size: 16px; margin: 16px 0 0; overflow-wrap: anywhere; } .charts + p { margin: 12px 0 0; } main > p { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; } td, th { text-align: left; padding: 6px 18px 6px 0; border-top: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; } th { font-weight: 500; color: var(--soft); } td.name { color: var(--soft); width: 38%; }
.columns td, .columns th { overflow-wrap: normal; } .columns div { white-space: pre-line; } .columns th > div { overflow-wrap: break-word !important; } .columns td > div, .columns th > div { min-width: 9ch; max-width: 34ch; overflow-wrap: anywhere; } .columns td.name { width: auto; } .columns td:last-child, .columns th:last-child { padding-right: 0; }
pre { background: var(--code); border-radius: 8px; padding: 12px 14px; margin: 8px 0 14px; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre mark { background: none; color: var(--accent); font-weight: 600; }
summary { cursor: pointer; padding: 8px 0; } details details { margin-left: 16px; }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } .metric b { font-size: 19px; } header { flex-direction: column-reverse; } td { padding-right: 10px; }
  .columns tr.head + tr { border-top: 0; } .columns tr { display: block; border-top: 1px solid var(--rule); padding: 6px 0; } .columns tr.head { display: none; } .columns td, .columns td.name { display: flex; gap: 10px; width: auto; border: 0; padding: 1px 0; }
  .columns td:not(.name)::before { content: attr(data-of); color: var(--soft); flex: 0 0 34%; overflow-wrap: anywhere; } .columns td > div { min-width: 0; max-width: none; width: auto; flex: 1; } .columns td.name { font-weight: 500; color: var(--ink); } }
@media print { button { display: none; } .chart { break-inside: avoid; } }
""".replace("FONT", chart_module.FONT)  # noqa: E501  # a style sheet


def _colours(selector: str, colours: Sequence[str]) -> str:
    return f"{selector} {{ {' '.join(f'--c{index}: {colour};' for index, colour in enumerate(colours))} }}\n"


STYLE += _colours(":root", chart_module.COLOURS)
STYLE += _colours(":root[data-theme=dark]", chart_module.DARK_COLOURS)

# Charts are drawn again for each theme, since Vega writes colours into the SVG.
SCRIPT = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const themes = JSON.parse(document.getElementById("themes").textContent);
const root = document.documentElement, preference = window.matchMedia("(prefers-color-scheme: dark)");
const button = document.getElementById("theme");
function show(name) {
  root.dataset.theme = name;
  button.textContent = name === "dark" ? "light" : "dark";
  const config = {...themes[name], background: "transparent"};
  return Promise.all(charts.map((spec, i) =>
    vegaEmbed(document.getElementById("chart-" + i), spec,
              {actions: false, renderer: "svg", config, tooltip: {theme: name}})));
}
const requested = new URLSearchParams(location.hash.slice(1)).get("theme");
button.onclick = () => show(root.dataset.theme === "dark" ? "light" : "dark");
preference.addEventListener("change", event => show(event.matches ? "dark" : "light"));
show(requested || (preference.matches ? "dark" : "light")).then(() => {
  root.dataset.drawn = charts.length;
  root.dataset.overflow = root.scrollWidth - root.clientWidth;
});
"""


def write_report(path: str | Path, *, output: str | Path | None = None, with_images: bool = True) -> Path:
    """Write the page of a run and its charts as plots/*.png, and return the path of the page.

    Args:
      path: the run directory.
      output: the page; None for report.html in the run directory.
      with_images: also write the charts as PNG.

    Raises:
      ValueError: the path is not a run directory, the `plot` extra is not installed, or a file cannot be
        written.
      DamagedFile: a file of the run is damaged.
    """
    run = read_run(path)
    charts = run_charts(run)
    target = Path(output) if output is not None else run.path / "report.html"
    write_page(target, document(title=run.name, body=_body(run, charts), charts=charts))
    # Images are for documents that cannot embed a page.
    if with_images:
        for chart in charts:
            _write_image(run.path / "plots" / f"{chart.name}.png", chart)
    return target


def write_page(target: Path, text: str) -> Path:
    """Write a page atomically, and return its path.

    Raises:
      ValueError: it cannot be written.
    """
    try:
        return write_text(target, text)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{target} cannot be written ({reason}): name another file with --output") from error


def _write_image(target: Path, chart: Chart) -> None:
    image = chart_module.png(chart)
    try:
        with atomic_file(target) as temporary:
            temporary.write_bytes(image)
    except OSError as error:
        raise ValueError(
            f"the page is written, but {target} cannot be ({error.strerror or error}): leave out the images "
            "with --no-images"
        ) from error


def document(*, title: str, body: str, charts: Sequence[Chart]) -> str:
    """Return a complete page. Its security policy forbids any access to a network."""
    # Vega compiles its expressions, which needs 'unsafe-eval'. Nothing may be loaded over a network.
    policy = (
        "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data:"
    )
    specs = _script_json([_without_legend(chart) for chart in charts])
    themes = _script_json({"light": theme(dark=False), "dark": theme(dark=True)})
    # Names of files and text of models may hold what is not valid UTF-8.
    title, body = (text.encode("utf-8", "replace").decode("utf-8") for text in (title, body))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body><main>{body}</main>
<script type="application/json" id="charts">{specs}</script>
<script type="application/json" id="themes">{themes}</script>
<script type="module">{_script_code(chart_module.drawing_code(SCRIPT))}</script>
</body></html>
"""


def _without_legend(chart: Chart) -> chart_module.Spec:
    """Return the chart's specification without the legend, which the page has as text."""
    if not chart.labels:
        return chart.spec
    encoding = chart.spec["encoding"]
    return {**chart.spec, "encoding": {**encoding, "color": {**encoding["color"], "legend": None}}}


def _script_json(value: Any) -> str:
    """Return JSON that cannot end the script element around it, whatever text it has."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _script_code(code: str) -> str:
    return code.replace("</script", "<\\/script")


# Parts of a page --------------------------------------------------------------------------------------------
def heading(title: str, about: str) -> str:
    """Return the head of a page, with the button that changes its theme."""
    return (
        f'<header><div><h1>{html.escape(title)}</h1><p class="about">{html.escape(about)}</p></div>'
        '<button id="theme" type="button">dark</button></header>'
    )


def chart_grid(charts: Sequence[Chart], first: int = 0) -> str:
    """Return placeholders for charts, which the script fills."""
    cards = (
        f'<div class="chart"><h3>{html.escape(chart.title)}</h3><p>{html.escape(chart.subtitle)}</p>'
        f'{_legend(chart.labels)}<div class="canvas" id="chart-{index}"></div></div>'
        for index, chart in enumerate(charts, start=first)
    )
    return f'<div class="charts">{"".join(cards)}</div>'


def _legend(labels: Sequence[str]) -> str:
    """Return the names of a chart's lines with their colours. As text they wrap at any width of the page."""
    colours = len(chart_module.COLOURS)
    dashes = len(chart_module.DASHES)
    items = (
        f'<span><i class="d{index // colours % dashes}" style="--c: var(--c{index % colours})"></i>'
        f"{html.escape(label)}</span>"
        for index, label in enumerate(labels)
    )
    return f'<div class="legend">{"".join(items)}</div>' if labels else ""


def table(rows: Iterable[Sequence[Any]], *, head: Sequence[str] = ()) -> str:
    """Return rows of cells as a table; the first cell of a row is its name.

    With names of columns in `head`, a page too narrow for the columns shows each cell in a line of its own,
    after the name of its column.
    """
    top = f"<tr class=head>{''.join(f'<th><div>{html.escape(cell)}</div></th>' for cell in head)}</tr>"
    body = "".join(f"<tr>{''.join(_cells(row, head))}</tr>" for row in rows)
    kind = ' class="columns"' if head else ""
    return f'<div class="box"><table{kind}>{top if head else ""}{body}</table></div>'


def _cells(row: Sequence[Any], head: Sequence[str]) -> Iterable[str]:
    for index, cell in enumerate(row):
        text = html.escape(str(cell))
        if not head:
            yield f"<td{' class=name' if index == 0 else ''}>{text}</td>"
        elif index == 0:
            yield f"<td class=name><div>{text}</div></td>"
        else:
            yield f'<td data-of="{html.escape(head[index])}"><div>{text}</div></td>'


def folded(summary: str, inner: str) -> str:
    """Return a part of a page that is folded until its summary is clicked."""
    return f'<details class="further"><summary>{html.escape(summary)}</summary>{inner}</details>'


def _body(run: RunRecords, charts: Sequence[Chart]) -> str:
    began = _date(run.train[0]["time"]) if run.train else "no step logged yet"
    about = f"{run.status} · step {run.last_step:,} of {run.config['run']['steps']:,} · {began}"
    changed = run.changed_settings()
    if changed:
        about += f" · settings changed in a resumed session: {', '.join(changed)}"
    parts = [heading(run.name, about), _metrics(run)]
    if charts:
        parts.append(f"<h2>Curves</h2>{chart_grid(charts)}")
    else:
        parts.append(
            '<h2>Curves</h2><p class="soft">Nothing is logged yet: write the report again after a few '
            "steps.</p>"
        )
    # The order is that of a reader's questions: results first, settings last.
    parts += [_samples(run), _result(run), _warnings(run), _sessions(run)]
    # The settings of the newest session: what it changed is in the table of sessions.
    parts.append(f'<h2>Settings</h2><div class="box">{_nested("experiment", run.config, is_open=True)}</div>')
    if run.data:
        sources = {str(index): source for index, source in enumerate(run.data)}
        parts.append(f'<h2>Data</h2><div class="box">{_nested("sources", sources, is_open=True)}</div>')
    if run.environment:
        parts.append(f'<h2>Environment</h2><div class="box">{_nested("environment", run.environment)}</div>')
    return "".join(parts)


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # no date that a calendar has
        return "on an unknown date"


def _metrics(run: RunRecords) -> str:
    result = run.result or {}
    evaluation = run.held_out
    rivals = ", ".join(
        f"{name} {bits:.3f}"
        for name, value in (result.get("compressors") or {}).items()
        if (bits := number(value)) is not None
    )
    tokens = number(evaluation.get("tokens"))
    total = number(evaluation.get("total_tokens"))
    # Only completions may be scored, and then the loss is not that of all tokens.
    part = (
        ""
        if tokens is None or total is None or tokens == total
        else f", of {tokens:,.0f} of {total:,.0f} tokens, the completions"
    )
    pairs = [
        (
            number(evaluation.get("bits_per_byte")),
            ".3f",
            f"bits per byte on {run.measured_on}{', compressors: ' + rivals if rivals else ''}",
        ),
        (
            number(evaluation.get("lost_text")),
            ".2%",
            "of the text's bytes are lost by the tokenizer: bits per byte are not comparable",
        ),
        (number(evaluation.get("loss")), ".4f", f"loss on {run.measured_on}, nats per token{part}"),
        (number(result.get("best_loss")), ".4f", f"lowest loss {best_note(run)}"),
        (
            number(evaluation.get("unrounded_bits_per_byte")),
            ".3f",
            "bits per byte with weights before rounding",
        ),
        (number(evaluation.get("teacher_bits_per_byte")), ".3f", "bits per byte of the teacher"),
        (number(evaluation.get("teacher_kl")), ".4f", "KL from the teacher, nats per token"),
        (number(evaluation.get("teacher_agreement")), ".1%", "same most likely token as the teacher"),
        (number(evaluation.get("calibration_error")), ".3f", "calibration error"),
        (number(result.get("parameters")), ",.0f", "parameters"),
        (number(result.get("run_tokens")), ",.0f", "tokens trained on, in all sessions"),
        (number(result.get("session_tokens_per_second")), ",.0f", "tokens per second in the last session"),
    ]
    tiles = [_tile(f"{value:{format}}", label) for value, format, label in pairs if value is not None]
    for name, span in (("run_seconds", "all sessions"), ("session_seconds", "the last session")):
        if (seconds := number(result.get(name))) is not None:
            tiles.append(_tile(format_seconds(seconds), f"wall time of {span}"))
    return f'<div class="metrics">{"".join(tiles)}</div>'


def _tile(value: str, label: str) -> str:
    return f"<div class=metric><b>{value}</b><span>{html.escape(label)}</span></div>"


def best_note(run: RunRecords) -> str:
    """Describe the best loss of a run: its step, its text, and what the last step has on the same text."""
    result = run.result or {}
    step = result.get("best_step")
    at = f"at step {step:,}, " if isinstance(step, int) else ""
    loss = number(result.get("part_loss"))
    is_last = step == result.get("step")
    last = "" if loss is None or is_last else f", where step {result['step']:,} has {loss:.4f}"
    return f"{at}on {run.best_measured_on}{last}"


def _samples(run: RunRecords) -> str:
    if not run.samples:
        return ""
    steps = sorted({sample["step"] for sample in run.samples})
    parts = []
    # The newest samples come first, and only they are open.
    for step in reversed(steps):
        texts = "".join(
            _sample(str(sample["prompt"]), str(sample["text"]))
            for sample in run.samples
            if sample["step"] == step
        )
        parts.append(
            f"<details{' open' if step == steps[-1] else ''}><summary>step "
            f"{step:,}</summary>{texts}</details>"
        )
    return f'<h2>Samples</h2><div class="box">{"".join(parts)}</div>'


def _sample(prompt: str, text: str) -> str:
    # The prompt is shown in another colour.
    rest = text.removeprefix(prompt)
    return f"<pre><mark>{html.escape(prompt)}</mark>{html.escape(rest)}</pre>"


# What names of fields do not say, and units.
_RESULT_NAMES = {
    "measured_on": "loss and bits per byte measured on",
    "loss": "loss, nats per token",
    "best_loss": "lowest loss of the evaluations",
    "best_measured_on": "lowest loss measured on",
    "part_loss": "loss of the last step on that text",
    "run_tokens": "tokens trained on, all sessions",
    "run_seconds": "seconds, all sessions",
    "session_tokens": "tokens trained on, last session",
    "session_seconds": "seconds, last session",
    "session_tokens_per_second": "tokens per second, last session",
    "session_data_wait_share": "fraction of the time spent waiting for data, last session",
    "skipped": "skipped steps, all sessions",
}


def _result(run: RunRecords) -> str:
    if run.result is None:
        return ""
    # These have sections of their own.
    left_out = ("samples", "compressors", "session_seconds_by_category")
    rows: list[tuple[str, Any]] = [
        (_RESULT_NAMES.get(name, name.replace("_", " ")), shown(value))
        for name, value in run.result.items()
        if name not in left_out
    ]
    rows += [
        (f"{name}, bits per byte", shown(value))
        for name, value in (run.result.get("compressors") or {}).items()
    ]
    rows += [
        (f"seconds of the last session: {name}", f"{seconds:.1f}")
        for name, value in (run.result.get("session_seconds_by_category") or {}).items()
        if (seconds := number(value)) is not None
    ]
    return f"<h2>Result</h2>{table(rows)}"


def _sessions(run: RunRecords) -> str:
    """Return a table of the sessions of a run that was resumed, with what each changed."""
    if len(run.sessions) < 2 and not run.changed_settings():
        return ""
    rows = []
    for session in run.sessions:
        steps = f"{session.first_step:,} to {session.last_step:,}" if session.num_steps else "none that count"
        changes = {**session.changes, **session.environment}
        texts = [f"{path}: {_leaf(before)} → {_leaf(after)}" for path, (before, after) in changes.items()]
        rows.append((f"session {session.number}", steps, format_seconds(session.seconds), "\n".join(texts)))
    return f"<h2>Sessions</h2>{table(rows, head=('', 'steps', 'wall time', 'changed'))}"


def _warnings(run: RunRecords) -> str:
    texts = dict.fromkeys(
        str(message["text"])
        for message in run.messages
        if message.get("level") in ("WARNING", "ERROR", "CRITICAL")
    )
    return f"<h2>Warnings</h2>{table([(text,) for text in texts])}" if texts else ""


def _nested(name: str, value: Any, *, is_open: bool = False) -> str:
    """Return nested settings as foldable sections."""
    # A list of mappings, such as the groups of a stack, is shown like a mapping of its indices.
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        raise TypeError(f"{name} is not a mapping or a list of mappings")
    plain = {key: item for key, item in value.items() if not _has_parts(item)}
    rows = "".join(
        f"<tr><td class=name>{html.escape(key)}</td><td>{html.escape(_leaf(item))}</td></tr>"
        for key, item in plain.items()
    )
    inner = f"<table>{rows}</table>" if rows else ""
    inner += "".join(_nested(key, item) for key, item in value.items() if key not in plain)
    return f"<details{' open' if is_open else ''}><summary>{html.escape(name)}</summary>{inner}</details>"


def _has_parts(value: Any) -> bool:
    return (isinstance(value, dict) and bool(value)) or (
        isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    )


def _leaf(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
