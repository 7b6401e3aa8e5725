"""What acts across layers: one feed-forward layer for all of them.

The reference of a shared layer is the same model in which every layer has a copy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from slmjax.formats.presets import PRESETS
from slmjax.models import (
    AttentionConfig,
    BlockConfig,
    ChannelMixConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormPlacement,
    Remat,
    stack_of,
    with_shared_ffn,
    zoo,
)
from slmjax.models.definition import define
from slmjax.models.parameterization import Parameterization
from slmjax.parallel.mesh import MeshConfig
from slmjax.quantization.fake_quantization import define_quantized, quantization_of
from slmjax.quantization.rules import QuantPhase, QuantRule
from slmjax.training.multipliers import multipliers_of
from slmjax.training.state import TrainState
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
        output = define(config).merge(params, {})(
            batch["tokens"], **{k: batch[k] for k in batch if k != "tokens"}
        )
        return jnp.sum(output.hidden * jnp.sin(jnp.arange(output.hidden.size)).reshape(output.hidden.shape))

    return jax.value_and_grad(loss)(params)


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


# Training ---------------------------------------------------------------------------------------------------
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.composes("mesh", "accumulation", "resume")
def test_training_on_a_mesh_equals_one_device_and_resumes_to_the_bit(tmp_path):
    """Two steps of two parts each."""
    config = model(with_shared_ffn([FULL] * 2))
    optim = dataclasses.replace(OPTIM, accumulation_steps=2, ema_decay=None)
    alone = build(config, optim=optim)
    divided = build(config, optim=optim, mesh=MESH, num_devices=8)
    batches = [make_batch(0), make_batch(1)]
    start = alone.start()
    expected, expected_metrics = alone.run(start, *batches)
    whole, metrics = divided.run(start, *batches)
    assert divided.shapes.params["shared/main/ffn/up/weight"].sharding.spec == jax.P("fsdp", "tensor")
    assert metrics["skipped"] == 0 and metrics["grad_norms"]["shared"] > 0
    for name in ("loss", "grad_norm"):
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
