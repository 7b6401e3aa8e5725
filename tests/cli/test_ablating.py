"""`slmjax ablate`: a study file to its findings, interrupted, failed, changed, in parts; what is refused."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from slmjax import cli
from slmjax.studies import Study, read_findings, running
from slmjax.studies.claims import Claims, Lease
from slmjax.studies.noise import NoiseRecord
from slmjax.studies.plan import StudyPlan, plan_study
from slmjax.studies.running import run_study
from slmjax.training.experiment import read_experiment
from tests.studies.stub import StubTrainer


def no_plan(study: Study, *, ledger: Path) -> StudyPlan:
    raise ValueError("costs take time")


Ablate = Callable[..., tuple[int, str, str]]

PACE = """
from tests.studies.stub import study as pace


def study():
    return pace(question="Is fast better?", comparisons=(("third", "fast & loose"),))
"""

BUILT_ON = '''
"""A base with each seed, and a teacher for all seeds, that the arms of the last study build on."""
import dataclasses

from slmjax.studies import Arm, Study
from slmjax.training import FromModel
from tests.studies.stub import experiment


def continued(seed, run):
    return dataclasses.replace(experiment(2e-3), init=FromModel(path=str(run)))


def study():
    arms = (Arm(name="teacher", experiment=experiment(9e-4)),)
    teacher = Study(name="teacher", arms=arms, seeds=(7,), baseline="teacher")
    arms = (Arm(name="base", experiment=experiment()), Arm(name="other", experiment=experiment(3e-3)))
    first = Study(name="first", arms=arms, seeds=(0, 1), baseline="base")
    arms = (
        Arm(name="base", after=("first", "base"), experiment=continued),
        Arm(name="taught", after=("teacher", "teacher"), experiment=continued),
        Arm(name="again", after="base", experiment=continued),
    )
    return Study(name="last", arms=arms, seeds=(0, 1), baseline="base", earlier=(teacher, first))
'''


@pytest.fixture
def stub() -> StubTrainer:
    return StubTrainer()


@pytest.fixture
def ablate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stub: StubTrainer,
) -> Ablate:
    """The command in a directory of its own, with trainings that take no time; pages are left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pace.py").write_text(PACE)
    monkeypatch.setattr(running, "run_study", functools.partial(run_study, train=stub))
    monkeypatch.setattr(
        "slmjax.studies.ablation.write_study_report", lambda directory, findings: directory / "report.html"
    )

    monkeypatch.setattr("slmjax.studies.ablation.plan_study", no_plan)

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["ablate", *argv])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


def asked(stub: StubTrainer) -> list[tuple[float, int]]:
    keys = [(one.optim.lr, one.run.seed) for one in stub.asked]
    stub.asked.clear()
    return keys


def test_a_study_from_its_file_to_its_findings(ablate: Ablate, stub: StubTrainer, tmp_path: Path) -> None:
    code, out, err = ablate("pace.py")
    directory = tmp_path / "runs" / "studies" / "pace"
    assert code == 0 and len(asked(stub)) == 9
    assert re.search("pace: member 6 of 9: third, seed 1, about [0-9ms]+ left\n", err)
    assert "pace: member 6 of 9: third, seed 1: finished, bits_per_byte 1.9" in err
    assert "Is fast better?" in out and out.endswith("runs/studies/pace/report.html\n")
    assert {path.name for path in directory.iterdir()} >= {"study.py", "plan.json", "findings.json"}
    assert (directory.parent / "noise.jsonl").is_file()
    # The directory shows what there is, and trains nothing.
    code, shown, err = ablate(str(directory))
    assert (code, shown, err, asked(stub)) == (0, out.replace("runs", str(tmp_path / "runs")), "", [])
    code, shown, _ = ablate("runs/studies/pace", "--json")
    result = json.loads(shown)
    assert code == 0 and result["status"] == "finished"
    assert result["command"] == "slmjax ablate runs/studies/pace"
    (outcome,) = result["studies"]
    assert (outcome["study"], outcome["members_left"], outcome["failed"]) == ("pace", 0, [])
    assert [one["arm"] for one in outcome["findings"]["comparisons"]] == ["fast & loose", "third", "third"]


