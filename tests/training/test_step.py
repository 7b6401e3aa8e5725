"""The one train step: what may not change it (accumulation, mesh, padding, rematerialisation), and what
happens when it goes wrong.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import losses
from slmjax.data.batch import Batch, empty_batch
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, Precision, Remat
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import Balance, MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.training import step
from slmjax.training.metrics import named_metrics
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, learning_rate, make_optimizer
from slmjax.training.state import TrainState, init_state, state_shapes

# Capacity with every auxiliary loss, and dropless with bias balancing and a shared (dense) expert, in one
# model.
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2)
CAPACITY = BlockConfig(
    mixer=dataclasses.replace(ATTENTION, window=5),
    ffn=MoeConfig(num_experts=4, hidden_dim=16, capacity_factor=0.8, balance_weight=0.1, z_weight=0.01),
)
DROPLESS = BlockConfig(
    mixer=ATTENTION,
    ffn=MoeConfig(num_experts=4, hidden_dim=16, shared_hidden_dim=8, balance=Balance.BIAS, bias_rate=0.01),
)
MIXED = ModelConfig(
    embed_dim=16,
    context_length=16,
    vocab_size=61,
    vocab_multiple=8,
    stack=(LayerGroup(pattern=(CAPACITY, DROPLESS)),),
)
DENSE = dataclasses.replace(
    MIXED, stack=(LayerGroup(pattern=(BlockConfig(mixer=ATTENTION, ffn=MlpConfig(hidden_dim=24)),)),)
)
# Adam divides by the size of the gradient; this eps keeps differences of rounding from growing where it is
# tiny.
OPTIM = OptimConfig(lr=2e-2, warmup_steps=2, eps=1e-4, ema_decay=0.5, grad_clip=0.5)
TOTAL_STEPS = 100
ROWS = 8
LENGTH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A train step and the mesh it runs on."""

    mesh: jax.sharding.Mesh
    definition: object
    shapes: TrainState
    train_step: step.TrainStep
    optimizer: object

    def start(self) -> TrainState:
        with jax.set_mesh(self.mesh):
            return init_state(self.definition, self.optimizer, shapes=self.shapes, seed=0)

    def run(self, state, *batches):
        """The state after these batches and the metrics of the last; `state` is left alone, and may be from
        another mesh.
        """
        places = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        state = jax.device_put(jax.tree.map(jnp.copy, state), places)
        with jax.set_mesh(self.mesh):
            for batch in batches:
                state, metrics = self.train_step(state, place_batch(batch, self.mesh))
        return state, named_metrics(self.definition.config, jax.device_get(metrics))


@functools.cache
def build(config=MIXED, *, optim=OPTIM, mesh=MeshConfig(), num_devices=1) -> Compiled:  # noqa: B008  # it is frozen
    mesh = make_mesh(mesh, jax.devices()[:num_devices])
    definition = define(config)
    optimizer = make_optimizer(optim, definition.params, total_steps=TOTAL_STEPS, scaling=config.scaling)
    shapes = state_shapes(definition, optimizer, with_ema=optim.ema_decay is not None, mesh=mesh)
    train_step = step.make_train_step(
        definition,
        optimizer,
        objective=ObjectiveConfig(),
        optim=optim,
        shapes=shapes,
        total_steps=TOTAL_STEPS,
    )
    return Compiled(
        mesh=mesh, definition=definition, shapes=shapes, train_step=train_step, optimizer=optimizer
    )


