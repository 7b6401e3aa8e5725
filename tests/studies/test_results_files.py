"""Results of runs that slmjax did not train: every format that is read, outcomes by status and cell, and
errors that name the cell or the near column.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmjax.studies import Question, Verdict, run_study
from slmjax.studies.findings import Findings, analyze_members
from slmjax.studies.foreign_results import ForeignResults, choose_columns, read_columns, with_names
from slmjax.studies.results_files import read_results
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.study_directory import StudyDirectory
from tests.studies.stub import StubTrainer, study

LOSSES = {"adam": (1.50, 1.52, 1.49), "muon": (1.40, 1.43, 1.395)}
RUNS = [
    {"optimizer": arm, "seed": seed, "val_loss": loss}
    for arm, losses in LOSSES.items()
    for seed, loss in enumerate(losses)
]


def read(*paths: Path, baseline: str | None = "adam", pattern: str = "", **columns: Any) -> ForeignResults:
    table = read_results(paths)
    table = with_names(table, pattern) if pattern else table
    return read_columns(table, choose_columns(table, **columns), baseline=baseline, rules=Rules())


def judged(results: ForeignResults) -> Findings:
    return analyze_members(results.question, results.members)


def csv_text(runs: list[dict[str, Any]], separator: str = ",") -> str:
    lines = [separator.join(runs[0]), *(separator.join(map(str, run.values())) for run in runs)]
    return "\n".join(lines) + "\n"


def wandb_runs() -> str:
    """As the table of runs is exported: quoted, with columns of the tracker."""
    head = '"Name","State","Created","Runtime","optimizer","seed","_step","val_loss"'
    rows = [
        f'"swift-{i}","finished","2026-11-30T10:0{i}:00.000Z","61","{run["optimizer"]}","{run["seed"]}","99",'
        f'"{run["val_loss"]}"'
        for i, run in enumerate(RUNS)
    ]
    return "\n".join([head, *rows]) + "\n"


def wandb_chart() -> str:
    """As a chart is exported: a line for each step, three columns for each run, and blanks."""
    names = [f"{run['optimizer']}-s{run['seed']} - val/loss" for run in RUNS]
    head = ["Step", *(f"{name}{end}" for name in names for end in ("", "__MIN", "__MAX"))]
    values = [[9.0] * 6, [run["val_loss"] for run in RUNS], [""] * 6]
    rows = [[10 * i, *(value for value in row for _ in range(3))] for i, row in enumerate(values)]
    return "\n".join(",".join(f'"{cell}"' for cell in row) for row in [head, *rows])


def history() -> str:
    """As the history of runs is saved: a line for each step, settings nested as in W&B's API."""
    rows = [
        {
            "_step": step,
            "config": {"optimizer": {"value": run["optimizer"], "desc": None}, "seed": run["seed"]},
        }
        | ({} if loss is None else {"val_loss": loss})
        for run in RUNS
        for step, loss in ((0, 9.0), (10, run["val_loss"]), (11, None))
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def columns_of(runs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [run[name] for run in runs] for name in runs[0]}


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("a.csv", lambda: csv_text(RUNS), {}),
        ("bom.csv", lambda: "\ufeff" + csv_text(RUNS, ";"), {}),
        ("a.tsv", lambda: csv_text(RUNS, "\t"), {}),
        ("a.jsonl", lambda: "\n".join(map(json.dumps, RUNS)), {}),
        ("a.json", lambda: json.dumps(RUNS), {}),
        ("lists.json", lambda: json.dumps(columns_of(RUNS)), {}),
        (
            "pandas.json",
            lambda: json.dumps({name: dict(enumerate(values)) for name, values in columns_of(RUNS).items()}),
            {},
        ),
        (
            "split.json",
            lambda: json.dumps({"columns": [*RUNS[0]], "data": [[*run.values()] for run in RUNS]}),
            {},
        ),
        ("wandb.csv", wandb_runs, {"metric": "val_loss"}),
        ("history.jsonl", history, {}),
        (
            "chart.csv",
            wandb_chart,
            {"pattern": r"(?P<optimizer>.+)-s(?P<seed>\d+)", "metric": "val/loss"},
        ),
    ],
)
def test_all_formats_come_to_the_same(
    tmp_path: Path, name: str, text: Callable[[], str], options: dict[str, Any]
) -> None:
    (tmp_path / name).write_text(text())
    results = read(tmp_path / name, arm="optimizer", **options)
    assert (results.question.arms, results.question.seeds) == (("adam", "muon"), (0, 1, 2))
    findings = judged(results)
    assert {arm.arm: arm.values for arm in findings.arms} == LOSSES
    assert findings.comparisons[0].verdict is Verdict.BETTER
    # Only histories have steps, which must then be the same for all.
    assert findings.is_matched is (True if name in ("history.jsonl", "chart.csv") else None)


