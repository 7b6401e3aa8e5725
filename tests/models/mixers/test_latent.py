"""Latent attention against transformers, its visibility, decoding with its small cache, and training."""

import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import slmjax
from benchmarks import mesh_equality
from slmjax.models.architecture import LayerGroup, ModelConfig, Precision, Remat
from slmjax.models.definition import define
from slmjax.models.layers import ModelDims
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.sampling import SamplingConfig
from slmjax.telemetry.run_directory import read_log
from slmjax.training import step
from slmjax.training.metrics import named_metrics
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, Schedule, make_optimizer
from slmjax.training.state import init_state, state_shapes
from tests.models.mixers import latent_oracle as oracle
from tests.one_layer import one_layer

BATCH = 2
LENGTH = 12
WIDTH = oracle.WIDTH
# The references fix the eps of their latent norms; the model's own differs here.
DIMS = ModelDims(embed_dim=WIDTH, num_layers=2, norm_eps=0.1, init_std=0.5, dtype=jnp.float32)


def build(name: str, dtype=jnp.float32):
    """Build the mixer of a case, with the reference's weights."""
    case = oracle.CASES[name]
    module = nnx.eval_shape(
        lambda: case.mixer.build(dataclasses.replace(DIMS, dtype=dtype), rngs=nnx.Rngs(params=0))
    )
    weights: dict[Any, jax.Array] = {
        tuple(path.split("/")): jnp.asarray(value) for path, value in oracle.imported_weights(case).items()
    }
    graphdef, params = nnx.split(module)
    assert {path: leaf.shape for path, leaf in nnx.to_flat_state(params)} == {
        path: value.shape for path, value in weights.items()
    }
    return nnx.merge(graphdef, nnx.from_flat_state(weights))


@functools.cache
def compiled(name: str, dtype=jnp.float32):
    """Return the mixer and a compiled call of it; `state` None means complete sequences."""
    mixer = build(name, dtype)
    graphdef, params = nnx.split(mixer)

    @jax.jit
    def call(x, segment_ids, positions, state=None):
        return nnx.merge(graphdef, params)(x, segment_ids=segment_ids, positions=positions, state=state)

    return mixer, call


def inputs(batch=BATCH, length=LENGTH):
    x = np.random.default_rng(1).normal(size=(batch, length, WIDTH)).astype(np.float32)
    return (
        x,
        np.ones((batch, length), np.int32),
        np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)),
    )


def full_output(name: str, *args, dtype=jnp.float32):
    return np.asarray(compiled(name, dtype)[1](*args)[0])


