"""Successive halving: who is trained beyond a rung, decided once, recorded, and kept out of paired tests."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest

from slmjax.runner import trainer
from slmjax.studies import Arm, Lease, Study, SuccessiveHalving, analyze, read_members, run_study
from slmjax.studies.stopping import decide, read_decision
from slmjax.studies.study_directory import StudyDirectory
from slmjax.telemetry.run_directory import RunDirectory, read_log
from slmjax.training.experiment import Experiment
from tests.one_layer import one_layer
from tests.studies.stub import StubTrainer, experiment
from tests.studies.test_workers import in_threads

RATES = {"base": 1e-3, "best": 5e-3, "second": 4e-3, "third": 3e-3, "worst": 5e-4}


def arms() -> tuple[Arm, ...]:
    """The higher the rate, the better the stub."""
    made = []
    for name, rate in RATES.items():
        base = experiment(rate)
        made.append(
            Arm(
                name=name,
                experiment=dataclasses.replace(
                    base,
                    eval=dataclasses.replace(base.eval, every=5),
                    run=dataclasses.replace(base.run, steps=40),
                ),
            )
        )
    return tuple(made)


def halved(**changes: Any) -> Study:
    stopping = SuccessiveHalving(rungs=(10, 20), keep=0.5)
    settings: dict[str, Any] = {"name": "halved", "arms": arms(), "seeds": (0, 1), "baseline": "base"}
    return Study(**{**settings, "stopping": stopping, **changes})


def test_it_is_off_unless_a_study_asks_for_it_and_recorded(tmp_path: Path) -> None:
    """Also where it is turned on or off later."""
    whole = halved(stopping=None)
    assert Study(name="a", arms=arms(), seeds=(0,), baseline="base").stopping is None
    assert StudyDirectory.create(tmp_path / "whole", whole).plan["settings"]["stopping"] is None
    directory = StudyDirectory.create(tmp_path / "halved", halved())
    assert directory.plan["settings"]["stopping"] == {"rungs": [10, 20], "keep": 0.5}
    StudyDirectory.create(tmp_path / "halved", whole)
    (change,) = directory.changes_since_lock()
    assert change.what == ('stopping was {"rungs": [10, 20], "keep": 0.5}, now null',)


@dataclasses.dataclass
class RungTrainer:
    """A stub that stops where it is asked to, with an evaluation."""

    stub: StubTrainer = dataclasses.field(default_factory=StubTrainer)
    trained: list[tuple[str, int, int | None]] = dataclasses.field(default_factory=list)

    def __call__(
        self, experiment: Experiment, *, resume: Path | None = None, console: Any = None
    ) -> trainer.Result:
        rate = experiment.optim.lr
        name = next(name for name in RATES if RATES[name] == rate)
        stop_after = experiment.run.stop_after
        self.trained.append((name, experiment.run.seed, stop_after))
        statuses = dict(self.stub.statuses)
        if stop_after is not None:
            statuses.setdefault((rate, experiment.run.seed), "interrupted")
        result = StubTrainer(statuses=statuses)(experiment, resume=resume)
        if result.status != "interrupted":
            return result
        run = RunDirectory(Path(result.run_dir))
        bits = 2 - 100 * rate + 1e-3 * experiment.run.seed
        with run.open_log() as log:
            log.write("eval", step=stop_after, loss=bits, bits_per_byte=bits, documents=1)
        result = dataclasses.replace(result, step=stop_after or 0)
        run.write_json("result.json", dataclasses.asdict(result))
        return result


def test_the_best_half_is_trained_further(tmp_path: Path) -> None:
    train = RungTrainer()
    members = run_study(halved(), tmp_path, train=train)
    both = (0, 1)
    first = [(name, seed, 10) for seed in both for name in RATES]
    second = [(name, seed, 20) for seed in both for name in ("base", "best", "second")]
    assert train.trained == first + second + [
        (name, seed, None) for seed in both for name in ("base", "best")
    ]
    status = {(member.arm, member.seed): member.status for member in members}
    assert status == {
        (name, seed): "finished" if name in ("base", "best") else "stopped early"
        for seed in both
        for name in RATES
    }
    stopped = {member.arm: member for member in members if member.seed == 1}
    assert stopped["second"].error == "bits_per_byte 1.601 after 20 steps, not among the best of 3 arms"
    assert stopped["worst"].result["step"] == 10
    assert stopped["worst"].evaluation["bits_per_byte"] == pytest.approx(1.951)
    assert stopped["worst"].metric_value("bits_per_byte") is None
    findings = analyze(halved(), members)
    assert any("worst, seed 0: stopped early" in note for note in findings.notes)
    # Again, nothing is trained; without stopping, all arms are, from where they were stopped.
    again = RungTrainer()
    assert run_study(halved(), tmp_path, train=again) == members and not again.trained
    whole = run_study(halved(stopping=None), tmp_path, train=again)
    assert {member.status for member in whole} == {"finished"}
    assert {name for name, _, _ in again.trained} == {"second", "third", "worst"}


def test_a_worker_that_was_killed_at_a_rung_trains_nothing_twice(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def killed(experiment: Experiment, **settings: Any) -> trainer.Result:
        RungTrainer()(experiment, **settings)
        raise Killed

    with pytest.raises(Killed):
        run_study(halved(), tmp_path, train=killed)
    train = RungTrainer()
    run_study(halved(), tmp_path, train=train)
    assert train.trained[0] == ("best", 0, 10) and len(train.trained) == 19


def test_workers_share_the_decisions(tmp_path: Path) -> None:
    train = RungTrainer()
    lease = Lease(seconds=30, heartbeat=0.05)
    work = functools.partial(run_study, halved(), tmp_path, train=train, worker=True, lease=lease)
    in_threads(work, functools.partial(work, wait=True), work)
    assert len(train.trained) == len(set(train.trained)) == 10 + 6 + 4
    assert sorted(path.name for path in (tmp_path / "claims").glob("rung-*")) == [
        "rung-10.json",
        "rung-20.json",
    ]
    assert len(read_members(halved(), tmp_path)) == 10


def test_a_member_that_diverges_is_the_worst(tmp_path: Path) -> None:
    """Also the mean of its arm; the baseline is trained all the same."""
    diverging = {(RATES["best"], 1): "diverged", (RATES["base"], 0): "diverged"}
    members = run_study(halved(), tmp_path, train=RungTrainer(StubTrainer(statuses=diverging)))
    status = {(member.arm, member.seed): member.status for member in members}
    assert status["best", 1] == "diverged" and status["best", 0] == "stopped early"
    assert status["base", 0] == "diverged" and status["base", 1] == "finished"
    assert status["second", 0] == status["second", 1] == "finished"
    decision = read_decision(tmp_path, 10)
    assert decision is not None and decision.means["best"] == math.inf


def test_a_decision_is_made_once(tmp_path: Path) -> None:
    rule = SuccessiveHalving(rungs=(10,))
    settings: dict[str, Any] = {"metric": "accuracy", "baseline": "a", "lower_is_better": False}
    first = decide(rule, tmp_path, 10, {"a": [0.1], "b": [0.2], "c": [0.3]}, **settings)
    assert first.remaining == ("a", "c")
    assert decide(rule, tmp_path, 10, {"a": [0.1], "b": [0.9], "c": [0.3]}, **settings) == first
    assert first.reason("late") is None and first.reason("a") is None
    assert rule.remaining({"a": math.nan, "b": math.inf}, baseline="x", lower_is_better=True) == ("a",)


def test_rungs_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    for rungs in ((), (0, 5), (20, 10), (10, 10)):
        with pytest.raises(ValueError, match="give steps from 1 in increasing order"):
            SuccessiveHalving(rungs=rungs)
    with pytest.raises(ValueError, match="between 0 and 1, such as 0.5"):
        SuccessiveHalving(rungs=(10,), keep=1)
    for rung in (12, 40):
        with pytest.raises(ValueError, match=rf"the rung {rung} .* multiples of eval.every \(5\)"):
            run_study(halved(stopping=SuccessiveHalving(rungs=(rung,))), tmp_path, train=RungTrainer())
    with pytest.raises(ValueError, match="compares all arms at each rung"):
        run_study(halved(), tmp_path, train=RungTrainer(), only=["best"])
    with pytest.raises(ValueError, match="evaluations on the way have no 'parameters'"):
        run_study(halved(metric="parameters"), tmp_path, train=RungTrainer())


@pytest.mark.nightly
@pytest.mark.composes("resume", "studies")
def test_a_rung_changes_nothing_for_arms_that_remain(workplace: Path, tmp_path: Path) -> None:
    """Their runs are those of the study without early stopping, to the last bit."""
    made = []
    for name, rate in (("base", 1e-2), ("slow", 1e-4), ("middle", 3e-3)):
        whole = one_layer(workplace, tmp_path, steps=8, lr=rate)
        whole = dataclasses.replace(whole, eval=dataclasses.replace(whole.eval, every=4))
        made.append(Arm(name=name, experiment=whole))
    study = Study(name="real", arms=tuple(made), seeds=(3,), baseline="base")
    expected = run_study(study, tmp_path / "whole")
    stopping = SuccessiveHalving(rungs=(4,), keep=0.5)
    members = run_study(dataclasses.replace(study, stopping=stopping), tmp_path / "halved")
    assert [member.status for member in members] == ["finished", "stopped early", "finished"]
    for member, other in zip(members, expected, strict=True):
        if member.status == "finished":
            assert member.metric_value("loss") == other.metric_value("loss")
        records = read_log(Path(member.result["run_dir"]) / "log.jsonl", kind="train")
        assert records[-1]["step"] == (8 if member.status == "finished" else 4)
