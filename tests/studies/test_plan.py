"""Plans of studies: costs, expected time and power, with a measurement that takes no time."""

import dataclasses
import math
from pathlib import Path

import pytest

from slmjax.config import dumps, loads
from slmjax.data.tokenizers import FileTokenizer
from slmjax.distill.config import DistillConfig, TeacherConfig
from slmjax.planning.memory import StepMemory
from slmjax.quantization.rules import quant_of
from slmjax.runner.step_time import TrainingTime, time_training
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.costs import arm_cost
from slmjax.studies.derived import RoundToNearest
from slmjax.studies.design import Dimension, LearningRates, Match, Quantity
from slmjax.studies.matching import match_arms
from slmjax.studies.plan import COLUMNS, StudyPlan, assumed_noise, plan_study
from slmjax.studies.planned import planned_experiment
from slmjax.studies.statistics.power import power_of_difference, seeds_needed, smallest_resolved
from slmjax.studies.study import Study
from slmjax.training.experiment import Experiment, FromModel, RunConfig
from tests import tiny
from tests.studies.test_costs import DENSE, FFN, VOCAB_SIZE, experiment

MEMORY = StepMemory(parameters=10**6, optimizer=2 * 10**6, average=0, temporary=10**6)


def timed(each: Experiment) -> TrainingTime:
    return TrainingTime(seconds=0.5 * each.run.steps, compile_seconds=3.0, memory=MEMORY)


def study(**changes: object) -> Study:
    arms = (
        Arm(name="plain"),
        Arm(name="a name that is much too long for a column of a table", changes={"optim.lr": 2e-3}),
        Derived(
            name="rounded", source="plain", derivation=RoundToNearest(rules=quant_of("q8_0").phases[0].rules)
        ),
    )
    fields = {
        "name": "plan",
        "question": "Does a plan say what the runs of a study take, and what they can find, in 80 columns?",
        "base": experiment(DENSE),
        "arms": arms,
        "seeds": (0, 1, 2),
        "baseline": "plain",
        "tune": LearningRates(factors=(0.5, 1, 2), seeds=(1000,)),
        "smallest_effect": 0.01,
    }
    return Study(**(fields | changes))


def test_a_plan_of_every_run() -> None:
    plan = plan_study(study(), time_of=timed, deviation=0.004)
    cost = arm_cost(experiment(DENSE))
    assert [arm.num_runs for arm in plan.arms] == [6, 6, 0]
    assert plan.num_runs == 12
    assert plan.arms[0].cost == cost
    assert plan.flops == 12 * cost.flops
    assert plan.seconds == 12 * (5.0 + 3.0)
    assert plan.memory == MEMORY.total
    lines = plan.text.splitlines()
    assert max(map(len, lines)) <= COLUMNS
    row = next(line for line in lines if line.startswith("plain"))
    assert row.split() == [
        "plain",
        f"{cost.parameters:,}",
        f"{cost.flops:.2e}",
        f"{cost.tokens:.2e}",
        "4.00",
        "MB",
        "5s",
        "3",
        "+",
        "3",
    ]
    assert any(line.startswith("rounded") and line.split()[1] == "derived" for line in lines)
    assert loads(StudyPlan, dumps(plan)) == plan


def test_power_is_that_of_the_statistics() -> None:
    power = plan_study(study(), deviation=0.004).power
    assert power is not None
    of_pair = math.sqrt(2) * 0.004
    assert (power.seeds, power.comparisons, power.degrees_of_freedom) == (3, 2, 4)
    assert power.smallest == pytest.approx(smallest_resolved(of_pair, 3, 2, 4))
    assert power.power == pytest.approx(power_of_difference(0.01, of_pair, 3, 2, 4))
    assert power.seeds_needed == seeds_needed(0.01, of_pair, comparisons=2, arms=3)
    text = " ".join(plan_study(study(), deviation=0.004).text.split())
    assert f"3 seeds, 2 comparisons: finds {power.smallest:.2g} bits per byte 4 times in 5." in text
    assert f"4 times in 5 takes {power.seeds_needed} seeds." in text
    # Seeds between two looks add nothing, and an early look has little of the level.
    early = plan_study(study(looks=(2, 5)), deviation=0.004).power
    assert early is not None and early.seeds == 2 and early.smallest > 2 * power.smallest
    assert plan_study(study(looks=(4, 5)), deviation=0.004).power is None
    # Neither is known from one seed, nor for a metric whose size is not known.
    assert plan_study(study(seeds=(0,))).power is None
    assert plan_study(study(metric="calibration_error")).power is None
    assert "Power: not known." in plan_study(study(seeds=(0,))).text