def test_outcomes(tmp_path: Path) -> None:
    runs = [
        {"arm": "base", "seed": 0, "state": "finished", "loss": "1.5"},
        {"arm": "base", "seed": 1, "state": "Finished", "loss": "1.6"},
        {"arm": "base", "seed": 2, "state": "", "loss": "1.7"},
        {"arm": "new", "seed": 0, "state": "finished", "loss": "nan"},
        {"arm": "new", "seed": 1, "state": "diverged", "loss": "3.0"},
        {"arm": "new", "seed": 2, "state": "crashed", "loss": "1.2"},
        {"arm": "third", "seed": 0, "state": "running", "loss": "1.2"},
        {"arm": "third", "seed": 1, "state": "finished", "loss": ""},
        {"arm": "third", "seed": 2.0, "state": "finished", "loss": "Infinity"},
    ]
    (tmp_path / "runs.csv").write_text(csv_text(runs))
    results = read(tmp_path / "runs.csv", baseline=None, metric="loss")
    assert results.question.baseline == "base" and set(results.columns.guessed) == {"arm", "seed", "status"}
    statuses = [member.status for member in results.members]
    assert statuses == ["finished"] * 3 + ["diverged"] * 2 + ["failed"] * 2 + ["finished", "diverged"]
    findings = judged(results)
    assert [arm.diverged for arm in findings.arms] == [(), (0, 1), (2,)]
    assert "new, seed 2: failed (status 'crashed'), and left out of its pairs." in findings.notes
    assert "third, seed 1: has no finite loss, and is left out of its pairs." in findings.notes


def test_a_step_that_was_trained_again_counts_as_it_was_last(tmp_path: Path) -> None:
    lines = ["adam,0,1,3", "adam,0,2,2.5", "adam,0,2,2", "muon,0,1,3", "muon,0,2,1"]
    (tmp_path / "runs.csv").write_text("\n".join(["arm,seed,step,loss", *lines]))
    results = read(tmp_path / "runs.csv")
    assert [member.metric_value("loss") for member in results.members] == [2.0, 1.0]


def test_cells_as_other_programs_write_them(tmp_path: Path) -> None:
    """Numbers of rows, seeds that no float has, and line separators that JSON allows within a text."""
    seeds = (2**53, 2**53 + 1)
    lines = [f"{i},{arm},{seed},{i + 1.5}" for i, arm in enumerate(("adam", "muon")) for seed in seeds]
    (tmp_path / "runs.csv").write_text("\n".join([",arm,seed,loss", *lines]))
    results = read(tmp_path / "runs.csv")
    assert results.columns.metric == "loss" and results.question.seeds == seeds
    runs = [{"arm": arm, "seed": seed, "loss": 1.5} for arm in ("adam", "a\u2028b\x85c") for seed in (0, 1)]
    (tmp_path / "runs.jsonl").write_text("\n".join(json.dumps(run, ensure_ascii=False) for run in runs))
    assert read(tmp_path / "runs.jsonl").question.arms == ("adam", "a\u2028b\x85c")


def test_arms_by_number(tmp_path: Path) -> None:
    runs = [{"lr": lr, "seed": seed, "loss": 1 + lr * seed} for lr in (0.001, 0.002) for seed in (0, 1)]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, runs)))
    assert (
        read(tmp_path / "runs.jsonl", arm="lr", metric="loss", baseline="1e-3").question.baseline == "0.001"
    )
    with pytest.raises(
        ValueError, match="--baseline 0.003 is no arm by the column lr.* Arms are 0.001, 0.002"
    ):
        read(tmp_path / "runs.jsonl", arm="lr", metric="loss", baseline="0.003")


