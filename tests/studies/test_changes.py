"""Changes of an experiment by field paths, and arms that only name them."""

import pytest

from slmjax.studies import Arm, Study, member_experiment
from slmjax.studies.changes import with_changes
from slmjax.training.optim import Optimizer
from slmjax.training.recipes import nano


def test_values_by_path_and_by_star() -> None:
    base = nano()
    changed = with_changes(
        base, {"optim.lr": 3e-3, "model.stack.0.repeats": 2, "model.stack.*.pattern.*.mixer.num_kv_heads": 1}
    )
    assert changed.optim.lr == 3e-3 and changed.model.stack[0].repeats == 2
    assert {block.mixer.num_kv_heads for block in changed.model.blocks()} == {1}
    assert changed.optim.muon_lr == base.optim.muon_lr and with_changes(base, {}) is base
    assert with_changes(base, {"optim.kind": "adamw"}).optim.kind is Optimizer.ADAMW
    # Each alone would be refused.
    longer = {"data.sequence_length": 4096, "model.context_length": 4096}
    assert with_changes(base, longer).data.sequence_length == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.muon_rl": 1.0}, "optim.muon_rl.*muon_lr"),
        ({"model.stack.3.repeats": 1}, "model.stack.3"),
        ({"optim.lr.peak": 1.0}, "optim.lr is 0.02"),
        ({"optim.lr": -1.0}, "optim.lr is -1"),
        ({"optim.lr": "1e-3"}, "optim with lr changed"),
        ({"optim.kind": "adamww"}, "optim.kind is one of adamw, .*, not 'adamww'.*Did you mean 'adamw'"),
        ({"run.steps": 2.5}, "run.steps: expected int|run with steps changed"),
        ({"optim": nano().optim, "optim.lr": 1.0}, "as a whole and in parts"),
    ],
)
def test_mistakes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_changes(nano(), changes)


def test_arms_of_a_base() -> None:
    arms = (
        Arm(name="base"),
        Arm(name="fast", changes={"optim.lr": 0.04}),
        Arm(name="deep", changes=lambda base: with_changes(base, {"model.stack.0.repeats": 9})),
    )
    study = Study(name="a", arms=arms, base=nano(), seeds=(3,), baseline="base")
    assert member_experiment(study, "fast", 3).optim.lr == 0.04
    assert member_experiment(study, "deep", 3).model.num_layers == 9
    assert member_experiment(study, "base", 3).run.seed == 3
    with pytest.raises(ValueError, match="arm 'base' has no experiment"):
        Study(name="a", arms=arms, seeds=(3,), baseline="base").experiment("base", 3)
