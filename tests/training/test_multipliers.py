"""Factors of rates, decay and eps, against values worked out by hand from the papers' tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.models.parameterization import Parameterization, Scaling
from slmjax.training.multipliers import Multipliers, Role, multipliers_of, role_of
from slmjax.training.optim import OptimConfig, Optimizer, Schedule, make_optimizer, parameter_groups

BLOCK = "segments/0/blocks/0"
# Path to the role, and the dims of one parameter.
ROLES = {
    "embed/table": (Role.INPUT, 2),
    "positions/weight": (Role.INPUT, 2),
    "head/weight": (Role.OUTPUT, 2),
    "final_norm/scale": (Role.VECTOR, 1),
    f"{BLOCK}/mixer/query/weight": (Role.HIDDEN, 2),
    f"{BLOCK}/mixer/latent_up/weight": (Role.HIDDEN, 2),
    f"{BLOCK}/mixer/query/bias": (Role.VECTOR, 1),
    f"{BLOCK}/mixer/sinks": (Role.VECTOR, 1),
    f"{BLOCK}/mixer/query_norm/scale": (Role.VECTOR, 1),
    f"{BLOCK}/ffn/experts/gate": (Role.HIDDEN, 2),
    f"{BLOCK}/ffn/experts/gate_bias": (Role.VECTOR, 1),
    f"{BLOCK}/ffn/shared/down/weight": (Role.HIDDEN, 2),
    f"{BLOCK}/ffn/shared_gate/weight": (Role.ROUTER, 2),
    f"{BLOCK}/ffn/router/weight": (Role.ROUTER, 2),
    f"{BLOCK}/ffn/router/bias": (Role.VECTOR, 1),
    f"{BLOCK}/mixer/query/weight/log_scale": (Role.QUANTIZER, 2),
    f"{BLOCK}/mixer/query/input_quantizer/log_scale": (Role.QUANTIZER, 1),
    "embed/table/log_scale": (Role.QUANTIZER, 2),
}
MUP = Scaling(kind=Parameterization.MUP, width=4.0)
COMPLETEP = Scaling(kind=Parameterization.COMPLETEP, width=4.0, depth=8.0)


def test_roles():
    assert {path: role_of(path, num_dims=dims) for path, (_, dims) in ROLES.items()} == {
        path: role for path, (role, _) in ROLES.items()
    }


def test_factors_of_the_tables():
    """Widths of 4 and depths of 8 times the base, with the tables' values in numbers."""
    # Table 8 of Tensor Programs V, Adam: 1 over the fan-in for hidden matrices, 1 for all others.
    hidden = Multipliers(learning_rate=0.25, weight_decay=4.0)
    of_mup = {path: multipliers_of(path, num_dims=dims, scaling=MUP) for path, (_, dims) in ROLES.items()}
    for path, (role, _) in ROLES.items():
        assert of_mup[path] == (hidden if role in (Role.HIDDEN, Role.ROUTER) else Multipliers()), path
    # Table 1 of CompleteP, alpha 1: rates in the blocks by m_L^0; eps by 1 / (m_N m_L), outside by 1 / m_N.
    factors = {
        path: multipliers_of(path, num_dims=dims, scaling=COMPLETEP) for path, (_, dims) in ROLES.items()
    }
    in_block = Multipliers(eps=1 / 32)
    assert factors["embed/table"] == factors["head/weight"] == Multipliers(eps=1 / 4)
    assert factors["final_norm/scale"] == Multipliers(eps=1 / 4)
    assert factors[f"{BLOCK}/mixer/query/bias"] == factors[f"{BLOCK}/mixer/sinks"] == in_block
    inner = Multipliers(learning_rate=0.25, weight_decay=4.0, eps=1 / 32)
    assert factors[f"{BLOCK}/ffn/experts/gate"] == factors[f"{BLOCK}/ffn/router/weight"] == inner
    assert factors["embed/table/log_scale"] == Multipliers()


def test_no_factors_at_the_base_and_for_the_standard():
    for kind in Parameterization:
        for path, (_, dims) in ROLES.items():
            assert multipliers_of(path, num_dims=dims, scaling=Scaling(kind=kind)) == Multipliers()