def test_equal_numbers_are_one_arm(tmp_path: Path) -> None:
    lines = ["lr,seed,loss", "0.001,0,1.5", "1e-3,1,1.6", "2e-3,0,1.25", ".002,1,1.5", "1.00,0,2", "1,1,2"]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    results = read(tmp_path / "runs.csv", arm="lr", baseline="0.0010")
    assert results.question.arms == ("0.001", "2e-3", "1.00") and results.question.baseline == "0.001"
    # Identifiers that a float would round to one number are two arms.
    lines = ["arm,seed,loss", "9007199254740993,0,1", "9007199254740992,0,2", "nan,0,1", "NaN,0,3"]
    (tmp_path / "ids.csv").write_text("\n".join(lines))
    assert len(read(tmp_path / "ids.csv", baseline="nan").question.arms) == 4


def test_two_runs_of_one_arm_and_seed_are_no_history(tmp_path: Path) -> None:
    """Runs that ended at different steps are not steps of one run, if their names say so."""
    lines = ["Name,arm,seed,step,loss", "a,adam,0,10,1.5", "b,adam,0,20,1.25", "c,muon,0,20,1"]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 2 of .* and line 3 of .* both of arm adam, seed 0: remove"):
        read(tmp_path / "runs.csv")


def test_several_studies_are_told_apart(tmp_path: Path) -> None:
    """Members of several studies are never taken for the same runs, nor for steps of one."""
    studies = tmp_path / "studies"
    stub = StubTrainer()
    run_study(study((0, 1)), studies / "first", train=stub)
    second = run_study(study((0, 1), name="second"), studies / "second", train=stub)
    # Runs that a study does not count are none of its members.
    run_study(study((7,), name="rates"), studies / "first" / "tuning", train=stub)
    # What is below a directory, and directories one by one, come to the same.
    for paths in ([studies], [studies / "first", studies / "second"]):
        results = read(*paths, baseline="first: slow")
        assert len(results.members) == 12 and results.question.seeds == (0, 1)
        assert results.question.arms[3:] == ("second: slow", "second: fast & loose", "second: third")
    with pytest.raises(ValueError, match="--baseline slow is no arm .* Did you mean 'first: slow'"):
        read(studies, baseline="slow")
    message = "slow, seed 0 of .*first and slow, seed 0 of .*second are both of arm 0.001, seed 0: they are "
    with pytest.raises(ValueError, match=f"{message}of two studies. Name the directory of one, .*--campaign"):
        read(studies, arm="optim.lr", baseline="0.001")
    runs = [Path(member.result["run_dir"]) for member in second]
    message = "are both of arm 0.002, seed 0: leave out one of them"
    with pytest.raises(ValueError, match=f"stub-.* and .*stub-.* {message}"):
        read(*runs, baseline="0.001", arm="optim.lr")
    with pytest.raises(ValueError, match="they differ in optim.lr. Name one of these with --arm, or leave"):
        read(*runs, baseline="nano", arm="run.name")


def test_a_study_has_its_settings_as_columns(tmp_path: Path) -> None:
    stub = StubTrainer(errors={(2e-3, 1): RuntimeError("no room")})
    asked = study(arms=study().arms[:2])
    StudyDirectory.create(tmp_path / "study", asked)
    run_study(asked, tmp_path / "study", train=stub)
    (tmp_path / "study").rename(tmp_path / "moved")
    results = read(tmp_path / "moved", arm="optim.lr", baseline="1e-3")
    assert results.question.arms == ("0.001", "0.002")
    # A member that failed left no run that says so: its settings are those of the plan.
    assert [member.status for member in results.members] == ["finished"] * 3 + ["failed"] + ["finished"] * 2
    # A path with stars, as in an arm's changes.
    with pytest.raises(ValueError, match="are both of arm 4, seed 0: they differ in optim.lr."):
        read(tmp_path / "moved", arm="model.stack.*.pattern.*.mixer.num_heads", baseline="4")
    with pytest.raises(ValueError, match="has several values of a.[*]: a.x = 1, a.y = 2. Name one of these"):
        (tmp_path / "runs.jsonl").write_text('{"a": {"x": 1, "y": 2}, "seed": 0, "loss": 1}\n')
        read(tmp_path / "runs.jsonl", arm="a.*")


