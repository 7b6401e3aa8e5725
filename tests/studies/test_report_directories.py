"""Reports of studies' directories: runs, plans, costs, caveats, commands, and what a repository keeps."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

from slmjax import config
from slmjax.checkpoints.model_file import write_model_file
from slmjax.cli import main
from slmjax.studies import analyze, read_findings, run_study, write_findings
from slmjax.studies.costs import arm_cost
from slmjax.studies.report import (
    gather,
    log_entry,
    read_report,
    report_of,
    study_report,
    write_study_report,
    write_tuned,
)
from slmjax.studies.report.planned import read_planned
from slmjax.studies.report.reproducing import reproducing_commands
from slmjax.studies.report.tables import time_note
from slmjax.studies.study_directory import StudyDirectory, copy_study, load_study
from slmjax.studies.tuning import TriedRate, Tuned
from slmjax.telemetry.report.reading import read_run
from tests.studies.stub import StubTrainer, study
from tests.studies.stub import experiment as stub_experiment

CHECKOUT = "git checkout c0ffee  # of slmjax"


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
    assert (
        log_entry(study_report(tmp_path)).splitlines()[0].endswith("How fast? no result: fast & loose, third")
    )
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


def test_times_of_training_are_without_compilation(trained: Path) -> None:
    members = [json.loads(line) for line in (trained / "members.jsonl").read_text().splitlines()]
    for member in members:
        result = member["result"]
        # A run of 40 seconds in two sessions, of which the last one knows its pace.
        result |= {"run_tokens": 1000, "run_seconds": 40.0, "session_tokens_per_second": 50.0}
    (trained / "members.jsonl").write_text("".join(json.dumps(member) + "\n" for member in members))
    report = study_report(trained)
    arm = report.arms[0]
    assert (arm.costs["training_seconds"], arm.costs["seconds"]) == (20.0, 40.0)
    assert dict(arm.cost_errors)["training_seconds"] == 0
    assert time_note(report).startswith("Training time is that of the steps")
    # Runs from elsewhere may know their wall time alone.
    elsewhere = dataclasses.replace(report, arms=(dataclasses.replace(arm, costs={"seconds": 40.0}),))
    assert not time_note(elsewhere)


def test_little_held_out_text_is_a_caveat_once(tmp_path: Path) -> None:
    """The warning of the preparation, which only the first run of a study shows."""
    sizes = {"documents": 3, "tokens": 9, "hash": "0"}
    entry = {"source": "text.txt", "bytes": 98_800, "tokenizer": "0", "shards": "0", **sizes}
    entry["heldout"] = {"bytes": 200, **sizes}
    members = run_study(study(), tmp_path, train=StubTrainer())
    for member in members:
        (Path(member.result["run_dir"]) / "data.json").write_text(json.dumps([entry]))
    notes = analyze(study(), members).notes
    [little] = [note for note in notes if "so little text" in note]
    assert little.startswith(
        "text.txt: only 200 of 99,000 bytes (0.2%) are held out, and not 3%: its documents"
    )
    for member in members:
        entry["heldout"]["bytes"] = 2000
        (Path(member.result["run_dir"]) / "data.json").write_text(json.dumps([entry]))
    assert not [note for note in analyze(study(), members).notes if "so little text" in note]


# Commands ---------------------------------------------------------------------------------------------------
def test_commands_name_the_file_of_the_repository_or_the_copy(trained: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "experiments").mkdir(parents=True)
    (repository / ".git").touch()
    file = repository / "experiments" / "pace_study.py"
    file.write_text("# a study\n")
    [run_directory] = (trained / "slow" / "seed-0").iterdir()
    run = read_run(run_directory)
    program = repository / "__main__.py"
    program.touch()
    command = [str(program), "ablate", str(file), "--seeds=5", "--directory", str(trained)]
    runs = [dataclasses.replace(run, environment={"command": command})]
    assert reproducing_commands(trained, runs, size="small") == (CHECKOUT, "slmjax report moved")
    shutil.copy(file, trained / "study.py")
    assert reproducing_commands(trained, runs, size="large") == (
        CHECKOUT,
        "slmjax ablate experiments/pace_study.py --budget large --seeds 5",
    )
    # The file has changed since: the copy is what was run.
    file.write_text("# another study\n")
    assert reproducing_commands(trained, runs, size="small")[1:] == (
        "# where the directory moved is, which has a copy of the study file",
        "slmjax ablate moved/study.py --seeds 5 --directory moved-again",
    )


def test_the_copy_is_complete(tmp_path: Path) -> None:
    """A study file that imports a module of its folder, run from its copy in another place."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "shared_part.py").write_text("SEEDS = (0, 1)\n")
    lines = ("from shared_part import SEEDS", "from tests.studies import stub", "def study():")
    file = folder / "pace_study.py"
    file.write_text("\n".join([*lines, "    return stub.study(seeds=SEEDS)", ""]))
    load_study(file)
    copy_study(file, tmp_path / "studies" / "pace")
    shutil.rmtree(folder)
    [_, command] = reproducing_commands(tmp_path / "studies" / "pace", [], size=None)
    words = command.split()
    assert words[:2] == ["slmjax", "ablate"] and words[2] == "pace/study.py"
    assert load_study(tmp_path / "studies" / words[2]).seeds == (0, 1)


def test_what_a_repository_keeps_is_small_and_names_no_directory(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = (trained / "members.jsonl").read_text()
    place = f"{trained.resolve()}/slow/seed-2/model.json is missing"
    (trained / "members.jsonl").write_text(members.replace("<b>no memory</b>", place))
    out = tmp_path / "results" / "pace"
    page = command_output(capsys, "report", str(trained), "--no-page", "--output", str(out))
    assert page.strip() == str(out / "report.md")
    names = {"report.json", "report.md", "report.tex", "report.csv", "verdicts.csv", "verdicts.md"}
    assert {path.name for path in out.iterdir()} == names | {"verdicts.svg"}
    assert sum(path.stat().st_size for path in out.iterdir()) < 300_000
    for path in out.iterdir():
        assert str(tmp_path) not in path.read_text(), path.name
    assert "slow/seed-2/model.json is missing" in (out / "report.json").read_text()
    # Of a study with several rows the table is narrow enough for a README.
    head, rule, *rows = (out / "verdicts.md").read_text().splitlines()
    assert head == "| arm | bits per byte | difference (95% interval) | verdict |"
    assert rule.count("---") == 4 and rows[0].startswith("| slow |") and len(rows) == 3
    # All of it again, with the page, from the data alone.
    command_output(capsys, "report", str(out))
    assert (out / "report.html").is_file()
