"""Divergence from one or more teachers: the distillation loss, with the hard cross entropy in the same pass.

    teachers = (TeacherOutput(hidden=hidden_of_teacher, head=head_of_teacher),)
    config = DistillLossConfig(divergence=ForwardKl())
    loss_sum, metrics = distill_loss(hidden, head, teachers, config, targets, token_weights)

A temperature T divides the logits of both sides, after soft-caps and multipliers. The gradient of a
divergence at temperature T is about 1 / T**2 of that at 1. With `scales_by_square`, the default, the
divergence is multiplied by T**2, so that its weight relative to the cross entropy (always at temperature 1)
keeps its meaning (Hinton, https://arxiv.org/abs/1503.02531). Reported divergences are multiplied too.

Several teachers become one distribution: the weighted mean of their logits or of their probabilities. Only
columns below the smallest `vocab_size` count for a divergence, on either side: padding, and tokens that one
model has and another has not, are left out before the softmax.

Dims: B batch, T time, C tokens of a chunk, D model, E a teacher's width, V and R rows of tables, v columns
that a device holds.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from slmjax.losses.divergences import Divergence, DivergenceContext, log_softmax
from slmjax.losses.hard_targets import Metrics, hard_loss
from slmjax.losses.heads import PADDING_LOGIT, UNSHARDED, Head, accumulation_dtype, column_ids, logits
from slmjax.losses.token_sums import ChunkFn, Vocabulary, sharded_sum, weighted_sum
from slmjax.parallel import communication


class TeacherMean(enum.Enum):
    """What is averaged over several teachers."""

    LOGITS = "logits"  # a geometric mean of their distributions
    PROBABILITIES = "probabilities"  # a mixture of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOutput:
    """Hidden states and head of a teacher: its logits, before they are computed.

    The table of its head has as many rows as the student's (`fit_rows`).
    """

    hidden: Any  # Float[Array, "B T E"], or "C E" within a chunk
    head: Head


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillLossConfig:
    """Settings of the distillation loss that are known at compile time."""

    divergence: Divergence
    mean: TeacherMean = TeacherMean.LOGITS
    teacher_weights: tuple[float, ...] = ()  # empty: equal weights
    scales_by_square: bool = True  # multiply a divergence at temperature T by T**2

    def normalised_weights(self, num_teachers: int) -> tuple[float, ...]:
        """Return the weights of the teachers, which add up to 1.

        Raises:
          ValueError: there are not as many weights as teachers, one is negative, or all are 0.
        """
        weights = self.teacher_weights or (1.0,) * num_teachers
        if len(weights) != num_teachers or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"{len(weights)} teacher weights {weights} for {num_teachers} teacher(s): give each one that "
                "is not negative"
            )
        return tuple(weight / sum(weights) for weight in weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillWeights:
    """Loss weights and temperature of one step, with the state and the random key of the divergence.

    Each number may be a float, which is compiled in, or a scalar array, which may change from step to step.
    """

    soft: Any = 1.0  # weight of the divergence
    hard: Any = 0.0  # weight of the cross entropy
    z_loss: Any = 0.0  # coefficient of the squared log-normaliser, within the cross entropy
    temperature: Any = 1.0  # divides the logits of both sides in the divergence
    # of the divergence, from step to step; empty: its initial state
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key: Any = None  # UInt32[Array, "2"]: key data of the step, for divergences that draw tokens

    def __post_init__(self) -> None:
        temperature = self.temperature
        if isinstance(temperature, int | float) and not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}: it divides logits and must be above 0")


def fit_table(table: Float[Array, "V ..."], num_rows: int) -> Float[Array, "R ..."]:
    """Return the table with `num_rows` rows: cut, or padded with zeros."""
    if table.shape[0] >= num_rows:
        return table[:num_rows]
    return jnp.pad(table, ((0, num_rows - table.shape[0]),) + ((0, 0),) * (table.ndim - 1))


def fit_rows(head: Head, num_rows: int) -> Head:
    """Return the head with `num_rows` rows: cut, which drops the tokens of further rows, or padded."""
    # Padding rows have no probability: `vocab_size` does not grow with them.
    bias = None if head.bias is None else fit_table(head.bias, num_rows)
    return dataclasses.replace(
        head, weight=fit_table(head.weight, num_rows), bias=bias, vocab_size=min(head.vocab_size, num_rows)
    )


def distill_loss(
    hidden: Float[Array, "B T D"],
    head: Head,
    teachers: Sequence[TeacherOutput],
    config: DistillLossConfig,
    targets: Int[Array, "B T"],
    token_weights: Float[Array, "B T"],
    *,
    weights: DistillWeights = DistillWeights(),
    draws: UInt32[Array, "B T 2"] | None = None,
    chunk_size: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the sum of `token_weight * (soft * divergence + hard * (nll + z_loss * logsumexp**2))`, in nats.

    The sum is over the tokens of the global batch, on any mesh or without one, in chunks of tokens.

    Args:
      hidden: final hidden states of the student, whose dtype is that of its matrix products; `head` has a
        gradient too.
      teachers: hidden states and heads of its teachers, without a gradient.
      config: the divergence, and how several teachers are averaged.
      targets: ids of the text, for the cross entropy.
      token_weights: the loss mask, or any weights; they get no gradient.
      weights: `soft`, `hard`, `z_loss` and the temperature.
      draws: two numbers that are different for every token, for divergences that draw tokens.
      chunk_size: tokens of a device per chunk; None gives about 256 MB of logits (of each model).
      vocabulary: how the tensor axis splits the work; None for the split that sends less.

    Returns:
      The sum, and weighted sums without a gradient: `divergence`, and the `nll`, `z` and `correct` of
      `cross_entropy`.

    Raises:
      ValueError: the divergence draws tokens and `weights.key` or `draws` is missing, the teachers' weights
        do not fit, or the tables do not have the same number of rows.
    """
    if config.divergence.draws_at_random and (weights.key is None or draws is None):
        raise ValueError(
            f"{type(config.divergence).__name__} draws at random: give a key, and draws, two numbers for "
            "each token"
        )
    # A constant temperature is part of the program: XLA then simplifies the division by it.
    temperature = float(weights.temperature) if isinstance(weights.temperature, int | float) else None
    dtype = accumulation_dtype(hidden.dtype)
    array_weights = dataclasses.replace(
        weights,
        soft=jnp.asarray(weights.soft, dtype),
        hard=jnp.asarray(weights.hard, dtype),
        z_loss=jnp.asarray(weights.z_loss, dtype),
        temperature=jnp.asarray(weights.temperature, dtype) if temperature is None else None,
        state=weights.state or config.divergence.initial_state(),
    )
    return sharded_sum(
        functools.partial(_chunk_loss_for, config, temperature),
        hidden,
        head,
        tokens=(targets, token_weights, draws),
        others=tuple((teacher.hidden, teacher.head) for teacher in teachers),
        constants=array_weights,
        chunk_size=chunk_size,
        vocabulary=vocabulary,
    )


