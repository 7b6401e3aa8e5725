"""`distill_loss` equals a dense float64 computation, in chunks and on any mesh, without an [N, V] array."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.losses import (
    DistillLossConfig,
    DistillWeights,
    Divergence,
    ForwardKl,
    Head,
    Jsd,
    ReverseKl,
    Sampled,
    SkewKl,
    SkewReverseKl,
    SoftCrossEntropy,
    Taid,
    TeacherMean,
    TeacherOutput,
    TopK,
    TotalVariation,
    Vocabulary,
    distill_loss,
)
from slmjax.parallel import communication
from slmjax.parallel.mesh import MeshConfig, make_mesh
from tests.losses.dense_divergences import dense_sum, dense_token_values
from tests.losses.flat import divergence_of_tokens, flat_distill_loss

ROWS = 16
WIDTH = 6
NUM_TOKENS = 22
DRAWS = jnp.arange(2 * NUM_TOKENS, dtype=jnp.uint32).reshape(NUM_TOKENS, 2)


def make_inputs(dtype=jnp.float32, *, num_teachers: int = 1):
    """A student of 14 tokens and teachers of 13, 12: of other widths, with padding, biases, multipliers and
    soft-caps.
    """
    keys = jax.random.split(jax.random.key(0), 12)
    hidden = jax.random.normal(keys[0], (NUM_TOKENS, WIDTH), dtype)
    head = Head(
        weight=jax.random.normal(keys[1], (ROWS, WIDTH), jnp.promote_types(dtype, jnp.float32)),
        bias=jax.random.normal(keys[2], (ROWS,)),
        softcap=3.0,
        scale=0.7,
        vocab_size=14,
    )
    teachers = tuple(
        TeacherOutput(
            hidden=jax.random.normal(keys[3 + i], (NUM_TOKENS, WIDTH + 1 + i), dtype),
            head=Head(
                weight=jax.random.normal(keys[5 + i], (ROWS, WIDTH + 1 + i)),
                bias=None if i else jax.random.normal(keys[7], (ROWS,)),
                softcap=4.0 if i else None,
                scale=0.8,
                vocab_size=13 - i,
            ),
        )
        for i in range(num_teachers)
    )
    targets = jax.random.randint(keys[8], (NUM_TOKENS,), 0, 12)
    weights = jax.random.uniform(keys[9], (NUM_TOKENS,)) * (jnp.arange(NUM_TOKENS) % 4 != 1)
    return hidden, head, teachers, targets, weights


def with_gradients(loss_fn, hidden, head, *rest, **options):
    """(sum, (hidden gradient, head gradient)) of a loss that is scaled, as a mean would be."""

    def scaled(hidden, head, *rest):
        result = loss_fn(hidden, head, *rest, **options)
        return 0.25 * (result[0] if isinstance(result, tuple) else result)

    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))(hidden, head, *rest)


def dense_with_gradients(hidden, head, teachers, targets, weights, config, **options):
    """The same from float64; the arrays are as they were."""
    inputs = hidden, head, teachers, targets, weights
    with jax.enable_x64(True):
        if hidden.dtype == jnp.bfloat16:  # operands of the products are rounded; nothing else is
            rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 2 else x, (head, teachers))
            inputs = hidden, *rounded, targets, weights
        inputs64 = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.inexact) else x, inputs
        )

        def fn(hidden, head, teachers, targets, weights):
            return dense_sum(hidden, head, teachers, config, targets, weights, **options)

        return jax.device_get(with_gradients(fn, *inputs64))


def assert_trees_close(actual, expected, *, rtol, atol) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=rtol, atol=atol),
        actual,
        expected,
    )


CASES: tuple[tuple[DistillLossConfig, dict[str, float], int | None], ...] = (
    (DistillLossConfig(divergence=ForwardKl()), {}, None),
    (
        DistillLossConfig(divergence=ForwardKl()),
        {"temperature": 2.0, "hard": 0.3, "soft": 0.7, "z_loss": 0.01},
        8,
    ),
    (DistillLossConfig(divergence=ReverseKl(), scales_by_square=False), {"temperature": 1.5}, 11),
    (DistillLossConfig(divergence=Jsd()), {"temperature": 0.7, "hard": 0.5}, 8),
    (DistillLossConfig(divergence=Jsd(beta=0.1)), {}, 11),
    (DistillLossConfig(divergence=SkewKl(alpha=0.2)), {"hard": 1.0}, 8),
    (DistillLossConfig(divergence=SkewReverseKl(alpha=0.3)), {"temperature": 3.0}, 11),
    (DistillLossConfig(divergence=TotalVariation()), {"soft": 2.0}, 8),
    (DistillLossConfig(divergence=SoftCrossEntropy()), {"temperature": 2.0}, 7),
    (DistillLossConfig(divergence=Taid()), {"hard": 0.1}, 11),
    (DistillLossConfig(divergence=TopK(k=3)), {"temperature": 1.3}, 5),
    (DistillLossConfig(divergence=TopK(k=1)), {}, 11),
    (DistillLossConfig(divergence=ForwardKl(), teacher_weights=(3.0, 1.0)), {"temperature": 2.0}, 8),
    (
        DistillLossConfig(divergence=Jsd(), mean=TeacherMean.PROBABILITIES, teacher_weights=(1.0, 2.0)),
        {"temperature": 2.0},
        11,
    ),
)
DISTINCT = [f"{type(case[0].divergence).__name__} {number}" for number, case in enumerate(CASES)]


@pytest.mark.parametrize(("config", "loss_weights", "chunk_size"), CASES, ids=DISTINCT)
def test_equals_dense(
    config: DistillLossConfig, loss_weights: dict[str, Any], chunk_size: int | None
) -> None:
    hidden, head, teachers, targets, weights = make_inputs(num_teachers=max(1, len(config.teacher_weights)))
    # Half of the cases have their loss weights compiled in, the others as arrays.
    as_arrays = {name: jnp.float32(x) for name, x in loss_weights.items()}
    options: dict[str, Any] = as_arrays if chunk_size == 8 else loss_weights

    def fn(hidden, head, teachers, targets, weights):
        return flat_distill_loss(
            hidden, head, teachers, config, targets, weights, chunk_size=chunk_size, **options
        )

    value, gradients = with_gradients(fn, hidden, head, teachers, targets, weights)
    expected = dense_with_gradients(hidden, head, teachers, targets, weights, config, **loss_weights)
    assert_trees_close((value, gradients), expected, rtol=1e-5, atol=1e-5)
    # Rows of padding, and what only the student has where no hard target is, get no gradient; tokens without
    # weight neither.
    shared = min(teacher.head.vocab_size for teacher in teachers)
    nothing = gradients[1].weight[head.vocab_size if "hard" in loss_weights else shared :]
    assert not np.any(nothing) and not np.any(gradients[0][1::4])


@pytest.mark.parametrize("divergence", [Jsd(beta=0.3), TopK(k=3)])
def test_equals_dense_tightly_in_float64(divergence: Divergence) -> None:
    config = DistillLossConfig(divergence=divergence)
    with jax.enable_x64(True):
        inputs = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, make_inputs(jnp.float64)
        )

        def fn(hidden, head, teachers, targets, weights):
            return flat_distill_loss(
                hidden, head, teachers, config, targets, weights, chunk_size=8, temperature=2.0, hard=0.5
            )

        ours = jax.device_get(with_gradients(fn, *inputs))
    assert ours[1][0].dtype == jnp.float64
    # The series of small exponents is exact to 5e-11 of its terms.
    assert_trees_close(
        ours,
        dense_with_gradients(*inputs, config=config, temperature=2.0, hard=0.5),
        rtol=1e-10,
        atol=1e-11,
    )


def test_bfloat16_hidden_states() -> None:
    inputs = make_inputs(jnp.bfloat16)
    config = DistillLossConfig(divergence=Jsd())

    def fn(hidden, head, teachers, targets, weights):
        return flat_distill_loss(hidden, head, teachers, config, targets, weights, chunk_size=8, hard=0.5)

    value, gradients = with_gradients(fn, *inputs)
    expected = dense_with_gradients(*inputs, config=config, hard=0.5)
    assert (
        value.dtype == jnp.float32
        and gradients[0].dtype == jnp.bfloat16
        and gradients[1].weight.dtype == jnp.float32
    )
    # Products of bfloat16 numbers are exact in float32, so that values agree; the gradient of the logits is
    # rounded to 8 bits.
    assert_trees_close(value, expected[0], rtol=1e-5, atol=1e-5)
    assert_trees_close(gradients, expected[1], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    ("divergence", "chunk_size"), [(ReverseKl(), 8), (Jsd(beta=0.3), 11), (TopK(k=3), None)]
)
def test_each_token_has_the_gradient_of_its_own_weight(
    divergence: Divergence, chunk_size: int | None
) -> None:
    """Also of a negative weight: the sum is the vector-Jacobian product of the values of the tokens."""
    hidden, head, teachers, targets, _ = make_inputs()
    config = DistillLossConfig(divergence=divergence)
    cotangent = jax.random.normal(jax.random.key(5), (NUM_TOKENS,))

    @jax.jit
    def in_chunks(hidden, head, teachers):
        def fn(hidden, head, teachers):
            return flat_distill_loss(
                hidden,
                head,
                teachers,
                config,
                targets,
                cotangent,
                chunk_size=chunk_size,
                temperature=2.0,
            )[0]

        values = divergence_of_tokens(hidden, head, teachers, config, temperature=2.0)
        return values, jax.value_and_grad(fn, argnums=(0, 1, 2))(hidden, head, teachers)

    values, (total, (*gradients, of_teachers)) = in_chunks(hidden, head, teachers)
    with jax.enable_x64(True):
        inputs64 = jax.tree.map(lambda x: x.astype(jnp.float64), (hidden, head, teachers))

        @jax.jit
        def from_dense(hidden, head, teachers):
            values, vjp_fn = jax.vjp(
                lambda hidden, head: dense_token_values(hidden, head, teachers, config, temperature=2.0),
                hidden,
                head,
            )
            return values, vjp_fn(cotangent.astype(jnp.float64))

        expected = jax.device_get(from_dense(*inputs64))
    assert_trees_close((values, tuple(gradients)), expected, rtol=1e-5, atol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teachers))
    np.testing.assert_allclose(jnp.sum(cotangent * values), total, rtol=1e-5, atol=1e-6)


# Those that look beyond one column of the vocabulary, and the most used of the others. Where a device has all
# columns, two will do.
ACROSS = (Jsd(beta=0.3), TopK(k=3), Taid(), Sampled(draws=20))
WITHIN = (Jsd(beta=0.3), Sampled(draws=20))


def on_the_mesh(divergences: tuple[Divergence, ...], num_times: int, *, vocabulary: Vocabulary | None = None):
    """Sums, metrics and gradients of several divergences from one program, on the current mesh."""
    keys = jax.random.split(jax.random.key(1), 4)
    _, head, (teacher,), _, _ = make_inputs()
    shape = (4, num_times)
    hidden, other = (
        jax.random.normal(key, (*shape, width)) for key, width in ((keys[0], WIDTH), (keys[1], WIDTH + 1))
    )
    targets = jax.random.randint(keys[2], shape, 0, 12)
    weights = jax.random.uniform(keys[3], shape)
    draws = jnp.stack(jnp.meshgrid(jnp.arange(4), jnp.arange(num_times), indexing="ij"), axis=-1).astype(
        jnp.uint32
    )
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:

        def place(head):
            return dataclasses.replace(
                head,
                weight=communication.constrain(head.weight, ("vocab_rows", None)),
                bias=communication.constrain(head.bias, (None,)),
            )

        head = place(head)
        teacher = dataclasses.replace(teacher, head=place(teacher.head))

    def loss(hidden: jax.Array, head: Head):
        results = [
            distill_loss(
                hidden,
                head,
                (TeacherOutput(hidden=other, head=teacher.head),),
                DistillLossConfig(divergence=divergence),
                targets,
                weights,
                weights=DistillWeights(
                    hard=0.3,
                    key=jax.random.key_data(jax.random.key(3)),
                    temperature=jnp.float32(1.5),
                ),
                draws=draws,
                chunk_size=3,
                vocabulary=vocabulary,
            )
            for divergence in divergences
        ]
        return sum(((1.0 + 0.7 * i) * value for i, (value, _) in enumerate(results)), jnp.zeros(())), results

    return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head))


@functools.cache
def on_one_device(divergences: tuple[Divergence, ...], num_times: int):
    return on_the_mesh(divergences, num_times)


@pytest.mark.parametrize(
    ("axes", "num_times", "vocabulary", "divergences"),
    [
        ({"tensor": 2}, 7, Vocabulary.SHARDED, WITHIN),
        ({"fsdp": 2, "tensor": 2}, 7, Vocabulary.GATHERED, WITHIN),  # a length that does not divide
        ({"fsdp": 2, "context": 2, "tensor": 2}, 8, Vocabulary.SHARDED, ACROSS),
        ({"fsdp": 2, "context": 2, "tensor": 2}, 8, Vocabulary.GATHERED, WITHIN),
    ],
)
def test_a_batch_on_any_mesh_equals_one_device(
    axes: dict[str, int], num_times: int, vocabulary: Vocabulary, divergences: tuple[Divergence, ...]
) -> None:
    devices = jax.devices()[: math.prod(axes.values())]
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **axes}), devices)):
        results = on_the_mesh(divergences, num_times, vocabulary=vocabulary)
    assert_trees_close(results, on_one_device(divergences, num_times), rtol=1e-5, atol=1e-5)


def test_masked_tokens_change_nothing() -> None:
    hidden, head, teachers, targets, weights = make_inputs()
    head = dataclasses.replace(head, softcap=None)  # which would hide how large the hidden states are
    masked = weights == 0

    @jax.jit
    def run(hidden, other, targets, weights):
        results = []
        for divergence in (ForwardKl(), Jsd(), SkewReverseKl(), Taid(), TopK(k=3), Sampled(draws=20)):

            def fn(hidden, head, d=divergence):
                return flat_distill_loss(
                    hidden,
                    head,
                    (dataclasses.replace(teachers[0], hidden=other),),
                    d,
                    targets,
                    weights,
                    chunk_size=8,
                    hard=0.5,
                    z_loss=0.01,
                    draws=DRAWS,
                    key=jax.random.key_data(jax.random.key(0)),
                )

            results.append(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)(hidden, head))
        return results

    one = run(hidden, teachers[0].hidden, targets, weights)

    def huge(x):
        return jnp.where(masked[:, None], 1e15 * x, x)

    other = run(
        huge(hidden), huge(teachers[0].hidden), jnp.where(masked, (targets + 1) % 12, targets), weights
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    nothing = run(1e4 * hidden, 1e4 * teachers[0].hidden, targets, jnp.zeros_like(weights))
    for leaf in jax.tree.leaves(nothing):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))


def largest_array(jaxpr) -> int:
    """Elements of the largest array written anywhere in a jaxpr, the loops and calls inside it included."""
    return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", str(jaxpr)))


@pytest.mark.parametrize("divergence", [ForwardKl(), Jsd(), TopK(k=3), Sampled(draws=5)])
def test_no_array_of_all_logits_exists(divergence: Divergence) -> None:
    num_tokens = 64
    rows = 24
    hidden = jnp.ones((num_tokens, WIDTH))
    head = Head(weight=jnp.ones((rows, WIDTH)), vocab_size=rows)
    teachers = (TeacherOutput(hidden=hidden, head=head),)
    targets = jnp.zeros(num_tokens, jnp.int32)
    weights = jnp.ones(num_tokens)
    options: dict[str, Any] = {
        "draws": jnp.zeros((num_tokens, 2), jnp.uint32),
        "key": jax.random.key_data(jax.random.key(0)),
    }

    def loss(hidden: jax.Array, head: Head, chunk_size: int) -> jax.Array:
        return flat_distill_loss(
            hidden, head, teachers, divergence, targets, weights, chunk_size=chunk_size, **options
        )[0]

    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    largest = {
        size: largest_array(jax.make_jaxpr(functools.partial(gradients, chunk_size=size))(hidden, head))
        for size in (16, 64)
    }
    assert largest[16] < num_tokens * rows <= largest[64]  # in one chunk, such an array is found


def test_divergences_that_draw_ask_for_a_key() -> None:
    hidden, head, teachers, targets, weights = make_inputs()
    with pytest.raises(ValueError, match="give a key"):
        flat_distill_loss(hidden, head, teachers, Sampled(), targets, weights, draws=DRAWS)
