"""Arms made equal: what the matcher moves, and what it says where it cannot."""

import dataclasses
from collections.abc import Callable

import pytest

from slmjax.config import dumps, loads
from slmjax.models import AttentionConfig, BlockConfig, LayerGroup, MlpConfig, ModelConfig, MoeConfig
from slmjax.quantization.rules import quant_of
from slmjax.studies.arms import Arm, Derived
from slmjax.studies.costs import arm_cost, cost_in
from slmjax.studies.derived import RoundToNearest
from slmjax.studies.design import Dimension, Match, Quantity
from slmjax.studies.matching import CannotMatch, Matched, at_matched, match_arms, nearest_integer
from slmjax.studies.study import Study
from slmjax.training.experiment import Experiment, RunConfig
from slmjax.training.optim import OptimConfig
from tests import tiny

FFN = 320


def experiment(**model: object) -> Experiment:
    """Two dense layers of width 128; nothing of it is trained here."""
    base = tiny.experiment()
    block = BlockConfig(mixer=AttentionConfig(num_heads=4, head_dim=32), ffn=MlpConfig(hidden_dim=FFN))
    fields = {
        "embed_dim": 128,
        "stack": (LayerGroup(pattern=(block,), repeats=2),),
        "context_length": 64,
        "vocab_size": 1024,
    }
    return dataclasses.replace(
        base, model=ModelConfig(**(fields | model)), optim=OptimConfig(), run=RunConfig(steps=200)
    )


def block(*, kv_heads: int = 4, head_dim: int | None = 32, ffn: int | MoeConfig = FFN) -> BlockConfig:
    hidden = MlpConfig(hidden_dim=ffn) if isinstance(ffn, int) else ffn
    return BlockConfig(
        mixer=AttentionConfig(num_heads=4, num_kv_heads=kv_heads, head_dim=head_dim), ffn=hidden
    )


def stack(*blocks: BlockConfig, repeats: int = 2) -> tuple[LayerGroup, ...]:
    return (LayerGroup(pattern=blocks, repeats=repeats),)


def study(other: Experiment, *matched: Match, seeds: tuple[int, ...] = (0, 1)) -> Study:
    arms = (Arm(name="base", experiment=experiment()), Arm(name="other", experiment=other))
    return Study(name="equal", arms=arms, seeds=seeds, baseline="base", matched=matched)


