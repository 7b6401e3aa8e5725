"""The decoder as a whole, in one configuration that holds every odd corner: what may influence what, and that
execution (scan, rematerialisation, precision, packing, decoding state) changes nothing.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slmjax import losses
from slmjax.models.architecture import (
    BlockConfig,
    HeadKind,
    LayerGroup,
    ModelConfig,
    NormPlacement,
    Precision,
    Remat,
)
from slmjax.models.blocks import Block, LayerInputs
from slmjax.models.decoder import logits
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.mixers.attention import AttentionConfig, Biases, QkNorm

WINDOW = BlockConfig(
    mixer=AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        window=4,
        rotary_dim=4,
        qk_norm=QkNorm.PER_HEAD,
        biases=Biases.QKV,
    ),
    ffn=MlpConfig(hidden_dim=24),
    norm=NormPlacement.SANDWICH,
)
FULL = BlockConfig(
    mixer=AttentionConfig(num_heads=2, num_kv_heads=1, rope_base=None, softcap=4.0, biases=Biases.ALL),
    ffn=MlpConfig(hidden_dim=12, activation=Activation.GELU, bias=True),
    norm=NormPlacement.POST,
)
TWICE = BlockConfig(
    mixer=AttentionConfig(num_heads=2, rope_base=100.0, scale=0.2),
    ffn=MlpConfig(hidden_dim=20, activation=Activation.RELU2, gated=False),
    num_loops=2,
)
MIXER_ALONE = BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=4, window=3), ffn=None)
ODD = ModelConfig(
    embed_dim=16,
    stack=(LayerGroup(pattern=(WINDOW, FULL), repeats=2), LayerGroup(pattern=(TWICE, MIXER_ALONE))),
    context_length=20,
    vocab_size=29,
    vocab_multiple=8,
    head=HeadKind.UNTIED,
    embed_multiplier=2.0,
    residual_multiplier=0.7,
    logit_multiplier=0.5,
    logit_softcap=5.0,
    dropout=0.1,
)
ROWS = 4
LENGTH = 20


@functools.cache
def random_params(config=ODD):
    """Every parameter at random: biases that are not zero and scales that are not one, all large enough to
    matter.
    """
    draw = np.random.default_rng(0)
    shapes = define(config).params
    means = {path: 1.0 if path.endswith("scale") else 0.0 for path in shapes}
    return {
        path: jnp.asarray(draw.normal(means[path], 0.3, leaf.shape), jnp.float32)
        for path, leaf in shapes.items()
    }


def pack(*rows, padding_token=0):
    """Rows of documents, given as arrays of tokens, padded to the full length: tokens, segment ids,
    positions.
    """
    tokens = np.full((ROWS, LENGTH), padding_token, np.int32)
    segment_ids, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for index, document in enumerate(documents):
            part = slice(start, start + len(document))
            tokens[row, part] = document
            segment_ids[row, part] = index + 1
            positions[row, part] = range(len(document))
            start += len(document)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}


def documents(*lengths):
    draw = np.random.default_rng(1)
    return [draw.integers(1, ODD.vocab_size, length).astype(np.int32) for length in lengths]


def run(config, params, batch, **options):
    batch = dict(batch)
    return define(config).merge(params, {})(batch.pop("tokens"), **batch, **options)


CAPTURE = {
    "block_output": lambda x: x,
    "mixer_output": lambda x: x,
    "ffn_output": lambda x: jnp.mean(x, axis=(0, 1)),
}


@jax.jit
def forward(params, batch):
    return run(ODD, params, batch, capture=CAPTURE)


def hidden_states(params, batch):
    return forward(params, batch).hidden


@functools.cache
def loss_and_gradient_fn(config):
    """Compiled once per configuration, for batches from `pack`: next-token loss where there is a next
    token.
    """

    def loss(params, batch):
        output = run(config, params, batch)
        scored = (batch["segment_ids"] > 0) & (
            batch["segment_ids"] == jnp.roll(batch["segment_ids"], -1, axis=1)
        )
        targets = jnp.roll(batch["tokens"], -1, axis=1)
        return losses.cross_entropy(output.hidden, output.head, targets, scored.astype(jnp.float32))[0]

    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def expected_loss_and_gradient():
    return loss_and_gradient_fn(ODD)(random_params(), pack([*documents(7, 9)], [], [*documents(20)]))


# What may influence what ------------------------------------------------------------------------------------
def test_no_token_is_influenced_by_a_later_one():
    (document,) = documents(LENGTH)
    changed = [document.copy() for _ in range(3)]
    for row, t in enumerate((1, 10, 19)):
        changed[row][t] = (changed[row][t] + 5) % ODD.vocab_size
    hidden = np.asarray(hidden_states(random_params(), pack(*([d] for d in (*changed, document)))))
    for row, t in enumerate((1, 10, 19)):
        np.testing.assert_allclose(hidden[row, :t], hidden[3, :t], atol=1e-6)
        assert (
            np.abs(hidden[row, t:] - hidden[3, t:]).max(-1).min() > 1e-5
        )  # full attention: all later ones are


def test_packed_documents_equal_the_same_documents_alone():
    first, second, third, fourth = documents(7, 9, 5, 15)
    packed = np.asarray(hidden_states(random_params(), pack([first, second], [third, fourth])))
    alone = np.asarray(hidden_states(random_params(), pack([first], [second], [third], [fourth])))
    for row, part, index in (
        (0, slice(0, 7), 0),
        (0, slice(7, 16), 1),
        (1, slice(0, 5), 2),
        (1, slice(5, 20), 3),
    ):
        np.testing.assert_allclose(
            packed[row, part], alone[index, : part.stop - part.start], rtol=1e-5, atol=1e-5
        )


def test_padding_is_finite_and_leaves_no_trace():
    value, gradient = expected_loss_and_gradient()
    assert np.isfinite(value)
    for path, leaf in gradient.items():
        assert np.all(np.isfinite(leaf)), path
    # The same with another token where nothing is: token 28 occurs nowhere else.
    rows = [[np.minimum(d, 27) for d in row] for row in ([*documents(7, 9)], [], [*documents(20)])]
    plain, other = (
        loss_and_gradient_fn(ODD)(random_params(), pack(*rows, padding_token=token))
        for token in (0, ODD.vocab_size - 1)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), plain, other)
    assert np.all(np.asarray(other[1]["embed/table"])[ODD.vocab_size - 1 :] == 0)
    assert np.all(np.asarray(other[1]["head/weight"])[ODD.vocab_size :] == 0)  # rows that are no token


def test_window_layers_reach_as_far_as_their_windows_together():
    # Two layers of window 4: a token sees itself and 2 * 3 tokens before it.
    block = dataclasses.replace(WINDOW, ffn=None)
    config = ModelConfig(embed_dim=16, stack=(LayerGroup(pattern=(block,), repeats=2),), vocab_size=29)
    (document,) = documents(LENGTH)
    changed = document.copy()
    changed[5] = (changed[5] + 3) % 29
    hidden = np.asarray(
        jax.jit(functools.partial(run, config))(random_params(config), pack([document], [changed])).hidden
    )
    differs = np.abs(hidden[0] - hidden[1]).max(-1) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(differs), range(5, 5 + 7))


# Execution changes nothing ----------------------------------------------------------------------------------
def test_scan_equals_a_plain_loop_over_layers():
    batch = pack([*documents(7, 9)], [*documents(20)])
    params = random_params()

    def block_of(index, offset, repeat):
        config = ODD.stack[index].pattern[offset]
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Block(config, ODD, rngs=nnx.Rngs(params=0))))
        prefix = f"segments/{index}/blocks/{offset}/"
        flat = {
            tuple(p.removeprefix(prefix).split("/")): leaf[repeat]
            for p, leaf in params.items()
            if p.startswith(prefix)
        }
        return nnx.merge(graphdef, nnx.from_flat_state(flat)), config.num_loops

    @jax.jit
    def plain():
        rows = {
            "segment_ids": jnp.asarray(batch["segment_ids"]),
            "positions": jnp.asarray(batch["positions"]),
        }
        inputs = LayerInputs(**rows, max_lengths=None, capture={})
        x = 2.0 * params["embed/table"][batch["tokens"]]
        for place in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0), (1, 1, 0)):
            block, num_loops = block_of(*place)
            for _ in range(num_loops):
                x, *_ = block(x, inputs=inputs, state=None, key=None)
        return (
            x
            / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
            * params["final_norm/scale"][None, None, :]
        )

    np.testing.assert_allclose(plain(), hidden_states(params, batch), rtol=1e-4, atol=1e-5)


SMALL = ModelConfig(
    embed_dim=16,
    stack=(LayerGroup(pattern=(dataclasses.replace(FULL, num_loops=2),), repeats=2),),
    vocab_size=29,
)


def test_rematerialisation_changes_neither_value_nor_gradient():
    batch = pack([*documents(7, 9)], [], [*documents(20)])
    none, *others = (
        loss_and_gradient_fn(dataclasses.replace(SMALL, remat=r))(random_params(SMALL), batch) for r in Remat
    )
    for other in others:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), other, none)


def test_rematerialisation_recomputes_what_it_says():
    def num_products(remat):
        loss = loss_and_gradient_fn(dataclasses.replace(SMALL, remat=remat))
        return str(jax.make_jaxpr(loss)(random_params(SMALL), pack())).count("dot_general")

    none, dots, full = (num_products(remat) for remat in Remat)
    # Per pass, DOTS computes scores (and what follows from them) again; FULL also the products with weights.
    assert none < dots < full


def test_bfloat16_is_close_with_float32_parameters_and_gradients():
    config = dataclasses.replace(SMALL, precision=Precision.BFLOAT16)
    assert all(leaf.dtype == jnp.float32 for leaf in define(config).params.values())
    batch = pack([*documents(7, 9)], [], [*documents(20)])
    output = jax.eval_shape(functools.partial(run, config), random_params(config), batch)
    assert output.hidden.dtype == output.head.weight.dtype == jnp.bfloat16
    value, gradient = loss_and_gradient_fn(config)(random_params(config), batch)
    expected_value, expected = loss_and_gradient_fn(SMALL)(random_params(config), batch)
    np.testing.assert_allclose(value, expected_value, rtol=0.02)
    assert all(leaf.dtype == jnp.float32 for leaf in gradient.values())
    flat, expected = (
        np.concatenate([np.ravel(leaf) for leaf in tree.values()]) for tree in (gradient, expected)
    )
    # bfloat16 has 8 bits, and the rounding of 4 layers, forward and back, adds up.
    assert np.linalg.norm(flat - expected) < 0.05 * np.linalg.norm(expected)


def test_decoding_with_a_state_equals_the_whole_sequence():
    (document,) = documents(LENGTH)
    batch = pack(*[[document]] * ROWS)
    params = random_params()
    step = jax.jit(functools.partial(run, ODD))
    state = define(ODD).merge(params, {}).init_state(ROWS, max_length=LENGTH)
    outputs = []
    start = 0
    for size in (5, 5, 5, 5):
        output = step(
            params, jax.tree.map(lambda x, part=slice(start, start + size): x[:, part], batch), state=state
        )
        state = output.state
        start = start + size
        outputs.append(output.hidden)
    np.testing.assert_allclose(
        np.concatenate(outputs, axis=1), hidden_states(params, batch), rtol=1e-4, atol=1e-5
    )


# Output -----------------------------------------------------------------------------------------------------
def test_capture_returns_activations_by_layer_reduced_on_the_way():
    batch = pack([*documents(7, 9)], [*documents(20)])
    output = forward(random_params(), batch)
    captured = jax.tree.map(np.asarray, output.captured)
    assert {name for name in captured if name.endswith("block_output")} == {
        f"layers/{i}/block_output" for i in range(6)
    }
    assert {name for name in captured if name.endswith("ffn_output")} == {
        f"layers/{i}/ffn_output" for i in range(5)
    }
    assert captured["layers/3/ffn_output"].shape == (16,)
    # The last block is a mixer alone; after it comes the final norm.
    before = captured["layers/4/block_output"]
    last = captured["layers/5/block_output"]
    mixed = captured["layers/5/mixer_output"]
    np.testing.assert_allclose(last - before, 0.7 * mixed, rtol=1e-3, atol=1e-4)
    scale = np.asarray(random_params()["final_norm/scale"])
    np.testing.assert_allclose(
        output.hidden,
        last / np.sqrt(np.mean(last**2, axis=-1, keepdims=True) + 1e-6) * scale,
        rtol=1e-4,
        atol=1e-5,
    )
    assert not run_shapes(batch).captured


def run_shapes(batch, **options):
    return jax.eval_shape(functools.partial(run, ODD, **options), random_params(), batch)


def test_unknown_activation_names_those_there_are():
    with pytest.raises(ValueError, match="capture takes mixer_output, ffn_output, block_output"):
        run_shapes(pack(), capture={"attention": lambda x: x})


def test_logits_are_those_of_the_real_vocabulary():
    config = dataclasses.replace(ODD, stack=(LayerGroup(pattern=(MIXER_ALONE,)),))
    decoder = define(config).merge(random_params(config), {})
    batch = jax.tree.map(jnp.asarray, pack(*([document] for document in documents(20, 20, 20, 20))))

    @jax.jit
    def both(tokens):
        return logits(decoder, tokens), run(config, random_params(config), {**batch, "tokens": tokens}).hidden

    x, hidden = (np.asarray(value) for value in both(batch["tokens"]))
    assert x.shape == (ROWS, LENGTH, 29) and x.dtype == np.float32
    raw = 0.5 * hidden @ np.asarray(random_params(config)["head/weight"])[:29].T
    np.testing.assert_allclose(x, 5.0 * np.tanh(raw / 5.0), rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_embedding_table():
    config = dataclasses.replace(ODD, head=HeadKind.TIED)
    definition = define(config)
    assert "head/weight" not in definition.params
    head = definition.merge(random_params(config), {}).make_head()
    np.testing.assert_array_equal(head.weight, random_params(config)["embed/table"])


# Dropout ----------------------------------------------------------------------------------------------------
@functools.cache
def dropped_outputs():
    """Two layers that add a vector of ones, on an embedding of ones: what is left shows what was dropped."""
    block = BlockConfig(mixer=AttentionConfig(num_heads=2, biases=Biases.ALL), ffn=None)
    stack = (LayerGroup(pattern=(block,), repeats=2),)
    config = ModelConfig(embed_dim=64, stack=stack, vocab_size=29, dropout=0.25, residual_multiplier=3.0)
    params = {path: jnp.zeros(leaf.shape) for path, leaf in define(config).params.items()}
    params |= {"embed/table": jnp.ones((29, 64)), "segments/0/blocks/0/mixer/output/bias": jnp.ones((2, 64))}
    call = jax.jit(functools.partial(run, config, capture={"block_output": lambda x: x}))
    keys = (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    batch = pack(*[[document] for document in documents(20, 20, 20, 20)])
    captured = [call(params, batch, key=key).captured for key in keys]
    return [tuple(np.asarray(c[f"layers/{layer}/block_output"]) for layer in (0, 1)) for c in captured]


def test_without_a_key_nothing_is_dropped():
    first, second = dropped_outputs()[0]
    assert np.all(first == 1 + 3) and np.all(second == 1 + 3 + 3)


def test_dropout_is_a_function_of_the_key():
    _, one, same, other = dropped_outputs()
    np.testing.assert_array_equal(one, same)
    assert np.any(one[0] != other[0])


def test_dropout_respects_its_rate_and_keeps_the_expectation():
    _, (first, second), *_ = dropped_outputs()
    kept = 1 / 0.75
    # Embedding and first update, dropped independently, then the second update, dropped apart from the first.
    update = second - first
    for values, levels in ((first, [0, kept, 3 * kept, 4 * kept]), (update, [0, 3 * kept])):
        assert np.all(np.abs(values[..., None] - np.array(levels)).min(-1) < 1e-4)
    embedding = np.isin(np.rint(first / kept), (1, 4))
    first_update = np.rint(first / kept) >= 3
    for on in (embedding, first_update, update > 1):
        np.testing.assert_allclose(on.mean(), 0.75, atol=0.03)  # five deviations of a mean of 5120 draws
    assert abs(np.corrcoef(first_update.ravel(), (update > 1).ravel())[0, 1]) < 0.07
    np.testing.assert_allclose(second.mean(), 7.0, rtol=0.03)


# Settings ---------------------------------------------------------------------------------------------------
def test_initial_parameters_have_the_stated_spread():
    stack = (
        LayerGroup(pattern=(dataclasses.replace(FULL, num_loops=2),), repeats=3),
        LayerGroup(pattern=(MIXER_ALONE,)),
    )
    config = dataclasses.replace(ODD, stack=stack, init_std=0.05)
    definition = define(config)
    params, buffers = jax.jit(definition.init)(jax.random.key(0))
    assert not buffers and {path: leaf.shape for path, leaf in params.items()} == {
        p: s.shape for p, s in definition.params.items()
    }
    depth = 3 * 2 + 1  # a block that runs twice adds twice
    for path, leaf in params.items():
        name = path.split("/")[-2:]
        values = np.asarray(leaf)
        if name[1] == "scale":
            assert np.all(values == 1), path
        elif name[1] == "bias":
            assert np.all(values == 0), path
        else:
            std = 0.05 / math.sqrt(2 * depth) if name[0] in ("output", "down") else 0.05
            np.testing.assert_allclose(
                values.std(), 0.98658 * std, rtol=0.15, err_msg=path
            )  # some have 128 entries
            np.testing.assert_allclose(values.mean(), 0, atol=0.3 * std, err_msg=path)
    # No two weights are the same draws: not those of neighbouring layers, nor of tables of one shape.
    query = np.asarray(params["segments/0/blocks/0/mixer/query/weight"])
    for one, other in ((query[0], query[1]), (params["embed/table"], params["head/weight"])):
        assert np.abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 0.2


def test_derived_sizes():
    assert ODD.num_layers == 6 and [*ODD.blocks()] == [WINDOW, FULL, WINDOW, FULL, TWICE, MIXER_ALONE]
    assert ODD.table_rows == 32 and dataclasses.replace(ODD, vocab_size=32).table_rows == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed_dim": 0}, "embed_dim >= 1"),
        ({"stack": ()}, "at least one layer group"),
        ({"dropout": 1.0}, "dropout is a rate"),
        ({"context_length": 1}, "context_length must be at least 2"),
        ({"vocab_size": 0}, "vocab_size and vocab_multiple must be at least 1"),
        ({"vocab_multiple": 0}, "vocab_size and vocab_multiple must be at least 1"),
        ({"logit_softcap": 0.0}, "logit_softcap must be positive"),
        ({"init_std": 0.0}, "init_std and norm_eps must be positive"),
    ],
)
def test_bad_model_settings_say_what_to_change(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ODD, **settings)


def test_bad_stacks_say_what_to_change():
    with pytest.raises(ValueError, match="repeats=0"):
        LayerGroup(pattern=(WINDOW,), repeats=0)
    with pytest.raises(ValueError, match="a layer group needs a pattern of blocks"):
        LayerGroup(pattern=())
    with pytest.raises(ValueError, match="num_loops must be at least 1"):
        dataclasses.replace(WINDOW, num_loops=0)
    with pytest.raises(ValueError, match="set head_dim"):
        define(dataclasses.replace(ODD, embed_dim=15))
    with pytest.raises(ValueError, match="model.vocab_size is not set: give it"):
        define(dataclasses.replace(ODD, vocab_size=None))
