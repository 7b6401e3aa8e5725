"""Nested feed-forward layers: a masked prefix is the sliced layer, in logits and gradients; a step draws one
granularity for all of its batch; slices are models of their own.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slmjax
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.model_file import write_model_file
from slmjax.convert.slicing import slice_model
from slmjax.formats.presets import PRESETS
from slmjax.models import (
    Activation,
    AttentionConfig,
    BlockConfig,
    MlpConfig,
    ModelConfig,
    MultiTokenConfig,
    stack_of,
    with_shared_ffn,
)
from slmjax.models.canonical_form import canonical
from slmjax.models.decoder import logits
from slmjax.models.definition import Definition, define, restack, stored_shapes, unstack
from slmjax.models.nested_ffn import drawn, num_granularities, sliced, sliced_config, with_prefixes
from slmjax.parallel.mesh import MeshConfig
from slmjax.quantization.fake_quantization import define_quantized
from slmjax.quantization.rules import QuantPhase, QuantRule
from slmjax.training import step
from slmjax.training.objective import ObjectiveConfig
from tests.training.test_step import OPTIM, build, make_batch

NESTED = (0.25, 0.5)
GATED = MlpConfig(hidden_dim=16, nested=NESTED)
ATTENTION = AttentionConfig(num_heads=2)
TOKENS = jnp.asarray([[1, 5, 9, 4, 2, 8], [7, 7, 3, 1, 0, 6]])


def config_of(*ffns: MlpConfig | None, **settings) -> ModelConfig:
    blocks = [BlockConfig(mixer=ATTENTION, ffn=ffn) for ffn in ffns]
    return ModelConfig(
        embed_dim=16, stack=stack_of(blocks), context_length=16, vocab_size=61, vocab_multiple=8, **settings
    )


def params_of(config: ModelConfig) -> dict[str, jax.Array]:
    draws = np.random.default_rng(2)
    return {
        path: jnp.asarray(0.4 * draws.normal(size=leaf.shape) + path.endswith("scale"), jnp.float32)
        for path, leaf in define(config).params.items()
    }


def sliced_params(
    config: ModelConfig, smaller: ModelConfig, params: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    shapes = stored_shapes(smaller, define(smaller).params)
    parts = {name: sliced(value, name, shapes[name].shape) for name, value in unstack(config, params).items()}
    return restack(smaller, parts, like=define(smaller).params)


def logits_of(definition: Definition, params: dict[str, jax.Array]) -> jax.Array:
    """Logits with parameters as layers multiply with them."""
    merge = definition.transformed().merge_transformed
    return jax.jit(lambda params: logits(merge(params, {}), TOKENS))(params)


# A prefix is a slice ----------------------------------------------------------------------------------------
# Every kind of activation, with biases; a layer without prefixes, and a layer without hidden units.
CLAMPED = dataclasses.replace(GATED, activation=Activation.CLAMPED_SILU, bias=True)
PLAIN = dataclasses.replace(GATED, activation=Activation.GELU_EXACT, gated=False, bias=True)
MIXED = config_of(CLAMPED, PLAIN, MlpConfig(hidden_dim=12), None, GATED, GATED)


@pytest.mark.parametrize("granularity", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_masked_prefix_is_the_sliced_model(granularity: int) -> None:
    params = params_of(MIXED)
    masked = with_prefixes(params, MIXED, jnp.int32(granularity))
    smaller = sliced_config(MIXED, [NESTED[granularity]])
    widths = [block.ffn.hidden_dim for block in smaller.blocks() if isinstance(block.ffn, MlpConfig)]
    assert widths == [[4, 4, 12, 4, 4], [8, 8, 12, 8, 8]][granularity]
    found = logits_of(define(MIXED), masked)
    expected = logits_of(define(smaller), sliced_params(MIXED, smaller, params))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # The whole layers are something else, and the last granularity.
    whole = with_prefixes(params, MIXED, jnp.int32(2))
    assert all(np.array_equal(whole[path], value) for path, value in params.items())
    assert not np.allclose(found, logits_of(define(MIXED), params), atol=0.1)


def test_hidden_units_behind_the_prefix_get_no_gradient() -> None:
    """In shared layers and in modules of further tokens too."""
    shared = with_shared_ffn([BlockConfig(mixer=ATTENTION, ffn=GATED)] * 2)
    own = BlockConfig(mixer=ATTENTION, ffn=PLAIN)
    config = dataclasses.replace(
        config_of(GATED), stack=stack_of([*shared, own]), multi_token=MultiTokenConfig()
    )
    batch = jax.tree.map(jnp.asarray, make_batch(0))

    @jax.jit
    def gradient(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def loss(params: dict[str, jax.Array]) -> jax.Array:
            masked = with_prefixes(params, config, jnp.int32(0))
            terms, _ = step.loss_terms(define(config), ObjectiveConfig(), masked, {}, batch, key=None)
            return sum((value for value, _ in terms.values()), jnp.zeros(()))

        return jax.grad(loss)(params)

    found = gradient(params_of(config))
    paths = [path for path in found if "/ffn/" in path]
    assert {path.split("/")[0] for path in paths} == {"segments", "shared", "multi_token"}
    for path in paths:
        axis = found[path].ndim - 2 if path.endswith("down/weight") else found[path].ndim - 1
        inner, behind = np.split(np.asarray(found[path]), [4], axis=axis)
        assert inner.any(), path
        assert path.endswith("down/bias") or not behind.any(), path


@pytest.mark.nightly
def test_rounded_weights_and_inputs_have_rounded_prefixes() -> None:
    """With a scale per token for inputs: hidden units that are 0 do not change it."""
    rules = (QuantRule(paths="/ffn/", weight=PRESETS["int8_row"], input=PRESETS["torchao_int8_token"]),)
    phases = (QuantPhase(rules=rules),)
    config = config_of(GATED)
    params = params_of(config)
    definition = define_quantized(config, phases)
    masked = with_prefixes(definition.transform(params), config, jnp.int32(1))
    found = logits_of(definition, masked)
    smaller = sliced_config(config, [0.5])
    other = define_quantized(smaller, phases)
    expected = logits_of(other, other.transform(sliced_params(config, smaller, params)))
    # The scales of `down` are those of all its rows, or of the rows that are left.
    np.testing.assert_allclose(found, expected, atol=0.1)
    inputs_only = dataclasses.replace(rules[0], weight=None)
    definition, other = (
        define_quantized(model, (QuantPhase(rules=(inputs_only,)),)) for model in (config, smaller)
    )
    found = logits_of(definition, with_prefixes(params, config, jnp.int32(1)))
    expected = logits_of(other, sliced_params(config, smaller, params))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# The step ---------------------------------------------------------------------------------------------------
TRAINED = config_of(GATED, GATED)


@functools.cache
def trained(**settings):
    """State and metrics after two steps, on a mesh or in parts."""
    compiled = build(TRAINED, **settings)
    return compiled.run(build(TRAINED).start(), make_batch(0), make_batch(1))


def test_all_granularities_are_drawn_and_the_step_says_which() -> None:
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(300)]
    counts = np.bincount([int(drawn(TRAINED, key)) for key in keys], minlength=3)
    assert num_granularities(TRAINED) == 3 and counts.min() > 70
    assert drawn(config_of(MlpConfig(hidden_dim=8)), keys[0]) is None
    state, metrics = trained()
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), 1)
    assert metrics["granularity"] == int(drawn(TRAINED, key))
    # The loss of the second step is that of this granularity.
    before, _ = build(TRAINED).run(build(TRAINED).start(), make_batch(0))
    batch = jax.tree.map(jnp.asarray, make_batch(1))

    @jax.jit
    def nll(granularity: jax.Array) -> jax.Array:
        masked = with_prefixes(before.params, TRAINED, granularity)
        _, sums = step.loss_terms(define(TRAINED), ObjectiveConfig(), masked, {}, batch, key=None)
        return sums["nll"]

    losses = [nll(jnp.int32(granularity)) for granularity in range(3)]
    assert metrics["nll"] == pytest.approx(float(losses[metrics["granularity"]]), rel=1e-5)
    assert len(np.unique(np.round(losses, 3))) == 3


@pytest.mark.nightly
def test_a_mesh_and_accumulation_change_nothing() -> None:
    settings = {
        "mesh": MeshConfig(data=2, fsdp=2, tensor=2),
        "num_devices": 8,
        "optim": dataclasses.replace(OPTIM, accumulation_steps=2),
    }
    state, metrics = trained(**settings)
    expected_state, expected = trained()
    assert metrics["granularity"] == expected["granularity"]
    assert metrics["nll"] == pytest.approx(expected["nll"], rel=1e-4)
    for path, value in expected_state.params.items():
        np.testing.assert_allclose(state.params[path], value, rtol=2e-4, atol=5e-6, err_msg=path)


# Slices as models -------------------------------------------------------------------------------------------
def test_a_slice_is_a_model_of_its_own(tmp_path: Path) -> None:
    """Of a fraction for each layer, from the directory of a model; it can be exported like any other."""
    config = dataclasses.replace(TRAINED, multi_token=MultiTokenConfig())
    params = params_of(config)
    source = tmp_path / "whole"
    source.mkdir()
    write_model_file(source, config)
    names = unstack(config, params).items()
    safetensors_files.write_tensors(
        source / safetensors_files.DIRECTORY, ((name, np.asarray(value)) for name, value in names)
    )
    written = slice_model(source, tmp_path / "mixed", fractions=[0.25, 1.0])
    loaded = slmjax.load_model(tmp_path / "mixed")
    assert [block.ffn for block in loaded.config.blocks()] == [
        MlpConfig(hidden_dim=4),
        MlpConfig(hidden_dim=16),
    ]
    smaller = sliced_config(config, [0.25, 1.0])
    assert loaded.config == smaller
    expected = logits_of(define(smaller), sliced_params(config, smaller, params))
    np.testing.assert_allclose(logits_of(loaded.definition, loaded.params), expected, rtol=1e-5, atol=1e-5)
    assert written.parameters == sum(value.size for value in loaded.params.values())
    # A slice has no smaller ones inside.
    with pytest.raises(ValueError, match="no layer has ffn.nested"):
        slice_model(tmp_path / "mixed", tmp_path / "again", fractions=[0.25])


def test_exports_of_the_whole_model_need_no_prefixes() -> None:
    assert canonical(TRAINED) == canonical(config_of(*[dataclasses.replace(GATED, nested=())] * 2))


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([0.3], "the fraction 0.3 of layer 0 was not trained: choose from 0.25, 0.5, 1.0"),
        ([0.5, 1.0, 0.5], "3 fractions for 2 layers"),
    ],
)
def test_fractions_that_were_not_trained_are_refused(fractions: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliced_config(TRAINED, fractions)


@pytest.mark.parametrize("nested", [(0.5, 0.25), (0.5, 1.0), (0.0, 0.5), (0.5, 0.5)])
def test_fractions_must_ascend_between_0_and_1(nested: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending fractions between 0 and 1"):
        MlpConfig(hidden_dim=16, nested=nested)


def test_widths_are_whole_and_layers_have_as_many() -> None:
    with pytest.raises(ValueError, match="whole numbers of the hidden_dim=10 units"):
        MlpConfig(hidden_dim=10, nested=(0.25,))
    with pytest.raises(ValueError, match="1 and 2 fractions"):
        config_of(GATED, MlpConfig(hidden_dim=16, nested=(0.5,)))
