"""Reports of studies: what pages, texts and tables hold, what they must not hold, and how pages look."""

import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmjax.studies.findings import COULD_NOT_ANSWER, AchievedPower
from slmjax.studies.report import (
    StudyReport,
    forest_picture,
    insert_entry,
    log_entry,
    read_report,
    report_of,
    write_from_data,
    write_report_files,
    write_study_report,
)
from slmjax.studies.report.charts import tradeoffs
from slmjax.studies.report.curves import POINTS, curve_charts
from slmjax.studies.report.data import printable
from slmjax.studies.report.documents import latex, latex_text, markdown, members_csv, verdicts_csv
from slmjax.studies.report.page import study_page
from slmjax.studies.report.pareto import Choice, front_text, is_resolved, pareto_front
from slmjax.studies.report.sentences import answer_text, losers, short_summary, summary, verdict_text
from slmjax.studies.report.tables import ladder_table
from slmjax.studies.report.verdict_charts import (
    LONGEST_INTERVAL,
    PAIRS_ROW,
    ROW,
    forest_chart,
    pairs_chart,
)
from slmjax.studies.statistics.ladders import LadderArm, LadderFindings, SizeGap
from slmjax.studies.statistics.results_table import Correction
from slmjax.studies.statistics.speedup import Direction
from slmjax.studies.statistics.verdicts import Verdict
from slmjax.telemetry.report.charts import COLOURS, DARK_COLOURS
from slmjax.telemetry.report.reading import read_run
from tests.browser import holds, installed_browser, look_in_frame
from tests.studies.sample_findings import ODD_NAMES, sample_findings, sample_report
from tests.written_run import write_run

# What every page shows, and what only reports with runs have.
ALWAYS = ("Verdicts", "What lost", "Arms", "Paired differences", "Power and noise", "Statistics", "Notes")
OF_RUNS = ("Learning curves", "Settings that differ", "Environment", "Reproduce", "Quality and cost")
OF_PLANS = (
    "Sizes",
    "Learning rates",
    "Quantities made equal",
    "Uncertainty of the held-out text",
    "Changes since the study was fixed",
)


@pytest.fixture(scope="module")
def report() -> StudyReport:
    return sample_report()


