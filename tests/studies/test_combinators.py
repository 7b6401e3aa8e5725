"""Grids, pairs and ladders: what their arms are named, and what differs between them."""

import dataclasses

import pytest

from slmjax.studies import Arm, Study, grid, ladder, pair
from slmjax.training.optim import Optimizer
from tests.studies.stub import experiment


def asked(arms: tuple[Arm, ...], **changes) -> Study:
    return Study(name="q", base=experiment(), arms=arms, seeds=(0,), baseline=arms[0].name, **changes)


def test_a_grid_has_an_arm_for_each_combination() -> None:
    arms = grid(
        {
            "optim.lr": (1e-3, 0.02),
            "optim.kind": (Optimizer.ADAMW, Optimizer.MUON),
            "shape": {
                "deep": {"model.embed_dim": 64, "model.stack.0.repeats": 8},
                "wide": {"model.embed_dim": 256},
            },
        }
    )
    assert [arm.name for arm in arms[:3]] == [
        "lr 0.001, kind adamw, deep",
        "lr 0.001, kind adamw, wide",
        ("lr 0.001, kind muon, deep"),
    ]
    assert len(arms) == 8
    last = asked(arms).experiment("lr 0.02, kind muon, deep", 0)
    assert (last.optim.lr, last.optim.kind, last.model.embed_dim, last.model.stack[0].repeats) == (
        0.02,
        Optimizer.MUON,
        64,
        8,
    )


def test_names_are_as_long_as_they_must_be() -> None:
    arms = grid({"optim.warmup_steps": (1,), "optim.lr": {"low": 1e-4}, "data.seed": (1,), "run.seed": (2,)})
    assert [arm.name for arm in arms] == ["warmup_steps 1, low, data.seed 1, run.seed 2"]


def test_a_grid_that_makes_no_sense() -> None:
    for axes, message in (
        ({"optim.lr": ()}, "is \\(\\): give a tuple"),
        ({"optim.lr": "0.1"}, "is '0.1': give a tuple"),
        ({"optim.lr": (1e-3, 1e-3)}, "two arms of the grid have the same name"),
        ({"optim.lr": (1e-3,), "a": {"b": {"optim.lr": 1}}}, "two axes of the grid change optim.lr"),
        ({"eval": (experiment().eval,)}, "takes a EvalConfig, which has no short name"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(axes)


def test_a_pair_is_the_base_and_a_change() -> None:
    study = asked(pair("nano", "slower", {"optim.lr": 5e-4}))
    assert study.experiment("nano", 0) == study.base
    assert study.experiment("slower", 0).optim.lr == 5e-4


def test_a_ladder_asks_the_same_at_each_size() -> None:
    own = Arm(name="own", experiment=experiment(3e-3), changes={"optim.weight_decay": 0.5})
    by_seed = Arm(name="by seed", experiment=lambda seed: experiment(seed * 1e-3))
    question = dataclasses.replace(
        asked((*pair("nano", "slower", {"optim.lr": 5e-4}), own, by_seed)), seeds=(4,)
    )
    small, large = ladder(question, {"1M": {}, "4M": {"model.embed_dim": 256}})
    assert (small.name, small.ladder, small.size) == ("q, 1M", "q", "1M") and large.directory == "q-4M"
    for name in ("nano", "slower", "own", "by seed"):
        one, other = (study.experiment(name, 4) for study in (small, large))
        assert one == question.experiment(name, 4) and other.model.embed_dim == 256
        assert dataclasses.replace(other, model=one.model) == one
    with pytest.raises(ValueError, match="a ladder has two sizes or more"):
        ladder(question, {"1M": {}})