def test_workers_leave_to_others_what_they_have_claimed(
    ablate: Ablate, stub: StubTrainer, tmp_path: Path
) -> None:
    directory = tmp_path / "runs" / "studies" / "pace"
    with Claims(directory, lease=Lease(seconds=30, heartbeat=0.05)) as other:
        claim = other.take(other.look("slow/seed-0"))
        assert claim is not None
        code, _, err = ablate("pace.py", "--worker", "--lease", "1")
        assert code == 0 and len(asked(stub)) == 8
        assert err.endswith("pace: 1 members have not ended yet\n")
    code, out, err = ablate("pace.py", "--worker", "--wait")
    assert code == 0 and asked(stub) == [(1e-3, 0)] and "Is fast better?" in out
    findings = read_findings(directory)
    assert all(len(arm.seeds) == 3 for arm in findings.arms)
    for seconds in ("0", "inf", "nan"):
        code, _, err = ablate("pace.py", "--worker", "--lease", seconds)
        assert code == 2 and f"the lease is {float(seconds)} s" in err


def test_an_interrupted_study_resumes(ablate: Ablate, stub: StubTrainer) -> None:
    stub.statuses = {(2e-3, 1): "interrupted"}
    code, out, err = ablate("pace.py", "--seeds", "2")
    assert code == 75 and out == "" and len(asked(stub)) == 5
    assert err.endswith(
        "stopped at arm fast & loose, seed 1, whose run is saved: run the study again to resume it\n"
        "resume with: slmjax ablate runs/studies/pace\n"
    )
    code, out, _ = ablate("pace.py", "--seeds", "2", "--json")
    result = json.loads(out)
    assert (code, result["status"], result["studies"]) == (75, "interrupted", [])
    assert result["command"] == "slmjax ablate runs/studies/pace"
    stub.statuses = {}
    asked(stub)
    assert ablate(*result["command"].split()[2:])[0] == 0
    assert asked(stub) == [(2e-3, 1), (2e-3, 1)] and stub.resumed[-2] is not None


def test_members_that_fail_are_tried_again(ablate: Ablate, stub: StubTrainer) -> None:
    stub.errors = {(1e-3, 2): RuntimeError("no room")}
    stub.statuses = {(2e-3, 0): "diverged"}
    code, _, err = ablate("pace.py")
    assert code == 1 and "member 7 of 9: slow, seed 2: failed (RuntimeError: no room)" in err
    assert err.endswith(
        "1 member failed, with the error above. To try again: slmjax ablate runs/studies/pace\n"
    )
    stub.errors = {}
    asked(stub)
    # What diverged is a result.
    assert ablate("runs/studies/pace")[0] == 0 and asked(stub) == [(1e-3, 2)]


def test_some_arms(ablate: Ablate, stub: StubTrainer) -> None:
    code, _, err = ablate("pace.py", "--only", "slow", "third")
    assert (code, len(asked(stub))) == (0, 6) and "pace: 3 members have not ended yet" in err
    code, _, err = ablate("pace.py", "--only", "thrid")
    assert (code, asked(stub)) == (2, [])
    assert "'thrid' is not an arm. Did you mean 'third'? Arms are slow, fast & loose, third" in err


def test_a_changed_arm(ablate: Ablate, stub: StubTrainer, tmp_path: Path) -> None:
    assert ablate("pace.py", "--seeds", "2")[0] == 0
    asked(stub)
    faster = PACE.replace("return pace(", "return pace(arms=arms(), ") + (
        "\n\ndef arms():\n    import dataclasses\n\n    from tests.studies.stub import experiment\n\n"
        "    slow, *others = pace().arms\n"
        "    return dataclasses.replace(slow, experiment=experiment(5e-4)), *others\n"
    )
    (tmp_path / "pace.py").write_text(faster)
    code, _, err = ablate("pace.py", "--seeds", "2")
    assert (code, asked(stub)) == (2, [])
    assert "arm slow: experiment.optim.lr was 0.001, now 0.0005" in err and "with --redo" in err
    # The directory has the former file still.
    assert ablate("runs/studies/pace")[0] == 0 and asked(stub) == []
    code, out, err = ablate("pace.py", "--seeds", "3", "--redo", "--json")
    assert code == 0 and asked(stub) == [(5e-4, 0), (5e-4, 1), (5e-4, 2), (2e-3, 2), (2e-3, 2)]
    (change,) = json.loads(out)["studies"][0]["findings"]["changes"]
    assert "after 6 members had ended: seeds was [0, 1], now [0, 1, 2]; arm slow: experiment" in change
    assert (tmp_path / "runs" / "studies" / "pace" / "study-1.py").read_text() == PACE
    # Another study has another directory.
    (tmp_path / "race.py").write_text(PACE.replace("pace(question", "pace(name='race', question"))
    code, _, err = ablate("race.py", "--directory", "runs/studies/pace")
    assert code == 2 and "is the directory of the study 'pace', not of 'race'" in err