EXPERTS = MoeConfig(num_experts=4, num_selected=2, hidden_dim=FFN, shared_hidden_dim=FFN // 2)

# What the other arm is, what is matched by what, and the value that it must come to.
CASES: dict[str, tuple[Callable[[], Experiment], Quantity, Dimension, int | None]] = {
    # 2 x (2 x 128 x 64) parameters fewer: 2 x 3 x 128 x 42.7 more in multiples of 8.
    "grouped queries": (
        lambda: experiment(stack=stack(block(kv_heads=2))),
        Quantity.PARAMETERS,
        Dimension.FFN,
        360,
    ),
    "deep and thin": (
        lambda: experiment(stack=stack(block(), repeats=6)),
        Quantity.NON_EMBEDDING_PARAMETERS,
        Dimension.WIDTH,
        None,
    ),
    # Layers of half the parameters: there must be twice as many.
    "shallow": (
        lambda: experiment(stack=stack(block(ffn=74), repeats=3)),
        Quantity.NON_EMBEDDING_PARAMETERS,
        Dimension.DEPTH,
        4,
    ),
    "experts": (
        lambda: experiment(stack=stack(block(ffn=EXPERTS))),
        Quantity.ACTIVE_PARAMETERS,
        Dimension.FFN,
        128,
    ),
    "heads that follow the width": (
        lambda: experiment(stack=stack(block(head_dim=None, ffn=256))),
        Quantity.PARAMETERS,
        Dimension.WIDTH,
        136,
    ),
    "formats": (
        lambda: dataclasses.replace(experiment(), quant=quant_of("q8_0")),
        Quantity.DEPLOYED_BYTES,
        Dimension.FFN,
        None,
    ),
    "steps": (lambda: experiment(stack=stack(block(ffn=640))), Quantity.FLOPS, Dimension.STEPS, None),
    "tokens": (
        lambda: dataclasses.replace(
            experiment(), data=dataclasses.replace(tiny.experiment().data, batch_size=12)
        ),
        Quantity.TOKENS,
        Dimension.STEPS,
        133,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_dimension_is_moved_until_the_quantity_is_equal(name: str) -> None:
    make, quantity, by, value = CASES[name]
    before = study(make(), Match(quantity=quantity, by=by, tolerance=0.05))
    after, (choice,) = match_arms(before)
    target = cost_in(quantity, experiment())
    reached = cost_in(quantity, after.experiment("other", 1))
    assert choice.is_met
    assert abs(reached / target - 1) <= 0.05
    assert (choice.target, choice.after) == (target, reached)
    assert choice.before == cost_in(quantity, make())
    if value is not None:
        assert choice.value_after == value
    assert after.experiment("base", 0) == before.experiment("base", 0)
    # A study that is resumed makes the same choices from the record alone.
    record = loads(Matched, dumps(choice))
    assert at_matched(before, [record]).experiment("other", 0) == after.experiment("other", 0)
    assert choice.text.startswith(f"other: {by.value} {choice.value_before:,} -> {choice.value_after:,}: ")


def test_a_neighbour_would_be_no_nearer() -> None:
    """The chosen width is the best multiple of 8, not only one within the tolerance."""
    other = experiment(stack=stack(block(kv_heads=2)))
    _, (choice,) = match_arms(study(other, Match(quantity=Quantity.PARAMETERS, by=Dimension.FFN)))
    target = cost_in(Quantity.PARAMETERS, experiment())
    for hidden_dim in (choice.value_after - 8, choice.value_after + 8):
        near = experiment(stack=stack(block(kv_heads=2, ffn=hidden_dim)))
        assert abs(cost_in(Quantity.PARAMETERS, near) - target) > abs(choice.after - target)
    assert choice.text == (
        f"other: ffn 320 -> 360: {round(choice.after):,} parameters, "
        f"{100 * abs(choice.off_by):.2g} % {'above' if choice.off_by > 0 else 'below'} the baseline"
    )


def test_several_quantities_in_order() -> None:
    other = experiment(stack=stack(block(kv_heads=1), repeats=4))
    matched = (
        Match(quantity=Quantity.PARAMETERS, by=Dimension.WIDTH),
        # Of a small model, 8 dims more are several per cent: a finer dimension does the rest.
        Match(quantity=Quantity.PARAMETERS, by=Dimension.FFN),
        Match(quantity=Quantity.FLOPS, by=Dimension.STEPS),
    )
    after, choices = match_arms(study(other, *matched))
    base = arm_cost(experiment())
    cost = arm_cost(after.experiment("other", 0))
    assert all(choice.is_met for choice in choices)
    assert cost.parameters == pytest.approx(base.parameters, rel=0.01)
    assert cost.flops == pytest.approx(base.flops, rel=0.01)
    # All fields that were changed are on record, and only they.
    assert (
        {*choices[0].changes}
        == {*choices[1].changes}
        == {"model.embed_dim", "model.stack.0.pattern.0.ffn.hidden_dim", "run.steps"}
    )


def test_what_cannot_be_equal_says_how_near_it_came() -> None:
    # One more layer is far more than 1 %.
    other = experiment(stack=stack(block(ffn=200), repeats=2))
    match = Match(quantity=Quantity.PARAMETERS, by=Dimension.DEPTH)
    with pytest.raises(
        CannotMatch, match=r"other: depth 2 -> 3: [\d,]+ parameters, [\d.]+ % above the baseline"
    ):
        match_arms(study(other, match))
    after, (choice,) = match_arms(study(other, dataclasses.replace(match, allow=("other",))))
    assert not choice.is_met
    assert after.experiment("other", 0).model.num_layers == 3
    with pytest.raises(ValueError, match="'third' is not an arm"):
        match_arms(study(other, dataclasses.replace(match, allow=("third",))))
    with pytest.raises(ValueError, match="cache_bytes cannot be matched by ffn: use width or depth"):
        Match(quantity=Quantity.CACHE_BYTES, by=Dimension.FFN)


def test_seconds_are_measured_once_and_matched_by_steps() -> None:
    def seconds(experiment: Experiment) -> float:
        return 0.01 * experiment.model.num_layers

    other = experiment(stack=stack(block(), repeats=3))
    match = Match(quantity=Quantity.SECONDS, by=Dimension.STEPS)
    after, (choice,) = match_arms(study(other, match), seconds=seconds)
    assert after.experiment("other", 0).run.steps == 133
    assert choice.after == pytest.approx(133 * 0.03)
    assert choice.changes == {"run.steps": 133}


def test_arms_that_are_equal_or_derived_stay() -> None:
    base = Arm(name="base", experiment=experiment())
    rounded = Derived(
        name="rounded", source="base", derivation=RoundToNearest(rules=quant_of("q8_0").phases[0].rules)
    )
    same = Arm(name="same", changes={"optim.lr": 1e-2}, experiment=experiment())
    match = Match(quantity=Quantity.PARAMETERS, by=Dimension.FFN)
    before = Study(name="equal", arms=(base, rounded, same), seeds=(0,), baseline="rounded", matched=(match,))
    after, (choice,) = match_arms(before)
    assert after == before
    assert choice.changes == {}
    assert "ffn stays 320" in choice.text and "exactly as the baseline" in choice.text


@pytest.mark.parametrize("function", [lambda x: 7 * x, lambda x: x**2 + 30, lambda x: x // 10, lambda x: 5])
def test_the_nearest_integer(function: Callable[[int], float]) -> None:
    asked = []

    def counted(x: int) -> float:
        asked.append(x)
        return float(function(x))

    for target in (0.0, 44.4, 700.0, 1e9):
        for start in (1, 40, 500):
            asked.clear()
            chosen = nearest_integer(counted, target, start=start, low=1, high=500)
            nearest = min(abs(function(x) - target) for x in range(1, 501))
            assert abs(function(chosen) - target) == nearest
            assert len(asked) == len(set(asked)) <= 24
