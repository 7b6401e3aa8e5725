"""A step of a model with a parameterization: that of the standard model with the same multipliers, whose
rates of single parameters are set by hand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.data.config import DataConfig
from slmjax.models.architecture import BlockConfig, HeadKind, LayerGroup, ModelConfig
from slmjax.models.canonical_form import canonical
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.parameterization import Parameterization
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.quantization.rules import quant_of
from slmjax.training.experiment import Experiment, RunConfig
from slmjax.training.multipliers import Role, role_of
from slmjax.training.optim import OptimConfig, Schedule
from slmjax.training.programs import make_programs
from tests.training.test_step import make_batch

WIDTH = 4.0  # of the model over that of its base
# The canonical form of a model has no balancing losses.
EXPERTS = MoeConfig(
    num_experts=4, num_selected=2, hidden_dim=32, shared_hidden_dim=32, balance_weight=0.0, z_weight=0.0
)
# Powers of two, so that multiplying by them rounds nothing.
SCALED = ModelConfig(
    embed_dim=32,
    stack=(LayerGroup(pattern=(BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=EXPERTS),), repeats=2),),
    context_length=16,
    vocab_size=61,
    head=HeadKind.UNTIED,
    parameterization=Parameterization.COMPLETEP,
    base_width=8,
    base_depth=1,
    base_head_dim=4,
)
# Without eps the first step of Adam has the size of its rate, however large the gradient is.
OPTIM = OptimConfig(
    lr=2.0**-6,
    schedule=Schedule.CONSTANT,
    warmup_steps=0,
    eps=1e-30,
    weight_decay=0.25,
    grad_clip=None,
    accumulation_steps=2,
)


@pytest.mark.composes("experts", "accumulation", "quantization")
def test_a_step_is_the_standard_one_with_factors_by_hand():
    """Experts, a router, an untied head, 4-bit weights and microbatches, four times as wide as the base."""
    experiment = Experiment(
        model=SCALED,
        optim=OPTIM,
        data=DataConfig(sequence_length=16, batch_size=8),
        quant=quant_of("q4_0"),
        run=RunConfig(steps=10),
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    scaled = make_programs(experiment, vocab_size=61, mesh=mesh)
    standard = make_programs(
        dataclasses.replace(experiment, model=canonical(SCALED)), vocab_size=61, mesh=mesh
    )
    with jax.set_mesh(mesh):
        state = scaled.init(0)
        start = jax.device_get(state.params)
        batch = place_batch(make_batch(), mesh)
        expected, expected_metrics = standard.train_step(jax.tree.map(jnp.copy, state), batch)
        found, metrics = scaled.train_step(state, batch)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-6, err_msg=name)
    roles = set()
    for path, before in start.items():
        role = role_of(path, num_dims=before.ndim - path.startswith("segments/") - ("/experts/" in path))
        roles.add(role)
        change = np.asarray(expected.params[path]) - before
        if role in (Role.HIDDEN, Role.ROUTER):
            # The rate is divided by the width, and the decay is not.
            decay = -OPTIM.lr * OPTIM.weight_decay * before
            change = decay + (change - decay) / WIDTH
        assert np.any(change), path
        np.testing.assert_allclose(
            np.asarray(found.params[path]) - before,
            change,
            rtol=1e-3,
            atol=1e-3 * OPTIM.lr / WIDTH,
            err_msg=path,
        )
    assert roles == {Role.INPUT, Role.OUTPUT, Role.HIDDEN, Role.ROUTER, Role.VECTOR}
