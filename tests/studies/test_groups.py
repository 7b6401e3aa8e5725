"""Members of a study that are trained in one program, with stubs in place of both kinds of training."""

import dataclasses
import itertools
import logging
import math
import types
from pathlib import Path
from typing import Any

import pytest

from slmjax.runner import trainer
from slmjax.runner.population import Pace
from slmjax.studies import groups, running
from slmjax.studies.arms import Arm
from slmjax.studies.claims import Claims
from slmjax.studies.groups import Populations
from slmjax.studies.member_queue import MemberQueue
from slmjax.studies.running import Interrupted, run_study
from slmjax.studies.study import Member, OnChange
from slmjax.training.experiment import Experiment
from tests.studies.stub import StubTrainer, experiment, study


@dataclasses.dataclass
class Stubs:
    """Training alone and together, and the measurement; remembers the members of each population."""

    alone: StubTrainer = dataclasses.field(default_factory=StubTrainer)
    together: StubTrainer = dataclasses.field(default_factory=StubTrainer)
    populations: list[list[tuple[float, int]]] = dataclasses.field(default_factory=list)
    measured: list[int] = dataclasses.field(default_factory=list)
    pays: bool = True
    error: Exception | None = None

    def train_population(
        self, members: list[Experiment], *, resume: Any, console: Any
    ) -> list[trainer.Result]:
        self.populations.append([(member.optim.lr, member.run.seed) for member in members])
        if self.error is not None:
            raise self.error
        return [self.together(member, resume=run) for member, run in zip(members, resume, strict=True)]

    def population_pays(self, members: list[Experiment]) -> Pace:
        self.measured.append(len(members))
        if self.error is not None:
            raise self.error
        return Pace(num_members=len(members), seconds_in_turn=1.0, seconds_together=0.4 if self.pays else 2.0)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Stubs:
    stubs = Stubs()
    monkeypatch.setattr(running, "train_population", stubs.train_population)
    monkeypatch.setattr(groups, "population_pays", stubs.population_pays)
    monkeypatch.setattr(groups, "LEAST_STEPS", 0)
    monkeypatch.setattr(groups, "_not_worth_it", [])
    monkeypatch.setattr(trainer, "train", stubs.alone)
    return stubs


def run(
    directory: Path, populations: Populations, *, of: Any = None, **options: Any
) -> list[tuple[str, int]]:
    members = run_study(of or study(), directory, train=trainer.train, populations=populations, **options)
    assert all(member.status == "finished" for member in members)
    return [(member.arm, member.seed) for member in members]


ORDER = [(arm, seed) for seed in (0, 1, 2) for arm in ("slow", "fast & loose", "third")]


def test_members_that_share_a_program_are_one_population(stubs: Stubs, tmp_path: Path) -> None:
    assert run(tmp_path, Populations.ALWAYS) == ORDER
    assert len(stubs.populations) == 1 and len(stubs.populations[0]) == 9
    assert stubs.alone.asked == [] and stubs.measured == []
    # Recorded: nothing is trained again.
    assert run(tmp_path, Populations.ALWAYS) == ORDER and len(stubs.populations) == 1


def test_a_population_is_announced_and_has_the_time_that_it_took(
    stubs: Stubs, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("slmjax"), "propagate", True)
    monkeypatch.setattr(groups, "MOST_MEMBERS", 3)
    # A minute for each population, and for each record.
    clock = itertools.count(step=60.0)
    monkeypatch.setattr(running, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO, logger="slmjax"):
        run(tmp_path, Populations.ALWAYS)
    lines = [text for text in caplog.messages if text.startswith("pace: ")]
    assert lines[0] == "pace: 3 members in one program: slow seed 0, fast & loose seed 0, third seed 0"
    assert lines[1:3] == [
        "pace: member 1 of 9: slow, seed 0: finished, bits_per_byte 1.9000",
        "pace: member 2 of 9: fast & loose, seed 0: finished, bits_per_byte 1.8000",
    ]
    # Each member so far has had a third of one minute, and one of its own.
    assert lines[4].endswith("third seed 1, about 8m00s left") and len(lines) == 12


def test_seconds_of_a_member_are_its_share_of_the_program() -> None:
    result = {"run_seconds": 60.0, "session_tokens_per_second": 100.0, "population": 4}
    result |= {"session_seconds_by_category": {"compile": 20.0}}
    member = Member(arm="a", seed=0, fingerprint="", status="finished", result=result, evaluation={})
    assert member.metric_value("seconds") == 15.0 and member.metric_value("tokens_per_second") == 400.0
    assert member.metric_value("run_seconds") == 60.0 and member.compile_seconds == 5.0