def make_batch(seed=0, *, num_rows=ROWS) -> Batch:
    """Rows of two documents and padding, unevenly filled and scored; the second is padding throughout."""
    draw = np.random.default_rng(seed)
    batch = empty_batch(num_rows, LENGTH)
    for row in range(num_rows):
        first, second = (0, 0) if row == 1 else draw.integers(1, LENGTH // 2, size=2)
        filled = slice(0, first + second)
        batch.tokens[row, filled] = draw.integers(2, 61, first + second)
        batch.targets[row, filled] = draw.integers(2, 61, first + second)
        batch.loss_mask[row, filled] = draw.random(first + second) < 0.2 + 0.1 * row
        batch.segment_ids[row, filled] = [1] * first + [2] * second
        batch.positions[row, filled] = [*range(first), *range(second)]
        batch.num_bytes[row] = 3 * batch.loss_mask[row].sum()
    return batch


@functools.cache
def first_state():
    return build().start()


@functools.cache
def reference():
    """The state and metrics after two different batches, on one device in one piece."""
    return build().run(first_state(), make_batch(0), make_batch(1))


def assert_same_training(found, *, rtol=2e-4, atol=2e-6):
    """The same state and metrics as the reference, to the rounding of another order of summation."""
    state, metrics = found
    expected_state, expected_metrics = reference()
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert jax.tree.structure(metrics[name]) == jax.tree.structure(value), name
        np.testing.assert_allclose(
            jax.tree.leaves(metrics[name]), jax.tree.leaves(value), rtol=rtol, atol=1e-6, err_msg=name
        )
    for (path, value), expected in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(expected_state), strict=True
    ):
        np.testing.assert_allclose(value, expected, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def assert_bits_equal(found, expected):
    for (path, value), wanted in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(
            np.asarray(value), np.asarray(wanted), err_msg=jax.tree_util.keystr(path)
        )


# What may not change it -------------------------------------------------------------------------------------
@pytest.mark.smoke
def test_a_step_is_deterministic_and_gives_its_input_away():
    compiled = build()
    state = jax.tree.map(jnp.copy, first_state())
    assert_bits_equal(compiled.run(state, make_batch(0), make_batch(1)), reference())
    with jax.set_mesh(compiled.mesh):
        compiled.train_step(state, place_batch(make_batch(0), compiled.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.optimizer, state.ema)))


@pytest.mark.parametrize("num_parts", [2, 4])
def test_accumulation_changes_nothing(num_parts):
    compiled = build(optim=dataclasses.replace(OPTIM, accumulation_steps=num_parts))
    assert_same_training(compiled.run(first_state(), make_batch(0), make_batch(1)))


def test_the_batch_tells_rows_with_routes_apart():
    """The comparisons of this file mean something: tokens are dropped, biases move, rows are filled
    unevenly.
    """
    metrics = reference()[1]
    assert metrics["dropped"] > 0 and metrics["expert_imbalance"] > 1.05
    assert metrics["objective"] > metrics["loss"] + 0.01
    assert set(metrics["expert_loads"]) == {"layers/0", "layers/1"}
    assert all(sum(shares) == pytest.approx(1.0) for shares in metrics["expert_loads"].values())
    # Of the whole gradient every parameter is told of once.
    assert math.hypot(*metrics["grad_norms"].values()) == pytest.approx(metrics["grad_norm"], rel=1e-5)
    assert (
        list(metrics["grad_norms"]) == ["layers/0", "layers/1", "embed", "final_norm"]
        and min(metrics["grad_norms"].values()) > 0
    )
    buffers = build().run(first_state(), make_batch(0))[0].buffers
    assert buffers
    for path, bias in buffers.items():
        np.testing.assert_allclose(np.abs(bias), 0.01, rtol=1e-6, err_msg=path)
    counts = make_batch(0).loss_mask.sum(axis=1)
    assert counts[1] == 0 and counts.max() > 3 * counts[counts > 0].min()


def test_one_mesh_of_four_axes_changes_nothing():
    compiled = build(mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2), num_devices=8)
    state, metrics = compiled.run(compiled.start(), make_batch(0), make_batch(1))
    for (path, leaf), wanted in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(compiled.shapes), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), jax.tree_util.keystr(path)
    experts = state.params["segments/0/blocks/0/ffn/experts/gate"]
    assert (
        experts.addressable_shards[0].data.size == experts.size // 8
    )  # experts, embedding and width are each halved
    assert_same_training((state, metrics))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "axes", list(itertools.combinations(("data", "fsdp", "expert", "tensor"), 2)), ids="-".join
)
def test_every_pair_of_axes_changes_nothing(axes):
    for sizes in ((2, 2), (4, 2), (2, 4)):
        mesh = MeshConfig(**{"data": 1} | dict(zip(axes, sizes, strict=True)))
        compiled = build(mesh=mesh, num_devices=math.prod(sizes))
        assert_same_training(compiled.run(first_state(), make_batch(0), make_batch(1)))


def test_rows_add_up_whatever_padding_is_beside_them():
    """Halves of a batch, each filled up with rows of padding and in another order, come to what the whole
    does.
    """
    compiled = build()
    whole = make_batch(0)
    empty = empty_batch(ROWS, LENGTH)

    def half(rows):
        return jax.tree.map(lambda leaf, none: np.concatenate([none[4:], leaf[rows]]), whole, empty)

    expected = compiled.run(first_state(), whole)[1]
    found = [compiled.run(first_state(), half(rows))[1] for rows in ([2, 0, 1, 3], [7, 6, 4, 5])]
    for name in ("nll", "targets", "tokens", "bytes", "dropped"):
        np.testing.assert_allclose(found[0][name] + found[1][name], expected[name], rtol=1e-6, err_msg=name)
    weights = np.asarray([metrics["targets"] for metrics in found]) / expected["targets"]
    np.testing.assert_allclose(
        np.dot(weights, [metrics["loss"] for metrics in found]), expected["loss"], rtol=1e-6
    )


