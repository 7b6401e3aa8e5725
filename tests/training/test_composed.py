"""The model of `composed.py`: learned positions and all else together, in documents, in decoding, and to
optimizer and log.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.checkpoints.run_checkpoints import CheckpointConfig, Checkpointer
from slmjax.models.architecture import ModelConfig
from slmjax.models.definition import define
from slmjax.models.parameterization import Parameterization
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from slmjax.training.metrics import gradient_groups, gradient_norms
from slmjax.training.optim import OptimConfig, Optimizer, parameter_groups
from slmjax.training.state import TrainState
from tests.composed import composed_model
from tests.training.test_step import OPTIM, build, make_batch

LENGTH = 16
MESH = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
CONFIG = composed_model(vocab_size=40, vocab_multiple=8)
# Wider and deeper than its base, with larger heads.
SCALED = {
    "parameterization": Parameterization.COMPLETEP,
    "base_width": 16,
    "base_depth": 1,
    "base_head_dim": 4,
}


@functools.cache
def random_model():
    """Every parameter and buffer at random, large enough to matter."""
    definition = define(composed_model(repeats=1, vocab_size=40, vocab_multiple=8))
    draw = np.random.default_rng(0)

    def fill(shapes):
        return {
            path: jnp.asarray(draw.normal(path.endswith("scale"), 0.3, leaf.shape), jnp.float32)
            for path, leaf in shapes.items()
        }

    return definition, fill(definition.params), fill(definition.buffers)


@jax.jit
def compiled(params, buffers, tokens, segment_ids, positions, state):
    output = random_model()[0].merge(params, buffers)(
        tokens, segment_ids=segment_ids, positions=positions, state=state
    )
    return output.hidden, output.state


def forward(*given):
    return compiled(*random_model()[1:], *given)


def document(length, seed):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 40, (1, length)), jnp.int32)


def alone(tokens):
    """A document in a row of its own, padded to the length of all, so that there is one shape to compile."""
    length = tokens.shape[1]
    row = jnp.pad(tokens, ((0, 0), (0, LENGTH - length)))
    places = jnp.arange(LENGTH)[None]
    return forward(row, (places < length).astype(int), jnp.where(places < length, places, 0), None)[0][
        :, :length
    ]


def test_positions_are_counted_in_each_document():
    first = document(8, 0)
    second = document(8, 1)
    tokens = jnp.concatenate([first, second], axis=1)
    packed, _ = forward(tokens, 1 + jnp.arange(LENGTH)[None] // 8, jnp.arange(LENGTH)[None] % 8, None)
    np.testing.assert_allclose(
        packed, np.concatenate([alone(first), alone(second)], axis=1), rtol=1e-4, atol=1e-5
    )


def test_the_row_of_a_position_is_added_to_its_token():
    """The model with a table of zeros, and each token's row of the other table in the table of tokens
    instead.
    """
    _, params, buffers = random_model()
    tokens = jnp.arange(LENGTH)[None]
    moved = dict(params, **{"positions/weight": jnp.zeros_like(params["positions/weight"])})
    rows = params["positions/weight"][:LENGTH] / CONFIG.embed_multiplier  # the positions are not multiplied
    moved["embed/table"] = params["embed/table"].at[:LENGTH].add(rows)
    found, _ = compiled(moved, buffers, tokens, jnp.ones_like(tokens), tokens, None)
    np.testing.assert_allclose(found, alone(tokens), rtol=1e-4, atol=1e-5)


def test_decoding_equals_the_whole_sequence():
    definition, params, buffers = random_model()
    state = definition.merge(params, buffers).init_state(1, max_length=LENGTH)
    tokens = document(LENGTH, 2)
    outputs = []
    start = 0
    for size in (8, *(1,) * 8):
        part = slice(start, start + size)
        hidden, state = forward(
            tokens[:, part], jnp.ones((1, size), int), jnp.arange(start, start + size)[None], state
        )
        outputs.append(hidden)
        start += size
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), alone(tokens), rtol=1e-4, atol=1e-5)


def test_what_is_not_a_matrix_of_a_layer_is_not_for_muon_and_what_is_looked_up_does_not_decay():
    """Biases, scales, sinks and both tables do not decay, as GPT-2 was trained; of experts and routers the
    matrices do.
    """
    groups = parameter_groups(OptimConfig(kind=Optimizer.MUON), define(CONFIG).params)
    names = {path.split("/", 4)[4] if path.startswith("segments/") else path: path for path in groups}
    decaying = {name for name, path in names.items() if groups[path].weight_decay}
    matrices = {f"mixer/{name}/weight" for name in ("query", "key", "value", "output", "output_gate")}
    matrices |= {f"ffn/{name}/weight" for name in ("up", "down")} | {
        f"ffn/experts/{name}" for name in ("gate", "up", "down")
    }
    assert decaying == matrices | {"ffn/router/weight"}
    assert {name for name, path in names.items() if groups[path].optimizer is Optimizer.MUON} == matrices
    assert set(names) > {
        "positions/weight",
        "mixer/sinks",
        "mixer/query_norm/bias",
        "ffn/experts/down_bias",
        "ffn/router/bias",
    }


def test_positions_lie_as_the_table_of_tokens_does():
    places = parameter_shardings(define(CONFIG).params, make_mesh(MESH))
    assert places["positions/weight"].spec == places["embed/table"].spec == jax.P(("tensor", "fsdp"), None)
    assert places["segments/0/blocks/0/ffn/experts/up_bias"].spec == jax.P(None, "expert", "tensor")
    assert places["segments/0/blocks/0/ffn/experts/down_bias"].spec == jax.P(None, "expert", None)


def test_gradient_norms_are_by_layer_and_module():
    grads = {
        "positions/weight": jnp.full((64, 32), 0.5),
        "segments/0/blocks/1/mixer/sinks": jnp.asarray([[3.0] * 4, [1.0] * 4]),
    }
    groups = gradient_groups(CONFIG, grads)
    assert groups.names == (*(f"layers/{i}" for i in range(4)), "embed", "final_norm", "positions")
    norms = dict(zip(groups.names, gradient_norms(grads, groups).tolist(), strict=True))
    assert {name: norm for name, norm in norms.items() if norm} == {
        "layers/1": 6.0,
        "layers/3": 2.0,
        "positions": pytest.approx(512.0**0.5),
    }


@pytest.mark.composes("mesh", "experts", "accumulation", "resume")
def test_training_on_a_mesh_equals_one_device_and_resumes_to_the_bit(tmp_path):
    """Two steps of two parts each, with CompleteP; experts, heads and rows divided."""
    config = composed_model(repeats=1, vocab_size=61, vocab_multiple=8, **SCALED)
    optim = dataclasses.replace(OPTIM, accumulation_steps=2, ema_decay=None)
    alone = build(config, optim=optim)
    divided = build(config, optim=optim, mesh=MESH, num_devices=8)
    batches = [make_batch(0), make_batch(1)]
    start = alone.start()
    expected, expected_metrics = alone.run(start, *batches)
    whole, metrics = divided.run(start, *batches)
    named = ("loss", "grad_norm", "grad_norms", "accuracy", "tokens", "expert_loads")
    assert metrics["skipped"] == 0 and metrics["grad_norms"]["positions"] > 0
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4),
        *({n: m[n] for n in named} for m in (metrics, expected_metrics)),
    )
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


def test_too_few_positions_are_refused():
    with pytest.raises(ValueError, match="learned_positions=63 must be at least context_length=64"):
        ModelConfig(embed_dim=8, stack=CONFIG.stack, context_length=64, learned_positions=63)
