"""The mesh, the rules, the collectives against numpy, and a whole model on eight devices against one."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.parallel import communication
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, batch_divisor, make_mesh
from slmjax.parallel.rules import like_parameters, parameter_shardings, partition_spec

MIXED = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)


@functools.cache
def mixed_mesh():
    return make_mesh(MIXED)


# Mesh -------------------------------------------------------------------------------------------------------
def test_one_axis_takes_the_rest_of_the_devices():
    assert MeshConfig().sizes(8) == {"data": 8, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    assert MeshConfig(data=2, fsdp=-1, tensor=2).sizes(8)["fsdp"] == 2
    mesh = mixed_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2}
    assert batch_divisor(mesh) == 4
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": -1, "fsdp": -1}, "only one mesh axis may be -1"),
        ({"tensor": 0}, "at least 1, or -1"),
        ({"fsdp": -2}, "at least 1, or -1"),
        ({"data": 3}, "the mesh data=3 does not fit the 8 device"),
        ({"data": 1}, "the mesh of one device does not fit the 8 device"),
        ({"tensor": 3}, r"set --mesh.\* so that the product is 8"),
    ],
)
def test_errors_of_bad_meshes_name_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**settings))


# Rules ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embed/table", (32, 16), (("tensor", "fsdp"), None)),
        ("head/weight", (34, 16), ("tensor", "fsdp")),
        ("layers/3/mixer/query/weight", (16, 8), ("fsdp", "tensor")),
        ("segments/0/blocks/1/mixer/query/weight", (3, 16, 8), (None, "fsdp", "tensor")),
        ("segments/0/blocks/1/mixer/value/weight", (3, 16, 8), (None, "fsdp", "tensor")),
        ("segments/0/blocks/1/mixer/output/weight", (3, 8, 16), (None, ("tensor", "fsdp"), None)),
        ("segments/0/blocks/1/ffn/up/weight", (3, 16, 24), (None, "fsdp", "tensor")),
        ("segments/0/blocks/1/ffn/shared/gate/weight", (3, 16, 24), (None, "fsdp", "tensor")),
        ("segments/0/blocks/1/ffn/down/weight", (3, 24, 16), (None, ("tensor", "fsdp"), None)),
        ("segments/0/blocks/1/ffn/down/weight", (3, 22, 16), (None, "tensor", "fsdp")),
        ("segments/0/blocks/1/ffn/experts/gate", (3, 4, 16, 24), (None, "expert", "fsdp", "tensor")),
        ("segments/0/blocks/1/ffn/experts/down", (3, 4, 24, 16), (None, "expert", ("tensor", "fsdp"), None)),
        ("segments/0/blocks/1/ffn/router/weight", (3, 16, 4), (None, "fsdp", None)),
    ],
)
def test_rules_name_every_weight(path, shape, spec):
    assert partition_spec(path, shape, mixed_mesh()) == PartitionSpec(*spec)


def test_vectors_and_dims_that_do_not_divide_are_replicated():
    mesh = mixed_mesh()
    assert partition_spec("final_norm/scale", (16,), mesh) == PartitionSpec(None)
    assert partition_spec("segments/0/blocks/0/mixer/query/bias", (4, 8), mesh) == PartitionSpec(None, None)
    assert partition_spec("segments/0/blocks/0/ffn/router_bias", (4, 8), mesh) == PartitionSpec(None, None)
    assert partition_spec("embed/table", (31, 16), mesh) == PartitionSpec(None, "fsdp")
    assert partition_spec("layers/0/ffn/up/weight", (15, 24), mesh) == PartitionSpec(None, "tensor")


def test_an_axis_of_one_device_is_not_named():
    mesh = make_mesh(MeshConfig(fsdp=8, data=1))
    assert partition_spec("layers/0/ffn/up/weight", (16, 24), mesh) == PartitionSpec("fsdp", None)


def test_a_matrix_without_a_rule_is_sharded_over_fsdp_along_its_largest_dim():
    mesh = mixed_mesh()
    assert partition_spec("layers/0/mixer/convolution", (4, 16), mesh) == PartitionSpec(None, "fsdp")
    assert partition_spec("segments/0/blocks/0/mixer/convolution", (64, 16, 4), mesh) == PartitionSpec(
        None, "fsdp", None
    )
    assert partition_spec("layers/0/mixer/convolution", (4, 15), mesh) == PartitionSpec(None, None)
    # A known name with another number of dims is no known weight.
    assert partition_spec("layers/0/mixer/query/weight", (16, 4, 2), mesh) == PartitionSpec(
        "fsdp", None, None
    )


def test_optimizer_state_is_sharded_like_its_parameters():
    params = {
        "embed/table": jax.ShapeDtypeStruct((32, 16), jnp.float32),
        "final_norm/scale": jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    state = (state, {"embed/table": {"row_means": jax.ShapeDtypeStruct((32,), jnp.float32)}})
    adam, factored = like_parameters(state, params, mixed_mesh())
    assert (
        adam[0].mu["embed/table"].spec
        == adam[0].nu["embed/table"].spec
        == PartitionSpec(("tensor", "fsdp"), None)
    )
    assert adam[0].mu["final_norm/scale"].spec == PartitionSpec(None)
    assert adam[0].count.spec == factored["embed/table"]["row_means"].spec == PartitionSpec()


# Batches ----------------------------------------------------------------------------------------------------
def test_sequences_are_sharded_over_the_batch_axes():
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = place_batch({"tokens": rows, "row_ids": rows[:, 0]}, mixed_mesh())
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(2, 3)}
    assert placed["tokens"].sharding.spec == PartitionSpec(("fsdp", "expert"), None)
    assert placed["row_ids"].sharding.spec == PartitionSpec(("fsdp", "expert"))
    np.testing.assert_array_equal(placed["tokens"], rows)


def test_a_batch_that_does_not_divide_is_replicated():
    placed = place_batch(np.zeros((3, 2), np.float32), mixed_mesh())
    assert placed.sharding.is_fully_replicated


# Inside the program -----------------------------------------------------------------------------------------
def collect(x, w):
    """On each device: a sum over all, column sums of the batch, a shard of a product, the shard's index."""
    total = communication.sum_over(jnp.sum(x), "batch", "heads")
    gathered = communication.gather(x, "batch", axis=0)
    partial = x @ w  # a partial sum: the contracted dim is sharded over heads
    index = jnp.full((x.shape[0], 1), communication.index_along("batch"), jnp.int32)
    scattered = communication.scatter_sum(partial, "heads", axis=1)
    flags = jnp.asarray([communication.is_sharded(dim) for dim in ("batch", "heads", "vocab")])
    return total, jnp.sum(gathered, axis=0, keepdims=True), scattered, index, flags


