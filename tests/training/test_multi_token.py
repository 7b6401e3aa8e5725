"""Multi-token prediction in training: targets stop at documents, the loss is a mean over each module's own
targets, and batches may be cut, sharded and recomputed as without it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import losses
from slmjax.data.batch import Batch, empty_batch
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig, MultiTokenConfig, Remat
from slmjax.models.canonical_form import canonical
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.linear_attention import LinearAttentionConfig
from slmjax.models.parameterization import Parameterization
from slmjax.models.zoo import describe
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.planning import flops
from slmjax.training import step
from slmjax.training.metrics import named_metrics
from slmjax.training.multi_token import further_counts, further_targets
from slmjax.training.objective import ObjectiveConfig
from slmjax.training.optim import OptimConfig, make_optimizer
from slmjax.training.state import init_state, state_shapes

VOCAB = 33
LENGTH = 12
ROWS = 8
WEIGHT = 0.5
BLOCK = BlockConfig(mixer=AttentionConfig(num_heads=4, num_kv_heads=2), ffn=MlpConfig(hidden_dim=16))
CONFIG = ModelConfig(
    embed_dim=16,
    context_length=LENGTH,
    vocab_size=VOCAB,
    vocab_multiple=8,
    stack=(LayerGroup(pattern=(BLOCK,)),),
    embed_multiplier=3.0,
    multi_token=MultiTokenConfig(num_tokens=2, weight=WEIGHT),
)


def batch_of(documents: list[list[list[int]]], *, length: int = LENGTH, unscored: int = 1) -> Batch:
    """Rows of documents; the first `unscored` targets of each are not scored."""
    batch = empty_batch(len(documents), length)
    for row, of_row in enumerate(documents):
        start = 0
        for number, document in enumerate(of_row, 1):
            part = slice(start, start + len(document) - 1)
            batch.tokens[row, part] = document[:-1]
            batch.targets[row, part] = document[1:]
            batch.segment_ids[row, part] = number
            batch.positions[row, part] = np.arange(len(document) - 1)
            batch.loss_mask[row, start + unscored : part.stop] = 1
            start = part.stop
    return batch


@functools.cache
def documents() -> list[list[list[int]]]:
    """Two documents in each row but the second, which is empty; some are too short for the last module."""
    draw = np.random.default_rng(0)
    sizes = [[7, 4], [], [3, 6], [9, 2], [5, 5], [8, 3], [2, 7], [6, 6]]
    return [[draw.integers(1, VOCAB, size).tolist() for size in of_row] for of_row in sizes]


# Targets ----------------------------------------------------------------------------------------------------
def test_the_shift_stops_at_documents_and_keeps_the_mask() -> None:
    batch = on_device(batch_of([[[1, 2, 3, 4, 5], [6, 7, 8]]], length=8))
    # Inputs 1 2 3 4 | 6 7 | padding; scored are the targets 3 4 5 and 8.
    targets, weights = further_targets(batch, 1)
    assert weights.tolist() == [[1, 1, 1, 0, 1, 0, 0, 0]]
    assert targets[0, :3].tolist() == [3, 4, 5] and targets[0, 4] == 8
    targets, weights = further_targets(batch, 2)
    assert weights.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    assert targets[0, :2].tolist() == [4, 5]
    assert not further_targets(batch, 9)[1].any()
    assert {name: float(count) for name, count in further_counts(batch, CONFIG).items()} == {
        "multi_token_targets_1": 4.0,
        "multi_token_targets_2": 2.0,
    }


# The loss ---------------------------------------------------------------------------------------------------
@functools.cache
def params() -> dict[str, jax.Array]:
    draw = np.random.default_rng(1)
    return {
        path: jnp.asarray(draw.normal(size=leaf.shape) * 0.3 + path.endswith("scale"), jnp.float32)
        for path, leaf in define(CONFIG).params.items()
    }


@functools.cache
def whole_loss(config: ModelConfig = CONFIG) -> tuple[dict, dict, dict]:
    """The terms of the loss of the packed rows, their counts' names, and the sums for metrics."""
    names = {}

    @jax.jit
    def compute(params: dict[str, jax.Array], batch: Batch) -> tuple[dict, dict]:
        terms, sums = step.loss_terms(define(config), ObjectiveConfig(), params, {}, batch, key=None)
        names.update({name: count for name, (_, count) in terms.items()})
        return {name: value for name, (value, _) in terms.items()}, sums

    own = {path: params()[path] for path in define(config).params}
    return *compute(own, on_device(batch_of(documents()))), names


def on_device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


