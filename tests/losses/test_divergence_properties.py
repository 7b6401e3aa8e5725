"""Properties of divergences for any distribution: sign, bounds, symmetry, masked columns, random draws."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from slmjax.losses import (
    PADDING_LOGIT,
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
    TeacherOutput,
    TopK,
    TotalVariation,
)
from slmjax.losses.divergences import DivergenceContext, draw_counts, log_softmax
from slmjax.parallel import communication
from slmjax.parallel.mesh import MeshConfig, make_mesh
from tests.losses.dense_divergences import dense_values
from tests.losses.flat import divergence_of_tokens, flat_distill_loss

UNSHARDED = communication.Shards()
KLS: tuple[Divergence, ...] = (
    ForwardKl(),
    ReverseKl(),
    Jsd(),
    Jsd(beta=0.1),
    Jsd(beta=0.9),
    SkewKl(),
    SkewReverseKl(),
    SkewKl(alpha=1.0),
    SkewReverseKl(alpha=1.0),
    TopK(k=64),
    TotalVariation(),
)
NUM_COLUMNS = 11


@functools.partial(jax.jit, static_argnums=2)
def values_of(
    p_logits: jax.Array, q_logits: jax.Array, divergences: tuple[Divergence, ...]
) -> list[jax.Array]:
    log_p = log_softmax(p_logits, UNSHARDED)
    log_q = log_softmax(q_logits, UNSHARDED)
    own = DivergenceContext()
    return [divergence.value_and_slope(log_p, log_q, own)[0] for divergence in divergences]


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_never_below_zero_and_nothing_of_nothing(noise: float) -> None:
    logits, other = 3 * jax.random.normal(jax.random.key(0), (2, 50, 32_768))
    found = values_of(logits, logits + noise * other, KLS)
    for divergence, values in zip(KLS, found, strict=True):
        assert jnp.all(values >= 0), divergence
        assert jnp.all(values <= noise * (3.0 if divergence == TotalVariation() else 10.0 * noise)), (
            divergence
        )
        assert noise or not jnp.any(values), divergence
    # What is looked for can be found: the formula as one writes it is negative for some.
    naive = jax.jit(lambda p, q: dense_values(Jsd(), jax.nn.log_softmax(p), jax.nn.log_softmax(q)))(
        logits, logits + noise * other
    )
    assert noise > 1e-6 or jnp.any(naive < 0)


LOGITS = st_numpy.arrays(np.float32, (2, 4, NUM_COLUMNS), elements=st.floats(-40, 40, width=32))
BETAS = (0.1, 0.25, 0.5, 0.75, 0.9)
EVERY_K = tuple(TopK(k=k) for k in range(1, NUM_COLUMNS + 1))


@settings(max_examples=60, deadline=None)
@given(LOGITS)
def test_bounds_and_symmetry(logits: np.ndarray) -> None:
    jsd = tuple(Jsd(beta=beta) for beta in BETAS)
    kinds = (*jsd, *EVERY_K, ForwardKl(), TotalVariation(), SoftCrossEntropy())
    found = dict(zip(kinds, map(np.asarray, values_of(*logits, kinds)), strict=True))
    swapped = dict(zip(kinds, map(np.asarray, values_of(*logits[::-1], kinds)), strict=True))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for beta, divergence in zip(BETAS, jsd, strict=True):
        close(found[divergence], swapped[Jsd(beta=BETAS[-1 - BETAS.index(beta)])])
        assert np.all(found[divergence] <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-6)
    previous = np.zeros(4)
    for divergence in EVERY_K:
        assert np.all(found[divergence] >= previous - 1e-5 * (1 + previous))
        previous = found[divergence]
    close(previous, found[ForwardKl()])
    variation = found[TotalVariation()]
    assert np.all(variation >= 0) and np.all(variation <= 1 + 1e-6)
    assert np.all(2 * variation**2 <= found[ForwardKl()] + 1e-5)  # Pinsker
    close(variation, swapped[TotalVariation()])
    assert np.all(found[SoftCrossEntropy()] >= found[ForwardKl()] - 1e-4)


MASKABLE: tuple[Divergence, ...] = (
    ForwardKl(),
    ReverseKl(),
    Jsd(),
    Jsd(beta=0.1),
    SkewKl(),
    SkewReverseKl(),
    TotalVariation(),
    SoftCrossEntropy(),
    Taid(),
    TopK(k=2),
    TopK(k=9),
    Sampled(draws=20),
)


@jax.jit
def with_biases(own_bias: jax.Array, other_bias: jax.Array) -> list[tuple[jax.Array, tuple[jax.Array, Head]]]:
    """Of each of `MASKABLE`, values and gradients by hidden states and head, where biases may mask
    columns.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, other = jax.random.normal(keys[0], (2, 3, 5))
    weight, other_weight = jax.random.normal(keys[1], (2, NUM_COLUMNS + 1, 5))
    head = Head(weight=weight, bias=own_bias, vocab_size=NUM_COLUMNS)
    teachers = (
        TeacherOutput(hidden=other, head=Head(weight=other_weight, bias=other_bias, vocab_size=NUM_COLUMNS)),
    )
    draws = jnp.arange(6, dtype=jnp.uint32).reshape(3, 2)
    key = jax.random.key_data(keys[2])
    results = []
    for divergence in MASKABLE:

        def fn(hidden, head, d=divergence):
            return divergence_of_tokens(hidden, head, teachers, d, draws=draws, key=key)

        values, vjp_fn = jax.vjp(fn, hidden, head)
        results.append((values, vjp_fn(jnp.ones_like(values))))
    return results