def run_collect(x, w):
    batch = "batch"
    heads = "heads"
    out_dims = ((), (batch, heads), (batch, heads), (batch, None), (None,))
    return jax.jit(
        communication.shard_mapped(collect, in_dims=((batch, heads), (heads, None)), out_dims=out_dims)
    )(x, w)


def operands(rows=8, inner=6):
    draw = np.random.default_rng(0)
    return draw.normal(size=(rows, inner)).astype(np.float32), draw.normal(size=(inner, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("rows", "inner", "sharded"), [(8, 6, (True, True)), (6, 6, (False, True)), (8, 5, (True, False))]
)
def test_collectives_equal_numpy_on_eight_devices(rows, inner, sharded):
    x, w = operands(rows, inner)
    with jax.set_mesh(mixed_mesh()):
        total, column_sums, product, index, flags = (np.asarray(value) for value in run_collect(x, w))
    np.testing.assert_allclose(total, x.sum(), rtol=1e-5, atol=1e-5)
    assert len(column_sums) == (4 if sharded[0] else 1)  # one from each device that holds rows
    for sums in column_sums:
        np.testing.assert_allclose(sums, x.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(product, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(index[:, 0], np.arange(rows) // 2 if sharded[0] else np.zeros(rows))
    assert tuple(flags) == (*sharded, False)


def test_without_a_mesh_collectives_are_the_identity():
    x, w = operands()
    for mesh in (contextlib.nullcontext(), jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))):
        with mesh:
            total, column_sums, product, index, flags = (np.asarray(value) for value in run_collect(x, w))
        np.testing.assert_allclose(total, x.sum(), rtol=1e-5)
        np.testing.assert_allclose(column_sums, x.sum(0, keepdims=True), rtol=1e-5)
        np.testing.assert_allclose(product, x @ w, rtol=1e-5)
        assert not index.any() and not flags.any()
        np.testing.assert_array_equal(communication.constrain(jnp.asarray(x), ("batch", None)), x)


def test_the_gradient_of_a_gathered_weight_is_summed_once():
    x, w = operands()

    def loss(x, w):
        def on_device(x, w):
            return communication.sum_over(
                jnp.sum(jnp.square(x @ communication.gather(w, "embed", axis=0))), "batch"
            )

        return communication.shard_mapped(on_device, in_dims=(("batch", None), ("embed", None)), out_dims=())(
            x, w
        )

    with jax.set_mesh(mixed_mesh()):
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)
    np.testing.assert_allclose(value, np.square(x @ w).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], 2 * x @ w @ w.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[1], 2 * x.T @ x @ w, rtol=1e-4, atol=1e-4)