SHAPES = {
    "embed/table": (5, 4),
    f"{BLOCK}/mixer/query/weight": (2, 4, 4),
    f"{BLOCK}/ffn/experts/gate": (2, 3, 4, 4),
    f"{BLOCK}/mixer_norm/scale": (2, 4),
}


def changes(optim, scaling):
    """Root mean square of the first update of every parameter, from gradients of 1e-3."""
    random = np.random.default_rng(0)
    gradients = {path: 1e-3 * random.choice([-1.0, 1.0], shape) for path, shape in SHAPES.items()}
    updates = first_update(optim, scaling, 0.0, gradients)
    return {path: float(np.sqrt(np.mean(np.square(update)))) for path, update in updates.items()}


@functools.partial(jax.jit, static_argnames=("optim", "scaling"))
def first_update(optim, scaling, value, gradients):
    params = {path: jnp.full(shape, value) for path, shape in SHAPES.items()}
    optimizer = make_optimizer(optim, params, total_steps=10, scaling=scaling)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def settings(kind, **more):
    return OptimConfig(
        kind=kind, lr=0.1, muon_lr=0.2, schedule=Schedule.CONSTANT, warmup_steps=0, grad_clip=None, **more
    )


@pytest.mark.parametrize("kind", [Optimizer.ADAMW, Optimizer.LION])
def test_updates_of_adam_and_lion(kind):
    """Signs, so that the size of an update is its rate."""
    got = changes(settings(kind), MUP)
    expected = {path: 0.025 if path.endswith(("weight", "gate")) else 0.1 for path in SHAPES}
    assert got == pytest.approx(expected, rel=1e-3)


def test_updates_of_muon():
    """Matrices between hidden layers move as at the base: their spectral norm is the rate at all widths."""
    got = changes(settings(Optimizer.MUON), COMPLETEP)
    base = changes(settings(Optimizer.MUON), Scaling())
    assert got == pytest.approx(base, rel=1e-3)
    assert base["embed/table"] == pytest.approx(0.1, rel=1e-3)


def test_eps_of_completep():
    """With an eps as large as the gradient, Adam's first update is lr / (1 + eps factor)."""
    got = changes(settings(Optimizer.ADAMW, eps=1e-3), COMPLETEP)
    assert got["embed/table"] == pytest.approx(0.1 / (1 + 1 / 4), rel=1e-3)
    assert got[f"{BLOCK}/mixer_norm/scale"] == pytest.approx(0.1 / (1 + 1 / 32), rel=1e-3)
    assert got[f"{BLOCK}/mixer/query/weight"] == pytest.approx(0.025 / (1 + 1 / 32), rel=1e-3)


def test_decay_does_not_depend_on_width():
    """Without a gradient a matrix shrinks by rate times decay, as at the base."""
    optim = settings(Optimizer.ADAMW, weight_decay=0.5)
    zeros = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    for scaling in (Scaling(), MUP):
        updates = first_update(optim, scaling, 1.0, zeros)
        np.testing.assert_allclose(updates[f"{BLOCK}/ffn/experts/gate"], -0.05, rtol=1e-6)
        # Neither embeddings nor norms decay.
        assert not np.any(updates["embed/table"]) and not np.any(updates[f"{BLOCK}/mixer_norm/scale"])


def test_muon_leaves_parameters_of_number_formats_alone():
    """By default: log-scales and signs have two dims, but are no matrices."""
    names = ("log_scale", "offset", "sign")
    params = {f"{BLOCK}/mixer/query/weight/{name}": np.zeros((2, 4, 4)) for name in names}
    groups = parameter_groups(settings(Optimizer.MUON), params, scaling=MUP)
    assert {group.optimizer for group in groups.values()} == {Optimizer.ADAMW}
    assert {group.multipliers for group in groups.values()} == {Multipliers()}


def test_refusals():
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    with pytest.raises(ValueError, match=r"mup has no rule for optim.kind=adafactor: use adamw"):
        make_optimizer(settings(Optimizer.ADAFACTOR), params, total_steps=10, scaling=MUP)
    with pytest.raises(ValueError, match=r"no rule for embed/table with muon: add a pattern"):
        parameter_groups(settings(Optimizer.MUON, muon_exclude=()), params, scaling=MUP)
    with pytest.raises(
        ValueError, match=r"mup has no rule for per_layer/table: set model.parameterization=s"
    ):
        multipliers_of("per_layer/table", num_dims=2, scaling=MUP)