def test_arms_that_build_on_runs_of_other_arms(ablate: Ablate, stub: StubTrainer, tmp_path: Path) -> None:
    (tmp_path / "built_on.py").write_text(BUILT_ON)
    code, out, _ = ablate("built_on.py", "--only", "taught", "--json")
    # The arm itself and the teacher: nothing else is needed.
    assert (code, asked(stub)) == (0, [(9e-4, 7), (2e-3, 0), (2e-3, 1)])
    code, out, _ = ablate("built_on.py", "--json")
    teacher, first, last = json.loads(out)["studies"]
    assert code == 0 and len(asked(stub)) == 4 + 4
    assert [one["study"] for one in (teacher, first, last)] == ["teacher", "first", "last"]
    runs = tmp_path / "runs" / "studies" / "built-on"
    starts = {
        path.parent.relative_to(runs / "last").parts[:2]: read_experiment(path.parent).init
        for path in (runs / "last").glob("*/seed-*/*/config.json")
    }
    sources = {key: Path(init.path).relative_to(runs).parts[:3] for key, init in starts.items()}
    for seed in ("seed-0", "seed-1"):
        assert sources["base", seed] == ("first", "base", seed)
        assert sources["taught", seed] == ("teacher", "teacher", "seed-7")
        assert sources["again", seed] == ("last", "base", seed)
    # The directory may be moved: what was built on is known by its experiment.
    runs.rename(tmp_path / "moved")
    assert ablate("moved")[0] == 0 and asked(stub) == []
    # A base that is trained again makes what builds on it stale.
    (tmp_path / "moved" / "study.py").write_text(
        BUILT_ON.replace("experiment()), Arm", "experiment(8e-4)), Arm")
    )
    code, _, err = ablate("moved")
    assert code == 2 and "members of base were trained with another experiment" in err
    code, _, err = ablate("moved", "--redo")
    assert code == 0 and [lr for lr, _ in asked(stub)] == [8e-4, 8e-4, 2e-3, 2e-3, 2e-3, 2e-3]


def test_a_source_that_failed_or_diverged(ablate: Ablate, stub: StubTrainer, tmp_path: Path) -> None:
    (tmp_path / "built_on.py").write_text(BUILT_ON)
    stub.errors = {(1e-3, 1): ValueError("too wide")}
    code, out, _ = ablate("built_on.py", "--json")
    failed = json.loads(out)["studies"][2]["failed"]
    assert code == 1 and [(one["arm"], one["seed"]) for one in failed] == [("base", 1), ("again", 1)]
    assert failed[0]["error"] == "base failed with seed 1, so that there is nothing to build on"
    # Divergence is an outcome of all that builds on it: nothing is left to try again.
    stub.errors = {}
    stub.statuses = {(1e-3, 1): "diverged"}
    code, out, _ = ablate("built_on.py", "--json")
    last = json.loads(out)["studies"][2]
    assert code == 0 and last["failed"] == [] and last["members_left"] == 0
    arms = {arm["arm"]: arm["diverged"] for arm in last["findings"]["arms"]}
    assert arms == {"base": [1], "taught": [], "again": [1]}


LADDER = """
from slmjax.studies import ladder
from tests.studies.stub import study as pace

RUNG = "data.sequence_length"


def study():
    return ladder(pace(seeds=(0, 1)), {"small": {RUNG: 64}, "large": {RUNG: 128}})
"""


