"""Models under rules of quantization: who may not notice it (earlier tokens, other models, the mesh, the loop
over layers).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.data.batch import Batch, empty_batch
from slmjax.formats.presets import preset
from slmjax.formats.spec import Granularity
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import Balance, MoeConfig
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.parameterization import Parameterization
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from slmjax.quantization import weights
from slmjax.quantization.estimators import Calibrated, LearnedClip, LearnedScale, StochasticRounding
from slmjax.quantization.fake_quantization import define_quantized, weight_formats
from slmjax.quantization.quantizer_params import (
    is_activation_quantizer_param,
    is_sign,
    is_weight_quantizer_param,
)
from slmjax.quantization.rules import QuantPhase, QuantRule, quant_of
from slmjax.quantization.schedule import QuantSchedule, quant_schedule_of
from slmjax.training import step
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, Optimizer, make_optimizer
from slmjax.training.state import init_state, state_shapes

Q8 = preset("q8_0")
TENSOR = dataclasses.replace(preset("int8_g32"), granularity=Granularity.PER_TENSOR, group_size=None)
WINDOW = BlockConfig(
    mixer=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=32, window=6, qk_norm=QkNorm.PER_HEAD),
    ffn=MlpConfig(hidden_dim=96),
)
EXPERTS = BlockConfig(
    mixer=LatentAttentionConfig(num_heads=2, latent_dim=64, plain_dim=32, rope_dim=32, value_dim=32),
    ffn=MoeConfig(num_experts=4, hidden_dim=64, shared_hidden_dim=32, balance=Balance.BIAS),
)
PLAIN = ModelConfig(
    embed_dim=64,
    stack=(LayerGroup(pattern=(WINDOW, EXPERTS)),),
    context_length=16,
    vocab_size=61,
    vocab_multiple=8,
)
SMALL = dataclasses.replace(PLAIN, stack=(LayerGroup(pattern=(WINDOW,), repeats=2),))
# Every weight, input and cache; 4 bits with computed and with learned scales, 3 with learned ones, inputs
# with learned and with measured scales.
RULES = (
    QuantRule(paths="cache$", cache=Q8),
    QuantRule(paths="mixer/output", weight=preset("int3_g32"), input=TENSOR, input_estimator=LearnedClip()),
    QuantRule(
        paths="ffn/down",
        weight=preset("q4_0"),
        estimator=LearnedScale(),
        input=TENSOR,
        input_estimator=Calibrated(),
    ),
    QuantRule(paths="layers/1/.*experts", weight=preset("mxfp4"), input=Q8),
    QuantRule(paths=".", weight=preset("q4_0"), input=Q8),
)
PHASES = (QuantPhase(rules=RULES),)
ROWS = 4
LENGTH = 16


@functools.cache
def parameters(phases=PHASES):
    """Parameters of the plain model and of its quantizers; scales of inputs are set by hand."""
    definition = define_quantized(PLAIN, phases)
    params, buffers = jax.jit(definition.init)(jax.random.key(0))
    wide = {path: 3 * leaf if "scale" not in path else leaf for path, leaf in params.items()}
    of_inputs = [path for path in (*params, *buffers) if is_activation_quantizer_param(path)]
    set_by_hand = {path: jnp.full_like({**params, **buffers}[path], -7.0) for path in of_inputs}
    return (
        {path: set_by_hand.get(path, leaf) for path, leaf in wide.items()},
        {path: set_by_hand.get(path, leaf) for path, leaf in buffers.items()},
    )


def hidden_of(phases=PHASES, config=PLAIN):
    definition = define_quantized(config, phases)

    def run(params, buffers, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return definition.merge(params, buffers)(
            tokens, segment_ids=jnp.ones_like(tokens), positions=positions
        ).hidden

    return jax.jit(run)


TOKENS = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 2, 61)


def test_the_last_token_changes_nothing_before_it():
    run = hidden_of()
    (params, buffers) = parameters()
    found = run(params, buffers, TOKENS)
    changed = run(params, buffers, TOKENS.at[:, -1].set(TOKENS[:, -1] % 59 + 2))
    np.testing.assert_array_equal(found[:, :-1], changed[:, :-1])
    assert np.all(np.abs(found[:, -1] - changed[:, -1]).max(-1) > 1e-3)


def test_models_and_formats_in_one_process_do_not_notice_each_other():
    params, buffers = jax.jit(define_quantized(PLAIN, ()).init)(jax.random.key(0))
    runs = {name: hidden_of(quant_of(name).phases if name else ()) for name in ("", "q8_0", "int4_g32")}
    first = {name: run(params, buffers, TOKENS) for name, run in runs.items()}
    errors = {name: float(jnp.abs(first[name] - first[""]).mean()) for name in runs}
    assert errors[""] == 0 and 0 < 5 * errors["q8_0"] < errors["int4_g32"]
    for name, run in reversed(runs.items()):
        np.testing.assert_array_equal(run(params, buffers, TOKENS), first[name])


@pytest.mark.smoke
def test_every_matrix_that_is_multiplied_with_is_one_of_the_format():
    definition = define_quantized(PLAIN, PHASES)
    (params, _) = parameters()
    rounded = jax.jit(definition.transform)(params)
    formats = weight_formats(definition)
    encoded_weights = jax.jit(lambda params: weights.encode_weights(params, formats))(params)
    assert set(encoded_weights) == {
        path
        for path in rounded
        if path.split("/")[-1] in ("table", "weight", "gate", "up", "down") and "router" not in path
    }
    for path, layers in encoded_weights.items():
        for layer, (tensor_quant, encoded) in enumerate(zip(formats[path], layers, strict=True)):
            matrix = rounded[path][layer] if path.startswith("segments/") else rounded[path]
            np.testing.assert_array_equal(
                weights.decode_matrices(encoded, tensor_quant.spec, axis=tensor_quant.axis), matrix
            )
    again = define_quantized(PLAIN, quant_of("q4_0").phases)
    once = jax.jit(again.transform)(
        {path: leaf for path, leaf in params.items() if not is_weight_quantizer_param(path)}
    )
    for path, leaf in jax.jit(again.transform)(once).items():
        np.testing.assert_array_equal(leaf, once[path])


def test_layers_stay_in_one_loop():
    def equations(config, phases):
        definition = define_quantized(config, phases)
        shapes = definition.params, definition.buffers, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
        return str(jax.make_jaxpr(hidden_of(phases, config))(*shapes)).count(" = ")

    deep = [
        dataclasses.replace(PLAIN, stack=(dataclasses.replace(PLAIN.stack[0], repeats=repeats),))
        for repeats in (6, 12)
    ]
    rules = tuple(rule for rule in RULES if "layers/" not in rule.paths)
    short, long = (equations(config, (QuantPhase(rules=rules),)) for config in deep)
    assert abs(long - short) < 20


def test_decoding_from_a_rounded_cache_equals_the_whole_sequence():
    # Inputs of products stay whole here: where sums in another order move one of their codes, many codes
    # after it follow.
    phases = quant_of("q4_0+none+q8_0").phases
    definition = define_quantized(PLAIN, phases)
    (params, buffers) = parameters(phases)

    @jax.jit
    def decoded(params):
        model = definition.merge(params, buffers)

        def one(state, token_and_position):
            token, position = token_and_position
            given = {
                "segment_ids": jnp.ones((ROWS, 1), jnp.int32),
                "positions": jnp.full((ROWS, 1), position),
            }
            output = model(token[:, None], **given, state=state)
            return output.state, output.hidden[:, 0]

        return jax.lax.scan(one, model.init_state(ROWS, max_length=LENGTH), (TOKENS.T, jnp.arange(LENGTH)))[1]

    whole = hidden_of(phases)(params, buffers, TOKENS)
    np.testing.assert_allclose(jnp.swapaxes(decoded(params), 0, 1), whole, atol=2e-5)
    uncached = hidden_of(quant_of("q4_0").phases)(params, buffers, TOKENS)
    assert np.abs(uncached - whole).mean() > 1e-3


# Training ---------------------------------------------------------------------------------------------------
OPTIM = OptimConfig(kind=Optimizer.MUON, lr=1e-3, warmup_steps=2, eps=1e-4, ema_decay=0.5)


def make_batch(seed: int) -> Batch:
    draw = np.random.default_rng(seed)
    batch = empty_batch(8, LENGTH)
    batch.tokens[:], batch.targets[:] = draw.integers(2, 61, (2, 8, LENGTH))
    batch.loss_mask[:] = draw.random((8, LENGTH)) < 0.7
    batch.segment_ids[:] = 1 + (np.arange(LENGTH) > 9)
    batch.positions[:] = np.where(np.arange(LENGTH) > 9, np.arange(LENGTH) - 10, np.arange(LENGTH))
    batch.num_bytes[:] = 3 * batch.loss_mask.sum(1)
    return batch


def trained(
    config, phases, *, optim=OPTIM, mesh=None, easing: QuantSchedule | None = None, num_steps=2, given=None
):
    """The state and the metrics after some batches."""
    mesh = make_mesh(mesh or MeshConfig(), jax.devices()[: 8 if mesh else 1])
    definition = define_quantized(config, phases)
    optimizer = make_optimizer(optim, definition.params, total_steps=10)
    shapes = state_shapes(definition, optimizer, with_ema=True, mesh=mesh)
    train_step = step.make_train_step(
        definition,
        optimizer,
        objective=ObjectiveConfig(),
        optim=optim,
        shapes=shapes,
        total_steps=10,
        quant_schedule=easing,
    )
    with jax.set_mesh(mesh):
        state = init_state(definition, optimizer, shapes=shapes, seed=0)
        if given is not None:
            places = jax.tree.map(lambda leaf: leaf.sharding, (shapes.params, shapes.buffers))
            params, buffers = jax.device_put(jax.tree.map(jnp.copy, given), places)
            state = dataclasses.replace(state, params=params, buffers=buffers)
        start = jax.device_get(state)
        for seed in range(num_steps):
            state, metrics = train_step(state, place_batch(make_batch(seed), mesh))
    return start, jax.device_get(state), jax.device_get(metrics)


@functools.cache
def alone():
    return trained(PLAIN, PHASES, given=parameters())


MESHES = {
    "fsdp-tensor-expert": (MeshConfig(data=1, fsdp=2, tensor=2, expert=2), 2),
    "context": (MeshConfig(data=2, context=2, fsdp=2), 1),
}


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [MESHES["fsdp-tensor-expert"], pytest.param(*MESHES["context"], marks=pytest.mark.nightly)],
    ids=MESHES,
)
@pytest.mark.composes("mesh", "experts", "accumulation", "quantization")
def test_a_mesh_and_accumulation_equal_one_device(mesh, parts):
    _, expected, figures = alone()
    _, found, metrics = trained(
        PLAIN,
        PHASES,
        mesh=mesh,
        optim=dataclasses.replace(OPTIM, accumulation_steps=parts),
        given=parameters(),
    )
    # Sums in another order move codes of 8-bit inputs, and each that moves changes the rest a little: without
    # inputs 1e-5 would do.
    np.testing.assert_allclose(metrics["loss"], figures["loss"], rtol=1e-3)
    np.testing.assert_allclose(
        metrics["grad_norm"], figures["grad_norm"], rtol=0.02
    )  # a code that flips moves it
    for path, leaf in expected.params.items():
        difference = np.abs(found.params[path] - leaf)
        assert np.mean(difference) < 3e-4 and np.quantile(difference, 0.9) < 2e-3, path


def test_sums_of_codes_tell_of_any_change_and_not_of_the_mesh():
    """Experts, learned scales and an 8-bit float format among them; divided over 8 devices they are the same
    numbers.
    """
    definition = define_quantized(PLAIN, PHASES)
    (params, _) = parameters()
    sums = jax.jit(functools.partial(weights.code_sums, formats_of=weight_formats(definition)))
    expected = jax.device_get(sums(params))
    assert set(expected) == set(weight_formats(definition))
    shape = params["segments/0/blocks/1/ffn/experts/down"].shape  # [R, E, F, D]
    assert expected["segments/0/blocks/1/ffn/experts/down"].shape == (*shape[:2], shape[3])
    mesh = make_mesh(MESHES["fsdp-tensor-expert"][0])
    found = sums(jax.device_put(params, parameter_shardings(params, mesh)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
    path = "segments/0/blocks/0/ffn/down/weight"
    changed = jax.device_get(sums(params | {path: params[path].at[0, 5, 7].multiply(-1)}))
    assert {
        name: int(np.sum(changed[name] != one))
        for name, one in expected.items()
        if np.any(changed[name] != one)
    } == {path: 1}


def test_what_is_learned_moves_and_what_is_measured_does_not():
    start, end, _ = alone()
    moved = {path: float(np.abs(end.params[path] - leaf).max()) for path, leaf in start.params.items()}
    assert all((value > 0) is not is_sign(path) for path, value in moved.items()), moved
    assert sum(path.endswith("log_scale") for path in moved) == 2 * 2 + 1 and sum(map(is_sign, moved)) == 1
    signs = next(leaf for path, leaf in end.params.items() if is_sign(path))
    assert 0.3 < np.mean(signs < 0) < 0.7
    measured = [path for path in end.buffers if is_activation_quantizer_param(path)]
    assert measured and all(np.array_equal(end.buffers[path], start.buffers[path]) for path in measured)


@pytest.mark.nightly
def test_learned_scales_move_with_completep():
    config = dataclasses.replace(
        PLAIN, parameterization=Parameterization.COMPLETEP, base_width=32, base_depth=1
    )
    params, buffers = parameters()
    # A learned clip moves by what it clips alone, and scaled down attention returns smaller values.
    low = {path: leaf - 2 if is_activation_quantizer_param(path) else leaf for path, leaf in params.items()}
    start, end, _ = trained(config, PHASES, given=(low, buffers))
    scales = [path for path in start.params if path.endswith("log_scale")]
    assert len(scales) == 5
    assert all(np.any(end.params[path] != start.params[path]) for path in scales)


def test_a_schedule_warms_up_and_freezes_layers_one_after_another():
    settings = dataclasses.replace(quant_of("int2_g32"), warmup_steps=3, damping=0.1, freeze_steps=4)
    schedule = quant_schedule_of(settings, first_step=2, total_steps=10)
    assert [float(schedule.warmup_fraction(jnp.int32(at))) for at in (0, 2, 3, 5, 9)] == [0, 0.25, 0.5, 1, 1]
    definition = define_quantized(SMALL, settings.phases)
    updates = {path: jnp.ones(leaf.shape) for path, leaf in definition.params.items()}
    frozen = {
        at: schedule.freeze_updates(
            updates, jnp.int32(at), config=definition.config, paths=weight_formats(definition)
        )
        for at in (5, 7, 8, 9)
    }
    query = "segments/0/blocks/0/mixer/query/weight"
    assert [frozen[at][query][:, 0, 0].tolist() for at in frozen] == [[1, 1], [0, 1], [0, 0], [0, 0]]
    assert (
        np.all(frozen[9]["embed/table"] == 1)
        and np.all(frozen[9]["final_norm/scale"] == 1)
        and np.all(frozen[9][query + "/log_scale"] == 0)
    )
    assert np.all(frozen[9]["segments/0/blocks/0/ffn_norm/scale"] == 1)


def test_a_small_fraction_of_the_error_is_nearly_none():
    phases = quant_of("int4_g32").phases
    warming = QuantSchedule(first_step=0, warmup_steps=10**6, damping=0.5, freeze_from=None, last_step=10)
    given = jax.jit(define_quantized(SMALL, phases).init)(jax.random.key(0))
    whole, nearly, plain = (
        trained(
            SMALL,
            model_phases,
            easing=easing,
            num_steps=1,
            given=(
                {p: v for p, v in given[0].items() if p in define_quantized(SMALL, model_phases).params},
                given[1],
            ),
        )[2]
        for model_phases, easing in ((phases, None), (phases, warming), ((), None))
    )
    assert abs(nearly["loss"] - plain["loss"]) < 1e-5 < abs(whole["loss"] - plain["loss"])
    definition = define_quantized(SMALL, phases)
    rounded = jax.jit(definition.transform)(given[0])
    damping_loss = weights.damping_loss(given[0], rounded, weight_formats(definition))
    np.testing.assert_allclose(nearly["objective"] - nearly["loss"], 0.5 * float(damping_loss), rtol=0.02)


def test_rounding_by_chance_is_new_in_every_step_and_none_in_evaluation():
    rules = (QuantRule(paths=".", weight=preset("int4_g32"), estimator=StochasticRounding()),)
    definition = define_quantized(PLAIN, (QuantPhase(rules=rules),))
    params, _ = jax.jit(definition.init)(jax.random.key(0))
    draw = jax.jit(lambda key: definition.transform(params, key=key))
    first = draw(jax.random.key(1))
    same = draw(jax.random.key(1))
    other = draw(jax.random.key(2))
    path = "segments/0/blocks/1/ffn/experts/up"
    np.testing.assert_array_equal(first[path], same[path])
    assert np.any(first[path] != other[path]) and np.any(
        first[path][0, 0] - params[path][0, 0] != first[path][1, 1] - params[path][1, 1]
    )
    nearest = define_quantized(PLAIN, quant_of("int4_g32").phases)
    np.testing.assert_array_equal(
        jax.jit(definition.transform)(params)[path], jax.jit(nearest.transform)(params)[path]
    )


def test_learned_inputs_train_on_average():
    rules = (QuantRule(paths=".", weight=Q8, input=TENSOR, input_estimator=LearnedScale()),)
    start, end, metrics = trained(SMALL, (QuantPhase(rules=rules),), num_steps=2)
    learned = [path for path in start.params if is_activation_quantizer_param(path)]
    assert len(learned) == 8 and np.isfinite(metrics["loss"])
    assert all(np.all(end.params[path] != start.params[path]) for path in learned if "experts" not in path)