@pytest.mark.nightly
@pytest.mark.parametrize("remat", [Remat.DOTS, Remat.FULL])
def test_rematerialisation_changes_nothing(remat):
    compiled = build(dataclasses.replace(MIXED, remat=remat))
    assert_same_training(compiled.run(first_state(), make_batch(0), make_batch(1)))


# Steps that go wrong ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_that_is_not_finite_is_skipped_and_counted(value):
    bad = make_batch(7)
    bad.loss_mask[2, 1] = value
    compiled = build()
    before = compiled.run(first_state(), make_batch(0))[0]
    after, metrics = compiled.run(before, bad)
    changed = {"step", "skipped", "skipped_in_a_row"}
    for field in dataclasses.fields(TrainState):
        if field.name not in changed:
            assert_bits_equal(getattr(after, field.name), getattr(before, field.name))
    assert [int(getattr(after, name)) for name in ("step", "skipped", "skipped_in_a_row")] == [2, 1, 1]
    assert (metrics["skipped"], metrics["skipped_in_a_row"], metrics["trained_targets"]) == (1, 1, 0)
    after, metrics = compiled.run(after, bad)
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (2, 2)

    # The next good batch does what it would have done at once, learning rate included.
    recovered, metrics = compiled.run(after, make_batch(1))
    expected, expected_metrics = reference()
    for name in ("params", "buffers", "optimizer", "ema"):
        assert_bits_equal(getattr(recovered, name), getattr(expected, name))
    assert (int(recovered.step), int(recovered.skipped), int(recovered.skipped_in_a_row)) == (4, 2, 0)
    assert (
        metrics["learning_rate"]
        == expected_metrics["learning_rate"]
        == float(learning_rate(OPTIM, 1, total_steps=TOTAL_STEPS))
    )


@pytest.mark.parametrize("value", [math.nan, 3e38])
def test_a_step_whose_new_state_is_not_finite_is_skipped(value):
    """Loss and gradient are finite: the moments of an unsound checkpoint make the update overflow."""
    compiled = build()
    before = compiled.run(first_state(), make_batch(0))[0]
    unsound = dataclasses.replace(
        before,
        optimizer=jax.tree.map(
            lambda leaf: np.full_like(leaf, value) if leaf.dtype == np.float32 and leaf.ndim else leaf,
            before.optimizer,
        ),
    )
    after, metrics = compiled.run(unsound, make_batch(1))
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 1)
    for name in ("params", "buffers", "optimizer", "ema"):
        assert_bits_equal(getattr(after, name), getattr(unsound, name))


def without_targets(batch: Batch, rows=slice(None)) -> Batch:
    """The batch with no target of these rows scored."""
    batch.loss_mask[rows] = 0
    batch.num_bytes[rows] = 0
    return batch


def assert_changes_nothing(compiled: Compiled, state: TrainState) -> TrainState:
    after, metrics = compiled.run(state, without_targets(make_batch(7)))
    for field in dataclasses.fields(TrainState):
        if field.name not in ("step", "skipped"):
            assert_bits_equal(getattr(after, field.name), getattr(state, field.name))
    assert (int(after.step), int(after.skipped)) == (int(state.step) + 1, int(state.skipped) + 1)
    assert math.isnan(metrics["loss"]) and metrics["targets"] == 0 and metrics["skipped"] == after.skipped
    assert metrics["trained_targets"] == 0
    return after


def test_a_step_without_a_target_changes_nothing_and_is_counted():
    compiled = build()
    before = compiled.run(first_state(), make_batch(0))[0]
    recovered = compiled.run(assert_changes_nothing(compiled, before), make_batch(1))[0]
    expected = reference()[0]
    for name in (
        "params",
        "buffers",
        "optimizer",
        "ema",
    ):  # learning rate and averages go on as if it had not been
        assert_bits_equal(getattr(recovered, name), getattr(expected, name))
    # It is not a step that failed: those in a row are what they were.
    bad = make_batch(7)
    bad.loss_mask[2, 1] = math.nan
    after = compiled.run(before, bad, without_targets(make_batch(7)), bad)[0]
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (3, 2)