@pytest.fixture(scope="module")
def written(report: StudyReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all files of the report."""
    return write_report_files(report, tmp_path_factory.mktemp("study")).parent


# The data ---------------------------------------------------------------------------------------------------
def test_report_json_is_enough_for_all_files(report: StudyReport, written: Path, tmp_path: Path) -> None:
    assert read_report(written / "report.json") == report
    write_from_data(written / "report.json", tmp_path / "again")
    names = {path.name for path in written.iterdir()}
    assert names == {f"report.{kind}" for kind in ("html", "json", "md", "tex", "csv")} | {
        "verdicts.csv",
        "verdicts.md",
        "verdicts.svg",
    }
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes(), name


def test_a_report_json_of_a_newer_version_or_a_damaged_one_is_refused(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    data = json.loads((written / "report.json").read_text())
    path.write_text(json.dumps({**data, "version": 2}))
    with pytest.raises(ValueError, match="version 2.*newer slmjax"):
        read_report(path)
    path.write_text(json.dumps({**data, "arms": 1}))
    with pytest.raises(ValueError, match=r"report\.json: arms.*restore it"):
        read_report(path)
    with pytest.raises(ValueError, match="there is no .*slmjax report STUDY_DIR"):
        read_report(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="no results of a study"):
        write_study_report(tmp_path / "nowhere")


# The page ---------------------------------------------------------------------------------------------------
def headings(text: str) -> list[str]:
    return re.findall(r"<h2>([^<]*)</h2>", without_scripts(text))


def without_scripts(text: str) -> str:
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_a_page_holds_all_that_it_needs_and_no_markup_of_names(written: Path) -> None:
    text = (written / "report.html").read_text()
    body = without_scripts(text)
    assert set(headings(text)) == {*ALWAYS, *OF_RUNS, *OF_PLANS}
    assert headings(text)[0] == "Verdicts"
    assert not re.search(r"<[^>]*(?:src|href)\s*=", body) and "default-src 'none'" in text
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in body
    assert text.count("</script>") == 3 and len(text) < 3_000_000
    # Verdicts are words, for readers who do not see their colours.
    for words in ("better", "worse", "equal within 0.005", "not resolved (about 12 seeds would)"):
        assert f"<div>{words}</div>" in body, words


def test_sections_of_runs_are_left_out_without_runs() -> None:
    assert headings(study_page(report_of(sample_findings()))) == list(ALWAYS)


def test_a_study_with_one_seed_has_differences_and_no_interval() -> None:
    report = report_of(sample_findings(seeds=(7,)))
    assert [item.difference is not None for item in report.comparisons] == [True] * 4
    assert all(item.interval is None and item.verdict == "not resolved" for item in report.comparisons)
    chart = forest_chart(report)
    assert chart is not None and not any(row["has_interval"] for row in chart.spec["data"]["values"])
    assert "interval</div></th>" in study_page(report) and "not resolved" in log_entry(report)


def test_a_study_with_nothing_to_compare_has_a_page() -> None:
    findings = sample_findings(names=("alone",), seeds=(0,))
    report = report_of(findings)
    assert "There is no comparison yet." in study_page(report)
    assert headings(study_page(report))[:1] == ["Arms"]
    with pytest.raises(ValueError, match="no comparison with a difference"):
        forest_picture(report)


def test_the_axis_of_verdicts_is_not_stretched_by_one_interval(report: StudyReport) -> None:
    first, *others = report.comparisons
    wide = dataclasses.replace(report, comparisons=(dataclasses.replace(first, interval=(-9, 9)), *others))
    chart = forest_chart(wide)
    assert chart is not None
    rows = chart.spec["data"]["values"]
    assert [row["cut_low"] and row["cut_high"] for row in rows] == [True, False, False, False]
    differences = [item.difference or 0.0 for item in report.comparisons]
    span = max(differences) - min(differences)
    assert max(row["high"] for row in rows) <= max(differences) + 1.5 * LONGEST_INTERVAL * span


def test_a_picture_of_names_with_characters_that_no_image_has(report: StudyReport) -> None:
    """The converter would end the process at a zero."""
    named = dataclasses.replace(report, question="wide\0 or\x1b \ud800\uffff")
    assert "wide\ufffd or\ufffd \ufffd\ufffd" in forest_picture(named, "svg").decode()


def test_no_text_lies_on_a_line_or_an_interval(report: StudyReport) -> None:
    """Texts of a row end above its interval, its part of the line at zero, and its band."""
    chart = forest_chart(report)
    pairs = pairs_chart(report)
    assert chart is not None and pairs is not None
    for height, layers in ((ROW, chart.spec["layer"]), (PAIRS_ROW, pairs.spec["layer"])):
        marks = [layer["mark"] for layer in layers]
        # The arrow of an interval that is cut is a character on that interval.
        texts = [mark for mark in marks if mark["type"] == "text" and mark.get("fontSize", 0) < 14]
        lowest = max(mark["yOffset"] + mark["fontSize"] / 2 for mark in texts)
        highest = min(mark["yOffset"] - mark["fontSize"] / 2 for mark in texts)
        drawn = [mark for mark in marks if mark["type"] != "text"]
        tops = [mark["yOffset"] - half_height(mark) for mark in drawn]
        bottoms = [mark["yOffset"] + half_height(mark) for mark in drawn]
        assert lowest <= min(tops) and max(bottoms) <= height + highest
        # A line through all rows would have no row of its own.
        assert all("y" in layer["encoding"] or layer["mark"]["type"] in ("rule", "point") for layer in layers)


def half_height(mark: dict[str, Any]) -> float:
    if mark["type"] == "point":
        return math.sqrt(mark["size"]) / 2
    return (mark["size"] if mark["type"] == "tick" else mark["strokeWidth"]) / 2


def test_the_picture_can_be_read_on_a_page_of_800_pixels(report: StudyReport) -> None:
    picture = forest_picture(report).decode()
    assert 'width="800"' in picture and 'fill="white"' in picture
    # The title does not take its space from the rows.
    [height] = re.findall(r'<svg[^>]* height="(\d+)"', picture)
    assert int(height) >= ROW * len(report.comparisons) + 60
    sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)px"', picture)]
    assert sizes and min(sizes) >= 12


def test_the_picture_names_verdicts_in_words(report: StudyReport) -> None:
    picture = forest_picture(report).decode()
    assert picture.startswith("<svg") and "<script>" not in picture
    for words in ("better", "worse", "equal within 0.005", "not resolved"):
        assert words in picture
    assert forest_picture(report, "png").startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="choose svg or png"):
        forest_picture(report, "pdf")


# Fronts and curves ------------------------------------------------------------------------------------------
def test_pareto_front_by_hand() -> None:
    choices = [
        Choice("dear", cost=4.0, quality=1.0),
        Choice("cheap", cost=1.0, quality=3.0),
        Choice("middle", cost=2.0, quality=2.0),
        Choice("beaten", cost=3.0, quality=2.0),
        Choice("twin", cost=2.0, quality=2.0),
        Choice("worst", cost=1.0, quality=4.0),
    ]
    names = [choice.name for choice in pareto_front(choices, lower_is_better=True)]
    assert names == ["cheap", "middle", "twin", "dear"]
    higher = [choice.name for choice in pareto_front(choices, lower_is_better=False)]
    assert higher == ["worst"]


def test_costs_that_are_equal_have_no_chart(report: StudyReport) -> None:
    names = [chart.name for chart, _ in tradeoffs(report)]
    assert names == ["cost-parameters", "cost-flops", "cost-training_seconds", "cost-deployed_bytes"]


def with_seconds(report: StudyReport, seconds: tuple[float, ...], error: float) -> StudyReport:
    arms = tuple(
        dataclasses.replace(
            arm,
            costs={"seconds": 100.0, "training_seconds": each},
            cost_errors=(("training_seconds", error),),
        )
        for arm, each in zip(report.arms, seconds, strict=True)
    )
    return dataclasses.replace(report, arms=arms)


def test_seconds_that_differ_by_chance_have_no_chart(report: StudyReport) -> None:
    seconds = (50.0, 51.0, 54.0, 58.0, 60.0)
    assert [chart.name for chart, _ in tradeoffs(with_seconds(report, seconds, 1.0))] == [
        "cost-training_seconds"
    ]
    assert not tradeoffs(with_seconds(report, seconds, 4.0))


def test_a_pareto_front_names_differences_that_are_not_resolved() -> None:
    report = sample_report(NAMES)
    choices = [
        Choice("base", cost=1.0, quality=1.700),
        Choice("deep", cost=2.0, quality=1.650),
        Choice("wide", cost=3.0, quality=1.740),
        Choice("narrow", cost=1.0, quality=1.699),
    ]
    # The pooled noise is 0.0034, so that means of 3 seeds differ from 0.0064 on: those of narrow and deep do.
    assert front_text(report, choices, cost="FLOPs") == (
        "Pareto front over FLOPs, by the means: narrow, deep. Not resolved in bits per byte: base and narrow."
    )
    resolved = [choice for choice in choices if choice.name != "narrow"]
    assert front_text(report, resolved, cost="FLOPs") == "Pareto front over FLOPs: base, deep."
    nothing = [choices[0], choices[3]]
    assert "not resolved. By the means it is narrow" in front_text(report, nothing, cost="FLOPs")
    # The verdict counts where two arms were compared, whatever their means.
    assert is_resolved(report, "base", "wide") and not is_resolved(report, "odd", "base")
    assert is_resolved(report, "wide", "deep")
    quiet = dataclasses.replace(report, noise=None)
    assert not is_resolved(quiet, "wide", "deep")


def test_points_have_letters_that_are_no_part_of_a_name() -> None:
    names = tuple(f"{index} layers" for index in range(1, 29))
    chart, _ = tradeoffs(sample_report(names))[0]
    assert (chart.labels[0], chart.labels[26]) == ("A: 1 layers", "AA: 27 layers")
    assert [row["letter"] for row in chart.spec["data"]["values"]][24:] == ["Y", "Z", "AA", "AB"]
    # Letters of points that are close to each other stand at different sides.
    close, _ = tradeoffs(sample_report(NAMES))[0]
    sides = {row["letter"]: row["letter_at"] for row in close.spec["data"]["values"]}
    assert sides == {"A": "right", "B": "right", "C": "right", "D": "left", "E": "right"}


def test_curves_are_means_with_the_lowest_and_highest_run(tmp_path: Path) -> None:
    runs = {("a", seed): read_run(write_run(tmp_path / str(seed), steps=400)) for seed in (0, 1, 2)}
    # Another seed has twice the losses, and the third one diverged.
    doubled = [{**record, "loss": 2 * record["loss"]} for record in runs["a", 1].train]
    runs["a", 1] = dataclasses.replace(runs["a", 1], train=doubled)
    statuses = {("a", 0): "finished", ("a", 1): "finished", ("a", 2): "diverged"}
    held_out, training = curve_charts(runs, statuses=statuses, metric="bits_per_byte")
    assert held_out.title == "Held-out bits per byte" and held_out.curves[0].steps == (20, 400)
    [curve] = training.curves
    assert curve.num_runs == 2 and len(curve.steps) <= POINTS and curve.steps[-1] >= 400
    # Steps 397 to 400, of the run that was resumed: its losses are 5 / step.
    last = np.mean([5 / step for step in range(397, 401)])
    assert (curve.low[-1], curve.high[-1]) == pytest.approx((last, 2 * last), rel=1e-4)
    assert curve.mean[-1] == pytest.approx(1.5 * last, rel=1e-4)
    assert [(item.arm, item.seed) for item in training.diverged] == [("a", 2)]


# Texts ------------------------------------------------------------------------------------------------------
def test_latex_has_no_character_with_a_meaning(report: StudyReport) -> None:
    text = latex(report)
    assert text.count("{") == text.count("}") and text.count(r"\begin{") == text.count(r"\end{") == 8
    tables = re.findall(r"\\begin{tabular}{(l\w*)}(.*?)\\end{tabular}", text, flags=re.DOTALL)
    assert len(tables) == 4
    for columns, body in tables:
        rows = [line.strip() for line in body.splitlines() if line.strip().endswith(r"\\")]
        for row in rows:
            bare = re.sub(r"\$(?:[-+]|\\\w+)\$|\\[A-Za-z]+(?:{})?|\\.", "", row.removesuffix(r"\\"))
            assert bare.count("&") == len(columns) - 1, row
            assert not re.search(r"[#$%_^~\\]", bare), row
    assert all(ord(character) < 0x180 for character in text)


@pytest.mark.nightly
def test_latex_compiles(written: Path, tmp_path: Path) -> None:
    if (program := shutil.which("pdflatex")) is None:
        pytest.skip("pdflatex is not installed: whether LaTeX takes the tables is not tested here")
    document = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}"
    (tmp_path / "report.tex").write_text((written / "report.tex").read_text())
    (tmp_path / "paper.tex").write_text(document + "\\input{report.tex}\\end{document}\n")
    command = [program, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 page" in done.stdout, done.stdout[-2000:]


def test_latex_text_by_hand() -> None:
    assert latex_text("50% of a_b & c^2 #1 {x} ~ \\y $") == (
        r"50\% of a\_b \& c\textasciicircum{}2 \#1 \{x\} \textasciitilde{} \textbackslash{}y \$"
    )
    assert latex_text("*a --b `c [d]") == r"{*}a {-}{-}b \textasciigrave{}c {[}d{]}"
    assert latex_text("−0.1 ± 0.2\ncafé 名") == r"$-$0.1 $\pm$ 0.2 café {[}U$+$540D{]}"


def test_markdown_rows_have_the_columns_of_their_head(report: StudyReport) -> None:
    blocks = [block for block in markdown(report).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 11
    for block in blocks:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block
    assert "<script>" not in re.sub(r"\\<", "", markdown(report))


def test_csv_has_every_run_unrounded(report: StudyReport) -> None:
    rows = list(csv.DictReader(io.StringIO(members_csv(report))))
    assert [row["arm"] for row in rows] == [name for name in ODD_NAMES for _ in range(3)]
    values = {(row["arm"], int(row["seed"])): float(row["bits_per_byte"]) for row in rows}
    assert values == {(member.arm, member.seed): member.metrics["bits_per_byte"] for member in report.members}


def test_no_spreadsheet_takes_a_name_for_a_formula(report: StudyReport) -> None:
    names = ("=1+2", "+1 layer", "-cmd|' /C calc'!A0", "@SUM(1)", "-0.5")
    named = sample_report(names)
    for text in (members_csv(named), verdicts_csv(named)):
        cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
        formulas = [cell for cell in cells if cell.startswith(("=", "+", "@")) or cell.startswith("-cmd")]
        assert not formulas and "'+1 layer" in cells and "-0.5" in cells
    # Numbers stay numbers.
    differences = [float(row["difference"]) for row in csv.DictReader(io.StringIO(verdicts_csv(named)))]
    assert differences == [item.difference for item in named.comparisons] and min(differences) < 0


def test_names_that_no_format_can_hold(tmp_path: Path) -> None:
    """Half a surrogate pair, control characters, and what is no character."""
    names = ("base\0", "a\ud800b", "c\x1b[31md", "e\x85f\uffff", "\u202eg")
    report = sample_report(names, question="Is it \udcff?", notes=("\x07 \ud83d",))
    write_report_files(report, tmp_path)
    written = read_report(tmp_path / "report.json")
    assert [arm.name for arm in written.arms] == [
        "base\ufffd",
        "a\ufffdb",
        "c\ufffd[31md",
        "e\ufffdf\ufffd",
        names[4],
    ]
    assert written == printable(report) and "Is it \ufffd?" in (tmp_path / "report.html").read_text()
    for path in tmp_path.iterdir():
        assert not re.search("[\x00-\x08\x1b\x7f-\x9f]", path.read_text()), path.name
    assert "\ufffd" in log_entry(printable(report))


# Sentences and the log --------------------------------------------------------------------------------------
NAMES = ("base", "deep", "wide", "narrow", "odd")


def test_verdicts_in_words() -> None:
    report = sample_report(NAMES)
    assert summary(report) == (
        "Better than base: deep. Equal to base within 0.005: narrow. Not resolved: odd (about 12 seeds "
        "would). Worse than base: wide."
    )
    assert short_summary(report) == "better: deep; equal: narrow; not resolved: odd; worse: wide"
    pair = dataclasses.replace(report.comparisons[1], arm="deep, thin", against="wide")
    with_pair = dataclasses.replace(report, comparisons=(*report.comparisons[:2], pair))
    assert (
        summary(with_pair)
        == "Better than base: deep. Worse than base: wide. “deep, thin” against wide: worse."
    )
    assert short_summary(with_pair) == "better: deep; worse: wide, “deep, thin” against wide"
    lost = losers(report)
    assert lost[0].startswith("wide is worse than base: +0.039")
    assert lost[1].startswith("base loses to deep (−0.0")
    assert lost[-1] == "odd: of 3 runs, 1 diverged and 1 failed."
    many = dataclasses.replace(
        report, comparisons=tuple(dataclasses.replace(report.comparisons[0], arm=f"a{i}") for i in range(5))
    )
    assert short_summary(many) == "better: 5"


def test_an_entry_of_the_log_has_its_verdict_in_the_heading(tmp_path: Path) -> None:
    log = tmp_path / "LOG.md"
    entry = log_entry(sample_report(NAMES, date="2026-12-01"))
    heading = entry.splitlines()[0]
    assert heading == (
        "## 2026-12-01  Does the shape of a model matter? better: deep; equal: narrow; not resolved: odd; "
        "worse: wide"
    )
    with pytest.raises(ValueError, match=r"there is no .*LOG\.md"):
        insert_entry(entry, log)
    log.write_text("# Log\n\nNewest first.\n\n    ## YYYY-MM-DD  An example\n\n## 2026-11-30  Older\nText.\n")
    insert_entry(entry, log)
    text = log.read_text()
    order = [text.index(part) for part in ("# Log", "    ## YYYY", heading, "Verdict: Better", "Older")]
    assert order == sorted(order) and text.endswith("Text.\n") and "\n\n\n" not in text
    with pytest.raises(ValueError, match="has the entry .* already"):
        insert_entry(entry, log)
    log.write_text("")
    insert_entry(entry, log)
    assert log.read_text() == entry


def test_an_entry_is_short_however_long_the_study() -> None:
    names = ("base", *(f"arm {index}" for index in range(1, 9)))
    notes = tuple(f"note {index} of a study with much to say about its runs" for index in range(40))
    entry = log_entry(
        sample_report(names, notes=notes, environment=(("devices", "1 x cpu"), ("processors", "2")))
    )
    lines = entry.splitlines()
    prose = [line for line in lines[1:] if not line.startswith("|")]
    assert len(lines) <= 30 and max(map(len, prose)) <= 150 and "2 CPU cores" in entry
    assert lines.count("") == 4 and entry.endswith("more notes are in the report.\n")
    assert "Every arm: 614,400 tokens, 65.54 kB cache." in entry and "| training FLOPs |" in entry


def test_a_study_that_could_not_have_answered_says_so() -> None:
    report = sample_report(NAMES, could_answer=False)
    text = (
        "This study could not have answered its question for odd: a difference has to be 0.012 bits per byte"
    )
    assert answer_text(report).startswith(text) and "was set to 0.01." in answer_text(report)
    for document in (study_page(report), markdown(report), log_entry(report).replace("\n", " ")):
        assert document.count(text) == 1
    running = dataclasses.replace(report, expected_runs=90)
    assert answer_text(running).startswith("The runs so far cannot answer the question for odd: a difference")
    nothing = tuple(dataclasses.replace(item, verdict="not resolved") for item in report.comparisons)
    assert "answered its question: a" in answer_text(dataclasses.replace(report, comparisons=nothing))
    # A study whose comparisons are all resolved has its answer.
    resolved = tuple(item for item in report.comparisons if item.verdict != "not resolved")
    assert answer_text(dataclasses.replace(report, comparisons=resolved)) == ""
    assert answer_text(dataclasses.replace(report, could_answer=True)) == ""


def test_a_ladder_is_in_all_documents(report: StudyReport) -> None:
    trend = "The gap shrinks: −0.01 for ten times the FLOPs."
    for document in (study_page(report), markdown(report), log_entry(report).replace("\n", " ")):
        assert trend in document
    table = ladder_table(report)
    assert table is not None and len(table.rows) == 8
    assert table.rows[0][1:] == ("1M", "1e+12", "worse", "+0.0200", "[+0.0140, +0.0260]", "0.8 times")
    assert ladder_table(dataclasses.replace(report, ladder=None)) is None


def test_findings_are_all_in_the_report() -> None:
    """Variances, reasons, the correction, the power at the smallest effect, the ladder, memory and FLOPs."""
    findings = sample_findings(NAMES)
    power = AchievedPower(
        seeds=3,
        smallest_resolved=0.02,
        smallest_effect=0.005,
        power=0.17,
        seeds_needed=21,
        could_answer=False,
    )
    gap = SizeGap(
        size="1M",
        verdict=Verdict.WORSE,
        difference=0.02,
        standard_error=0.001,
        interval=(0.01, 0.03),
        compute=1e12,
        speedup=None,
        interpolated=None,
    )
    arm = LadderArm(
        arm="deep",
        against="base",
        gaps=(gap,),
        trend=None,
        adjusted_p=None,
        direction=Direction.NOT_RESOLVED,
        note="one size",
    )
    ladder = LadderFindings(
        name="width", sizes=(), arms=(arm,), curve=None, confidence=0.95, notes=("A note.",)
    )
    last = dataclasses.replace(findings.comparisons[-1], reason="the difference is too small for the noise")
    findings = dataclasses.replace(
        findings,
        arms=(dataclasses.replace(findings.arms[0], flops=3e12, peak_memory_bytes=2e9), *findings.arms[1:]),
        comparisons=(*findings.comparisons[:-1], last),
        rules=dataclasses.replace(findings.rules, smallest_effect=0.005),
        smallest_resolved=0.02,
        correction=Correction.CLOSED,
        power=power,
        ladder=ladder,
        notes=(f"{COULD_NOT_ANSWER}: with ...", "Another note."),
    )
    text = markdown(report_of(findings))
    for part in (
        "p (closed test)",
        "p of equality",
        "which is resolved 17 times in 100, and 4 times in 5 with 21 seeds.",
        "odd against base: not resolved, as the difference is too small for the noise; about 12 seeds",
        "deep − base: No trend of the gap is known (one size).",
        "- A note.",
        "- Another note.",
        "| 3e+12 | 2 GB |",
        "| pooled |",
    ):
        assert part in text, part
    assert text.count("could not have answered") == 1
    # Findings of earlier versions lack the power.
    assert report_of(dataclasses.replace(findings, power=None)).could_answer is False


def test_what_is_not_resolved_says_why(report: StudyReport) -> None:
    item = dataclasses.replace(report.comparisons[-1], seeds_needed=None, reason="1 seed in common")
    assert verdict_text(report, item) == "not resolved: 1 seed in common"


# In a browser -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> str:
    return installed_browser()


# Pixels are decoded slowly: the first charts by default, all of them every night.
@pytest.mark.parametrize(
    ("theme", "width", "height", "num_charts"),
    [
        ("dark", 420, 1200, 1),
        ("light", 1280, 3000, 3),
        pytest.param("light", 420, 9500, 9, marks=pytest.mark.nightly),
        pytest.param("dark", 1280, 5200, 9, marks=pytest.mark.nightly),
    ],
)
def test_in_a_browser(
    browser: str, written: Path, tmp_path: Path, theme: str, width: int, height: int, num_charts: int
) -> None:
    page = written / "report.html"
    actual, image = look_in_frame(browser, page, tmp_path, theme=theme, width=width, height=height)
    expected = {"theme": theme, "width": str(width), "drawn": "9", "svgs": "9", "overflow": "0", "cut": "0"}
    assert {name: actual.get(name) for name in expected} == expected
    assert int(actual["narrowest"]) > 60
    ours, others = (DARK_COLOURS, COLOURS) if theme == "dark" else (COLOURS, DARK_COLOURS)
    places = json.loads(actual["canvases"])
    assert all(0 <= left < right <= width and right - left > 300 for left, _, right, _ in places)
    for index, (left, top, right, bottom) in enumerate(places[:num_charts]):
        assert 0 <= top < bottom <= height, "the picture does not hold this chart"
        chart = image[top:bottom, left:right].astype(np.int32)
        # Texts and axes are greys; marks are coloured from end to end.
        coloured = np.ptp(chart, axis=-1) > 60
        assert np.flatnonzero(coloured.any(axis=0)).size > 0.05 * (right - left), index
        assert not holds(chart, others[0]), index
        # Dots of seeds are translucent, and lines of curves are hardly wider than a pixel.
        assert holds(chart, ours[0]) or index >= 5, index