def test_the_time_left_counts_compilation_once_for_each_arm(tmp_path: Path) -> None:
    asked = study()
    with Claims(tmp_path) as claims:
        queue = MemberQueue(
            asked, tmp_path, claims, only=None, on_change=OnChange.REFUSE, earlier=tmp_path.parent
        )
        for expected, seconds in (
            ("", 50.0),
            # Two members of 50 - 20 s; of each other arm one that compiles, and two that do not.
            (", about 4m40s left", 40.0),
            # Two of 30 s, two of 20 s, and of the third arm what the second has shown: 40 + 2 * 20 s.
            (", about 3m00s left", 40.0),
            (", about 2m20s left", 25.0),
            # Compilation has cost the first arm 50 - 25 s, and so it has the others: 25 + 4 * (40 - 25) s.
            (", about 1m25s left", 25.0),
        ):
            assert queue.time_left() == expected
            task = queue.take()
            assert task is not None
            queue.add_seconds(task, seconds, compiling=20.0)
            queue.left.remove((task.arm, task.seed))


def test_arms_of_other_programs_are_other_populations(stubs: Stubs, tmp_path: Path) -> None:
    longer = dataclasses.replace(experiment(5e-3), run=dataclasses.replace(experiment().run, steps=20))
    arms = (*study().arms[:2], Arm(name="longer", experiment=longer))
    assert len(run(tmp_path, Populations.ALWAYS, of=study(arms=arms))) == 9
    assert [sorted(population) for population in stubs.populations] == [
        sorted((lr, seed) for lr in (1e-3, 2e-3) for seed in (0, 1, 2)),
        [(5e-3, seed) for seed in (0, 1, 2)],
    ]


@pytest.mark.parametrize("pays", [True, False])
def test_a_measurement_decides(
    stubs: Stubs, tmp_path: Path, pays: bool, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(logging.getLogger("slmjax"), "propagate", True)
    stubs.pays = pays
    with caplog.at_level(logging.INFO, logger="slmjax"):
        assert run(tmp_path, Populations.AUTO) == ORDER
    # Where it does not pay, it is measured once, not again for the members that are left.
    assert stubs.measured == [9]
    assert (len(stubs.populations), len(stubs.alone.asked)) == ((1, 0) if pays else (0, 9))
    expected = "together: one program" if pays else "in turn: one program"
    ratio = "2.50" if pays else "0.50"
    assert any(expected in text and ratio in text for text in caplog.messages)


def test_short_runs_and_workers_are_not_measured(
    stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "worker", Populations.AUTO, worker=True)
    monkeypatch.setattr(groups, "LEAST_STEPS", 91)
    run(tmp_path / "short", Populations.AUTO)
    run(tmp_path / "never", Populations.NEVER)
    assert stubs.measured == stubs.populations == [] and len(stubs.alone.asked) == 27


def test_members_of_a_failed_population_are_trained_alone(stubs: Stubs, tmp_path: Path) -> None:
    stubs.error = MemoryError("too many")
    assert run(tmp_path, Populations.ALWAYS) == ORDER
    assert len(stubs.populations) == 1 and len(stubs.alone.asked) == 9
    run(tmp_path / "unmeasured", Populations.AUTO)
    assert len(stubs.populations) == 1 and len(stubs.alone.asked) == 18


def test_an_interrupted_population_is_resumed(stubs: Stubs, tmp_path: Path) -> None:
    keys = [(lr, seed) for lr in (1e-3, 2e-3) for seed in (0, 1, 2)]
    stubs.together.statuses = dict.fromkeys(keys, "interrupted") | {(1e-3, 1): "diverged"}
    stubs.together.bits = {(1e-3, 1): math.nan}
    with pytest.raises(Interrupted, match="slow seed 0"):
        run(tmp_path, Populations.ALWAYS)
    assert stubs.alone.asked == []
    stubs.together.statuses = {}
    members = run_study(study(), tmp_path, train=trainer.train, populations=Populations.ALWAYS)
    statuses = {(member.arm, member.seed): member.status for member in members}
    assert statuses == dict.fromkeys(ORDER, "finished") | {("slow", 1): "diverged"}
    # What had ended is recorded, and the others go on in their runs.
    assert [len(population) for population in stubs.populations] == [9, 8]
    assert None not in stubs.together.resumed[9:]
