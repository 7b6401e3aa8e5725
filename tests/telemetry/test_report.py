"""Pages of runs: what they hold, what they must not hold, and, in a browser without a window, how they
look.
"""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from slmjax.cli import main
from slmjax.telemetry.report import (
    RunRecords,
    config_differences,
    list_runs,
    read_run,
    write_comparison,
    write_report,
)
from slmjax.telemetry.report.charts import COLOURS, DARK_COLOURS, POINTS, Chart, lines, run_charts
from slmjax.telemetry.report.comparison import results, text_note
from tests.browser import holds, installed_browser, look, look_in_frame
from tests.written_run import write_run

# The charts of lines and the fields of the log that they show; two of them show the evaluations as well.
LINES = {
    "loss": "loss",
    "bits-per-byte": "bits_per_byte",
    "learning-rate": "learning_rate",
    "gradient-norm": "grad_norm",
    "throughput": "tokens_per_second",
    "utilisation": "mfu",
    "data-wait": "data_wait_share",
    "expert-imbalance": "expert_imbalance",
    "dropped": "dropped",
}
OF_EXPERTS = {"expert-imbalance", "dropped", "experts-layers-1"}
HEATS = {"gradient-norm-by-layer", "experts-layers-1"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "moe-run")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Path:
    return write_report(run_dir)