# The reference ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", oracle.CASES)
def test_equals_transformers(name):
    _, segment_ids, positions = inputs(1, oracle.LENGTH)
    output = full_output(name, oracle.inputs(), segment_ids, positions)
    # Both compute in float32, and the file has six decimal places.
    np.testing.assert_allclose(output[0], json.loads(oracle.GOLDEN.read_text())[name], rtol=1e-5, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("name", oracle.CASES)
def test_the_golden_values_equal_transformers(name):
    expected = oracle.reference_output(oracle.CASES[name])[0]
    np.testing.assert_allclose(json.loads(oracle.GOLDEN.read_text())[name], expected, rtol=1e-5, atol=1e-5)


# Visibility -------------------------------------------------------------------------------------------------
def test_a_token_sees_earlier_tokens_of_its_document_and_padding_sees_nothing():
    x, _, _ = inputs(1)
    segment_ids = np.array([[1] * 4 + [2] * 6 + [0] * 2], np.int32)
    positions = np.array([[*range(4), *range(6), 0, 0]], np.int32)
    _, call = compiled("deepseek_v2")

    def influence(t):
        return (
            jnp.abs(jax.grad(lambda x: jnp.sum(call(x, segment_ids, positions)[0][:, t] ** 2))(x)).sum((0, 2))
            > 0
        )

    t = np.arange(LENGTH)
    same = (segment_ids[0][:, None] == segment_ids[0][None, :]) & (segment_ids[0] > 0)
    np.testing.assert_array_equal(jax.jit(jax.vmap(influence))(t), same & (t[:, None] >= t[None, :]))


def test_a_packed_document_equals_the_document_alone():
    x, segment_ids, positions = inputs()
    packed = full_output(
        "deepseek_v2", x, np.where(positions < 5, 1, 2), np.where(positions < 5, positions, positions - 5)
    )
    alone = full_output("deepseek_v2", np.roll(x, -5, axis=1), segment_ids, positions)
    np.testing.assert_allclose(
        packed[:, :5], full_output("deepseek_v2", x, segment_ids, positions)[:, :5], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(packed[:, 5:], alone[:, :7], rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_where_a_row_is_padding():
    x, segment_ids, positions = map(jnp.asarray, inputs())
    x = x.at[1].set(0.0)
    segment_ids = segment_ids.at[1].set(0)
    graphdef, params = nnx.split(build("deepseek_v2"))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(
            jnp.square(
                nnx.merge(graphdef, params)(x, segment_ids=segment_ids, positions=positions, state=None)[0]
            )
        )

    leaves = jax.tree.leaves(gradient(params))
    assert len(leaves) == 10 and all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in leaves)


def test_without_rotary_positions_the_order_of_the_past_does_not_matter():
    x, segment_ids, positions = map(jnp.asarray, inputs())
    reversed_past = jnp.concatenate([x[:, -2::-1], x[:, -1:]], axis=1)
    config = oracle.CASES["deepseek_v2_lite"].mixer

    def change(base):
        mixer = dataclasses.replace(config, rope_base=base).build(DIMS, rngs=nnx.Rngs(params=0))
        graphdef, params = nnx.split(mixer)
        call = jax.jit(
            lambda x: nnx.merge(graphdef, params)(
                x, segment_ids=segment_ids, positions=positions, state=None
            )[0][:, -1]
        )
        return np.max(np.abs(np.asarray(call(x) - call(reversed_past))))

    assert change(None) < 1e-5
    assert change(10.0) > 1e-3


# Decoding ---------------------------------------------------------------------------------------------------
KINDS = ("deepseek_v2", "deepseek_v2_lite")


def decode(name, x, segment_ids, positions, *, chunks, dtype=jnp.float32):
    mixer, call = compiled(name, dtype)
    state = mixer.init_state(x.shape[0], max_length=LENGTH)
    outputs = []
    start = 0
    for size in chunks:
        part = slice(start, start + size)
        y, state = call(x[:, part], segment_ids[:, part], positions[:, part], state)
        outputs.append(y)
        start += size
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("chunks", [(6, 1, 1, 1, 1, 1, 1), (6, 6)], ids=["token by token", "chunks"])
def test_decoding_from_latents_equals_the_full_sequence(name, chunks):
    args = inputs()
    decoded = decode(name, *args, chunks=chunks)
    np.testing.assert_allclose(decoded, full_output(name, *args), rtol=1e-4, atol=1e-5)


def test_decoding_continues_the_last_document_of_a_chunk():
    # The first chunk ends two tokens into the second document, whose positions start again at 0.
    x, _, _ = inputs()
    segment_ids = np.array([[1] * 4 + [2] * 8] * BATCH, np.int32)
    positions = np.array([[*range(4), *range(8)]] * BATCH, np.int32)
    decoded = decode("deepseek_v2", x, segment_ids, positions, chunks=(6, 1, 1, 1, 1, 1, 1))
    np.testing.assert_allclose(
        decoded, full_output("deepseek_v2", x, segment_ids, positions), rtol=1e-4, atol=1e-5
    )


def test_prompts_of_different_lengths_decode_as_alone():
    # The second prompt has 4 tokens and 2 of padding, which must not change anything.
    x, segment_ids, positions = inputs()
    expected = full_output("deepseek_v2", x, segment_ids, positions)
    mixer, call = compiled("deepseek_v2")
    lengths = np.array([6, 4], np.int32)
    rows = np.arange(BATCH)
    t = np.arange(6, dtype=np.int32)
    prompt = t < lengths[:, None]
    _, state = call(
        x[:, :6], prompt.astype(np.int32), np.where(prompt, t, 0), mixer.init_state(BATCH, max_length=LENGTH)
    )
    for index in range(6):
        at = lengths + np.int32(index)
        y, state = call(x[rows, at][:, None], np.ones((BATCH, 1), np.int32), at[:, None], state)
        np.testing.assert_allclose(y[:, 0], expected[rows, at], rtol=1e-4, atol=1e-5)


def test_bfloat16_differs_only_by_rounding():
    x, segment_ids, positions = inputs()
    rounded = jnp.asarray(x, jnp.bfloat16)
    expected = full_output("deepseek_v2", np.asarray(rounded, np.float32), segment_ids, positions)
    output = full_output("deepseek_v2", rounded, segment_ids, positions, dtype=jnp.bfloat16)
    decoded = decode(
        "deepseek_v2", rounded, segment_ids, positions, chunks=(6, 1, 1, 1, 1, 1, 1), dtype=jnp.bfloat16
    )
    assert output.dtype == decoded.dtype == jnp.bfloat16
    assert build("deepseek_v2", jnp.bfloat16).init_state(1, max_length=4).entries.dtype == jnp.bfloat16
    for result in (output, decoded):
        error = np.linalg.norm(np.asarray(result, np.float32) - expected) / np.linalg.norm(expected)
        assert error < 0.02, error  # eight bits, 0.004, in each of several products one after the other


# Costs and settings -----------------------------------------------------------------------------------------
def test_costs_equal_those_of_the_arrays():
    config = oracle.CASES["deepseek_v2"].mixer  # 2 heads, latents of 8, keys of 6 + 8, values of 5
    state = jax.eval_shape(lambda: build("deepseek_v2").init_state(3, max_length=LENGTH))
    assert (
        config.state_size(DIMS, length=LENGTH).bytes(4) == 4 * state.entries.size // 3 == LENGTH * (8 + 8) * 4
    )
    # A multiplication and an addition each, per visible token and head, for each dim of keys and of values.
    visible = sum(t + 1 for t in range(LENGTH)) / LENGTH
    assert config.mixing_flops(DIMS, length=LENGTH) == 2 * visible * 2 * (14 + 5)


def test_depth_scaled_output_and_plain_inputs_at_the_start():
    dims = ModelDims(embed_dim=256, num_layers=8, norm_eps=1e-6, init_std=0.02, dtype=jnp.float32)
    config = LatentAttentionConfig(
        num_heads=4, query_rank=128, latent_dim=128, plain_dim=32, rope_dim=32, value_dim=64
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: config.build(dims, rngs=nnx.Rngs(params=0))))
    mixer = nnx.merge(graphdef, jax.jit(lambda: nnx.state(config.build(dims, rngs=nnx.Rngs(params=0))))())
    linears = (mixer.query_down, mixer.query_up, mixer.latent_down, mixer.latent_up, mixer.output)
    for linear, std in zip(linears, (0.02, 0.02, 0.02, 0.02, 0.005), strict=True):
        np.testing.assert_allclose(np.std(np.asarray(linear.weight[...])), 0.98658 * std, rtol=2e-2)
        assert linear.bias is None
    assert mixer.latent_norm.eps == mixer.query_norm.eps == 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"value_dim": -1}, "value_dim must be at least 1"),
        ({"rope_dim": 3}, "rope_dim must be even and at least 2"),
        ({"query_rank": 0}, "query_rank must be at least 1, or none"),
        ({"rope_base": 0.0}, "rope_base must be positive"),
        ({"latent_norm_eps": 0.0}, "latent_norm_eps must be positive"),
    ],
)
def test_errors_of_bad_settings_name_what_to_change(settings, message):
    good = {"num_heads": 2, "latent_dim": 8, "plain_dim": 4, "rope_dim": 4, "value_dim": 4}
    with pytest.raises(ValueError, match=message):
        LatentAttentionConfig(**{**good, **settings})