def test_run_directories_have_their_settings_as_columns(tmp_path: Path) -> None:
    members = run_study(study(), tmp_path / "study", train=StubTrainer())
    run_dirs = [Path(member.result["run_dir"]) for member in members if member.arm != "third"]
    for results in (
        read(*run_dirs, baseline="0.001"),
        read(tmp_path / "study" / "slow", tmp_path / "study" / "fast-loose", arm="lr", baseline="1e-3"),
    ):
        assert results.columns.arm == "optim.lr" and results.columns.metric == "bits_per_byte"
        assert results.question.seeds == (0, 1, 2) and results.question.arms == ("0.001", "0.002")
        finished = [member.metric_value("bits_per_byte") for member in results.members]
        assert finished.count(None) == 0
    # The directory of the study itself has the names of its arms.
    results = read(tmp_path / "study", baseline="slow")
    assert results.question.arms == ("slow", "fast & loose", "third")
    assert [member.metric_value("loss") for member in results.members] == [
        member.metric_value("loss") for member in members
    ]


HEAD = "optimizer,seed,loss"
RUN = "adam,0,1.5"
# Lines of a CSV, options, and what the error says.
BAD_TABLES = {
    "two names": (["a,b,a", "1,2,3"], {}, "two columns named 'a'"),
    "short line": ([HEAD, RUN, "adam,1"], {}, "line 3 of .* has 2 cells"),
    "seed": ([HEAD, RUN, "adam,x,1.5"], {}, "line 3 .* 'x' as seed: seeds are whole"),
    "metric": ([HEAD, RUN, "adam,1,good"], {}, "line 3 .* 'good' as loss, which is no number"),
    "twice": ([HEAD, RUN, RUN], {}, "line 2 .* and line 3 .* --step"),
    "twice at a step": ([f"{HEAD},step", f"{RUN},9", "adam,0,1.7,9"], {}, "line 2 .* and line 3 .* both of"),
    "too large": ([HEAD, RUN, "muon,0,-1e200"], {}, "line 3 .* has -1e[+]200 as loss, .* inf if"),
    "one arm": ([HEAD, RUN], {}, "has one arm by the column optimizer, adam"),
    "no arm": ([HEAD, RUN, ",1,1.5"], {}, "line 3 .* has no optimizer: every run"),
    "near column": ([HEAD, RUN], {"metric": "los"}, "--metric los: .* Did you mean 'loss'"),
    "two metrics": ([f"{HEAD},b", f"{RUN},1"], {}, "name the column that is compared .* are loss, b"),
    "names": (
        ["Name,loss", "a-seed0,1"],
        {"arm": None},
        "with --arm.* If Name says it, give --name-p",
    ),
    "no seed": (["optimizer,sd,loss", RUN], {}, "name the column with the seed of a run with --seed"),
    "status": (
        [f"{HEAD},status", f"{RUN},finishd", "adam,1,1.5,ok"],
        {},
        "'finishd' as status, which is no known status. Did you mean 'finished'",
    ),
    "two columns": ([f"a.{HEAD},b.optimizer", f"{RUN},1"], {}, "may be one of several columns"),
    "no pattern": ([HEAD, RUN], {"pattern": "("}, "is no regular expression"),
    "no groups": ([HEAD, RUN], {"pattern": "a"}, "has no named groups"),
    "no match": (["run,seed,loss", RUN], {"pattern": "(?P<arm>x)"}, "'adam' does not match the pattern"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(tmp_path: Path, case: str) -> None:
    lines, options, message = BAD_TABLES[case]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.csv", **{"arm": "optimizer"} | options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "a.csv has no results"),
        ("a.xlsx", "", "is no file of results: its name must end in .csv"),
        ("a.json", '{"a": 1}', "has no rows: give a list of objects"),
        ("a.json", '{"a": [1], "b": [1, 2]}', "has no rows: give a list of objects"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 of .* holds a list, not an object"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results([tmp_path / name])


def test_paths_that_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_results([tmp_path / "a.csv"])
    with pytest.raises(ValueError, match="has no runs"):
        read_results([tmp_path])
    with pytest.raises(ValueError, match="no results to read"):
        read_results([])
    (tmp_path / "a.csv").write_bytes(b"a,b\n\xff,1\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_results([tmp_path / "a.csv"])


def test_a_question_has_its_pairs_once() -> None:
    question = Question(
        name="q",
        arms=("a", "b", "c"),
        seeds=(0,),
        baseline="a",
        metric="loss",
        rules=Rules(),
        comparisons=(("b", "c"),),
    )
    assert question.pairs == (("b", "a"), ("c", "a"), ("b", "c"))
