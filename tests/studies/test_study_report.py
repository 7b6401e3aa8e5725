"""Reports of studies: what pages, texts and tables hold, what they must not hold, and how pages look."""

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slmjax import config
from slmjax.checkpoints.model_file import write_model_file
from slmjax.cli import main
from slmjax.studies import analyze, read_findings, run_study, write_findings
from slmjax.studies.costs import arm_cost
from slmjax.studies.report import (
    StudyReport,
    forest_picture,
    gather,
    insert_entry,
    log_entry,
    read_report,
    report_of,
    study_report,
    write_from_data,
    write_report_files,
    write_study_report,
    write_tuned,
)
from slmjax.studies.report.charts import tradeoffs
from slmjax.studies.report.curves import POINTS, curve_charts
from slmjax.studies.report.documents import latex, latex_text, markdown, members_csv
from slmjax.studies.report.page import study_page
from slmjax.studies.report.pareto import Choice, pareto_front
from slmjax.studies.report.planned import read_planned
from slmjax.studies.report.sentences import losers, short_summary, summary
from slmjax.studies.report.verdict_charts import LONGEST_INTERVAL, forest_chart
from slmjax.studies.study_directory import StudyDirectory
from slmjax.studies.tuning import TriedRate, Tuned
from slmjax.telemetry.report.charts import COLOURS, DARK_COLOURS
from slmjax.telemetry.report.reading import read_run
from tests.browser import holds, installed_browser, look_in_frame
from tests.studies.sample_findings import ODD_NAMES, sample_findings, sample_report
from tests.studies.stub import StubTrainer, study
from tests.studies.stub import experiment as stub_experiment
from tests.written_run import write_run

