"""Divergences of equal, one-hot and masked distributions, against float64 in NumPy."""

import functools
import math
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
    distill_loss,
    evaluation_sums,
)
from slmjax.parallel.mesh import MeshConfig, make_mesh
from tests.losses.flat import divergence_of_tokens, flat_cross_entropy, flat_distill_loss

INF = math.inf
KINDS: tuple[Divergence, ...] = (
    ForwardKl(),
    ReverseKl(),
    Jsd(),
    Jsd(beta=0.1),
    SkewKl(),
    SkewReverseKl(),
    TotalVariation(),
    SoftCrossEntropy(),
    Taid(),
    TopK(k=1),
    TopK(k=3),
)
PLAIN = [0.3, -1.2, 2.0, 0.7, -0.4, 1.1]
# Teacher's and student's logits.
CORNERS: dict[str, tuple[list[float], list[float]]] = {
    "equal": (PLAIN, PLAIN),
    "equal, raised": (PLAIN, [x + 3.7 for x in PLAIN]),
    "equal, lowered": ([x + 100.3 for x in PLAIN], PLAIN),
    "one column of the teacher": ([60, 0, 0, 0, 0, 0], PLAIN),
    "one column of the student": (PLAIN, [0, 0, 100, 0, 0, 0]),
    "one column of both": ([0, 90, 0, 0, 0, 0], [0, 100, 0, 0, 0, 0]),
    "another column": ([0, 90, 0, 0, 0, 0], [0, 0, 0, 100, 0, 0]),
    "a peaked student": ([2 / 0.3, 0, 0, 0, 0, 0], [100, 0, 0, 0, 0, 0]),
    "masked on both sides": ([0.3, -INF, 2.0, 0.7, -0.4, -INF], [1.0, -INF, 0.5, 0.2, -2.0, -INF]),
    "masked by the teacher": ([0.3, -INF, 2.0, 0.7, -0.4, 1.0], PLAIN),
    "masked by the student": (PLAIN, [0.3, -INF, 2.0, 0.7, -0.4, 1.0]),
}


NEVER = -1e5  # the logarithm of a probability of 0


def log_softmax(x: Any) -> np.ndarray:
    x64 = np.asarray(x, np.float64)
    x64 = x64 - x64.max()
    return np.maximum(x64 - np.log(np.exp(x64).sum()), NEVER)


def kl(log_a: np.ndarray, log_b: np.ndarray) -> float:
    return float((np.exp(log_a) * (log_a - log_b)).sum())


def log_mixture(log_p: np.ndarray, log_q: np.ndarray, p_weight: float) -> np.ndarray:
    """Return log(p_weight p + (1 - p_weight) q)."""
    return np.logaddexp(math.log(p_weight) + log_p, math.log1p(-p_weight) + log_q)


def reference(divergence: Divergence, log_p: np.ndarray, log_q: np.ndarray) -> tuple[float, np.ndarray]:
    """The value, and its derivative by each log q, up to a multiple of q."""
    p = np.exp(log_p)
    q = np.exp(log_q)
    match divergence:
        case ForwardKl():
            return kl(log_p, log_q), -p
        case ReverseKl():
            return kl(log_q, log_p), q * (log_q - log_p)
        case Jsd(beta=beta):
            log_m = log_mixture(log_p, log_q, beta)
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m), (1 - beta) * q * (log_q - log_m)
        case SkewKl(alpha=alpha):
            log_m = log_mixture(log_p, log_q, alpha)
            return kl(log_p, log_m), -(1 - alpha) * np.exp(log_p + log_q - log_m)
        case SkewReverseKl(alpha=alpha):
            log_m = log_mixture(log_q, log_p, alpha)
            return kl(log_q, log_m), q * (log_q - log_m) - alpha * np.exp(2 * log_q - log_m)
        case TotalVariation():
            sign = np.where(np.abs(log_q - log_p) < 1e-12, 0.0, np.sign(q - p))
            return float(np.abs(q - p).sum() / 2), sign * q / 2
        case SoftCrossEntropy():
            return float(-(p * log_q).sum()), -p
        case Taid():
            between = np.exp(log_softmax(0.6 * log_q + 0.4 * log_p))
            return float(-(between * log_q).sum()), -between
        case TopK(k=k):
            order = np.argsort(-log_p, kind="stable")
            top = order[:k]
            tail = order[k:]
            log_p_tail, log_q_tail = (np.logaddexp.reduce(x[tail]) for x in (log_p, log_q))
            slope = -p
            slope[tail] = -np.exp(log_p_tail + log_q[tail] - log_q_tail)
            return kl(np.append(log_p[top], log_p_tail), np.append(log_q[top], log_q_tail)), slope
    raise AssertionError(divergence)


