"""Parameters from outside: paths, and that neither what is stored nor what is computed depends on how layers
are grouped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slmjax.models import paths
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define, flat_params, restack, stored_shapes, unstack
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig, Biases
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings

ONE = BlockConfig(
    mixer=AttentionConfig(num_heads=2, window=3, biases=Biases.ALL), ffn=MlpConfig(hidden_dim=12, gated=False)
)
OTHER = BlockConfig(mixer=AttentionConfig(num_heads=2, num_kv_heads=1), ffn=None)
GROUPINGS = {
    "scanned": (LayerGroup(pattern=(ONE, OTHER), repeats=4),),
    "cut": (LayerGroup(pattern=(ONE, OTHER)), LayerGroup(pattern=(ONE, OTHER), repeats=3)),
    "doubled": (LayerGroup(pattern=(ONE, OTHER) * 2, repeats=2),),
}


def config_of(grouping):
    return ModelConfig(embed_dim=8, stack=GROUPINGS[grouping], vocab_size=11, dropout=0.2, init_std=0.3)


@functools.cache
def initial(grouping):
    return jax.jit(define(config_of(grouping)).init)(jax.random.key(3))[0]


def test_paths_and_shapes_of_a_stack():
    params = define(config_of("doubled")).params
    assert set(params) >= {"embed/table", "final_norm/scale", "segments/0/blocks/3/mixer/query/weight"}
    assert not any(path.startswith("head/") for path in params)
    assert params["embed/table"].shape == (11, 8) and params["final_norm/scale"].shape == (8,)
    assert params["segments/0/blocks/0/mixer/query/weight"].shape == (2, 8, 8)
    assert params["segments/0/blocks/0/mixer/query/bias"].shape == (2, 8)
    assert params["segments/0/blocks/1/mixer/key/weight"].shape == (2, 8, 4)
    assert params["segments/0/blocks/2/ffn/down/weight"].shape == (2, 12, 8)
    assert not any("ffn" in path for path in params if "/blocks/1/" in path)


@pytest.mark.parametrize(
    ("grouping", "path", "layers"),
    [
        ("scanned", "segments/0/blocks/1/mixer/query/weight", [1, 3, 5, 7]),
        ("cut", "segments/0/blocks/1/mixer/query/weight", [1]),
        ("cut", "segments/1/blocks/0/mixer/query/weight", [2, 4, 6]),
        ("doubled", "segments/0/blocks/3/mixer/query/weight", [3, 7]),
    ],
)
def test_layers_behind_a_stack(grouping, path, layers):
    assert paths.layer_indices(config_of(grouping), path) == layers
    assert paths.logical_paths(config_of(grouping), path) == [
        f"layers/{layer}/mixer/query/weight" for layer in layers
    ]


def test_parameters_outside_the_layers_are_their_own_logical_path():
    assert paths.layer_indices(config_of("cut"), "embed/table") is None
    assert paths.logical_paths(config_of("cut"), "embed/table") == ["embed/table"]


@pytest.mark.parametrize("grouping", ["cut", "doubled"])
def test_initial_parameters_do_not_depend_on_the_grouping(grouping):
    expected = unstack(config_of("scanned"), initial("scanned"))
    actual = unstack(config_of(grouping), initial(grouping))
    assert expected.keys() == actual.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)
    weights = [np.ravel(leaf) for path, leaf in expected.items() if path.endswith("query/weight")]
    assert len(weights) == len({weight.tobytes() for weight in weights}) == 8


def test_the_forward_pass_and_its_dropout_do_not_depend_on_the_grouping():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)), jnp.int32)
    given = {"segment_ids": jnp.ones_like(tokens), "positions": jnp.asarray([range(6)] * 2, jnp.int32)}

    @functools.partial(jax.jit, static_argnums=0)
    def hidden(grouping, params, key):
        return define(config_of(grouping)).merge(params, {})(tokens, **given, key=key).hidden

    flat = unstack(config_of("scanned"), initial("scanned"))
    results = []
    for grouping in GROUPINGS:
        params = restack(config_of(grouping), flat, like=define(config_of(grouping)).params)
        results.append(hidden(grouping, params, jax.random.key(0)))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-6)


def test_restack_undoes_unstack_for_a_training_state():
    params = initial("cut")
    state = {
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "ema": params,
        "step": jnp.asarray(7, jnp.int32),
    }
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 10, leaf.shape), leaf.dtype), state)
    flat = unstack(config_of("cut"), state)
    assert flat["step"].shape == () and flat["ema/layers/3/mixer/query/weight"].shape == (8, 4 * 2)
    moments = [name for name in flat if name.endswith("mu/layers/7/mixer/key/weight")]
    assert len(moments) == 1 and flat[moments[0]].shape == (8, 4)
    again = restack(config_of("cut"), flat, like=state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_state_moves_to_another_grouping():
    def state_of(grouping, fill):
        params = jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, fill, leaf.dtype), define(config_of(grouping)).params
        )
        return optax.adam(1e-3).init(params)

    flat = unstack(config_of("scanned"), state_of("scanned", 1.0))
    like = state_of("doubled", 0.0)
    moved = restack(config_of("doubled"), flat, like=like)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, like)
    assert unstack(config_of("doubled"), moved).keys() == flat.keys()


def test_a_stacked_leaf_without_its_layer_dim_is_refused():
    # Slicing it would give every layer the last entry without a word.
    with pytest.raises(AssertionError, match="segments/0/blocks/0/mixer/query/bias"):
        unstack(config_of("scanned"), {"segments/0/blocks/0/mixer/query/bias": jnp.zeros((1, 8))})


def test_stored_shapes_are_those_of_unstack():
    config = config_of("doubled")
    params = define(config).params
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    expected = jax.eval_shape(functools.partial(unstack, config), state)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in stored_shapes(config, state).items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()
    }


def test_stored_shapes_keep_the_placement_without_the_layer_dim():
    config = config_of("doubled")
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = define(config).params
    shardings = parameter_shardings(params, mesh)
    placed = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in params.items()
    }
    stored = stored_shapes(config, placed)
    assert stored["layers/6/ffn/up/weight"].sharding == NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    assert stored["embed/table"].sharding == shardings["embed/table"]


def test_merge_and_flat_params_are_inverse():
    definition = define(config_of("cut"))
    params, buffers = flat_params(definition.merge(initial("cut"), {}))
    assert not buffers and params.keys() == definition.params.keys()
    jax.tree.map(np.testing.assert_array_equal, params, initial("cut"))


def test_a_definition_of_real_size_computes_nothing():
    block = BlockConfig(mixer=AttentionConfig(num_heads=32), ffn=MlpConfig(hidden_dim=16384))
    config = ModelConfig(
        embed_dim=4096, stack=(LayerGroup(pattern=(block,), repeats=48),), vocab_size=128_000
    )
    params = define(config).params
    per_layer = 4 * 4096**2 + 3 * 4096 * 16384 + 2 * 4096
    assert sum(leaf.size for leaf in params.values()) == 48 * per_layer + 128_000 * 4096 + 4096
