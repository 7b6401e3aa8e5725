"""Keys and values that several layers share: what readers compute, decoding, a mesh, caches in a format."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax import kernels
from slmjax.formats.presets import PRESETS
from slmjax.models import (
    AttentionConfig,
    BlockConfig,
    DifferentialAttentionConfig,
    MixerContext,
    MlpConfig,
    ModelConfig,
    ModelDims,
    ParallelMixerConfig,
    QkNorm,
    stack_of,
    with_shared_key_values,
)
from slmjax.models.definition import define
from slmjax.models.zoo import state_size
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from slmjax.quantization.fake_quantization import define_quantized
from slmjax.quantization.rules import QuantPhase, QuantRule

LENGTH = 16
FULL = AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=QkNorm.PER_HEAD)
LOCAL = dataclasses.replace(FULL, window=4)
LOCAL_BLOCK, FULL_BLOCK = (BlockConfig(mixer=mixer, ffn=MlpConfig(hidden_dim=32)) for mixer in (LOCAL, FULL))
# Two sources in a group of their own, and two repeats of two readers.
BLOCKS = [LOCAL_BLOCK, FULL_BLOCK] * 3


def model(blocks: list[BlockConfig], **settings) -> ModelConfig:
    return ModelConfig(embed_dim=32, stack=stack_of(blocks), vocab_size=40, context_length=LENGTH, **settings)


MODEL = model(with_shared_key_values(BLOCKS, num_shared=4))
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 40, (4, LENGTH)), jnp.int32)
PLACES = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)


@functools.cache
def random_params():
    draw = np.random.default_rng(0)
    return {
        path: jnp.asarray(draw.normal(path.endswith("scale"), 0.3, leaf.shape), jnp.float32)
        for path, leaf in define(MODEL).params.items()
    }


@jax.jit
def hidden_states(params, tokens, segment_ids, positions, state):
    model = define(MODEL).merge(params, {})
    output = model(tokens, segment_ids=segment_ids, positions=positions, state=state)
    return output.hidden, output.state


def test_a_reader_attends_to_the_keys_and_values_of_its_source():
    dims = ModelDims(embed_dim=8, num_layers=2, norm_eps=1e-6, init_std=0.5, dtype=jnp.float32)
    plain = AttentionConfig(num_heads=2, num_kv_heads=1, rope_base=None)
    reader = dataclasses.replace(plain, reads_kv="x").build(dims, rngs=nnx.Rngs(params=0))
    assert reader.key is None and reader.value is None and reader.cached_shape() is None
    draw = np.random.default_rng(0)
    x, keys, values = (
        jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((1, 4, 8), (1, 4, 1, 4), (1, 4, 1, 4))
    )
    ids = jnp.array([[1, 1, 2, 2]])

    @jax.jit
    def both(x, keys, values):
        context = MixerContext(shared={"x": (keys, values)})
        y, _ = reader(x, segment_ids=ids, positions=jnp.arange(4)[None], state=None, context=context)
        queries = (x @ reader.query.weight[...]).reshape(1, 4, 2, 4)
        mixed = kernels.self_attention(queries, keys, values, segment_ids=ids, window=None, scale=0.5)
        return y, mixed.reshape(1, 4, 8) @ reader.output.weight[...]

    np.testing.assert_allclose(*both(x, keys, values), rtol=1e-5, atol=1e-6)


def test_readers_decode_as_they_train_and_do_not_see_other_documents():
    definition = define(MODEL)
    params = random_params()
    whole, _ = hidden_states(params, TOKENS, jnp.ones_like(TOKENS), PLACES, None)
    segments = 1 + (PLACES >= 6)
    positions = jnp.where(PLACES < 6, PLACES, PLACES - 6)
    packed, _ = hidden_states(params, TOKENS, segments, positions, None)
    np.testing.assert_allclose(packed[:, :6], whole[:, :6], rtol=1e-4, atol=1e-5)
    # Several tokens that follow a cache: those of the window are older than its ring.
    state = definition.merge(params, {}).init_state(4, max_length=LENGTH)
    # The readers' states hold nothing, as their size says.
    entries = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)
    assert entries == 4 * state_size(MODEL, length=LENGTH).cached == 4 * 2 * 2 * 8 * (4 + LENGTH)
    outputs = []
    start = 0
    for size in (7, 7, 1, 1):
        part = slice(start, start + size)
        ids = jnp.ones((4, size), int)
        hidden, state = hidden_states(params, TOKENS[:, part], ids, PLACES[:, part], state)
        outputs.append(hidden)
        start += size
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_readers_on_a_mesh():
    """Values and gradients, which reach the keys of the sources from all of their readers."""
    definition = define(MODEL)
    params = random_params()

    def loss(params):
        hidden = definition.merge(params, {})(
            TOKENS, segment_ids=1 + (PLACES >= 6), positions=PLACES, state=None
        ).hidden
        return jnp.sum(hidden * jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape))

    expected = jax.jit(jax.value_and_grad(loss))(params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(definition.params, mesh))
        sharded = jax.jit(jax.value_and_grad(loss))(placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-3), sharded, expected)


def test_only_sources_have_caches_in_a_format():
    phases = (QuantPhase(rules=(QuantRule(paths=".", cache=PRESETS["torchao_int8_token"]),)),)
    definition = define_quantized(MODEL, phases)
    zeros = {path: jnp.zeros(leaf.shape) for path, leaf in definition.params.items()}
    decoder = definition.merge_untransformed(zeros, {})
    blocks = [block for stack in decoder.segments for block in stack.blocks]
    assert [block.mixer.cache_quantizer is not None for block in blocks] == [
        block.mixer.config.reads_kv is None for block in blocks
    ]


@pytest.mark.parametrize(
    ("blocks", "num_shared", "message"),
    [
        (BLOCKS, 0, "num_shared=0 of 6 layers"),
        (BLOCKS, 6, "num_shared=6 of 6 layers"),
        (BLOCKS, 5, "layer 1 has no earlier layer of its kind"),
    ],
)
def test_too_few_sources_are_refused(blocks, num_shared, message):
    with pytest.raises(ValueError, match=message):
        with_shared_key_values(blocks, num_shared=num_shared)


@pytest.mark.parametrize(
    ("source", "reader", "message"),
    [
        ({}, {"window": 5}, "layer 1 reads 'x': window is 5 here and None"),
        ({"rope_base": 5.0}, {}, "rope_base is 10000.0 here and 5.0"),
        ({}, {"num_kv_heads": 1}, "key-value heads is 1 here and 2"),
        ({}, {"head_dim": 4}, "head_dim is 4 here and 8"),
    ],
)
def test_sources_of_another_kind_are_refused(source, reader, message):
    mixers = (
        dataclasses.replace(FULL, writes_kv="x", **source),
        dataclasses.replace(FULL, reads_kv="x", **reader),
    )
    with pytest.raises(ValueError, match=message):
        model([dataclasses.replace(FULL_BLOCK, mixer=mixer) for mixer in mixers])


def test_readers_are_checked_inside_parallel_mixers():
    reader = dataclasses.replace(FULL, reads_kv="x")
    both = ParallelMixerConfig(mixers=(reader, DifferentialAttentionConfig(num_heads=2)))
    with pytest.raises(ValueError, match=r"layer 0 \(AttentionConfig\) reads 'x', and no earlier"):
        model([dataclasses.replace(FULL_BLOCK, mixer=both)])
    with pytest.raises(ValueError, match="set one of them"):
        dataclasses.replace(reader, writes_kv="y")
