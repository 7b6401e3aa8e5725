"""Cross entropy in chunks equals the dense one, on one device and on eight, without an [N, V] array."""

import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slmjax import losses
from slmjax.losses import Head, Vocabulary, choose_vocabulary
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from tests.losses.flat import flat_cross_entropy

NUM_TOKENS = 22
WIDTH = 6
ROWS = 16
VOCAB = 13


def make_inputs(*, dtype=jnp.float32, head_dtype=jnp.float32, bias=True, softcap=3.0, scale=0.5, rows=ROWS):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = 2 * jax.random.normal(keys[0], (NUM_TOKENS, WIDTH), dtype)
    head = Head(
        weight=jax.random.normal(keys[1], (rows, WIDTH), head_dtype),
        bias=jax.random.normal(keys[2], (rows,), head_dtype) if bias else None,
        softcap=softcap,
        scale=scale,
        vocab_size=VOCAB,
    )
    targets = jax.random.randint(keys[3], (NUM_TOKENS,), 0, VOCAB)
    weights = jax.random.uniform(keys[4], (NUM_TOKENS,), dtype=jnp.float32) * (
        jnp.arange(NUM_TOKENS) % 4 != 1
    )
    return hidden, head, targets, weights


def dense_cross_entropy(hidden, head, targets, weights, *, z_loss):
    """The same sums from one array of logits, written out: real columns sliced, log-softmax, gather."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    weight = head.weight.astype(hidden.dtype).astype(dtype)[: head.vocab_size]
    x = jnp.matmul(hidden.astype(dtype), weight.T, precision="highest")
    if head.bias is not None:
        x = x + head.bias.astype(dtype)[None, : head.vocab_size]
    x = head.scale * x
    if head.softcap is not None:
        x = head.softcap * jnp.tanh(x / head.softcap)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(x), targets[:, None], axis=-1)[:, 0]
    normaliser = jax.nn.logsumexp(x, axis=-1)
    metrics = {
        "nll": jnp.sum(weights * nll),
        "z": jnp.sum(weights * normaliser**2),
        "correct": jnp.sum(weights * (jnp.argmax(x, axis=-1) == targets)),
    }
    return jnp.sum(weights * (nll + z_loss * normaliser**2)), metrics


def value_and_gradients(loss_fn, hidden, head, targets, weights, **options):
    """((sum, metrics), (hidden gradient, head gradient)) of a loss that is scaled, as a mean would be."""

    def scaled(hidden, head):
        loss, metrics = loss_fn(hidden, head, targets, weights, **options)
        return 0.25 * loss, metrics

    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))(hidden, head)


@functools.cache
def dense_results():
    return value_and_gradients(dense_cross_entropy, *make_inputs(), z_loss=0.01)


def assert_trees_close(actual, expected, *, rtol, atol):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected)


def test_hand_worked_number():
    # One hidden state (1, 0) on rows (ln 2, .) and (0, .): logits (ln 2, 0), probabilities (2/3, 1/3).
    head = Head(weight=jnp.array([[math.log(2.0), 5.0], [0.0, -7.0]]), vocab_size=2)
    hidden = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    loss, metrics = flat_cross_entropy(
        hidden, head, jnp.array([0, 1, 1]), jnp.array([1.0, 2.0, 0.0]), z_loss=0.1
    )
    nll = math.log(1.5) + 2 * math.log(3.0)
    z = 3 * math.log(3.0) ** 2
    np.testing.assert_allclose(loss, nll + 0.1 * z, rtol=1e-6)
    expected = {"nll": nll, "z": z, "correct": 1.0}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("chunk_size", [None, 8, 11], ids=["one chunk", "padded", "dividing"])
def test_equals_dense(chunk_size):
    chunked = value_and_gradients(flat_cross_entropy, *make_inputs(), z_loss=0.01, chunk_size=chunk_size)
    assert_trees_close(chunked, dense_results(), rtol=1e-5, atol=1e-5)
    # Padding rows of the table get no gradient at all, tokens without weight neither.
    head_gradient = chunked[1][1]
    hidden_gradient = chunked[1][0]
    assert not np.any(head_gradient.weight[VOCAB:]) and not np.any(head_gradient.bias[VOCAB:])
    assert not np.any(hidden_gradient[1::4])


def test_equals_dense_tightly_in_float64():
    with jax.enable_x64(True):
        hidden, head, targets, weights = make_inputs(dtype=jnp.float64, head_dtype=jnp.float64)
        inputs = (hidden, head, targets, weights.astype(jnp.float64))
        chunked = value_and_gradients(flat_cross_entropy, *inputs, z_loss=0.01, chunk_size=8)
        dense = value_and_gradients(dense_cross_entropy, *inputs, z_loss=0.01)
        assert chunked[1][0].dtype == jnp.float64
        assert_trees_close(chunked, dense, rtol=1e-12, atol=1e-13)


def test_equals_optax_without_extras():
    hidden, head, targets, weights = make_inputs(bias=False, softcap=None, scale=1.0, rows=VOCAB)

    def from_optax(hidden, head, targets, weights):
        nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ head.weight.T, targets)
        return jnp.sum(weights * nll), None

    ours = value_and_gradients(flat_cross_entropy, hidden, head, targets, weights, chunk_size=5)
    theirs = value_and_gradients(from_optax, hidden, head, targets, weights)
    assert_trees_close((ours[0][0], ours[1]), (theirs[0][0], theirs[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dtype", [jnp.float32, jnp.bfloat16], ids=["float32 head", "bfloat16 head"])
def test_bfloat16_products(head_dtype):
    hidden, head, targets, weights = make_inputs(dtype=jnp.bfloat16, head_dtype=head_dtype)
    (loss, metrics), gradients = value_and_gradients(
        flat_cross_entropy, hidden, head, targets, weights, z_loss=0.01, chunk_size=8
    )
    dense = value_and_gradients(dense_cross_entropy, hidden, head, targets, weights, z_loss=0.01)
    # Operands are rounded alike on both sides, and products of bfloat16 are exact in float32: the sums agree
    # closely.
    assert loss.dtype == jnp.float32
    assert_trees_close((loss, metrics), dense[0], rtol=1e-5, atol=1e-5)
    # The gradient of the logits is rounded to bfloat16 (8 bits), and so is a gradient that leaves in
    # bfloat16.
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].weight.dtype == head_dtype
    gradients, expected = jax.tree.map(lambda x: x.astype(jnp.float32), (gradients, dense[1]))
    assert_trees_close(gradients, expected, rtol=2**-6, atol=2**-6)


def test_bfloat16_head_gradient_is_summed_in_float32():
    # 512 chunks that each add 1/2 to a gradient: a bfloat16 sum would stop at 128, where the spacing is 1.
    num_tokens = 512
    hidden = jnp.ones((num_tokens, 1), jnp.bfloat16)
    head = Head(weight=jnp.zeros((2, 1), jnp.bfloat16), vocab_size=2)
    targets = jnp.zeros(num_tokens, jnp.int32)
    weights = jnp.ones(num_tokens)

    def loss(head):
        return flat_cross_entropy(hidden, head, targets, weights, chunk_size=1)[0]

    gradient = jax.grad(loss)(head)
    np.testing.assert_array_equal(gradient.weight.astype(jnp.float32), [[-256.0], [256.0]])


def test_all_masked_is_zero_and_finite():
    hidden, head, targets, weights = make_inputs()
    hidden = 1e4 * hidden
    (loss, metrics), gradients = value_and_gradients(
        flat_cross_entropy, hidden, head, targets, jnp.zeros_like(weights), z_loss=0.01, chunk_size=8
    )
    for leaf in jax.tree.leaves((loss, metrics, gradients)):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))


def test_masked_tokens_change_nothing():
    hidden, head, targets, weights = make_inputs()
    masked = weights == 0
    other_hidden = jnp.where(masked[:, None], 50.0, hidden)
    other_targets = jnp.where(masked, (targets + 1) % VOCAB, targets)
    one = value_and_gradients(flat_cross_entropy, hidden, head, targets, weights, z_loss=0.01, chunk_size=8)
    other = value_and_gradients(
        flat_cross_entropy, other_hidden, head, other_targets, weights, z_loss=0.01, chunk_size=8
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_logits_of_padding_are_large_negative_and_finite():
    hidden, head, _, _ = make_inputs()
    x = losses.logits(hidden.reshape(2, 11, WIDTH), head)
    assert x.shape == (2, 11, ROWS) and x.dtype == jnp.float32
    assert np.all(np.isfinite(x)) and np.all(x[..., VOCAB:] == losses.PADDING_LOGIT)
    assert np.all(np.abs(x[..., :VOCAB]) <= head.softcap)


def largest_array(jaxpr):
    """Elements of the largest array written anywhere in a jaxpr, the loops and calls inside it included."""
    return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", str(jaxpr)))


def test_no_array_of_all_logits_exists():
    num_tokens = 64
    rows = 24
    hidden = jnp.ones((num_tokens, WIDTH))
    head = Head(weight=jnp.ones((rows, WIDTH)), vocab_size=rows)
    targets = jnp.zeros(num_tokens, jnp.int32)
    weights = jnp.ones(num_tokens)

    def largest(loss_fn, **options):
        gradients = jax.grad(
            lambda hidden, head: loss_fn(hidden, head, targets, weights, **options)[0], argnums=(0, 1)
        )
        return largest_array(jax.make_jaxpr(gradients)(hidden, head))

    assert largest(dense_cross_entropy, z_loss=0.0) >= num_tokens * rows  # what is looked for can be found
    assert largest(flat_cross_entropy, chunk_size=16) < num_tokens * rows


def test_value_alone_computes_no_gradient():
    hidden, head, targets, weights = make_inputs()
    jaxpr = jax.make_jaxpr(functools.partial(flat_cross_entropy, chunk_size=8))(
        hidden, head, targets, weights
    )
    assert str(jaxpr).count("dot_general[") == 1


def test_default_chunks_are_even_and_fit():
    assert losses.default_chunk_size(1000, 256) == 1000  # one chunk
    size = losses.default_chunk_size(8192, 49152)
    assert size % losses.MIN_CHUNK_SIZE == 0 and size * 49152 * 4 <= 2 * losses.CHUNK_BYTES
    assert losses.default_chunk_size(8192, 10**7) == losses.MIN_CHUNK_SIZE


def test_bad_chunk_size_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        flat_cross_entropy(*make_inputs(), chunk_size=0)


@pytest.mark.parametrize(
    ("num_times", "axes", "vocabulary"),
    [
        (8, None, None),
        (8, {"data": 2, "fsdp": 2, "tensor": 2}, Vocabulary.GATHERED),
        (7, {"data": 2, "fsdp": 2, "tensor": 2}, Vocabulary.GATHERED),  # a length that does not divide
        (7, {"data": 2, "fsdp": 2, "tensor": 2}, Vocabulary.SHARDED),
        (8, {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}, Vocabulary.SHARDED),
        (8, {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}, None),
    ],
)
def test_a_batch_on_any_mesh_equals_the_dense_loss(num_times, axes, vocabulary):
    _, head, _, _ = make_inputs(bias=num_times == 8)
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (4, num_times, WIDTH))
    targets = jax.random.randint(keys[1], (4, num_times), 0, VOCAB)
    weights = jax.random.uniform(keys[2], (4, num_times))
    flat = (hidden.reshape(-1, WIDTH), head, targets.reshape(-1), weights.reshape(-1))
    expected = value_and_gradients(dense_cross_entropy, *flat, z_loss=0.01)

    context = contextlib.nullcontext()
    if axes is not None:
        mesh = make_mesh(MeshConfig(**axes))
        placement = parameter_shardings({"head/weight": head.weight}, mesh)
        assert placement["head/weight"].spec == jax.P(("tensor", "fsdp"), None)
        head = dataclasses.replace(head, weight=jax.device_put(head.weight, placement["head/weight"]))
        context = jax.set_mesh(mesh)
    with context:
        values, (hidden_gradient, head_gradient) = value_and_gradients(
            losses.cross_entropy,
            hidden,
            head,
            targets,
            weights,
            z_loss=0.01,
            chunk_size=3,
            vocabulary=vocabulary,
        )
    assert_trees_close(
        (values, (hidden_gradient.reshape(-1, WIDTH), head_gradient)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("vocabulary", list(Vocabulary))
def test_factors_of_tokens_have_their_losses_as_gradient(vocabulary):
    _, head, _, _ = make_inputs(bias=False)
    keys = jax.random.split(jax.random.key(1), 4)
    hidden = jax.random.normal(keys[0], (4, 7, WIDTH))
    targets = jax.random.randint(keys[1], (4, 7), 0, VOCAB)
    weights = 1.0 * jax.random.bernoulli(keys[2], 0.7, (4, 7))
    factors = jax.random.uniform(keys[3], (4, 7))
    options = {"z_loss": 0.01, "chunk_size": 3, "vocabulary": vocabulary}

    def expectation(hidden, head, factors):
        return losses.cross_entropy(hidden, head, targets, weights, factors=factors, **options)[0]

    def dense(hidden, head, factors):
        flat = (hidden.reshape(-1, WIDTH), head, targets.reshape(-1), (weights * factors).reshape(-1))
        return dense_cross_entropy(*flat, z_loss=0.01)[0]

    expected = jax.jit(jax.value_and_grad(dense, argnums=(0, 1, 2)))(hidden, head, factors)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        found = jax.jit(jax.value_and_grad(expectation, argnums=(0, 1, 2)))(hidden, head, factors)
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_vocabulary_is_sharded_where_that_sends_less():
    assert choose_vocabulary(10, 1024) is Vocabulary.GATHERED  # there is no mesh
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        assert choose_vocabulary(1023, 1024) is Vocabulary.SHARDED
        assert choose_vocabulary(1024, 1024) is Vocabulary.GATHERED
        assert choose_vocabulary(10, 1023) is Vocabulary.GATHERED


@pytest.mark.parametrize("vocabulary", list(Vocabulary))
def test_the_head_is_gathered_and_its_gradient_reduced_once_outside_the_loop(vocabulary):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    targets = jnp.zeros((8, 8), jnp.int32)
    weights = jnp.ones((8, 8))

    def loss(hidden, weight):
        return losses.cross_entropy(
            hidden,
            Head(weight=weight, vocab_size=ROWS),
            targets,
            weights,
            chunk_size=2,
            vocabulary=vocabulary,
        )[0]

    with jax.set_mesh(mesh):
        hidden = jax.device_put(
            jnp.ones((8, 8, 4)), jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "tensor"))
        )
        weight = jax.device_put(jnp.ones((ROWS, 4)), jax.NamedSharding(mesh, jax.P(("tensor", "fsdp"), None)))
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, weight).compile().as_text()
    assert " while(" in program
    collective = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    _, entry = program.split("\nENTRY ")
    assert (
        len(re.findall(collective, entry)) <= 5
    )  # of the gradient one over fsdp, which scatters, and one over data
    # Within the loop: one number per token of the chunk, and only where each device has a part of its logits.
    inside = re.findall(r"= (\S+)" + collective, program.replace(entry, ""))
    assert {shape for shape, *_ in inside} == ({"f32[2]{0}"} if vocabulary is Vocabulary.SHARDED else set())
