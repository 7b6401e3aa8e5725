"""What acts across layers: one feed-forward layer for all of them, loops of the stack with an exit gate,
per-layer embeddings.

The reference of a shared layer is the same model in which every layer has a copy; those of the others are
plain Python loops over blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from slmjax.distill.slices import student_cuts
from slmjax.formats.presets import PRESETS
from slmjax.models import (
    AttentionConfig,
    BlockConfig,
    ChannelMixConfig,
    ExitGateConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    MultiTokenConfig,
    NormPlacement,
    PerLayerEmbeddingConfig,
    Remat,
    StackLoops,
    stack_of,
    with_shared_ffn,
    zoo,
)
from slmjax.models.blocks import LayerInputs
from slmjax.models.definition import define, unstack
from slmjax.models.loops import exit_entropy, exit_log_probs, exit_loops
from slmjax.models.parameterization import Parameterization
from slmjax.parallel.mesh import MeshConfig
from slmjax.quantization.fake_quantization import define_quantized, quantization_of
from slmjax.quantization.plan import assignment_lines
from slmjax.quantization.rules import QuantPhase, QuantRule
from slmjax.training import DataConfig, DistillConfig, Experiment, ObjectiveConfig, TeacherConfig
from slmjax.training.multipliers import multipliers_of
from slmjax.training.objective import CROSS_ENTROPY
from slmjax.training.optim import OptimConfig, Optimizer, parameter_groups
from slmjax.training.state import TrainState
from slmjax.training.step import loss_terms
from tests.training.test_step import OPTIM, build, make_batch

LENGTH = 16
FULL = BlockConfig(
    mixer=AttentionConfig(num_heads=4, num_kv_heads=2), ffn=MlpConfig(hidden_dim=32, bias=True)
)
LOCAL = dataclasses.replace(
    FULL, mixer=AttentionConfig(num_heads=2, window=4), norm=NormPlacement.SANDWICH, num_loops=2
)
# A pattern that repeats, a layer that loops, a layer without a feed-forward layer, and a group of one layer.
PLAIN = [LOCAL, FULL, LOCAL, FULL, dataclasses.replace(FULL, ffn=None), FULL]
SHARED = with_shared_ffn(PLAIN)


def model(blocks: list[BlockConfig], **settings) -> ModelConfig:
    return ModelConfig(
        stack=stack_of(blocks),
        **{
            "embed_dim": 16,
            "vocab_size": 61,
            "vocab_multiple": 8,
            "context_length": 16,
            "remat": Remat.FULL,
            **settings,
        },
    )


def random_arrays(shapes):
    draw = np.random.default_rng(0)
    return {
        path: jnp.asarray(draw.normal(path.endswith("scale"), 0.3, leaf.shape), jnp.float32)
        for path, leaf in shapes.items()
    }


def packed_batch():
    """Four rows of two documents each."""
    places = jnp.broadcast_to(jnp.arange(LENGTH), (4, LENGTH))
    return {
        "tokens": jnp.asarray(np.random.default_rng(1).integers(0, 40, (4, LENGTH)), jnp.int32),
        "segment_ids": 1 + (places >= 5),
        "positions": jnp.where(places < 5, places, places - 5),
    }


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(config, params, batch):
    def loss(params):
        output = define(config).merge(params, {})(**batch)
        return jnp.sum(output.hidden * jnp.sin(jnp.arange(output.hidden.size)).reshape(output.hidden.shape))

    return jax.value_and_grad(loss)(params)


@functools.partial(jax.jit, static_argnums=0)
def full_pass(config, params, batch):
    return define(config).merge(params, {})(**batch).hidden


@functools.partial(jax.jit, static_argnums=0)
def decoded(config, params, tokens):
    """Final hidden states, one token at a time."""
    decoder = define(config).merge(params, {})
    rows, length = tokens.shape

    def step(state, token):
        column, position = token
        output = decoder(
            column[:, None],
            segment_ids=jnp.ones((rows, 1), jnp.int32),
            positions=jnp.full((rows, 1), position),
            state=state,
        )
        return output.state, output.hidden[:, 0]

    state = decoder.init_state(rows, max_length=length)
    _, hidden = jax.lax.scan(step, state, (tokens.T, jnp.arange(length)))
    return jnp.swapaxes(hidden, 0, 1)


# One feed-forward layer for all layers ----------------------------------------------------------------------
def copied(params, config):
    """Parameters of the model whose layers have copies of the shared layer."""
    result = {path: leaf for path, leaf in params.items() if not path.startswith("shared/")}
    for path, leaf in define(config).params.items():
        if path not in result:
            result[path] = jnp.broadcast_to(params[f"shared/main/{path.split('/', 4)[4]}"], leaf.shape)
    return result


def test_a_shared_layer_computes_as_copies_do_and_has_the_sum_of_their_gradients():
    shared = model(SHARED)
    plain = model(PLAIN, remat=Remat.NONE)
    assert [group.repeats for group in shared.stack] == [2, 1]
    params = random_arrays(define(shared).params)
    assert params["shared/main/ffn/up/weight"].shape == (16, 32)
    value, gradient = value_and_gradient(shared, params, packed_batch())
    copies = copied(params, plain)
    expected, by_layer = value_and_gradient(plain, copies, packed_batch())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for path, leaf in gradient.items():
        if path.startswith("shared/"):
            ending = path.removeprefix("shared/main")
            expected = sum(jnp.sum(by_layer[p], axis=0) for p in by_layer if p.endswith(ending))
        else:
            expected = by_layer[path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-3, err_msg=path)


def test_a_shared_layer_is_stored_once_and_multiplied_at_every_use():
    costs, plain = (zoo.describe(model(blocks)) for blocks in (SHARED, PLAIN))
    matrices = 3 * 16 * 32
    biases = 2 * 32 + 16
    assert plain.parameters - costs.parameters == (5 - 1) * (matrices + biases)
    assert costs.active_parameters == costs.parameters
    assert costs.training_flops_per_token == plain.training_flops_per_token
    once = model(with_shared_ffn([dataclasses.replace(FULL, num_loops=1)]))
    more = model(with_shared_ffn([FULL] * 3))
    mixing = zoo.describe(model([dataclasses.replace(FULL, ffn=None)])).training_flops_per_token
    head = 6 * 64 * 16
    assert zoo.describe(once).training_flops_per_token - mixing == 6 * matrices
    assert zoo.describe(more).training_flops_per_token == 3 * (mixing - head + 6 * matrices) + head


def test_a_shared_layer_is_a_matrix_of_layers_for_optimizer_and_formats():
    scaling = model(SHARED, parameterization=Parameterization.MUP, base_width=8).scaling
    of_layer, of_shared = (
        multipliers_of(path, num_dims=2, scaling=scaling)
        for path in ("segments/0/blocks/0/ffn/up/weight", "shared/main/ffn/up/weight")
    )
    assert of_shared == of_layer and of_shared.learning_rate == 0.5
    phases = (QuantPhase(rules=(QuantRule(paths="ffn", weight=PRESETS["q8_0"], input=PRESETS["q8_0"]),)),)
    definition = define_quantized(model(with_shared_ffn([FULL] * 2), embed_dim=32), phases)
    weights = {f"shared/main/ffn/{name}/weight" for name in ("gate", "up", "down")}
    assert set(quantization_of(definition).formats) == weights
    decoder = definition.merge(random_arrays(definition.params), {})
    assert decoder.shared["main"].ffn.down.input_quantizer is not None


def test_layers_that_cannot_share_are_refused():
    wide = dataclasses.replace(FULL, ffn=MlpConfig(hidden_dim=32, shared_as="main"))
    with pytest.raises(ValueError, match=r"(?s)layer 6 shares the feed-forward layer 'main'.*hidden_dim=32"):
        model([*SHARED, wide])
    with pytest.raises(ValueError, match="2 different feed-forward layers"):
        with_shared_ffn([FULL, wide])
    for ffn in (MoeConfig(num_experts=2, hidden_dim=8), ChannelMixConfig(hidden_dim=8)):
        with pytest.raises(ValueError, match=f"MlpConfig, not a {type(ffn).__name__}"):
            with_shared_ffn([dataclasses.replace(FULL, ffn=ffn)] * 2)
    with pytest.raises(ValueError, match="letters, digits and underscores, got 'a/b'"):
        with_shared_ffn([FULL], name="a/b")


# Loops of the stack and their gate --------------------------------------------------------------------------
LOOPS = StackLoops(num_loops=3, exit_gate=ExitGateConfig(threshold=0.6, entropy_weight=0.1))
LOOPED = model([LOCAL, dataclasses.replace(FULL, num_loops=1)], loops=LOOPS)


def plain_blocks(config, params):
    """Every block as a module of its own, in order."""
    blocks = []
    for stack in define(config).merge(params, {}).segments:
        for repeat in range(stack.config.repeats):
            for block in stack.blocks:
                graphdef, state = nnx.split(block)
                blocks.append(nnx.merge(graphdef, jax.tree.map(lambda leaf, i=repeat: leaf[i], state)))
    return blocks


def plain_results(config, params, batch):
    """The results of all loops, and the probabilities of stopping, by their definition."""
    rows = {name: batch[name] for name in ("segment_ids", "positions")}
    inputs = LayerInputs(**rows, max_lengths=None, capture={})
    x = params["embed/table"][batch["tokens"]]
    results = []
    probs = []
    left = 1.0
    for _ in range(config.loops.num_loops):
        for block in plain_blocks(config, params):
            for _ in range(block.config.num_loops):
                x, *_ = block(x, inputs=inputs, state=None, key=None)
        mean = jnp.mean(x**2, axis=-1, keepdims=True)
        x = x / jnp.sqrt(mean + config.norm_eps) * params["final_norm/scale"][None, None]
        results.append(x)
        stops = jax.nn.sigmoid(x @ params["exit_gate/direction"] + params["exit_gate/bias"][0])
        probs.append(left * stops)
        left = left * (1 - stops)
    probs[-1] = left + probs[-1]
    return jnp.stack(results), jnp.stack(probs)


def test_the_loss_of_a_gate_is_the_expected_cross_entropy_without_the_entropy():
    params = random_arrays(define(LOOPED).params)
    params["exit_gate/bias"] = jnp.asarray([-1.0])
    batch = jax.tree.map(jnp.asarray, make_batch(0))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def scanned(params):
        terms, sums = loss_terms(define(LOOPED), CROSS_ENTROPY, params, {}, batch, key=None)
        assert {count for _, count in terms.values()} == {"targets"}
        return sum(value for value, _ in terms.values()), sums

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def plain(params):
        rows = {name: getattr(batch, name) for name in ("tokens", "segment_ids", "positions")}
        results, probs = plain_results(LOOPED, params, rows)
        log_probs = jax.nn.log_softmax(results @ params["embed/table"][:61].T)
        nll = -jnp.take_along_axis(log_probs, batch.targets[None, ..., None], axis=-1)[..., 0]
        expected = jnp.sum(probs * nll, axis=0)
        entropy = -jnp.sum(probs * jnp.log(probs), axis=0)
        loops = jnp.sum(probs * jnp.asarray([1.0, 2.0, 3.0])[:, None, None], axis=0)
        values = {"nll": expected, "exit_entropy": entropy, "expected_loops": loops}
        sums = {name: jnp.sum(batch.loss_mask * value) for name, value in values.items()}
        return sums["nll"] - 0.1 * sums["exit_entropy"], sums

    (loss, sums), grads = scanned(params)
    (expected, expected_sums), expected_grads = plain(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    assert np.abs(grads["exit_gate/direction"]).min() > 1e-3
    for path, leaf in expected_grads.items():
        np.testing.assert_allclose(grads[path], leaf, rtol=1e-3, atol=1e-3, err_msg=path)


def test_a_token_takes_the_loop_at_which_the_threshold_is_reached_in_decoding_too():
    params = random_arrays(define(LOOPED).params)
    params["exit_gate/bias"] = jnp.asarray([-1.0])
    batch = packed_batch()
    whole = {
        **batch,
        "segment_ids": jnp.ones_like(batch["tokens"]),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), (4, LENGTH)),
    }
    hidden = functools.partial(full_pass, LOOPED, params)
    results, probs = jax.jit(functools.partial(plain_results, LOOPED))(params, whole)
    exits = np.argmax(np.cumsum(probs, axis=0) >= 0.6, axis=0)
    assert set(np.unique(exits)) == {0, 1, 2}
    expected = np.take_along_axis(np.asarray(results), exits[None, ..., None], axis=0)[0]
    np.testing.assert_allclose(hidden(whole), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(decoded(LOOPED, params, whole["tokens"]), expected, rtol=1e-4, atol=1e-4)
    # The first document of a packed row does not see the second, nor the second the first.
    alone = {name: jnp.roll(leaf, -5, axis=1) for name, leaf in batch.items()}
    alone["segment_ids"] = jnp.where(jnp.arange(LENGTH) < LENGTH - 5, 1, 0)[None] * whole["segment_ids"]
    packed = hidden(batch)
    np.testing.assert_allclose(packed[:, :5], expected[:, :5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[:, 5:], hidden(alone)[:, : LENGTH - 5], rtol=1e-4, atol=1e-4)


def test_probabilities_of_stopping_stay_finite_and_rounding_does_not_decide():
    logits = jnp.asarray([[0.0, -200.0, 200.0, 0.0], [0.0, -200.0, 3.0, 2.0], [9.0, 9.0, -9.0, -9.0]])
    log_probs = exit_log_probs(logits[:, None])
    np.testing.assert_allclose(np.sum(np.exp(log_probs), axis=0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_probs[:, 0, 0]), [0.5, 0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(exit_entropy(log_probs)[0, 0], 1.5 * np.log(2.0), rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(exit_entropy(exit_log_probs(x))))(logits[:, None])
    assert np.all(np.isfinite(gradient))
    assert exit_loops(log_probs, threshold=1.0)[0].tolist() == [2, 2, 0, 2]
    assert exit_loops(log_probs, threshold=0.75)[0].tolist() == [1, 2, 0, 1]
    assert exit_loops(log_probs, threshold=0.0)[0].tolist() == [0, 0, 0, 0]


def test_loops_cost_flops_and_states_and_no_parameters():
    once = zoo.describe(dataclasses.replace(LOOPED, loops=None))
    without_gate = zoo.describe(dataclasses.replace(LOOPED, loops=StackLoops(num_loops=3)))
    gated = zoo.describe(LOOPED)
    head = 64 * 16
    layers = once.training_flops_per_token - 6 * head
    assert without_gate.parameters == once.parameters == gated.parameters - 17
    assert without_gate.training_flops_per_token == 3 * layers + 6 * head
    # The loss reads the logits of every loop, and inference those of one.
    assert gated.training_flops_per_token == 3 * layers + 6 * 3 * (head + 16)
    assert gated.inference_flops_per_token == layers + 2 * (head + 3 * 16)
    assert gated.cache_bytes_per_token == 3 * once.cache_bytes_per_token
    assert LOOPED.depth == 3 * 3 and LOOPED.num_layers == 2


def test_gates_that_cannot_be_trained_are_refused():
    for settings, message in (
        ({"num_loops": 1}, "loops.num_loops must lie between 2 and 64, got 1"),
        ({"num_loops": 2, "exit_gate": {"threshold": 1.5}}, "threshold is a probability, got 1.5"),
        ({"num_loops": 2, "exit_gate": {"entropy_weight": -1.0}}, "must not be negative, got -1.0"),
    ):
        gate = settings.pop("exit_gate", None)
        with pytest.raises(ValueError, match=message):
            StackLoops(**settings, exit_gate=None if gate is None else ExitGateConfig(**gate))
    with pytest.raises(ValueError, match="multi_token and loops: the modules of multi_token run once"):
        dataclasses.replace(LOOPED, multi_token=MultiTokenConfig())
    distill = ObjectiveConfig(distill=DistillConfig(teachers=(TeacherConfig(path="x"),)))
    with pytest.raises(ValueError, match="distillation trains one result of the model"):
        Experiment(model=LOOPED, data=DataConfig(sequence_length=16), objective=distill)


# Per-layer embeddings ---------------------------------------------------------------------------------------
PER_LAYER = PerLayerEmbeddingConfig(dim=4)
WITH_TABLE = model(
    [LOCAL, dataclasses.replace(LOCAL, num_loops=1), FULL],
    per_layer_embeddings=PER_LAYER,
    embed_multiplier=2.0,
    learned_positions=16,
    residual_multiplier=0.7,
)


def rms_normed(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


@jax.jit
@jax.value_and_grad
def plain_per_layer(params, batch):
    """The loss of `value_and_gradient`, layer by layer, from the blocks of the same model without a table."""
    plain = dataclasses.replace(WITH_TABLE, per_layer_embeddings=None)
    x = 2.0 * params["embed/table"][batch["tokens"]]
    projected = (x @ params["per_layer/projection/weight"] / np.sqrt(16)).reshape(*x.shape[:2], 3, 4)
    rows = 2.0 * params["embed/per_layer"][batch["tokens"]].reshape(projected.shape)
    scale = params["per_layer/norm/scale"][None, None, None]
    layer_inputs = (rms_normed(projected, scale) + rows) / np.sqrt(2.0)
    x = x + params["positions/weight"][batch["positions"]]
    rows = {name: batch[name] for name in ("segment_ids", "positions")}
    inputs = LayerInputs(**rows, max_lengths=None, capture={})
    shapes = define(plain).params
    stacked = unstack(WITH_TABLE, {path: leaf for path, leaf in params.items() if path not in shapes})
    blocks = plain_blocks(plain, {path: params[path] for path in shapes})
    for layer, block in enumerate(blocks):
        prefix = f"layers/{layer}/per_layer"
        for _ in range(block.config.num_loops):
            x, *_ = block(x, inputs=inputs, state=None, key=None)
            hidden = (
                jax.nn.gelu(x @ stacked[f"{prefix}/gate/weight"], approximate=True)
                * layer_inputs[:, :, layer]
            )
            x = x + 0.7 * rms_normed(
                hidden @ stacked[f"{prefix}/output/weight"], stacked[f"{prefix}/norm/scale"][None, None]
            )
    hidden = rms_normed(x, params["final_norm/scale"][None, None])
    return jnp.sum(hidden * jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape))


def test_per_layer_embeddings_by_their_definition():
    params = random_arrays(define(WITH_TABLE).params)
    assert params["embed/per_layer"].shape == (64, 3 * 4)
    found = value_and_gradient(WITH_TABLE, params, packed_batch())
    expected = plain_per_layer(params, packed_batch())
    # A sum of a thousand terms of both signs.
    np.testing.assert_allclose(found[0], expected[0], atol=1e-3)
    for path, leaf in expected[1].items():
        np.testing.assert_allclose(found[1][path], leaf, rtol=2e-3, atol=2e-3, err_msg=path)
    assert np.abs(found[1]["embed/per_layer"]).max() > 0.1


def test_per_layer_embeddings_in_decoding():
    params = random_arrays(define(WITH_TABLE).params)
    tokens = packed_batch()["tokens"]
    places = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    whole = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": places}
    expected = full_pass(WITH_TABLE, params, whole)
    np.testing.assert_allclose(decoded(WITH_TABLE, params, tokens), expected, rtol=1e-4, atol=1e-4)


def test_the_table_of_per_layer_embeddings_is_stored_and_not_computed_with():
    plain = zoo.describe(dataclasses.replace(WITH_TABLE, per_layer_embeddings=None))
    costs = zoo.describe(WITH_TABLE)
    # Rows of padding included, as of the other table.
    table = 64 * 3 * 4
    projection = 16 * 3 * 4
    gates = 3 * 2 * 16 * 4
    norms = 4 + 3 * 16
    assert costs.per_layer_parameters == table and plain.per_layer_parameters == 0
    assert costs.parameters - plain.parameters == table + projection + gates + norms
    assert costs.active_parameters - plain.active_parameters == 3 * 4 + projection + gates + norms
    assert costs.embedding_parameters - plain.embedding_parameters == table
    assert costs.bytes_bf16 - costs.resident_bytes_bf16 == 2 * table
    # The first layer runs twice.
    more = costs.training_flops_per_token - plain.training_flops_per_token
    assert more == 6 * (projection + 4 * 2 * 16 * 4)


def test_the_table_of_per_layer_embeddings_is_a_table_for_optimizer_formats_and_students():
    definition = define(WITH_TABLE)
    groups = parameter_groups(OptimConfig(kind=Optimizer.MUON), definition.params)
    assert groups["embed/per_layer"].weight_decay == 0.0
    assert groups["embed/per_layer"].optimizer is Optimizer.ADAMW
    assert groups["per_layer/projection/weight"].optimizer is Optimizer.MUON
    wide = model([FULL] * 2, embed_dim=32, per_layer_embeddings=PerLayerEmbeddingConfig(dim=32))
    rules = (QuantRule(paths="per_layer", weight=PRESETS["q8_0"]),)
    lines = {line.path: line for line in assignment_lines(wide, (QuantPhase(rules=rules),))}
    assert lines["embed/per_layer"].format == "q8_0" and lines["embed/per_layer"].bytes == 64 * 64 * 34 // 32
    narrow = dataclasses.replace(wide, stack=stack_of([FULL]), per_layer_embeddings=PER_LAYER)
    cuts = student_cuts(define(wide), define(narrow), chosen=[1])
    for name in ("embed/per_layer", "per_layer/projection/weight"):
        np.testing.assert_array_equal(cuts[name].indices[1], [32, 33, 34, 35])
    with pytest.raises(ValueError, match="mup has no rules for per_layer_embeddings"):
        dataclasses.replace(WITH_TABLE, parameterization=Parameterization.MUP, base_width=8)


@pytest.mark.nightly
def test_inputs_of_layers_equal_those_of_gemma3n():
    import torch
    from transformers import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextModel

    theirs = Gemma3nTextModel(
        Gemma3nTextConfig(
            vocab_size=64,
            vocab_size_per_layer_input=64,
            hidden_size=16,
            hidden_size_per_layer_input=4,
            num_hidden_layers=3,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_kv_shared_layers=0,
            laurel_rank=2,
            activation_sparsity_pattern=[0.0] * 3,
            layer_types=["full_attention"] * 3,
            pad_token_id=0,
        )
    )
    params = random_arrays(define(WITH_TABLE).params)
    tokens = packed_batch()["tokens"]
    names = {
        "embed_tokens.weight": params["embed/table"],
        "embed_tokens_per_layer.weight": params["embed/per_layer"],
        "per_layer_model_projection.weight": params["per_layer/projection/weight"].T,
        "per_layer_projection_norm.weight": params["per_layer/norm/scale"],
    }
    theirs.load_state_dict({name: torch.tensor(np.array(x)) for name, x in names.items()}, strict=False)
    with torch.no_grad():
        ids = torch.tensor(np.array(tokens), dtype=torch.long)
        embedded = theirs.embed_tokens(ids)
        expected = theirs.project_per_layer_inputs(embedded, theirs.get_per_layer_inputs(ids)).numpy()
    decoder = define(WITH_TABLE).merge(params, {})
    rows = params["embed/per_layer"][tokens]
    np.testing.assert_allclose(
        decoder.per_layer(jnp.asarray(embedded.numpy()), rows), expected, rtol=1e-4, atol=1e-5
    )


# Training ---------------------------------------------------------------------------------------------------
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


# Each alone would compile as much again: the others are trained together.
EVERYTHING = model(with_shared_ffn([FULL]), loops=LOOPS, per_layer_embeddings=PER_LAYER, remat=Remat.NONE)


@pytest.mark.parametrize(
    "config",
    [
        model(with_shared_ffn([FULL] * 2), remat=Remat.NONE),
        pytest.param(EVERYTHING, marks=pytest.mark.nightly),
    ],
    ids=["shared", "everything"],
)
@pytest.mark.composes("mesh", "accumulation", "resume")
def test_training_on_a_mesh_equals_one_device_and_resumes_to_the_bit(tmp_path, config):
    """Two steps, on the mesh in two parts each."""
    optim = dataclasses.replace(OPTIM, accumulation_steps=2, ema_decay=None)
    alone = build(config, optim=dataclasses.replace(optim, accumulation_steps=1))
    divided = build(config, optim=optim, mesh=MESH, num_devices=8)
    batches = [make_batch(0), make_batch(1)]
    start = alone.start()
    expected, expected_metrics = alone.run(start, *batches)
    whole, metrics = divided.run(start, *batches)
    assert divided.shapes.params["shared/main/ffn/up/weight"].sharding.spec == jax.P("fsdp", "tensor")
    groups = {"shared", "exit_gate", "per_layer"} & metrics["grad_norms"].keys()
    assert metrics["skipped"] == 0 and all(metrics["grad_norms"][name] > 0 for name in groups)
    for name in {"loss", "grad_norm", "exit_entropy", "expected_loops"} & expected_metrics.keys():
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4)
    # The updates of two steps of this rate are of its size.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-2 * optim.lr),
        whole.items(),
        expected.items(),
    )
    halfway, _ = divided.run(start, batches[0])
    checkpointer = Checkpointer(tmp_path / "checkpoints", model=config, config=CheckpointConfig())
    checkpointer.save(1, halfway.items())
    _, items = checkpointer.restore(divided.shapes.items())
    checkpointer.close()
    resumed, _ = divided.run(TrainState.from_items(items), batches[1])
    jax.tree.map(np.testing.assert_array_equal, resumed.items(), whole.items())