@pytest.mark.parametrize("mask", [PADDING_LOGIT, -math.inf])
def test_a_column_masked_on_both_sides_counts_nothing(mask: float) -> None:
    bias = jnp.zeros(NUM_COLUMNS + 1).at[jnp.array([0, 4])].set(mask)
    # As good as masked: nothing that is added to a float32 sum of ordinary size.
    nearly = jnp.zeros(NUM_COLUMNS + 1).at[jnp.array([0, 4])].set(-100.0)
    for divergence, found, expected in zip(
        MASKABLE, with_biases(bias, bias), with_biases(nearly, nearly), strict=True
    ):
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=str(divergence))
        for gradient in (found[1][1].weight, found[1][1].bias):
            assert not jnp.any(gradient[jnp.array([0, 4, NUM_COLUMNS])]), divergence


@pytest.mark.parametrize("mask", [PADDING_LOGIT, -math.inf])
def test_a_column_that_one_side_masks(mask: float) -> None:
    none = jnp.zeros(NUM_COLUMNS + 1)
    bias = jnp.zeros(NUM_COLUMNS + 1).at[4].set(mask)
    nearly = none.at[4].set(-100.0)
    for own, other in ((none, bias), (bias, none)):
        approximate = with_biases(*(jnp.where(x == 0, x, nearly) for x in (own, other)))
        for divergence, found, expected in zip(MASKABLE, with_biases(own, other), approximate, strict=True):
            assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found)), divergence
            # Where the divergence is infinite it is very large; elsewhere it is that of a column next to
            # nothing.
            if float(jnp.max(found[0])) < 1e20:
                np.testing.assert_allclose(
                    found[0], expected[0], rtol=1e-5, atol=1e-6, err_msg=str(divergence)
                )
    teacher_only = dict(zip(MASKABLE, with_biases(none, bias), strict=True))
    for divergence in (ForwardKl(), Jsd(), SkewKl(), SkewReverseKl(), TotalVariation(), TopK(k=2)):
        assert jnp.max(teacher_only[divergence][0]) < 100, divergence


# Draws ------------------------------------------------------------------------------------------------------
def test_draws_are_unbiased_and_those_asked_for() -> None:
    num_draws = 30
    num_keys = 3000
    logits = jnp.array([[2.0, 1.0, PADDING_LOGIT, 0.1, -1.0, -3.0, PADDING_LOGIT]])
    p = jax.nn.softmax(logits)
    ids = jnp.array([[3, 5]], jnp.uint32)
    keys = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(jnp.arange(num_keys))
    counts = jax.jit(jax.vmap(lambda key: draw_counts(p, num_draws, DivergenceContext(draws=ids, key=key))))(
        keys
    )[:, 0]
    np.testing.assert_array_equal(counts.sum(axis=-1), np.full(num_keys, num_draws))
    assert not jnp.any(counts[:, jnp.array([2, 6])])
    # Each draw is one of n * keys independent ones: five standard deviations.
    deviation = np.sqrt(p[0] * (1 - p[0]) / (num_draws * num_keys))
    np.testing.assert_array_less(np.abs(counts.mean(axis=0) / num_draws - p[0]), 5 * deviation + 1e-9)
    np.testing.assert_allclose(counts.var(axis=0) / num_draws, p[0] * (1 - p[0]), atol=0.02)

    def gradient(key: jax.Array) -> jax.Array:
        head = Head(weight=jnp.eye(7), vocab_size=7)
        teachers = (TeacherOutput(hidden=logits, head=head),)

        def fn(x):
            return divergence_of_tokens(x, head, teachers, Sampled(draws=num_draws), draws=ids, key=key)[0]

        return jax.grad(fn)(jnp.array([[1.0, 1.5, PADDING_LOGIT, 0.0, 0.5, -1.0, PADDING_LOGIT]]))[0]

    q = jax.nn.softmax(jnp.array([1.0, 1.5, PADDING_LOGIT, 0.0, 0.5, -1.0, PADDING_LOGIT]))
    mean = jax.jit(lambda keys: jax.vmap(gradient)(keys).mean(axis=0))(keys)  # that of the soft cross entropy
    np.testing.assert_array_less(np.abs(mean - (q - p[0])), 5 * deviation + 1e-6)


