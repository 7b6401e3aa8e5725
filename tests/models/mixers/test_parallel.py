"""Parallel mixers: by hand, and as one of three kinds of layers in a stack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax import config as config_io
from slmjax.formats.presets import PRESETS
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, Parameterization
from slmjax.models.canonical_form import canonical
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.layers import ModelDims
from slmjax.models.mixers.attention import AttentionConfig, OutputGate
from slmjax.models.mixers.differential import DifferentialAttentionConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.mixers.parallel import Combine, ParallelMixerConfig
from slmjax.models.protocols import MixerContext
from slmjax.models.zoo import state_size
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from slmjax.planning.sizes import HeadGrowth, at_width, head_growth, query_dim
from slmjax.quantization.fake_quantization import define_quantized
from slmjax.quantization.plan import assignment_lines
from slmjax.quantization.rules import QuantPhase, QuantRule

DIMS = ModelDims(embed_dim=8, num_layers=2, norm_eps=1e-6, init_std=0.5, dtype=jnp.float32)
WINDOW = AttentionConfig(num_heads=2, window=3)
DIFFERENTIAL = DifferentialAttentionConfig(num_heads=1)
ROW = {
    "segment_ids": jnp.array([[1, 1, 1, 2, 2, 2]]),
    "positions": jnp.array([[0, 1, 2, 0, 1, 2]]),
    "state": None,
}


def built(**settings):
    config = ParallelMixerConfig(mixers=(WINDOW, DIFFERENTIAL), **settings)
    constants = {
        name: jnp.float32(value)
        for name, value in config.layer_constants(DIMS, index=1, num_layers=2).items()
    }
    context = MixerContext(constants=constants)
    return config.build(dataclasses.replace(DIMS, constants=constants), rngs=nnx.Rngs(params=0)), context


@pytest.mark.parametrize("combine", Combine)
def test_outputs_are_combined_as_the_formula_says(combine):
    mixer, context = built(combine=combine, input_multipliers=(2.0, 1.0), output_multipliers=(1.0, -3.0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 8)), jnp.float32)
    y, _ = mixer(x, **ROW, context=context)
    first, _ = mixer.parts[0].mixer(2.0 * x, **ROW)
    # What differs between layers reaches the part under its own name.
    own = MixerContext(constants={"lambda_init": 0.8 - 0.6 * np.exp(-0.3)})
    second, _ = mixer.parts[1].mixer(x, **ROW, context=own)
    if combine is Combine.SUM:
        expected = first - 3.0 * second
    else:
        first, second = (y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6) for y in (first, second))
        expected = (first - 3.0 * second) / 2
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_costs_are_sums():
    config = ParallelMixerConfig(mixers=(WINDOW, DIFFERENTIAL))
    parts = (WINDOW, DIFFERENTIAL)
    assert config.mixing_flops(DIMS, length=9) == sum(part.mixing_flops(DIMS, length=9) for part in parts)
    # Keys and values of 8 dims: three slots of the window, and nine.
    assert config.state_size(DIMS, length=9).cached == 2 * 8 * (3 + 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixers": (WINDOW,)}, "at least two, got 1"),
        ({"mixers": (WINDOW, WINDOW), "input_multipliers": (1.0,)}, "input_multipliers has 1 entries for 2"),
        ({"mixers": (WINDOW, WINDOW), "output_multipliers": (1.0,) * 3}, "output_multipliers has 3 entries"),
    ],
)
def test_errors_of_bad_settings_name_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        ParallelMixerConfig(**settings)


# In a stack -------------------------------------------------------------------------------------------------
LENGTH = 16
GATED = AttentionConfig(num_heads=4, num_kv_heads=2, output_gate=OutputGate.PER_ELEMENT)
LATENT = LatentAttentionConfig(num_heads=4, latent_dim=8, plain_dim=4, rope_dim=4, value_dim=4)
BOTH = ParallelMixerConfig(
    mixers=(dataclasses.replace(GATED, window=4), LATENT), combine=Combine.MEAN_OF_NORMS
)
MODEL = ModelConfig(
    embed_dim=32,
    stack=(
        LayerGroup(
            pattern=tuple(
                BlockConfig(mixer=mixer, ffn=MlpConfig(hidden_dim=32))
                for mixer in (GATED, DifferentialAttentionConfig(num_heads=4, num_kv_heads=2), BOTH)
            ),
        ),
    ),
    vocab_size=40,
    context_length=LENGTH,
)


@functools.cache
def random_model():
    definition = define(MODEL)
    draw = np.random.default_rng(0)
    return definition, {
        path: jnp.asarray(draw.normal(path.endswith("scale"), 0.3, leaf.shape), jnp.float32)
        for path, leaf in definition.params.items()
    }


def compiled(definition):
    @jax.jit
    def hidden_states(params, tokens, segment_ids, positions, state):
        model = definition.merge(params, {})
        output = model(tokens, segment_ids=segment_ids, positions=positions, state=state)
        return output.hidden, output.state

    return hidden_states


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 40, (4, LENGTH)), jnp.int32)
PLACES = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)


def test_three_kinds_of_mixers_in_one_stack_do_not_see_other_documents_and_decode_as_they_train():
    definition, params = random_model()
    hidden_states = compiled(definition)
    whole, _ = hidden_states(params, TOKENS, jnp.ones_like(TOKENS), PLACES, None)
    # The first 6 tokens of a row are the same document when others follow.
    segments = 1 + (PLACES >= 6)
    packed, _ = hidden_states(params, TOKENS, segments, jnp.where(PLACES < 6, PLACES, PLACES - 6), None)
    np.testing.assert_allclose(packed[:, :6], whole[:, :6], rtol=1e-4, atol=1e-5)
    # The others are alone the same as after them.
    moved = jnp.roll(TOKENS, -6, axis=1)
    alone, _ = hidden_states(params, moved, (PLACES < 10).astype(int), PLACES, None)
    np.testing.assert_allclose(packed[:, 6:], alone[:, :10], rtol=1e-4, atol=1e-5)
    # Prefill, then single tokens: the state of the parallel mixer is a tuple.
    state = definition.merge(params, {}).init_state(4, max_length=LENGTH)
    parallel = state[0][2][0].mixer
    assert isinstance(parallel, tuple) and len(parallel) == 2
    outputs = []
    start = 0
    for size in (12, 1, 1, 1, 1):
        part = slice(start, start + size)
        hidden, state = hidden_states(
            params, TOKENS[:, part], jnp.ones((4, size), int), PLACES[:, part], state
        )
        outputs.append(hidden)
        start += size
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_three_kinds_of_mixers_on_a_mesh():
    """Values and gradients, with heads over tensor, rows over fsdp and data."""
    definition, params = random_model()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = parameter_shardings(definition.params, mesh)
    name = "segments/0/blocks/2/mixer/parts/0/mixer/output_gate/weight"
    assert shardings[name].spec == jax.P(None, "fsdp", "tensor")

    def loss(params):
        hidden = definition.merge(params, {})(
            TOKENS, segment_ids=1 + (PLACES >= 6), positions=PLACES, state=None
        ).hidden
        return jnp.sum(hidden * jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape))

    expected = jax.jit(jax.value_and_grad(loss))(params)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(jax.device_put(params, shardings))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-3), found, expected)


def test_weights_inputs_and_caches_of_parts_are_quantized():
    int8 = PRESETS["torchao_int8_token"]
    rules = (
        QuantRule(paths=".", weight=PRESETS["int8_row"], input=int8),
        QuantRule(paths="mixer/cache", cache=int8),
    )
    phases = (QuantPhase(rules=rules),)
    lines = {line.path: line for line in assignment_lines(MODEL, phases)}
    part = "layers/2/mixer/parts/1/mixer"
    assert lines[f"{part}/latent_up/weight"].format is not None
    # The latent and the rotated key of a token.
    assert lines[f"{part}/cache"].format is not None and lines[f"{part}/cache"].shape == (12,)
    assert lines["layers/1/mixer/cache"].shape == (2, 4, 4)
    definition = define_quantized(MODEL, phases)
    zeros = {path: jnp.zeros(leaf.shape) for path, leaf in definition.params.items()}
    model = definition.merge_untransformed(zeros, {})
    parts = model.segments[0].blocks[2].mixer.parts
    assert all(part.mixer.cache_quantizer is not None for part in parts)
    assert parts[0].mixer.output_gate.input_quantizer is not None
    assert parts[1].mixer.latent_up.input_quantizer is not None


def test_forms_and_sizes_reach_the_parts():
    assert config_io.loads(ModelConfig, config_io.dumps(MODEL)) == MODEL
    block = canonical(MODEL).stack[0].pattern[2]
    assert block.mixer.mixers[0].head_dim == 8 and block.mixer.output_multipliers == (1.0, 1.0)
    # Attention; differential attention, with two keys of 4 dims a head; a window beside latents of 12 dims.
    sizes = (2 * 16 * 2 * 8, 4 * 16 * 2 * 4, 2 * 4 * 2 * 8, 16 * 12)
    assert state_size(MODEL, length=16).cached == sum(sizes)
    assert head_growth(MODEL, widths=(32, 64)) is HeadGrowth.NUMBER and query_dim(MODEL) == 8
    wide = at_width(MODEL, 64, growth=HeadGrowth.NUMBER).stack[0].pattern[2].mixer
    assert wide.mixers[0].num_heads == 8 and wide.mixers[1].latent_dim == 16
    scaled = dataclasses.replace(MODEL, parameterization=Parameterization.MUP, base_width=16)
    assert scaled.scaling.width == 2