# What every page shows, and what only reports with runs have.
ALWAYS = ("Verdicts", "What lost", "Arms", "Paired differences", "Power and noise", "Statistics", "Notes")
OF_RUNS = ("Learning curves", "Settings that differ", "Environment", "Reproduce", "Quality and cost")
OF_PLANS = (
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
    assert names == ["cost-parameters", "cost-flops", "cost-seconds", "cost-deployed_bytes"]


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
    assert latex_text("−0.1 ± 0.2\ncafé 名") == r"$-$0.1 $\pm$ 0.2 café {[}U$+$540D{]}"


def test_markdown_rows_have_the_columns_of_their_head(report: StudyReport) -> None:
    blocks = [block for block in markdown(report).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 10
    for block in blocks:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block
    assert "<script>" not in re.sub(r"\\<", "", markdown(report))


def test_csv_has_every_run_unrounded(report: StudyReport) -> None:
    rows = list(csv.DictReader(io.StringIO(members_csv(report))))
    assert [row["arm"] for row in rows] == [name for name in ODD_NAMES for _ in range(3)]
    values = {(row["arm"], int(row["seed"])): float(row["bits_per_byte"]) for row in rows}
    assert values == {(member.arm, member.seed): member.metrics["bits_per_byte"] for member in report.members}


# Sentences and the log --------------------------------------------------------------------------------------
NAMES = ("base", "deep", "wide", "narrow", "odd")


def test_verdicts_in_words() -> None:
    report = sample_report(NAMES)
    assert summary(report) == (
        "Better than base: deep. Equal to base within 0.005: narrow. Not resolved: odd (about 12 seeds "
        "would). Worse than base: wide."
    )
    assert short_summary(report) == "better: deep; equal: narrow; not resolved: odd; worse: wide"
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


# Directories ------------------------------------------------------------------------------------------------
@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A study with a run that diverged and one that failed, whose directory was moved since."""
    trainer = StubTrainer(
        statuses={(2e-3, 2): "diverged"}, errors={(1e-3, 2): RuntimeError("<b>no memory</b>")}
    )
    defined = study(question="How fast?", further_metrics=("calibration_error",))
    members = run_study(defined, tmp_path / "made", train=trainer)
    write_findings(analyze(defined, members), tmp_path / "made")
    return (tmp_path / "made").rename(tmp_path / "moved")


def test_the_report_of_a_study_directory(trained: Path) -> None:
    page = write_study_report(trained)
    report = read_report(trained / "report.json")
    assert page == trained / "report.html" and report.question == "How fast?"
    by_name = {arm.name: arm for arm in report.arms}
    assert (by_name["slow"].failed, by_name["slow"].ended) == (1, 3)
    assert (by_name["third"].diverged, by_name["third"].failed, by_name["third"].ended) == (1, 0, 3)
    assert {(item.arm, item.seed): item.status for item in report.members}["third", 2] == "diverged"
    # Runs are looked for in the directory: the recorded paths are those of before it was moved.
    assert report.settings_of == ("slow", "fast & loose", "third")
    assert [(item.path, item.values) for item in report.settings] == [
        ("optim.lr", ("0.001", "0.002", "0.002"))
    ]
    # The stub has one evaluation on part of the text, of which there is no line to draw.
    assert not report.curves
    assert "<b>no memory" not in page.read_text() and "c0ffee" in page.read_text()


def test_a_study_in_progress_has_the_findings_of_what_has_ended(tmp_path: Path) -> None:
    defined = study(seeds=(0, 1, 2), equal_within=0.01, question="How fast?")
    StudyDirectory.create(tmp_path, defined)
    assert study_report(tmp_path).comparisons[0].difference is None, "nothing has ended"
    members = run_study(defined, tmp_path, train=StubTrainer())
    # Without findings.json, and with one that is older than the last members.
    complete = report_of(analyze(defined, members), members).comparisons
    assert study_report(tmp_path).comparisons == complete
    write_findings(analyze(defined, members[:6]), tmp_path)
    report = study_report(tmp_path)
    assert report.comparisons == complete and report.equal_within == 0.01 and report.question == "How fast?"
    write_findings(analyze(defined, members, changes=("one",)), tmp_path)
    assert study_report(tmp_path).changes == ("one",)


def test_members_of_another_experiment_do_not_count(tmp_path: Path) -> None:
    defined = study(seeds=(0, 1, 2))
    StudyDirectory.create(tmp_path, defined)
    run_study(defined, tmp_path, train=StubTrainer())
    lines = (tmp_path / "members.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    (tmp_path / "members.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps({**record, "fingerprint": "f" * 16})]) + "\n"
    )
    arms = {arm.name: arm.seeds for arm in study_report(tmp_path).arms}
    assert arms == {"slow": (0, 1, 2), "fast & loose": (0, 1, 2), "third": (0, 1)}


def test_what_was_planned_is_shown(trained: Path) -> None:
    """What was made equal, and the rates that were chosen."""
    experiment = config.to_json(stub_experiment())
    match = {"arm": "third", "quantity": "flops", "dimension": "steps", "target": 1e12, "before": 2e12}
    match |= {"after": 1.005e12, "value_before": 20, "value_after": 10, "tolerance": 0.01}
    plan = {
        "size": "large",
        "arms": {"slow": {"experiment": experiment}, "rounded": {"derived_from": "slow"}},
        "matched": [match, {**match, "after": 1.02e12}],
    }
    tuned = Tuned(
        arm="slow",
        metric="bits_per_byte",
        seeds=(1000,),
        tried=(
            TriedRate(rate=1e-3, value=1.5, status="finished"),
            TriedRate(rate=2e-3, value=None, status="diverged"),
        ),
        own_rate=1e-3,
        rate=1e-3,
        value=1.5,
        is_fitted=False,
        is_resolved=False,
        reason="the best rate is the lowest",
        sensitivity=0.02,
        ceiling=3.0,
    )
    (trained / "plan.json").write_text(json.dumps(plan))
    write_tuned(trained, [tuned])
    planned = read_planned(trained)
    assert planned.size == "large"
    assert [(item.is_met, item.changed) for item in planned.matched] == [
        (True, "steps 20 to 10"),
        (False, "steps 20 to 10"),
    ]
    [rate] = planned.tuned
    assert rate.tried == ((1e-3, 1.5), (2e-3, None)) and not rate.is_resolved
    assert (rate.sensitivity, rate.text, rate.seeds) == (0.02, "the best rate is the lowest", (1000,))
    assert planned.derived_from == {"rounded": "slow"}
    assert planned.experiments["slow"].config == experiment
    (trained / "plan.json").write_text("[]")
    with pytest.raises(ValueError, match=r"plan\.json.*restore the file"):
        read_planned(trained)


def test_costs_are_counted_once_from_the_settings_of_runs(trained: Path) -> None:
    [run] = (trained / "slow" / "seed-0").iterdir()
    write_model_file(run, dataclasses.replace(stub_experiment().model, vocab_size=512))
    findings = read_findings(trained)
    write_study_report(trained, findings)
    costs = {arm.name: arm.costs for arm in read_report(trained / "report.json").arms}
    expected = arm_cost(stub_experiment(), vocab_size=512)
    assert costs["slow"]["flops"] == expected.flops and "flops" not in costs["third"]
    assert costs["slow"]["deployed_bytes"] == expected.deployed_bytes
    # What runs have measured counts more.
    assert costs["slow"]["tokens"] == 1_064_778 and costs["slow"]["parameters"] == 1
    before = (trained / "costs.json").read_text()
    config_file = run / "config.json"
    config_file.write_text(config_file.read_text().replace('"steps": 10', '"steps": 20'))
    write_study_report(trained, findings)
    assert (trained / "costs.json").read_text() == before, "the member is the same"


def test_a_damaged_run_does_not_hide_the_others(trained: Path) -> None:
    findings = analyze(study(), run_study(study(), trained, train=StubTrainer()))
    [run] = (trained / "slow" / "seed-0").iterdir()
    (run / "config.json").write_text("{")
    report = gather(trained, findings)
    assert any(note.startswith("slow, seed 0: left out of curves") for note in report.notes)
    assert report.settings_of == ("slow", "fast & loose", "third")


def command_output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    captured = capsys.readouterr()
    assert not stopped.value.code, captured.err
    return captured.out


def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_output(capsys, "report", str(trained)).strip() == str(trained / "report.html")
    log = tmp_path / "LOG.md"
    log.write_text("# Log\n")
    entry = command_output(capsys, "report", str(trained), "--log", "--write", "--log-file", str(log))
    assert entry.startswith("## ") and "How fast?" in entry and entry.strip() in log.read_text()
    # What is shipped of a study: its data alone, from which the rest is written elsewhere.
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (trained / "report.json").rename(shipped / "report.json")
    out = command_output(capsys, "report", str(shipped), "--output", str(tmp_path / "out"), "--json")
    assert json.loads(out)["studies"][0]["study"] == "pace" and (tmp_path / "out" / "report.tex").is_file()
    # A file with several studies has a directory for each.
    (tmp_path / "studies.json").write_text(json.dumps({"size": "small", "studies": {"pace": "shipped"}}))
    assert command_output(capsys, "report", str(tmp_path)).strip() == str(shipped / "report.html")
    for words, problem in (
        ([str(trained), "--write"], "use both"),
        ([str(tmp_path / "nowhere")], "no directory that exists"),
        ([str(log.parent / "out")], ""),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["report", *words])
        assert bool(stopped.value.code) is bool(problem) and problem in capsys.readouterr().err


def test_without_the_extra_all_but_the_page_is_written(
    trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert write_study_report(trained) == trained / "report.md"
    assert "slmjax[plot]" in caplog.text and not (trained / "report.html").exists()


# In a browser -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> str:
    return installed_browser()


# Pixels are decoded slowly: the first charts by default, all of them every night.
@pytest.mark.parametrize(
    ("theme", "width", "height", "num_charts"),
    [
        ("dark", 420, 1200, 1),
        ("light", 1280, 2600, 3),
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