# A model of it ----------------------------------------------------------------------------------------------
def losses_of_steps(model: ModelConfig, optim: OptimConfig, *, steps: int) -> list[float]:
    """Return the loss of each step on the same batch, on one device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    definition = define(model)
    optimizer = make_optimizer(optim, definition.params, total_steps=steps)
    shapes = state_shapes(definition, optimizer, with_ema=False, mesh=mesh)
    settings = {"objective": ObjectiveConfig(), "optim": optim, "shapes": shapes, "total_steps": steps}
    train_step = step.make_train_step(definition, optimizer, **settings)
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(definition, optimizer, shapes=shapes, seed=0)
        batch = place_batch(mesh_equality.make_batch(), mesh)
        for _ in range(steps):
            state, metrics = train_step(state, batch)
            losses.append(float(named_metrics(model, jax.device_get(metrics))["loss"]))
    return losses


def test_precision_rematerialisation_and_accumulation_change_training_only_by_rounding():
    """Layers are scanned, rows hold two documents and padding; the model overfits one batch."""
    plain = mesh_equality.MODELS["latent"]
    optim = OptimConfig(lr=1e-2, warmup_steps=0, schedule=Schedule.CONSTANT)
    lean = dataclasses.replace(plain, precision=Precision.BFLOAT16, remat=Remat.FULL)
    expected = losses_of_steps(plain, optim, steps=6)
    actual = losses_of_steps(lean, dataclasses.replace(optim, accumulation_steps=2), steps=6)
    assert expected[-1] < expected[0] - 0.5, expected
    np.testing.assert_allclose(actual, expected, rtol=0.01)


@pytest.mark.nightly
def test_a_run_on_a_mesh_loads_and_decodes_from_latents(workplace: Path, tmp_path: Path) -> None:
    tiny = one_layer(workplace, tmp_path, steps=8, accumulation_steps=2)
    (block,) = tiny.model.stack[0].pattern
    mixer = LatentAttentionConfig(
        num_heads=4, query_rank=16, latent_dim=16, plain_dim=4, rope_dim=4, value_dim=8
    )
    stack = (LayerGroup(pattern=(dataclasses.replace(block, mixer=mixer),), repeats=2),)
    experiment = dataclasses.replace(
        tiny,
        mesh=MeshConfig(fsdp=2, tensor=2),
        model=dataclasses.replace(tiny.model, precision=Precision.BFLOAT16, stack=stack),
    )
    result = slmjax.train(experiment, console=Console(file=io.StringIO()))
    losses = [
        record["loss"] for record in read_log(Path(result.run_dir) / "log.jsonl") if record["kind"] == "train"
    ]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5, losses
    loaded = slmjax.load_model(result.run_dir)
    assert loaded.config.stack[0].pattern[0].mixer == mixer
    (sample,) = slmjax.generate(loaded, ["The "], config=SamplingConfig(max_tokens=4, temperature=0.0))
    tokens = [*sample.prompt_tokens, *sample.tokens]
    logprobs = jax.nn.log_softmax(jax.jit(slmjax.logits)(loaded.model, jnp.asarray([tokens])))[
        0, len(sample.prompt_tokens) - 1 : -1
    ]
    expected = logprobs[np.arange(len(sample.tokens)), np.asarray(sample.tokens)]
    np.testing.assert_allclose(sample.logprobs, expected, atol=0.03)  # bfloat16, in another order