def test_targets_are_counted_over_all_microbatches_and_devices():
    """With 4 microbatches, of which one or two have no target, a step is what it is in one piece; and with
    none at all, no step.
    """
    compiled = build(optim=dataclasses.replace(OPTIM, accumulation_steps=4))
    part = [0, 1, 4]
    found, _ = compiled.run(first_state(), without_targets(make_batch(0), part))
    expected, _ = build().run(first_state(), without_targets(make_batch(0), part))
    assert int(found.skipped) == 0
    for path, value in expected.params.items():
        np.testing.assert_allclose(found.params[path], value, rtol=2e-4, atol=2e-6, err_msg=path)
    assert_changes_nothing(compiled, found)
    meshed = build(mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2), num_devices=8)
    assert_changes_nothing(meshed, meshed.run(meshed.start(), make_batch(0))[0])


# The parts of it --------------------------------------------------------------------------------------------
def test_the_average_follows_the_parameters():
    compiled = build()
    start = first_state()
    first = compiled.run(start, make_batch(0))[0]
    second = compiled.run(first, make_batch(1))[0]
    for path, value in start.params.items():
        # The rate is 1 - min(decay, (1 + updates) / (10 + updates)): 0.9 in the first, 9/11 in the second.
        np.testing.assert_array_equal(start.ema[path], value)
        after_one = value + 0.9 * (first.params[path] - value)
        np.testing.assert_allclose(first.ema[path], after_one, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            second.ema[path], after_one + 9 / 11 * (second.params[path] - after_one), rtol=1e-5, atol=1e-7
        )
    assert (
        second.eval_params is second.ema
        and dataclasses.replace(second, ema=None).eval_params is second.params
    )


def test_a_state_goes_through_its_items():
    state = first_state()
    assert_bits_equal(TrainState.from_items(state.items()), state)
    without = dataclasses.replace(state, ema=None)
    assert "ema" not in without.items() and TrainState.from_items(without.items()).ema is None


def test_metrics_agree_with_the_batch():
    _, metrics = reference()
    batch = make_batch(1)
    assert metrics["targets"] == metrics["trained_targets"] == batch.loss_mask.sum()
    assert metrics["bytes"] == batch.num_bytes.sum()
    assert metrics["tokens"] == (batch.segment_ids > 0).sum()
    assert metrics["loss"] == pytest.approx(metrics["nll"] / metrics["targets"], rel=1e-6)
    assert abs(metrics["loss"] - math.log(61)) < 0.5 and 0 <= metrics["accuracy"] <= 1


def test_dropout_in_bfloat16():
    """It is new in every step, the same when a step is repeated, and lets the loss fall; parameters and
    moments stay float32.
    """
    config = dataclasses.replace(DENSE, dropout=0.2, precision=Precision.BFLOAT16)
    compiled = build(config, optim=dataclasses.replace(OPTIM, ema_decay=None))
    start = compiled.start()
    loss = compiled.run(start, make_batch(0))[1]["loss"]
    later = compiled.run(dataclasses.replace(start, step=jnp.asarray(1, jnp.int32)), make_batch(0))[1]["loss"]
    assert loss == compiled.run(start, make_batch(0))[1]["loss"] != later
    state, metrics = compiled.run(start, *[make_batch(0)] * 20)
    assert metrics["loss"] < 0.8 * loss
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.optimizer))} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }


def test_z_loss_is_the_squared_log_normaliser():
    definition = define(DENSE)
    batch = jax.tree.map(jnp.asarray, make_batch(0))
    params, buffers = jax.jit(definition.init)(jax.random.key(0))
    params = {
        path: 3.0 * value for path, value in params.items()
    }  # far from log-normalisers that are all alike

    @jax.jit
    def found_and_expected(params):
        with_z, without = (
            step.loss_terms(definition, ObjectiveConfig(z_loss=weight), params, buffers, batch, key=None)[0][
                "cross_entropy"
            ][0]
            for weight in (0.5, 0.0)
        )
        output = definition.merge(params, buffers)(
            batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions
        )
        normalisers = jax.nn.logsumexp(losses.logits(output.hidden, output.head), axis=-1)
        return with_z - without, 0.5 * jnp.sum(jnp.square(normalisers) * batch.loss_mask)

    np.testing.assert_allclose(*found_and_expected(params), rtol=1e-5)


def test_one_batch_is_learned_by_heart():
    compiled = build()
    state, metrics = compiled.run(first_state(), *[make_batch(0)] * 70)
    assert metrics["loss"] < 0.05 and metrics["accuracy"] > 0.95
    assert int(state.skipped) == 0