def test_sizes_of_a_ladder_are_shown_together(ablate: Ablate, stub: StubTrainer, tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text(LADDER)
    code, out, _ = ablate("sizes.py", "--json")
    small, large = json.loads(out)["studies"]
    assert code == 0 and small["findings"]["ladder"] is None
    assert "not known: left out of trends" in large["findings"]["ladder"]["notes"][0]
    root = tmp_path / "runs" / "studies" / "sizes"
    for name, flops in (("pace-small", 1e12), ("pace-large", 4e12)):
        costs = {arm: {"cost": {"flops": flops}} for arm in ("slow", "fast & loose", "third")}
        (root / name / "costs.json").write_text(json.dumps({"arms": costs}))
    code, out, _ = ablate("sizes.py", "--json")
    last = json.loads(out)["studies"][1]["findings"]
    assert [each["compute"] for each in last["ladder"]["sizes"]] == [1e12, 4e12]
    # The sizes that came before have it, too.
    findings = [read_findings(root / name) for name in ("pace-small", "pace-large")]
    assert findings[0].ladder == findings[1].ladder and findings[0].ladder is not None
    arm = findings[0].ladder.arms[0]
    assert (arm.arm, [gap.size for gap in arm.gaps]) == ("fast & loose", ["small", "large"])
    assert arm.trend is not None and findings[0].arm("third").flops == 1e12
    code, out, _ = ablate("sizes.py")
    assert code == 0 and "Ladder pace over small, large." in out


TUNED = """
from slmjax.studies import LearningRates
from tests.studies.stub import study as pace


def study():
    return pace(name="tuned", tune=LearningRates(rates=(5e-4, 1e-3, 2e-3), seeds=(50,)))
"""


def test_arms_at_their_own_best_rates(ablate: Ablate, stub: StubTrainer, tmp_path: Path) -> None:
    (tmp_path / "tuned.py").write_text(TUNED)
    # The same values for all arms, with the minimum in the middle of the grid.
    stub.bits = {(rate, 50): value for rate, value in ((5e-4, 1.6), (1e-3, 1.5), (2e-3, 1.6))}
    code, out, err = ablate("tuned.py", "--seeds", "2")
    rates = asked(stub)
    assert code == 0 and len(rates) == 9 + 6 and {seed for _, seed in rates[:9]} == {50}
    assert [lr for lr, _ in rates[9:]] == pytest.approx([1e-3] * 6)
    assert "tuned, learning rates: member 1 of 9: slow at 0.0005, seed 50" in err
    assert "third: learning rate 0.001, the best by a quadratic" in out
    directory = tmp_path / "runs" / "studies" / "tuned"
    assert {one["arm"] for one in json.loads((directory / "tuned.json").read_text())} == {
        "slow",
        "fast & loose",
        "third",
    }
    assert ablate("runs/studies/tuned")[0] == 0 and asked(stub) == []


def test_only_the_named_arms_are_tuned(ablate: Ablate, stub: StubTrainer, tmp_path: Path) -> None:
    (tmp_path / "tuned.py").write_text(TUNED)
    stub.bits = {(rate, 50): value for rate, value in ((5e-4, 1.6), (1e-3, 1.5), (2e-3, 1.6))}
    code, out, err = ablate("tuned.py", "--seeds", "2", "--only", "slow")
    assert code == 0 and [seed for _, seed in asked(stub)] == [50, 50, 50, 0, 1]
    assert "tuned: 4 members have not ended yet" in err and "fast & loose: learning rate" not in out
    # The others follow, at rates of their own, and the first is as it was.
    code, out, _ = ablate("tuned.py", "--seeds", "2", "--only", "third")
    assert code == 0 and [seed for _, seed in asked(stub)] == [50, 50, 50, 0, 1]
    assert "slow: learning rate 0.001" in out and "third: learning rate 0.001" in out
    assert ablate("runs/studies/tuned")[0] == 0 and len(asked(stub)) == 5


def test_arms_that_continue_runs_are_tuned(ablate: Ablate, stub: StubTrainer, tmp_path: Path) -> None:
    """Their tokenizer is that of a run, and with the tuning seed there are runs of what they build on."""
    text = BUILT_ON.replace(
        "init=FromModel(path=str(run)))",
        "init=FromModel(path=str(run)), tokenizer=FileTokenizer(path=str(run / 'tokenizer')))",
    )
    text = text.replace("import FromModel", "import FileTokenizer, FromModel").replace(
        "earlier=(teacher, first)",
        "earlier=(teacher, first), tune=LearningRates(factors=(0.5, 1, 2), seeds=(50,))",
    )
    text = text.replace("import Arm, Study", "import Arm, LearningRates, Study")
    (tmp_path / "continued.py").write_text(text)
    code, _, err = ablate("continued.py", "--json")
    tuned = [key for key in asked(stub) if key[1] == 50]
    assert code == 0, err
    # The first study's base, that of the last, and three arms at three rates; the teacher has one seed.
    assert len(tuned) == 2 + 9 and (1e-3, 50) in tuned and (9e-4, 50) not in tuned


def test_a_best_rate_at_the_edge_of_the_grid_resolves_nothing(
    ablate: Ablate, stub: StubTrainer, tmp_path: Path
) -> None:
    (tmp_path / "tuned.py").write_text(TUNED)
    # The stub's values rise with the rate, at this seed.
    code, out, _ = ablate("tuned.py", "--seeds", "3", "--json")
    findings = json.loads(out)["studies"][0]["findings"]
    assert code == 0 and all(lr == 5e-4 for lr, _ in asked(stub)[9:])
    assert {one["judgement"]["verdict"] for one in findings["comparisons"]} == {"not resolved"}
    assert any("slow: its best learning rate is not resolved" in note for note in findings["notes"])


def test_a_plan_trains_nothing_and_writes_nothing(
    ablate: Ablate, stub: StubTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmjax.studies.ablation.plan_study", plan_study)
    code, out, _ = ablate("pace.py", "--plan", "--no-measure", "--seeds", "5")
    assert code == 0 and not asked(stub) and not (tmp_path / "runs").exists()
    assert "pace: Is fast better?" in out and "Power: 5 seeds, 3 comparisons: finds" in out
    code, out, _ = ablate("pace.py", "--plan", "--no-measure", "--json")
    (plan,) = json.loads(out)["studies"]
    assert (plan["num_runs"], plan["power"]["seeds"], plan["power"]["is_assumed"]) == (9, 3, True)
    # The ledger is the one that the study will write to.
    assert "There are no such runs in runs/studies/noise.jsonl yet" in plan["power"]["source"]
    record = NoiseRecord(
        key="a", study="a", arm="a", metric="bits_per_byte", deviation=0.25, degrees_of_freedom=4, noisy=False
    )
    (tmp_path / "else").mkdir()
    line = json.dumps({"kind": "noise", **dataclasses.asdict(record)})
    (tmp_path / "else" / "noise.jsonl").write_text(f"{line}\n")
    code, out, _ = ablate("pace.py", "--plan", "--no-measure", "--directory", "else/pace")
    assert code == 0 and "Noise: standard deviation 0.25 of a run" in out and "by else/noise.jsonl." in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "slmjax ablate needs STUDY.py or STUDY_DIR: a Python file with `def study() -> Study`"),
        (["pcae.py"], "there is no Python file pcae.py. Did you mean 'pace.py'"),
        (["pace"], "pace is no study: name a Python file with `def study() -> Study`"),
        (["none.py"], "none.py needs a function `def study() -> Study` that returns the study, and has none"),
        (["nano.py"], "It is an experiment: slmjax train nano.py"),
        (["."], ". is not the directory of a study"),
        (["run"], "run is a run directory: name a Python file"),
        (["pace.py", "--budgte", "large"], "slmjax ablate has no option --budgte. Did you mean --budget?"),
        (["pace.py", "--seeds", "0"], "the number of seeds is 0: give 1 to 1,000"),
        (["pace.py", "--seeds", "100000"], "the number of seeds is 100,000: give 1 to 1,000"),
        (["pace.py", "--seeds", "three"], "--seeds is 'three', not an integer: number of seeds"),
        (["pace.py", "--budget", "medium"], "--budget is 'medium', not one of small, large."),
        (
            ["pace.py", "--budget=Large"],
            "--budget is 'Large', not one of small, large. Did you mean 'large'?",
        ),
        (["pace.py", "--budget"], "--budget needs a value: size of the study"),
        (["pace.py", "--populations", "always"], "--populations is 'always', not one of auto, on, off."),
        (["pace.py", "--lease", "5m"], "--lease is '5m', not a number: seconds after which"),
        (["pace.py", "--worker=yes"], "--worker takes no value, such as 'yes'"),
        (["pace.py", "--only"], "--only needs the name of an arm"),
        (["pace.py", "--plan", "--only", "slow"], "--plan is about the whole study: leave out --only"),
    ],
)
def test_what_is_no_study(ablate: Ablate, tmp_path: Path, argv: list[str], message: str) -> None:
    (tmp_path / "none.py").write_text("def studies(): ...\n")
    (tmp_path / "nano.py").write_text("def experiment(): ...\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    code, out, err = ablate(*argv)
    assert code == 2 and out == "" and message in err
    assert not (tmp_path / "runs").exists()