# Cached, so that `chunked_sum` gets the same function in every call.
@functools.cache
def _chunk_loss_for(
    config: DistillLossConfig, fixed_temperature: float | None, shards: communication.Shards
) -> ChunkFn:
    def chunk_loss(
        hidden: Array, head: Head, tokens: Any, constants: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        (targets, token_weights, draws), teacher_hidden = tokens
        weights, teacher_heads = constants
        student_logits = logits(hidden, head, shards)
        hard, metrics = hard_loss(student_logits, targets, token_weights, weights.z_loss, shards)
        values = token_divergences(
            student_logits,
            head.vocab_size,
            [TeacherOutput(hidden=x, head=y) for x, y in zip(teacher_hidden, teacher_heads, strict=True)],
            config,
            temperature=weights.temperature if fixed_temperature is None else fixed_temperature,
            context=DivergenceContext(shards=shards, state=weights.state, draws=draws, key=weights.key),
        )
        soft = weighted_sum(token_weights, values)
        metrics["divergence"] = jax.lax.stop_gradient(soft)
        return weights.soft * soft + weights.hard * hard, metrics

    return chunk_loss


def token_divergences(
    student_logits: Float[Array, "C v"],
    vocab_size: int,
    teachers: Sequence[TeacherOutput],
    config: DistillLossConfig,
    *,
    temperature: float | Float[Array, ""],
    context: DivergenceContext,
) -> Float[Array, "C"]:
    """Return the divergence of each token of a chunk; only the student's logits get a gradient.

    Args:
      student_logits: logits of the student, with padding columns.
      vocab_size: real columns of the student's full table.
      teachers: hidden states [C, E] and heads.
      config: the divergence, and how several teachers are averaged.
      temperature: divides the logits of both sides.
      context: shards of the vocabulary, state and randomness of the divergence.
    """
    shards = context.shards
    # Distributions over the tokens that all models have: the others would get probability from one side only.
    shared_size = min(vocab_size, *(teacher.head.vocab_size for teacher in teachers))
    log_p = teacher_log_probabilities(
        teachers, config, temperature=temperature, vocab_size=shared_size, shards=shards
    )
    if shared_size < vocab_size:
        is_shared = column_ids(student_logits, shards) < shared_size
        student_logits = jnp.where(is_shared, student_logits, PADDING_LOGIT)
    inputs = (context.state, context.draws, context.key)
    values: Array = _divergence(config.divergence, shards, student_logits / temperature, log_p, inputs)
    return values * temperature**2 if config.scales_by_square else values


def teacher_log_probabilities(
    teachers: Sequence[TeacherOutput],
    config: DistillLossConfig,
    *,
    temperature: float | Float[Array, ""],
    vocab_size: int,
    shards: communication.Shards = UNSHARDED,
) -> Float[Array, "C v"]:
    """Return the log-probabilities of the teachers' mean over the first `vocab_size` columns."""
    # A teacher of weight 0 is left out: 0 times a logit of -inf is NaN.
    weighted_logits = [
        (weight, logits(teacher.hidden, _restricted(teacher.head, vocab_size), shards) / temperature)
        for weight, teacher in zip(config.normalised_weights(len(teachers)), teachers, strict=True)
        if weight > 0
    ]
    # Weighted logits need one normaliser after the sum, probabilities one for each teacher before it.
    if config.mean is TeacherMean.LOGITS or len(weighted_logits) == 1:
        return log_softmax(functools.reduce(jnp.add, [weight * x for weight, x in weighted_logits]), shards)
    return functools.reduce(
        jnp.logaddexp, [math.log(weight) + log_softmax(x, shards) for weight, x in weighted_logits]
    )


def _restricted(head: Head, vocab_size: int) -> Head:
    return dataclasses.replace(head, vocab_size=vocab_size)


# A divergence computes its gradient along with its value: the derived gradient would save the log-softmax of
# both sides, and loses the formulas that stay finite where a probability is 0.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(
    divergence: Divergence,
    shards: communication.Shards,
    student_logits: Array,
    log_p: Array,
    inputs: tuple[Mapping[str, Array], Any, Any],
) -> Array:
    """Return the divergence of softmax(student_logits) from p, [C]."""
    return _divergence_forward(divergence, shards, student_logits, log_p, inputs)[0]


def _divergence_forward(
    divergence: Divergence,
    shards: communication.Shards,
    student_logits: Array,
    log_p: Array,
    inputs: tuple[Mapping[str, Array], Any, Any],
) -> tuple[Array, Array]:
    state, draws, key = inputs
    log_q = log_softmax(student_logits, shards)
    context = DivergenceContext(shards=shards, state=state, draws=draws, key=key)
    values, slope = divergence.value_and_slope(log_p, log_q, context)
    # The gradient of the softmax: see the head of divergences.py.
    return values, slope - jnp.exp(log_q) * shards.sum(jnp.sum(slope, axis=-1))[:, None]


def _divergence_backward(
    divergence: Divergence, shards: communication.Shards, gradient: Array, cotangent: Array
) -> tuple[Array, None, None]:
    del divergence, shards
    return gradient * cotangent[:, None], None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)