TEACHERS, STUDENTS = (jnp.asarray([pair[side] for pair in CORNERS.values()], jnp.float32) for side in (0, 1))
HEAD = Head(weight=jnp.eye(6), vocab_size=6)


def on_logits(fn: Any) -> Any:
    """A loss of logits of -inf: hidden states cannot be infinite, so that the mask is a bias of each token's
    own.
    """

    def of_row(student: jax.Array, teacher: jax.Array) -> jax.Array:
        heads = [
            Head(weight=jnp.eye(6), bias=jnp.where(jnp.isinf(x), x, 0.0), vocab_size=6)
            for x in (student, teacher)
        ]
        states = [jnp.where(jnp.isinf(x), 0.0, x)[None] for x in (student, teacher)]
        return fn(states[0], heads[0], (TeacherOutput(hidden=states[1], head=heads[1]),))[0]

    return of_row


@functools.cache
def results() -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each of `KINDS` values and gradients by the student's logits, at all corners."""

    def of_kind(divergence: Divergence) -> Any:
        own = on_logits(
            lambda hidden, head, teachers: divergence_of_tokens(hidden, head, teachers, divergence)
        )
        return jax.vmap(jax.value_and_grad(own))

    return jax.device_get(
        jax.jit(lambda s, t: [of_kind(divergence)(s, t) for divergence in KINDS])(STUDENTS, TEACHERS)
    )


@pytest.mark.parametrize("index", range(len(KINDS)), ids=[str(kind) for kind in KINDS])
def test_corners(index: int) -> None:
    values, gradients = results()[index]
    for (name, (teacher, student)), value, gradient in zip(CORNERS.items(), values, gradients, strict=True):
        assert np.isfinite(value) and np.all(np.isfinite(gradient)), name
        log_p = log_softmax(teacher)
        log_q = log_softmax(student)
        expected, slope = reference(KINDS[index], log_p, log_q)
        if expected > 1e3:  # without end
            assert value > 1e25, name
            continue
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(
            gradient, slope - np.exp(log_q) * slope.sum(), rtol=2e-5, atol=3e-6, err_msg=name
        )


def test_the_tail_of_a_peaked_student_over_a_sharded_vocabulary() -> None:
    """0.584 and not the 0.514 of a tail that ends at the smallest float32; in chunks, on one device and on
    eight.
    """
    teacher = jnp.asarray([[2.0, 0, 0, 0, 0, 0]])
    student = jnp.asarray([[30.0, 0, 0, 0, 0, 0]])
    config = DistillLossConfig(divergence=TopK(k=1), scales_by_square=False)
    head = Head(weight=jnp.pad(jnp.eye(6), ((0, 2), (0, 0))), vocab_size=6)

    def fn(student: jax.Array, teacher: jax.Array) -> Any:
        teachers = (TeacherOutput(hidden=teacher, head=head),)
        zeros = jnp.zeros(student.shape[:-1], jnp.int32)
        token_weights = jnp.ones(zeros.shape)
        weights = DistillWeights(temperature=0.3)
        total, _ = distill_loss(
            student, head, teachers, config, zeros, token_weights, weights=weights, chunk_size=1
        )
        return total / zeros.size

    p = np.exp(log_softmax([2 / 0.3, 0, 0, 0, 0, 0]))
    expected = p[0] * np.log(p[0]) + p[1:].sum() * (np.log(p[1]) + 100)
    assert expected == pytest.approx(0.5837, abs=1e-4)
    on_one_device, gradient_on_one_device = jax.jit(jax.value_and_grad(fn))(student[None], teacher[None])
    batch = [jnp.broadcast_to(x[None], (4, 2, 6)) for x in (student, teacher)]
    with jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        on_mesh, gradient_on_mesh = jax.jit(jax.value_and_grad(fn))(*batch)
    for value, gradient in (
        (on_one_device, gradient_on_one_device[0]),
        (on_mesh, gradient_on_mesh.sum((0, 1))[None]),
    ):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        # Each column of the tail has the same fraction of it as in q; the first column has the rest.
        np.testing.assert_allclose(gradient[0] * 0.3, [p[1:].sum(), *[-p[1:].sum() / 5] * 5], rtol=3e-5)


