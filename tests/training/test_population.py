"""A population's step: each member has the state and the metrics that its own train step gives it."""

import dataclasses
import operator

import jax
import numpy as np
import pytest

from slmjax.data.batch import Batch, empty_batch
from slmjax.data.config import DataConfig
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.parameterization import Parameterization
from slmjax.parallel.batches import place_batch, place_batches
from slmjax.parallel.mesh import MeshConfig, make_mesh, population_mesh
from slmjax.training.experiment import Experiment, RunConfig
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, Optimizer, Schedule
from slmjax.training.population import differing_numbers, population_programs
from slmjax.training.programs import make_programs

ATTENTION = AttentionConfig(num_heads=2)
EXPERTS = MoeConfig(num_experts=4, hidden_dim=16, capacity_factor=0.8, balance_weight=0.1)
# Twice as wide as its base: members have the factors of CompleteP, next to numbers of their own.
DENSE = ModelConfig(
    embed_dim=16,
    parameterization=Parameterization.COMPLETEP,
    base_width=8,
    base_depth=1,
    context_length=16,
    vocab_size=61,
    stack=(LayerGroup(pattern=(BlockConfig(mixer=ATTENTION, ffn=MlpConfig(hidden_dim=16)),)),),
    dropout=0.1,
)
MIXTURE = dataclasses.replace(
    DENSE, stack=(LayerGroup(pattern=(BlockConfig(mixer=ATTENTION, ffn=EXPERTS),)),)
)
# Adam divides by the size of the gradient; this eps keeps differences of rounding from growing where it is
# tiny.
OPTIM = OptimConfig(lr=2e-2, warmup_steps=2, eps=1e-4, ema_decay=0.5, grad_clip=0.5)
STEPS = 4
ROWS = 8
LENGTH = 16


def member(seed: int, *, model: ModelConfig = DENSE, z_loss: float = 0.0, **changes) -> Experiment:
    return Experiment(
        model=model,
        optim=dataclasses.replace(OPTIM, **changes),
        objective=ObjectiveConfig(z_loss=z_loss),
        data=DataConfig(sequence_length=LENGTH, batch_size=ROWS),
        run=RunConfig(steps=STEPS, seed=seed),
    )


def make_batch(seed: int) -> Batch:
    draw = np.random.default_rng(seed)
    batch = empty_batch(ROWS, LENGTH)
    for row in range(ROWS):
        filled = slice(0, draw.integers(4, LENGTH))
        batch.tokens[row, filled] = draw.integers(2, 61, filled.stop)
        batch.targets[row, filled] = draw.integers(2, 61, filled.stop)
        batch.loss_mask[row, filled] = 1
        batch.segment_ids[row, filled] = 1
        batch.positions[row, filled] = np.arange(filled.stop)
        batch.row_ids[row] = 10 * seed + row
    return batch


def train_alone(experiment: Experiment, batches: list[Batch]):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    programs = make_programs(experiment, vocab_size=61, mesh=mesh)
    with jax.set_mesh(mesh):
        state = programs.init(experiment.run.seed)
        for batch in batches:
            state, metrics = programs.train_step(state, place_batch(batch, mesh))
    return jax.device_get((state, metrics))


def train_together(experiments: list[Experiment], batches: list[list[Batch]], *, num_devices=1, mesh=None):
    mesh = make_mesh(mesh or MeshConfig(), jax.devices()[:num_devices])
    programs = make_programs(experiments[0], vocab_size=61, mesh=mesh)
    together = population_programs(
        programs.step_settings,
        experiments,
        shapes=programs.shapes,
        mesh=population_mesh(mesh, num_members=len(experiments)),
    )
    with jax.set_mesh(mesh):
        state = together.stack([programs.init(experiment.run.seed) for experiment in experiments])
        for of_members in zip(*batches, strict=True):
            state, metrics = together.step(state, place_batches(of_members, together.mesh))
        states = [together.member(state, i) for i in range(len(experiments))]
    metrics = [jax.tree.map(operator.itemgetter(i), jax.device_get(metrics)) for i in range(len(experiments))]
    return state, list(zip(jax.device_get(states), metrics, strict=True))


def assert_same_training(found, wanted) -> None:
    """The same in float32 up to the order of sums: one part in 10,000, as between meshes."""
    for (path, leaf), expected in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        where = jax.tree_util.keystr(path)
        if np.issubdtype(leaf.dtype, np.integer):
            np.testing.assert_array_equal(leaf, expected, err_msg=where)
        else:
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=2e-6, err_msg=where)


MEMBERS = [
    member(3),
    member(4, lr=1e-2, betas=(0.8, 0.99), weight_decay=0.0, schedule=Schedule.WSD),
    member(5, eps=1e-3, min_lr_ratio=0.5, warmup_steps=1, ema_decay=0.9, grad_clip=10.0, z_loss=0.1),
]


def batches_of(experiments: list[Experiment]) -> list[list[Batch]]:
    return [[make_batch(10 * number + step) for step in range(3)] for number in range(len(experiments))]


def test_members_train_as_they_do_alone():
    batches = batches_of(MEMBERS)
    state, together = train_together(MEMBERS, batches)
    assert all(leaf.shape[0] == len(MEMBERS) for leaf in jax.tree.leaves(state))
    for experiment, own, found in list(zip(MEMBERS, batches, together, strict=True))[1:]:
        assert_same_training(found, train_alone(experiment, own))


@pytest.mark.nightly
@pytest.mark.composes("mesh", "experts", "accumulation", "studies")
@pytest.mark.parametrize(
    ("num_devices", "mesh"), [(4, MeshConfig()), (4, MeshConfig(fsdp=2)), (8, MeshConfig(tensor=2, expert=2))]
)
def test_members_are_spread_over_devices(num_devices, mesh):
    """Experts, microbatches and Muon; members on the axis arm, next to the axes of their own mesh."""
    changes = dict(model=MIXTURE, kind=Optimizer.MUON, accumulation_steps=2)
    experiments = [member(0, **changes), member(1, muon_lr=0.05, muon_momentum=0.9, **changes)]
    batches = batches_of(experiments)
    state, together = train_together(experiments, batches, num_devices=num_devices, mesh=mesh)
    path = "segments/0/blocks/0/mixer/query/weight"
    assert state.params[path].sharding.spec[0] == "arm"
    for experiment, own, found in zip(experiments, batches, together, strict=True):
        assert_same_training(found, train_alone(experiment, own))


def test_only_numbers_that_differ_are_arrays():
    assert differing_numbers([member(0), member(1)], total_steps=STEPS) == {}
    arrays = differing_numbers([member(0), member(1, eps=1e-3, betas=(0.5, 0.6))], total_steps=STEPS)
    assert {name: array.shape for name, array in arrays.items()} == {
        "eps": (2,),
        "betas": (2, 2),
        "learning_rates": (2, STEPS),
    }
    np.testing.assert_array_equal(arrays["learning_rates"][0], arrays["learning_rates"][1])


def test_the_axis_arm_takes_devices_that_members_fill():
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices())
    for num_members, (arm, data) in {8: (4, 1), 2: (2, 2), 3: (1, 4), 6: (2, 2)}.items():
        ours = population_mesh(mesh, num_members=num_members)
        assert dict(ours.shape) == {**mesh.shape, "arm": arm, "data": data}
        assert [*ours.devices.flat] == [*mesh.devices.flat]