def test_packed_rows_have_the_losses_of_their_documents() -> None:
    """Each document alone in a row, with dense logits and nothing but the definition of module k.

    The order of documents in a row, and what stands behind one, therefore changes nothing.
    """
    packed, sums, counts = whole_loss()
    alone = [document for row in documents() for document in row]
    batch = on_device(batch_of([[document] for document in alone]))

    @jax.jit
    def log_probs(params: dict[str, jax.Array], next_tokens: list[jax.Array]) -> list[jax.Array]:
        model = define(CONFIG).merge(params, {})
        around = {"segment_ids": batch.segment_ids, "positions": batch.positions}
        output = model(batch.tokens, **around)
        hidden = output.hidden
        found = []
        for index, tokens in enumerate(next_tokens):
            hidden, _, _ = model.further(index, hidden, tokens, **around)
            found.append(jax.nn.log_softmax(losses.logits(hidden, output.head)))
        return found

    # Token t + module is the input of module, and token t + 1 + module its target: 0 where there is none.
    padded = np.array([document + [0] * (LENGTH + 3 - len(document)) for document in alone])
    by_module = log_probs(params(), [jnp.asarray(padded[:, k : k + LENGTH]) for k in (1, 2)])
    for module, values in enumerate(by_module, 1):
        # The first target of a document, its token 1, is not scored by any module.
        nll = -sum(
            values[row, t, document[t + 1 + module]]
            for row, document in enumerate(alone)
            for t in range(len(document) - 1 - module)
        )
        np.testing.assert_allclose(sums[f"multi_token_nll_{module}"], nll, rtol=2e-5)
        np.testing.assert_allclose(packed[f"multi_token_{module}"], nll * WEIGHT / 2, rtol=2e-5)
        assert counts[f"multi_token_{module}"] == f"multi_token_targets_{module}"
    # The next token is predicted without the modules.
    _, sums_without, _ = whole_loss(dataclasses.replace(CONFIG, multi_token=None))
    np.testing.assert_allclose(sums["nll"], sums_without["nll"], rtol=1e-6)


def test_no_array_of_all_logits() -> None:
    """The modules' logits exist a chunk at a time, as those of the main loss."""

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        batch = on_device(batch_of(documents()))
        terms, _ = step.loss_terms(define(CONFIG), ObjectiveConfig(chunk_size=4), params, {}, batch, key=None)
        return sum((value for value, _ in terms.values()), jnp.zeros(()))

    program = str(jax.make_jaxpr(jax.grad(loss))(params()))
    rows = CONFIG.table_rows
    found = [
        text for text in (f"[4,{rows}]", f"{LENGTH},{rows}]", f"{ROWS * LENGTH},{rows}]") if text in program
    ]
    assert found == [f"[4,{rows}]"]


# The step ---------------------------------------------------------------------------------------------------
OPTIM = OptimConfig(lr=2e-2, warmup_steps=2, eps=1e-4)


@functools.cache
def trained(
    *,
    num_parts: int = 1,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008  # it is frozen
    num_devices: int = 1,
    remat: Remat = Remat.NONE,
) -> tuple[dict, dict]:
    """Parameters and metrics after two steps from the same parameters."""
    devices = make_mesh(mesh, jax.devices()[:num_devices])
    definition = define(dataclasses.replace(CONFIG, remat=remat))
    optim = dataclasses.replace(OPTIM, accumulation_steps=num_parts)
    optimizer = make_optimizer(optim, definition.params, total_steps=10)
    shapes = state_shapes(definition, optimizer, with_ema=False, mesh=devices)
    settings = step.step_settings(
        definition, optimizer, objective=ObjectiveConfig(z_loss=0.01), optim=optim, total_steps=10
    )
    train_step = step.compiled_step(settings, shapes)
    with jax.set_mesh(devices):
        state = init_state(definition, optimizer, shapes=shapes, seed=0)
        places = jax.tree.map(lambda leaf: leaf.sharding, shapes.params)
        # A copy, because the step gives its input away.
        own = jax.device_put(jax.tree.map(jnp.copy, params()), places)
        state = dataclasses.replace(state, params=own)
        metrics: dict = {}
        for _ in range(2):
            state, metrics = train_step(state, place_batch(batch_of(documents()), devices))
    return state.params, named_metrics(definition.config, jax.device_get(metrics))


def assert_same(found: tuple[dict, dict]) -> None:
    expected_params, expected = trained()
    for name in ("loss", "objective", "multi_token_loss_1", "multi_token_loss_2", "grad_norm"):
        np.testing.assert_allclose(found[1][name], expected[name], rtol=1e-4, err_msg=name)
    for path, value in expected_params.items():
        np.testing.assert_allclose(found[0][path], value, rtol=2e-4, atol=5e-6, err_msg=path)


