"""Divergences from all logits at once: log-softmax, the formula, its derivative by jax; for float64."""

import math

import jax
import jax.numpy as jnp

from slmjax.losses import (
    DistillLossConfig,
    Divergence,
    ForwardKl,
    Head,
    Jsd,
    ReverseKl,
    SkewKl,
    SkewReverseKl,
    SoftCrossEntropy,
    Taid,
    TeacherMean,
    TeacherOutput,
    TopK,
    TotalVariation,
)


def kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)


def mixture(log_a: jax.Array, log_b: jax.Array, b_weight: float) -> jax.Array:
    """Return log((1 - b_weight) a + b_weight b)."""
    if b_weight in (0.0, 1.0):
        return log_b if b_weight else log_a
    return jnp.logaddexp(math.log(1 - b_weight) + log_a, math.log(b_weight) + log_b)


def dense_values(
    divergence: Divergence, log_p: jax.Array, log_q: jax.Array, *, taid_weight: float = 0.4
) -> jax.Array:
    """Return the divergence of each row of log-probabilities."""
    p = jnp.exp(log_p)
    q = jnp.exp(log_q)
    match divergence:
        case ForwardKl() | Jsd(beta=0.0):
            return kl(log_p, log_q)
        case ReverseKl() | Jsd(beta=1.0):
            return kl(log_q, log_p)
        case Jsd(beta=beta):
            log_m = mixture(log_q, log_p, beta)
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        case SkewKl(alpha=alpha):
            return kl(log_p, mixture(log_q, log_p, alpha))
        case SkewReverseKl(alpha=alpha):
            return kl(log_q, mixture(log_p, log_q, alpha))
        case TotalVariation():
            return jnp.sum(jnp.abs(p - q), axis=-1) / 2
        case SoftCrossEntropy():
            return -jnp.sum(p * log_q, axis=-1)
        case Taid():
            between = jax.nn.softmax((1 - taid_weight) * jax.lax.stop_gradient(log_q) + taid_weight * log_p)
            return -jnp.sum(between * log_q, axis=-1)
        case TopK(k=k):
            order = jnp.argsort(-log_p, axis=-1)
            p = jnp.take_along_axis(p, order, axis=-1)
            q = jnp.take_along_axis(q, order, axis=-1)
            buckets = (
                jnp.concatenate([x[..., :k], x[..., k:].sum(-1, keepdims=True)], axis=-1) for x in (p, q)
            )
            return kl(*map(jnp.log, buckets))
    raise AssertionError(divergence)


def dense_logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Return logits of the real rows of the table; operands are rounded to the dtype of the hidden states."""
    weight = head.weight.astype(hidden.dtype).astype(jnp.float64)[: head.vocab_size]
    x = jnp.matmul(hidden.astype(jnp.float64), weight.T, precision="highest")
    if head.bias is not None:
        x = x + head.bias.astype(jnp.float64)[None, : head.vocab_size]
    x = head.scale * x
    return x if head.softcap is None else head.softcap * jnp.tanh(x / head.softcap)


def dense_teachers(
    config: DistillLossConfig, teachers: tuple[TeacherOutput, ...], *, columns: int, temperature: float
) -> jax.Array:
    teacher_weights = config.teacher_weights or (1.0,) * len(teachers)
    logits = jnp.stack(
        [dense_logits(teacher.hidden, teacher.head)[:, :columns] / temperature for teacher in teachers]
    )
    weights = jnp.array(teacher_weights)[:, None, None] / sum(teacher_weights)
    if config.mean is TeacherMean.LOGITS:
        return jax.nn.log_softmax(jnp.sum(weights * logits, axis=0))
    return jnp.log(jnp.sum(weights * jax.nn.softmax(logits), axis=0))


def dense_token_values(
    hidden: jax.Array,
    head: Head,
    teachers: tuple[TeacherOutput, ...],
    config: DistillLossConfig,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """Return the divergence of each token, times the temperature squared if the config asks for it."""
    columns = min(head.vocab_size, *(teacher.head.vocab_size for teacher in teachers))
    log_p = dense_teachers(config, teachers, columns=columns, temperature=temperature)
    log_q = jax.nn.log_softmax(dense_logits(hidden, head)[:, :columns] / temperature)
    return dense_values(config.divergence, log_p, log_q) * (
        temperature**2 if config.scales_by_square else 1.0
    )


def dense_sum(
    hidden: jax.Array,
    head: Head,
    teachers: tuple[TeacherOutput, ...],
    config: DistillLossConfig,
    targets: jax.Array,
    weights: jax.Array,
    *,
    soft: float = 1.0,
    hard: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
) -> jax.Array:
    """Return the weighted sum over tokens of the divergence and of the cross entropy on the targets."""
    x = dense_logits(hidden, head)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(x), targets[:, None], axis=-1)[:, 0]
    hard_values = nll + z_loss * jax.nn.logsumexp(x, axis=-1) ** 2
    values = dense_token_values(hidden, head, teachers, config, temperature=temperature)
    return jnp.sum(weights.astype(jnp.float64) * (soft * values + hard * hard_values))