def test_draws_of_a_token_do_not_depend_on_its_place_in_the_batch() -> None:
    hidden = jax.random.normal(jax.random.key(0), (10, 5))
    head = Head(weight=jax.random.normal(jax.random.key(1), (12, 5)), vocab_size=NUM_COLUMNS)
    ids = jnp.stack([jnp.arange(10), jnp.arange(10) % 3], axis=-1).astype(jnp.uint32)
    key = jax.random.key_data(jax.random.key(2))

    @jax.jit
    def values(order: jax.Array, key: jax.Array = key) -> jax.Array:
        teachers = (TeacherOutput(hidden=hidden[order] + 1.0, head=head),)
        return divergence_of_tokens(
            hidden[order], head, teachers, Sampled(draws=20), draws=ids[order], key=key
        )

    @jax.jit
    def values_from_chunks(order: jax.Array) -> jax.Array:
        """The same, in chunks: one chunked sum for each token, which alone has a weight."""
        teachers = (TeacherOutput(hidden=hidden[order] + 1.0, head=head),)

        def chunked(token_weights: jax.Array) -> jax.Array:
            return flat_distill_loss(
                hidden[order],
                head,
                teachers,
                Sampled(draws=20),
                jnp.zeros(10, jnp.int32),
                token_weights,
                draws=ids[order],
                key=key,
                chunk_size=3,
            )[0]

        return jax.lax.map(chunked, jnp.eye(10))

    order = jax.random.permutation(jax.random.key(3), 10)
    first = values(jnp.arange(10))
    np.testing.assert_allclose(values(order), first[order], rtol=1e-6)
    np.testing.assert_allclose(values_from_chunks(order), first[order], rtol=1e-6)
    assert not np.allclose(values(order, jax.random.key_data(jax.random.key(9))), first[order])
    flat = 0.1 * hidden[:1].repeat(2, 0)
    same = divergence_of_tokens(
        flat, head, (TeacherOutput(hidden=flat, head=head),), Sampled(draws=20), draws=ids[:2], key=key
    )
    assert same[0] != same[1]  # the same distributions, drawn from twice


@pytest.mark.parametrize("num_shards", [2, 8])
def test_draws_over_a_sharded_vocabulary(num_shards: int) -> None:
    # one of eight shards has nothing
    p = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (6, 16))).at[:, 8:10].set(0.0)
    ids = jnp.arange(12, dtype=jnp.uint32).reshape(6, 2)
    key = jax.random.key_data(jax.random.key(1))
    unsharded = draw_counts(p, 500, DivergenceContext(draws=ids, key=key))
    np.testing.assert_array_equal(unsharded.sum(axis=-1), np.full(6, 500))

    def of_shard(p: jax.Array) -> jax.Array:
        return draw_counts(
            p, 500, DivergenceContext(shards=communication.shards_of("vocab"), draws=ids, key=key)
        )

    mesh = make_mesh(MeshConfig(data=1, tensor=num_shards), jax.devices()[:num_shards])
    with jax.set_mesh(mesh):
        sharded = jax.jit(
            communication.shard_mapped(of_shard, in_dims=((None, "vocab"),), out_dims=(None, "vocab"))
        )(p)
    np.testing.assert_array_equal(sharded, unsharded)


def test_taid_with_a_teacher_weight_of_zero_has_no_gradient() -> None:
    head = Head(weight=jnp.eye(4), vocab_size=4)
    hidden = jnp.array([[1.0, 1.5, 0.0, 0.5]])
    teachers = (TeacherOutput(hidden=2 * hidden, head=head),)
    taid = Taid(start=0.2)
    state = {name: jnp.zeros_like(x) if name == "share" else x for name, x in taid.initial_state().items()}
    gradient = jax.grad(lambda x, state: divergence_of_tokens(x, head, teachers, taid, state=state)[0])
    np.testing.assert_allclose(gradient(hidden, state), np.zeros((1, 4)), atol=1e-7)
    assert np.any(
        np.abs(gradient(hidden, dict(taid.initial_state()))) > 1e-2
    )  # the state that is given counts