def test_metrics_and_gradients() -> None:
    found, metrics = trained()
    assert math.hypot(*metrics["grad_norms"].values()) == pytest.approx(metrics["grad_norm"], rel=1e-5)
    assert metrics["grad_norms"]["multi_token"] > 0
    z = metrics["objective"] - metrics["loss"]
    further = WEIGHT * np.mean([metrics["multi_token_loss_1"], metrics["multi_token_loss_2"]])
    assert z > further > 0.1
    assert 0 <= metrics["multi_token_accuracy_2"] <= 1
    for path, value in found.items():
        assert not np.array_equal(value, params()[path]), path


@pytest.mark.nightly
def test_accumulation_changes_nothing() -> None:
    assert_same(trained(num_parts=4))


@pytest.mark.nightly
def test_a_mesh_accumulation_and_recomputation_change_nothing() -> None:
    found = trained(num_parts=2, remat=Remat.FULL, mesh=MeshConfig(data=2, fsdp=2, tensor=2), num_devices=8)
    assert_same(found)
    assert found[0]["multi_token/1/block/ffn/up/weight"].addressable_shards[0].data.size == 16 * 16 // 4


@pytest.mark.nightly
def test_a_context_axis_changes_nothing() -> None:
    """Targets move from one part of a row to another."""
    assert_same(trained(mesh=MeshConfig(data=1, context=2), num_devices=2))


# Config -----------------------------------------------------------------------------------------------------
def test_costs_are_those_of_the_program() -> None:
    """The FLOPs of a forward pass, with products of the head, and the parameters of the modules."""
    plain = dataclasses.replace(CONFIG, multi_token=None)
    more = describe(CONFIG)
    fewer = describe(plain)
    of_module = 32 * 16 + 16 * (16 + 16 + 8 + 8) + 3 * 16 * 16 + 5 * 16
    assert more.parameters - fewer.parameters == 2 * of_module
    assert more.active_parameters == fewer.active_parameters == fewer.parameters
    batch = on_device(batch_of([[[1] * (LENGTH + 1)]]))

    def objective(params: dict[str, jax.Array], config: ModelConfig) -> jax.Array:
        terms, _ = step.loss_terms(define(config), ObjectiveConfig(), params, {}, batch, key=None)
        return sum((value for value, _ in terms.values()), jnp.zeros(()))

    counted = [
        flops.count(functools.partial(objective, config=config), define(config).params) / LENGTH
        for config in (CONFIG, plain)
    ]
    # Attention over whole rows multiplies masked scores too, which the averages of `describe` leave out.
    masked = 2 * 2 * 16 * (LENGTH - 1) / 2 * 2
    difference = (more.training_flops_per_token - fewer.training_flops_per_token) / 3
    assert counted[0] - counted[1] == pytest.approx(difference + masked, rel=0.02)


def test_it_is_no_part_of_the_model_that_is_exported() -> None:
    assert canonical(CONFIG) == canonical(dataclasses.replace(CONFIG, multi_token=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multi_token": {"num_tokens": 0}}, "between 1 and 8, got 0"),
        ({"multi_token": {"weight": 0.0}}, "above 0, got 0.0"),
        (
            {"parameterization": Parameterization.MUP, "base_width": 8, "multi_token": {}},
            "no rule for multi_token",
        ),
        (
            {
                "multi_token": {},
                "stack": (
                    LayerGroup(
                        pattern=(dataclasses.replace(BLOCK, ffn=MoeConfig(num_experts=4, hidden_dim=8)),)
                    ),
                ),
            },
            "set multi_token.block",
        ),
    ],
)
def test_what_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings = MultiTokenConfig(**change.pop("multi_token"))
        dataclasses.replace(CONFIG, multi_token=settings, **change)


def test_the_layer_of_the_modules_is_the_last_one_unless_another_is_given() -> None:
    looped = dataclasses.replace(
        CONFIG, stack=(LayerGroup(pattern=(dataclasses.replace(BLOCK, num_loops=2),)),)
    )
    assert looped.multi_token_block == BLOCK
    other = BlockConfig(mixer=LinearAttentionConfig(num_heads=2), ffn=None)
    given = dataclasses.replace(CONFIG, multi_token=MultiTokenConfig(block=other))
    assert given.multi_token_block == other
    assert "multi_token/0/block/ffn/up/weight" not in define(given).params