MASKED: tuple[Divergence, ...] = (*KINDS, Jsd(beta=0.0), Jsd(beta=1.0), Sampled(draws=4))


def test_a_masked_token_counts_nothing_whatever_its_target() -> None:
    """Its target's logit is -inf: sums, metrics and gradients are those of the other tokens alone."""
    draws = np.random.default_rng(0)
    hidden, other = jnp.asarray(draws.normal(size=(2, 3, 4)), jnp.float32)
    head = Head(
        weight=jnp.asarray(draws.normal(size=(6, 4)), jnp.float32),
        bias=jnp.zeros(6).at[0].set(-INF),
        vocab_size=6,
    )
    teachers = (TeacherOutput(hidden=other, head=head),)
    weights = jnp.asarray([1.0, 0.0, 0.5])
    ids = jnp.arange(6, dtype=jnp.uint32).reshape(3, 2)
    key = jax.random.key_data(jax.random.key(0))

    @jax.jit
    def everything(targets: jax.Array) -> Any:
        def hard(hidden: jax.Array, head: Head) -> Any:
            return flat_cross_entropy(hidden, head, targets, weights, z_loss=0.1)

        def soft(hidden: jax.Array, head: Head, divergence: Divergence) -> Any:
            settings: dict[str, Any] = {"draws": ids, "key": key} if divergence.draws_at_random else {}
            return flat_distill_loss(
                hidden, head, teachers, divergence, targets, weights, hard=0.3, **settings
            )

        fns = [hard, *(functools.partial(soft, divergence=divergence) for divergence in MASKED)]
        rows = jax.tree.map(lambda x: x[None], (hidden, targets, weights))
        teacher_outputs = (TeacherOutput(hidden=other[None], head=head),)
        sums = evaluation_sums(rows[0], head, *rows[1:], teachers=teacher_outputs)
        return [jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)(hidden, head) for fn in fns], sums

    masked, plain = (jax.device_get(everything(jnp.asarray([2, target, 4]))) for target in (0, 3))
    for actual, expected in zip(jax.tree.leaves(masked), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert np.all(np.isfinite(actual))
    assert all(not np.any(gradients[0][1]) for _, gradients in masked[0])


def test_a_teacher_of_weight_zero_is_ignored() -> None:
    heads = [Head(weight=jnp.eye(6), bias=jnp.zeros(6).at[1].set(mask), vocab_size=6) for mask in (0.0, -INF)]
    teachers = tuple(TeacherOutput(hidden=jnp.asarray([PLAIN]), head=head) for head in heads)
    student = jnp.asarray([[1.0, 0, 0, 0, 0, 2.0]])
    alone = divergence_of_tokens(student, HEAD, teachers[:1], ForwardKl())
    for mean in TeacherMean:
        config = DistillLossConfig(divergence=ForwardKl(), mean=mean, teacher_weights=(1.0, 0.0))
        np.testing.assert_allclose(divergence_of_tokens(student, HEAD, teachers, config), alone, rtol=1e-6)