# What is read -----------------------------------------------------------------------------------------------
def test_of_steps_done_twice_the_later_counts(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert [record["step"] for record in run.train] == list(range(1, 41))
    assert [record["loss"] * record["step"] for record in run.train] == pytest.approx(
        [500.0] * 10 + [5.0] * 30
    )
    assert [record["step"] for record in run.evals] == [20, 40] and run.status == "finished"


def test_what_is_no_run_is_refused(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a run directory.*slmjax runs"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="given twice"):
        write_comparison([run_dir, run_dir.parent / "." / run_dir.name], tmp_path / "page.html")
    with pytest.raises(ValueError, match="two runs or more, got 1"):
        write_comparison([run_dir], tmp_path / "page.html")
    with pytest.raises(ValueError, match="holds no run"):
        list_runs(tmp_path)
    with pytest.raises(ValueError, match="there is no directory"):
        list_runs(tmp_path / "nowhere")
    damaged = write_run(tmp_path / "damaged")
    (damaged / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is not JSON .*: delete it and resume"):
        read_run(damaged)
    assert [item.status for item in list_runs(tmp_path)] == ["damaged"]


def without_scripts(text: str) -> str:
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


# What a page holds ------------------------------------------------------------------------------------------
def test_a_page_holds_all_that_it_needs(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<[^>]*(?:src|href)\s*=", without_scripts(text))
    assert "default-src 'none'" in text and len(text) < 3_000_000
    for part in (
        "Loss",
        "Gradient norm by layer",
        "Load of experts, layers/1",
        "Samples",
        "Settings",
        "Environment",
        "Warnings",
    ):
        assert part in text, part
    assert "step 40 of 40" in text and "1,234,567" in text and "xz -9 1.500" in text and "1m01s" in text
    for step in (20, 40):  # each sample once, under its step
        assert re.findall(
            rf"<summary>step {step}</summary><pre><mark>def &lt;x&gt;</mark>( at \d+)", text
        ) == [f" at {step}"]


def test_texts_of_a_run_stay_texts(page: Path) -> None:
    text = page.read_text()
    assert "alert(1)" in text and "<script>alert" not in text and "<img" not in without_scripts(text)
    assert text.count("</script>") == 3


def charts_of(run: Path) -> dict[str, Chart]:
    return {chart.name: chart for chart in run_charts(read_run(run))}


def test_all_that_was_logged_is_charted_point_by_point(run_dir: Path) -> None:
    charts = charts_of(run_dir)
    run = read_run(run_dir)
    assert charts.keys() == LINES.keys() | HEATS
    for name, field in LINES.items():
        shown = [(row["series"], row["step"], row["value"]) for row in charts[name].spec["data"]["values"]]
        expected = [
            ("training", item["step"], item[field]) for item in run.train if item[field] not in (None, "nan")
        ]
        assert len(expected) >= 38, name
        evaluated = (
            [("held out", item["step"], item[field]) for item in run.evals]
            if name in ("loss", "bits-per-byte")
            else []
        )
        assert shown == expected + evaluated, name
    cells = {
        name: [(row["step"], row["row"], row["value"]) for row in charts[name].spec["data"]["values"]]
        for name in HEATS
    }
    steps = range(1, 41)
    assert cells["gradient-norm-by-layer"] == [
        (step, *each) for step in steps for each in (("0", 0.1), ("1", 0.2), ("embed", 0.3))
    ]
    # Of two experts one has three quarters of the tokens: one and a half times its even share.
    assert cells["experts-layers-1"] == [(step, *each) for step in steps for each in (("0", 1.5), ("1", 0.5))]


def test_what_was_not_logged_has_no_chart(run_dir: Path, tmp_path: Path) -> None:
    everything = charts_of(run_dir).keys()
    assert charts_of(write_run(tmp_path / "dense", moe=False)).keys() == everything - OF_EXPERTS
    assert charts_of(write_run(tmp_path / "peak", peak=False)).keys() == everything - {"utilisation"}
    assert charts_of(write_run(tmp_path / "roomy", dropped=0.0)).keys() == everything - {"dropped"}


def test_values_that_are_not_finite_are_gaps(run_dir: Path) -> None:
    [chart] = [chart for chart in run_charts(read_run(run_dir)) if chart.name == "gradient-norm"]
    steps = [row["step"] for row in chart.spec["data"]["values"]]
    assert steps == [step for step in range(1, 41) if step != 5] and all(map(math.isfinite, steps))


def test_long_runs_are_thinned_to_their_last_record() -> None:
    records = [{"step": step, "loss": 1.0} for step in range(1, 12_346)]
    chart = lines("loss", "Loss", "", {"training": records}, "loss")
    assert chart is not None
    steps = [row["step"] for row in chart.spec["data"]["values"]]
    assert steps[0] == 1 and steps[-1] == 12_345 and POINTS / 2 < len(steps) <= POINTS + 1


def test_more_series_than_colours_have_other_dashes() -> None:
    series = {f"run {index}": [{"step": 1, "loss": 1.0}] for index in range(9)}
    chart = lines("loss", "Loss", "", series, "loss")
    assert chart is not None and chart.labels == tuple(series)
    dashes = chart.spec["layer"][0]["encoding"]["strokeDash"]["scale"]["range"]
    assert dashes == [[1, 0]] * 7 + [[6, 3]] * 2
    few = lines("loss", "Loss", "", dict(list(series.items())[:7]), "loss")
    assert few is not None and "encoding" not in few.spec["layer"][0]


@pytest.mark.parametrize("logged", [False, True])
def test_a_run_that_has_just_begun(tmp_path: Path, logged: bool) -> None:
    run = write_run(tmp_path / "young", finished=False)
    if not logged:
        (run / "log.jsonl").unlink()
    text = write_report(run, with_images=False).read_text()
    assert ("unfinished" in text) and ("Nothing is logged yet" in text) == (not logged)
    assert list_runs(tmp_path)[0].status == "unfinished"


def test_images_are_drawn(run_dir: Path, page: Path) -> None:
    names = {path.name for path in (run_dir / "plots").iterdir()}
    assert names == {f"{chart.name}.png" for chart in run_charts(read_run(run_dir))}
    for path in (run_dir / "plots").iterdir():
        content = path.read_bytes()
        assert (
            content.startswith(b"\x89PNG")
            and int.from_bytes(content[16:20], "big") > 1000
            and len(content) > 5000
        )


def test_differences_are_of_settings_that_differ(run_dir: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", lr=3e-3)
    rows = config_differences([read_run(run_dir), read_run(other)])
    assert rows == [("run.name", "moe-run", "other"), ("optim.lr", 0.001, 0.003)]
    text = write_comparison([run_dir, other], tmp_path / "page.html").read_text()
    assert "optim.lr" in text and "Held-out loss" in text and "Comparison of moe-run and other" in text


# The commands -----------------------------------------------------------------------------------------------
def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert not stopped.value.code
    return capsys.readouterr().out


def test_commands(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(tmp_path / "runs" / "other", finished=False, lr=3e-3)
    page = tmp_path / "pages" / "page.html"
    assert (
        output(capsys, "report", str(other), "--output", str(page), "--no-images").strip() == str(page)
        and page.is_file()
    )
    shown = output(capsys, "runs", str(tmp_path / "runs"))
    assert "other" in shown and "unfinished" in shown and "40/40" in shown and "0.100" in shown
    [record] = json.loads(output(capsys, "runs", "--json", str(tmp_path / "runs")))
    assert record["name"] == "other" and record["bits_per_byte"] == 0.1
    compared = tmp_path / "compared.html"
    assert (
        "optim.lr" in output(capsys, "compare", str(run_dir), str(other), "--output", str(compared))
        and compared.is_file()
    )
    actual = json.loads(
        output(capsys, "compare", str(run_dir), str(other), "--output", str(compared), "--json")
    )
    assert (
        actual["settings"]["optim.lr"] == {"moe-run": 0.001, "other": 0.003}
        and actual["results"]["status"]["other"] == "unfinished"
    )


def test_a_comparison_shows_what_each_run_was_evaluated_on(run_dir: Path) -> None:
    record = {"source": "a.jsonl", "fingerprint": "0123456789", "heldout": {"documents": 6, "bytes": 1254}}
    runs = [dataclasses.replace(read_run(run_dir), data=data) for data in ([record], [{"source": "a.jsonl"}])]
    assert ("held_out_text", "6 documents of 01234567, 1,254 bytes", None) in results(runs)
    assert text_note(runs) == "", "the text of the second is unknown"
    other = {**record, "heldout": {"documents": 7, "bytes": 1300}}
    assert "do not compare" in text_note([runs[0], dataclasses.replace(runs[1], data=[other])])


def test_text_that_a_tokenizer_loses_is_shown_with_bits_per_byte(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losing = write_run(tmp_path / "runs" / "losing")
    log = losing / "log.jsonl"
    log.write_text(log.read_text().replace('"documents": 2', '"documents": 2, "lost_text": 0.92'))
    shown = " ".join(output(capsys, "runs", str(tmp_path / "runs")).split())
    assert (
        "0.100!" in shown
        and "! losing: the tokenizer loses 92.00% of the text's bytes: not comparable across tokenizers"
        in shown
    )
    assert ("lost_text", None, 0.92) in results([read_run(run_dir), read_run(losing)])
    page = write_comparison([run_dir, losing], tmp_path / "page.html").read_text()
    assert "not comparable, the tokenizer of losing loses text" in page
    assert "92.00%" in write_report(losing, with_images=False).read_text()


def test_the_code_that_draws_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And bundled again if the file was changed."""
    from slmjax.telemetry.report import charts

    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path))
    bundled: list[str] = []

    class Package:
        __version__ = "1"

        @staticmethod
        def javascript_bundle(snippet: str) -> str:
            bundled.append(snippet)
            return f"draw(é);\n{snippet}"

    monkeypatch.setattr(charts, "converter", lambda: Package)
    draw = charts.drawing_code.__wrapped__
    assert draw("a") == draw("a") == "draw(é);\na" and bundled == ["a"]
    assert draw("b") == "draw(é);\nb" and bundled == ["a", "b"]
    for file in (tmp_path / "drawing").iterdir():
        file.write_text(file.read_text() + "steal()")
    assert draw("a") == "draw(é);\na" and bundled == ["a", "b", "a"]
    # A cache that cannot be written to costs time alone.
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLMJAX_CACHE", str(tmp_path / "file"))
    assert draw("a") == "draw(é);\na"


def test_without_the_extra(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    from slmjax.telemetry.report.charts import drawing_code

    drawing_code.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(run_dir)])
    assert stopped.value.code == 2 and "slmjax[plot]" in capsys.readouterr().err


def test_training_writes_the_page(trained, workplace: Path) -> None:
    run: RunRecords = read_run(workplace / json.loads(trained.stdout)["run_dir"])
    text = (run.path / "report.html").read_text()
    assert "Load of experts, layers/3" in text and "finished · step 60 of 60" in text
    assert (run.path / "plots" / "loss.png").is_file()


# In a browser -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> str:
    return installed_browser()


@pytest.mark.parametrize(
    ("theme", "width", "height"),
    [("light", 1400, 2700), ("dark", 1400, 2700), ("light", 390, 4700), ("dark", 390, 4700)],
)
def test_in_a_browser(browser: str, page: Path, tmp_path: Path, theme: str, width: int, height: int) -> None:
    actual, image = look_in_frame(browser, page, tmp_path, theme=theme, width=width, height=height)
    num_charts = str(len(LINES) + len(HEATS))
    expected = {"theme": theme, "width": str(width), "drawn": num_charts, "svgs": num_charts, "overflow": "0"}
    assert {name: actual.get(name) for name in expected} == expected
    for corner in (image[0, 0], image[-1, -1]):
        assert corner.max() < 60 if theme == "dark" else corner.min() > 200, corner
    names = list(charts_of(page.parent))
    for name, (left, top, right, bottom) in zip(names, json.loads(actual["canvases"]), strict=True):
        assert 0 <= left < right <= width and right - left > 300 and 0 <= top < bottom <= height, (
            "the picture does not hold this chart"
        )
        chart = image[top:bottom, left:right].astype(np.int32)
        # Axes and texts are greys. Lines and cells have colours from end to end; the colours of a legend
        # alone are narrower.
        coloured = np.ptp(chart, axis=-1) > 60
        assert coloured.any(axis=0).mean() > 0.6, name
        if name == "loss":
            ours, others = (DARK_COLOURS, COLOURS) if theme == "dark" else (COLOURS, DARK_COLOURS)
            assert holds(chart, ours[0]) and holds(chart, ours[1]) and not holds(chart, others[1])


def test_a_comparison_in_a_browser(browser: str, run_dir: Path, tmp_path: Path) -> None:
    """In a narrow frame, and by itself in a window, as people open it."""
    names = [f"an-experiment-20261201-0810{number}-1a2b3c" for number in (48, 49)]
    others = [write_run(tmp_path / name, lr=3e-3, finished=False) for name in names]
    page = write_comparison([run_dir, *others], tmp_path / "page.html")
    actual, _ = look_in_frame(browser, page, tmp_path, theme="light", width=390, height=1000)
    assert (actual["width"], actual["svgs"], actual["overflow"]) == ("390", "7", "0")
    # Cells are wider than a few letters, and legends are complete.
    assert int(actual["narrowest"]) > 150 and actual["cut"] == "0"
    dom = without_scripts(look(browser, page, "--window-size=1400,1000"))
    assert 'data-overflow="0"' in dom and dom.count("<svg") == 7