def test_without_a_ledger_the_noise_is_an_assumption(tmp_path: Path) -> None:
    plan = plan_study(study(), ledger=tmp_path / "noise.jsonl")
    assert plan.power is not None and plan.power.is_assumed
    assert plan.power.deviation == 2.0 * assumed_noise(1.0)
    assert "M parameters differ by 0.2 % (standard deviation between seeds)" in " ".join(plan.text.split())
    assert "Time and memory were not measured." in " ".join(plan.text.split())
    assert assumed_noise(1e5) == assumed_noise(0.6e6) == 0.002
    assert assumed_noise(1e9) == pytest.approx(0.0005)
    assert 0.0005 < assumed_noise(1e7) < 0.002


def test_what_was_made_equal_is_shown() -> None:
    wide = Arm(name="wide", changes={"model.stack.0.pattern.0.ffn.hidden_dim": 2 * FFN})
    before = study(
        arms=(Arm(name="plain"), wide),
        tune=None,
        matched=(Match(quantity=Quantity.FLOPS, by=Dimension.STEPS, tolerance=0.1),),
    )
    after, matched = match_arms(before)
    text = " ".join(plan_study(after, matched=matched).text.split())
    assert "matched wide: steps 10 -> 7: " in text


def test_arms_that_build_on_runs_that_do_not_exist() -> None:
    """The teacher's forward pass counts, and the vocabulary is that of the run that is continued."""

    def taught(seed: int, run: Path) -> Experiment:
        base = tiny.experiment()
        student = experiment(DENSE)
        distill = DistillConfig(teachers=(TeacherConfig(path=str(run)),))
        return dataclasses.replace(
            student,
            model=dataclasses.replace(student.model, vocab_size=None),
            tokenizer=FileTokenizer(path=str(run / "tokenizer")),
            objective=dataclasses.replace(base.objective, distill=distill),
        )

    def continued(seed: int, run: Path) -> Experiment:
        plain = dataclasses.replace(taught(seed, run), objective=tiny.experiment().objective)
        return dataclasses.replace(plain, init=FromModel(path=str(run)))

    teacher = experiment(DENSE)
    teacher = dataclasses.replace(teacher, model=dataclasses.replace(teacher.model, vocab_size=None))
    asked = study(
        base=teacher,
        arms=(
            Arm(name="plain"),
            Arm(name="continued", after="plain", experiment=continued),
            Arm(name="taught", after="continued", experiment=taught),
        ),
        tune=None,
    )
    plan = plan_study(asked, time_of=timed)
    plain, again, learner = (arm.cost for arm in plan.arms)
    assert plain is not None and again is not None and learner is not None
    assert again == plain
    assert learner.parameters == plain.parameters
    # A forward pass is a third of a step; the head of the teacher is multiplied in the student's loss.
    assert 1.3 < learner.flops / plain.flops < 1.8
    assert [arm.seconds for arm in plan.arms] == [5.0, 5.0, None]
    assert "taught is not timed: its teacher, a run of continued, does not exist yet" in plan.text
    with planned_experiment(asked, "taught", 0) as each:
        assert each.tokenizer == teacher.tokenizer


def test_a_few_steps_are_timed_on_random_tokens() -> None:
    short = dataclasses.replace(experiment(DENSE), run=RunConfig(steps=7))
    # A row for each of the devices here.
    short = dataclasses.replace(short, data=dataclasses.replace(short.data, batch_size=8))
    measured = time_training(short, vocab_size=VOCAB_SIZE, measured_steps=2)
    assert 0 < measured.per_step(7) == measured.seconds / 7 < 10
    assert measured.compile_seconds > 0
    assert measured.memory.parameters == 4 * arm_cost(short).parameters
    # Another length and learning rate are the same program, which is not compiled again.
    other = dataclasses.replace(
        short, run=RunConfig(steps=70), optim=dataclasses.replace(short.optim, lr=3e-3)
    )
    assert time_training(other, vocab_size=VOCAB_SIZE, measured_steps=2).seconds == pytest.approx(
        10 * measured.seconds
    )