def test_constrain_shards_by_logical_dims():
    x = np.zeros((8, 3, 4), np.float32)
    with jax.set_mesh(mixed_mesh()):
        y = jax.jit(lambda x: communication.constrain(x, ("batch", None, "heads")))(x)
        odd = jax.jit(lambda x: communication.constrain(x[:3], ("batch", None, "heads")))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3, 2)}
    assert {shard.data.shape for shard in odd.addressable_shards} == {(3, 3, 2)}


@pytest.mark.parametrize("size", [0, 1, 3, 4, 6, 20])
def test_a_halo_is_the_entries_before(size):
    """Halos of shards of 4: none, a part of the neighbour, all of it, more than it, more than exists."""
    x = np.arange(2 * 16 * 3, dtype=np.float32).reshape(2, 16, 3)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=4))

    def run(x):
        def on_device(x):
            extended = communication.halo(x, "time", size=size, axis=1)
            return extended, communication.sum_before(jnp.sum(x, axis=1), "time")[:, None]

        rows = ("batch", "time", None)
        return communication.shard_mapped(on_device, in_dims=(rows,), out_dims=(rows, rows))(x)

    added = min(size, 12)
    expected = [
        np.pad(x, [(0, 0), (added, 0), (0, 0)])[:, start : start + added + 4] for start in (0, 4, 8, 12)
    ]
    with jax.set_mesh(mesh):
        extended, before = jax.jit(run)(x)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(run(x)[0]))))(x)
    np.testing.assert_array_equal(extended, np.concatenate(expected, axis=1))
    np.testing.assert_array_equal(before, np.stack([x[:, :start].sum(1) for start in (0, 4, 8, 12)], axis=1))
    # An entry counts once on its own device, and once on each of those that it was sent to.
    uses = [1 + sum(start - added <= place < start for start in (4, 8, 12)) for place in range(16)]
    np.testing.assert_array_equal(gradient, 2 * x * np.asarray(uses, np.float32)[None, :, None])


# Parameters -------------------------------------------------------------------------------------------------
def test_parameters_are_initialised_sharded_and_equal_on_any_mesh():
    block = BlockConfig(mixer=AttentionConfig(num_heads=4), ffn=None)
    definition = define(
        ModelConfig(embed_dim=16, stack=(LayerGroup(pattern=(block,), repeats=2),), vocab_size=32)
    )
    expected, _ = jax.jit(definition.init)(jax.random.key(0))
    shardings = parameter_shardings(definition.params, mixed_mesh())
    params, _ = jax.jit(definition.init, out_shardings=(shardings, {}))(jax.random.key(0))
    for path, leaf in params.items():
        assert leaf.sharding == shardings[path]
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-8, err_msg=path)
    assert params["segments/0/blocks/0/mixer/query/weight"].addressable_shards[0].data.shape == (2, 8, 8)
