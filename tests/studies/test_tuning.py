"""Learning rates of arms: the optimum of synthetic curves, and sweeps as studies of their own."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from slmjax.config import dumps, loads
from slmjax.quantization.rules import quant_of
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.derived import RoundToNearest
from slmjax.studies.design import LearningRates
from slmjax.studies.running import run_study
from slmjax.studies.study import Member, Study
from slmjax.studies.tuning import (
    TriedRate,
    Tuned,
    TuningUnfinished,
    at_rates,
    best_rate,
    choose_rates,
    sensitivity,
    tune,
    tuning_study,
    unresolved_arms,
)
from slmjax.training.experiment import Experiment, FromModel
from tests.studies.stub import StubTrainer, experiment

GRID = (5e-4, 1e-3, 2e-3, 4e-3)
BEST = 1.3e-3
SEEDS = (1000, 1001)


def curve(rate: float) -> float:
    """Bits per byte of a parabola in log2 of the rate."""
    return 1.5 + 0.02 * (math.log2(rate) - math.log2(BEST)) ** 2


def sweep(values: Callable[[float], float | None], rates: tuple[float, ...] = GRID) -> tuple[TriedRate, ...]:
    tried = []
    for rate in rates:
        value = values(rate)
        status = "finished" if value is not None else "diverged"
        tried.append(TriedRate(rate=rate, value=value, status=status))
    return tuple(tried)


# The optimum ------------------------------------------------------------------------------------------------
def test_the_minimum_of_a_parabola_is_exact() -> None:
    optimum = best_rate(sweep(curve))
    assert (optimum.rate, optimum.value) == (pytest.approx(BEST), pytest.approx(1.5))
    assert optimum.is_fitted and optimum.is_resolved and not optimum.reason
    # A grid that is no power of two, and a metric that should be high.
    optimum = best_rate(sweep(lambda rate: -curve(rate), (4e-4, 1e-3, 1.5e-3, 6e-3)), lower_is_better=False)
    assert (optimum.rate, optimum.value) == (pytest.approx(BEST), pytest.approx(-1.5))


def test_an_optimum_at_the_edge_asks_for_a_wider_grid() -> None:
    lowest = best_rate(sweep(curve, (2e-3, 4e-3, 8e-3)))
    assert lowest.rate == 2e-3 and not lowest.is_resolved and not lowest.is_fitted
    assert lowest.reason == "0.002 is the lowest that was tried: widen the grid to lower rates"
    highest = best_rate(sweep(curve, (1e-4, 2e-4, 4e-4)))
    assert highest.rate == 4e-4 and not highest.is_resolved
    assert highest.reason == "0.0004 is the highest that was tried: widen the grid to higher rates"


def test_rates_that_diverge_enclose_the_optimum() -> None:
    bounded = best_rate(sweep(lambda rate: None if rate > 1e-3 else 2 - 100 * rate))
    assert bounded.rate == 1e-3 and bounded.is_resolved and not bounded.is_fitted
    assert bounded.reason == "training diverges at 0.002"
    # Beside the neighbours nothing matters; a failure next to the best says nothing about the rate.
    far = best_rate(sweep(lambda rate: None if rate > 2e-3 else curve(rate)))
    assert far.is_fitted and far.rate == pytest.approx(BEST)
    tried = sweep(curve)
    failed = (*tried[:2], dataclasses.replace(tried[2], value=None, status="failed"), tried[3])
    unknown = best_rate(failed)
    assert not unknown.is_resolved and unknown.reason == "the run at 0.002 failed"
    nowhere = best_rate(sweep(lambda rate: None))
    assert (nowhere.rate, nowhere.value, nowhere.is_resolved) == (GRID[0], None, False)
    assert nowhere.reason == "Training diverges at every rate that was tried: widen the grid to lower rates"
    failed = best_rate([dataclasses.replace(each, value=None, status="failed") for each in tried])
    assert not failed.is_resolved and "none finished: see their errors" in failed.reason


def test_a_flat_curve_has_no_fit() -> None:
    flat = best_rate(sweep(lambda rate: 1.0))
    assert flat.rate in GRID[1:3] and flat.is_resolved and not flat.is_fitted
    assert flat.reason == "the metric is the same at 0.0005 and 0.002"


def test_sensitivity_is_the_mean_excess() -> None:
    tried = sweep(lambda rate: {5e-4: 1.3, 1e-3: 1.0, 2e-3: 1.1}.get(rate))
    # The last rate diverged: it counts as the ceiling, and so does what is worse than that.
    assert sensitivity(tried, ceiling=2.0) == pytest.approx((0.3 + 0.0 + 0.1 + 1.0) / 4)
    assert sensitivity(tried, ceiling=1.2) == pytest.approx((0.2 + 0.0 + 0.1 + 0.2) / 4)
    accuracy = sweep(lambda rate: {5e-4: 0.6, 1e-3: 0.9, 2e-3: 0.8, 4e-3: 0.1}[rate])
    assert sensitivity(accuracy, ceiling=0.2, lower_is_better=False) == pytest.approx((0.3 + 0.1 + 0.7) / 4)


# Sweeps of a study ------------------------------------------------------------------------------------------
def study(**changes: object) -> Study:
    """Two arms, one of them with another rate of its own, and one that is rounded."""
    rounded = Derived(
        name="rounded", source="fast", derivation=RoundToNearest(rules=quant_of("q8_0").phases[0].rules)
    )
    arms = (
        Arm(name="slow", changes={"run.steps": 11}),
        Arm(name="fast", experiment=experiment(1.6e-2)),
        rounded,
    )
    fields = {
        "name": "pace",
        "base": experiment(1e-3),
        "arms": arms,
        "seeds": (0, 1),
        "baseline": "slow",
        "tune": LearningRates(factors=(0.5, 1, 2, 4), seeds=SEEDS),
    }
    return Study(**(fields | changes))


def bits(rate: float, seed: int) -> float:
    # The arm that begins at 1.6e-2 is best above its grid.
    return (curve(rate) if rate < 4e-3 else 1.6 - rate) + 0.01 * (seed - SEEDS[0])


def trainer() -> StubTrainer:
    rates = [factor * own for own in (1e-3, 1.6e-2) for factor in (0.5, 1, 2, 4)]
    return StubTrainer(bits={(rate, seed): bits(rate, seed) for rate in rates for seed in SEEDS})


def test_each_arm_is_trained_at_its_own_best_rate(tmp_path: Path) -> None:
    train = trainer()

    def run(swept: Study, directory: Path) -> tuple[Member, ...]:
        return run_study(swept, directory, train=train)

    before = study()
    after, (slow, fast) = tune(before, tmp_path, run=run)
    assert (tmp_path / "tuning" / "members.jsonl").is_file()
    assert {each.run.seed for each in train.asked} == {*SEEDS}
    assert (slow.rate, slow.value) == (pytest.approx(BEST, rel=0.05), pytest.approx(1.505, abs=0.002))
    assert slow.is_resolved and slow.own_rate == 1e-3 and slow.seeds == SEEDS
    tuned = after.experiment("slow", 0)
    assert tuned.optim.lr == slow.rate and tuned.run.steps == 11
    assert tuned.optim.muon_lr == pytest.approx(before.experiment("slow", 0).optim.muon_lr * slow.rate / 1e-3)
    # The other arm is best at its highest rate: neither it nor what is derived from it gets a verdict.
    assert fast.rate == 6.4e-2 and not fast.is_resolved
    assert unresolved_arms(after, (slow, fast)) == ("fast", "rounded")
    assert "widen the grid to higher rates" in list(fast.notes())[1]
    assert "0.001 (" in next(slow.notes()) and "with seeds 1000, 1001 of" in next(slow.notes())
    assert loads(Tuned, dumps(slow)) == slow
    # Nothing is trained again, and the choice stays the same.
    count = len(train.asked)
    assert tune(before, tmp_path, run=run)[1] == (slow, fast)
    assert len(train.asked) == count
    assert at_rates(before, (slow, fast)).experiment("fast", 1) == after.experiment("fast", 1)


def test_runs_that_diverge_count_as_no_training(tmp_path: Path) -> None:
    statuses = {(4e-3, SEEDS[1]): "diverged"}
    train = dataclasses.replace(trainer(), statuses=statuses)
    swept = study(arms=study().arms[:1])
    _, (slow,) = tune(swept, tmp_path, run=lambda each, directory: run_study(each, directory, train=train))
    assert [each.status for each in slow.tried] == ["finished", "finished", "finished", "diverged"]
    # The stub's loss and bits per byte are equal: a token of nano's tokenizer has log(4096) nats.
    assert slow.ceiling == pytest.approx(math.log(4096))
    values = [each.value for each in slow.tried[:3] if each.value is not None]
    assert slow.ceiling is not None
    excess = sum(values) - 3 * min(values) + slow.ceiling - min(values)
    assert slow.sensitivity == pytest.approx(excess / 4)


def test_an_arm_that_diverges_at_every_rate_does_not_stop_the_study(tmp_path: Path) -> None:
    rates = tuning_study(study()).arms[4:8]
    statuses = {(factor * 1.6e-2, seed): "diverged" for factor in (0.5, 1, 2, 4) for seed in (*SEEDS, 0, 1)}
    train = dataclasses.replace(trainer(), statuses=statuses)
    after, tuned = tune(
        study(), tmp_path, run=lambda each, directory: run_study(each, directory, train=train)
    )
    assert {arm.name.split(" at ")[0] for arm in rates} == {"fast"}
    slow, fast = tuned
    assert slow.is_resolved and slow.value is not None
    assert (fast.rate, fast.value, fast.sensitivity) == (0.8e-2, None, None)
    assert unresolved_arms(after, tuned) == ("fast", "rounded")
    (note,) = fast.notes()
    assert "0.016 (diverged)" in note and note.endswith("to lower rates. Its verdicts are not resolved.")
    assert loads(Tuned, dumps(fast)) == fast
    # Its members, and what is derived from them, have diverged: outcomes that are not tried again.
    members = run_study(after, tmp_path / "runs", train=train)
    ended = {(member.arm, member.seed): member for member in members}
    assert [ended[arm, seed].status for arm in ("fast", "rounded") for seed in (0, 1)] == ["diverged"] * 4
    assert ended["rounded", 1].error == "fast diverged with seed 1, so that there is nothing to build on"


def test_tuning_seeds_never_judge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seeds \[1001\] choose the learning rates and are seeds of"):
        tuning_study(study(seeds=(0, 1001)))
    assert tune(study(tune=None), tmp_path) == (study(tune=None), ())
    with pytest.raises(ValueError, match="is not tuned"):
        tuning_study(study(tune=None))


def test_runs_that_other_workers_train_are_waited_for(tmp_path: Path) -> None:
    swept = study()
    members = run_study(tuning_study(swept), tmp_path, train=trainer(), only=["slow at 0.001"])
    with pytest.raises(TuningUnfinished, match="learning rates of slow, fast are still being tried"):
        choose_rates(swept, members)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": (1e-3, 2e-3)}, "give at least 3 above 0"),
        ({"factors": (1, 1, 2)}, "each once"),
        ({"rates": GRID, "factors": (1, 2, 4)}, "give one of both"),
        ({}, "give one of both"),
        ({"rates": GRID, "seeds": ()}, "the tuning seeds are"),
    ],
)
def test_grids_that_choose_nothing(changes: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRates(**changes)


def test_arms_that_build_on_others_bring_them_into_the_sweep() -> None:
    """Sources are trained with the tuning seeds too, at their own rates; a single run for all seeds stays."""

    def after(seed: int, run: Path) -> Experiment:
        return dataclasses.replace(experiment(1e-3), init=FromModel(path=str(run)))

    def built_on(seeds: tuple[int, ...]) -> Study:
        source = Study(
            name="first", base=experiment(5e-3), arms=(Arm(name="full"),), seeds=seeds, baseline="full"
        )
        arms = (
            Arm(name="full", after=("first", "full"), experiment=after),
            Arm(name="then", after="full", experiment=after),
        )
        return study(arms=arms, baseline="full", earlier=(source,))

    swept = tuning_study(built_on((0, 1)))
    names = [arm.name for arm in swept.arms]
    assert names[:2] == ["first: full", "full"]
    assert swept.earlier == ()
    assert swept.source("full at 0.001", SEEDS[0]) == (swept, "first: full", SEEDS[0])
    assert swept.source("then at 0.001", SEEDS[0]) == (swept, "full", SEEDS[0])
    assert swept.experiment("first: full", SEEDS[0]).optim.lr == 5e-3
    assert swept.experiment("full", SEEDS[0]).optim.lr == 1e-3
    teacher = built_on((0,))
    swept = tuning_study(teacher)
    assert swept.earlier == teacher.earlier
    assert swept.source("full at 0.001", SEEDS[0]) == (teacher.earlier[0], "full", 0)
