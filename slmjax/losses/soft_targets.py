"""Divergence from one or more teachers on hidden states: what distillation minimises, with the hard cross
entropy in the same pass.

    teacher = TeacherOutput(hidden=hidden_of_teacher, head=head_of_teacher)
    value, metrics = linear_divergence(hidden, head, (teacher,), ForwardKl(), targets, weights)          #
    tokens in one dim value, metrics = sharded_divergence(hidden, head, (teacher,), ForwardKl(), targets,
    weights)         # [B, T], any mesh values = token_divergence(hidden, head, (teacher,), ForwardKl())
    # [N], one for each token

A temperature T divides the logits of both sides, after soft-caps and multipliers. The gradient of a
divergence at temperature T is about 1 / T**2 of that at 1; with `scales_by_square`, as here by default, the
divergence is multiplied by T**2, so that its weight beside the cross entropy (always at 1) keeps its meaning
(Hinton, https://arxiv.org/abs/1503.02531). Reported divergences are so multiplied too.

Several teachers become one distribution, of the weighted mean of their logits or of their probabilities. Only
columns below the smallest `vocab_size` count for a divergence, on either side: what one model pads, or has
beyond the others, is left out before the softmax.

Dims: B batch, T time, N tokens, C tokens of a chunk, D model, E a teacher's width, v columns that a device
holds.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from slmjax.losses.chunks import ChunkFn, chosen_chunk_size, chunked_sum, over_chunks, weighted_sum
from slmjax.losses.divergences import Divergence, DivergenceContext, State, log_softmax
from slmjax.losses.hard_targets import Metrics, hard_terms
from slmjax.losses.heads import PADDING_LOGIT, Head, accumulation_dtype, check_rows, columns, local_logits
from slmjax.losses.sharded import Vocabulary, sharded_sum
from slmjax.parallel import communication


class TeacherMean(enum.Enum):
    """What is averaged over several teachers."""

    LOGITS = "logits"  # a geometric mean of their distributions
    PROBABILITIES = "probabilities"  # a mixture of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOutput:
    """What a teacher hands over. Its head's table has as many rows as the student's: `fit_rows` makes it
    so.
    """

    hidden: Any  # Float[Array, "N E"] or "B T E"
    head: Head


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillLossConfig:
    """How a student is compared with its teachers: all that is known before the program is compiled."""

    divergence: Divergence
    mean: TeacherMean = TeacherMean.LOGITS
    weights: tuple[float, ...] = ()  # of the teachers; none: all alike
    scales_by_square: bool = True  # whether a divergence at temperature T is multiplied by T**2
    temperature: float = 1.0  # unless an array is given with each step

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: it divides logits and must be above 0")

    def shares(self, num_teachers: int) -> tuple[float, ...]:
        """The weights of the teachers, which add up to 1."""
        weights = self.weights or (1.0,) * num_teachers
        if len(weights) != num_teachers or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"{len(weights)} teacher weights {weights} for {num_teachers} teacher(s): give each one that "
                "is not negative"
            )
        return tuple(weight / sum(weights) for weight in weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillWeights:
    """What may change from step to step, as scalars of one dtype; `state` and `key` for those divergences
    that use them.
    """

    soft: Any  # Float[Array, ""]: weight of the divergence
    hard: Any  # of the cross entropy
    z_loss: Any  # of the squared log-normaliser, within the cross entropy
    temperature: Any = None  # None: the number that is compiled in
    state: Any = dataclasses.field(default_factory=dict)  # State: of the divergence
    key: Any = None  # UInt32[Array, "2"]: key data


def fit_table(table: Float[Array, "V ..."], num_rows: int) -> Float[Array, "R ..."]:
    """The table with so many rows: cut, or filled up with zeros."""
    if table.shape[0] >= num_rows:
        return table[:num_rows]
    return jnp.pad(table, ((0, num_rows - table.shape[0]),) + ((0, 0),) * (table.ndim - 1))


def fit_rows(head: Head, num_rows: int) -> Head:
    """The head with a table of so many rows: cut, which drops what it has beyond them, or filled up with
    padding.
    """

    bias = None if head.bias is None else fit_table(head.bias, num_rows)
    return dataclasses.replace(
        head, weight=fit_table(head.weight, num_rows), bias=bias, vocab_size=min(head.vocab_size, num_rows)
    )


def linear_divergence(
    hidden: Float[Array, "N D"],
    head: Head,
    teachers: Sequence[TeacherOutput],
    matching: Divergence | DistillLossConfig,
    targets: Int[Array, "N"],
    weights: Float[Array, "N"],
    *,
    draws: UInt32[Array, "N 2"] | None = None,
    chunk_size: int | None = None,
    **amounts: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """Sum over tokens of `weight * (soft * divergence + hard * (nll + z_loss * logsumexp**2))`, in nats, in
    chunks of tokens.

    Args:
      hidden: final hidden states of the student, whose dtype is that of its matrix products; `head` has a
        gradient too.
      teachers: hidden states and heads of its teachers, without a gradient.
      matching: the divergence, or all settings of the comparison.
      targets: ids of the text; only the cross entropy looks at them.
      weights: the loss mask, or any weights; no gradient goes through them.
      draws: two numbers that are different for every token, where the divergence draws at random.
      chunk_size: tokens per chunk; None gives about 256 MB of logits (of each model).
      **amounts: fields of `DistillWeights`: `soft` (1 by default), `hard` (0), `z_loss` (0), `temperature`
      (that of `matching`), `state`, `key`.

    Returns:
      The sum, and weighted sums without a gradient: `divergence`, and the `nll`, `z` and `correct` of
        `cross_entropy`.
    """
    matching, given = _checked(matching, hidden.dtype, amounts)
    check_rows(head, *(teacher.head for teacher in teachers))
    tokens = ((targets, weights, draws), tuple(teacher.hidden for teacher in teachers))
    constants = (given, tuple(teacher.head for teacher in teachers))
    size = chosen_chunk_size(chunk_size, hidden, head)
    return chunked_sum(
        _terms(matching, communication.Shards()),
        hidden,
        head,
        tokens=tokens,
        constants=constants,
        chunk_size=size,
    )


def sharded_divergence(
    hidden: Float[Array, "B T D"],
    head: Head,
    teachers: Sequence[TeacherOutput],
    matching: Divergence | DistillLossConfig,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    draws: UInt32[Array, "B T 2"] | None = None,
    chunk_size: int | None = None,
    vocabulary: Vocabulary | None = None,
    **amounts: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """`linear_divergence` of a whole batch on the current mesh (`sharded_sum`): tokens and vocabulary are
    divided over its devices.
    """
    matching, given = _checked(matching, hidden.dtype, amounts)
    return sharded_sum(
        functools.partial(_terms, matching),
        hidden,
        head,
        tokens=(targets, weights, draws),
        others=tuple((teacher.hidden, teacher.head) for teacher in teachers),
        constants=given,
        chunk_size=chunk_size,
        vocabulary=vocabulary,
    )


def token_divergence(
    hidden: Float[Array, "N D"],
    head: Head,
    teachers: Sequence[TeacherOutput],
    matching: Divergence | DistillLossConfig,
    *,
    draws: UInt32[Array, "N 2"] | None = None,
    chunk_size: int | None = None,
    **amounts: Any,
) -> Float[Array, "N"]:
    """The divergence of each token, for a sum that is not known yet: each chunk's logits are made again for
    the gradient.

    Arguments are those of `linear_divergence`, which is faster where the weights of the tokens are known.
    """
    matching, given = _checked(matching, hidden.dtype, amounts)
    heads = tuple(teacher.head for teacher in teachers)
    check_rows(head, *heads)
    size = chosen_chunk_size(chunk_size, hidden, head)

    @jax.checkpoint
    def step(carry: None, chunk: Any) -> tuple[None, Array]:
        own, states, draws = chunk
        logits = local_logits(own, head, communication.Shards())
        return carry, _divergences(
            matching, communication.Shards(), logits, head.vocab_size, states, heads, given, draws
        )

    _, values = over_chunks(step, None, (hidden, tuple(teacher.hidden for teacher in teachers), draws), size)
    return values.reshape(-1)[: hidden.shape[0]]


def _checked(
    matching: Divergence | DistillLossConfig, dtype: Any, amounts: dict[str, Any]
) -> tuple[DistillLossConfig, DistillWeights]:
    if isinstance(matching, Divergence):
        matching = DistillLossConfig(divergence=matching)
    given = {"soft": 1.0, "hard": 0.0, "z_loss": 0.0} | amounts
    state = given.pop("state", None) or matching.divergence.initial_state()
    key = given.pop("key", None)
    if matching.divergence.draws_at_random and key is None:
        raise ValueError(
            f"{type(matching.divergence).__name__} draws at random: give a key, and draws, two numbers for "
            "each token"
        )
    if isinstance(given.get("temperature"), int | float):
        matching = dataclasses.replace(matching, temperature=float(given.pop("temperature")))
    wide = accumulation_dtype(dtype)
    return matching, DistillWeights(
        state=state, key=key, **{name: jnp.asarray(x, wide) for name, x in given.items()}
    )


@functools.cache
def _terms(matching: DistillLossConfig, shards: communication.Shards) -> ChunkFn:
    """The terms of `linear_divergence` over tables that are divided into these shards; of each there is one
    function.
    """

    def terms(hidden: Array, head: Head, tokens: Any, constants: Any) -> tuple[Float[Array, ""], Metrics]:
        ((targets, weights, draws), states) = tokens
        (given, heads) = constants
        logits = local_logits(hidden, head, shards)
        hard, metrics = hard_terms(logits, targets, weights, given.z_loss, shards)
        values = _divergences(matching, shards, logits, head.vocab_size, states, heads, given, draws)
        soft = weighted_sum(weights, values)
        return given.soft * soft + given.hard * hard, {**metrics, "divergence": jax.lax.stop_gradient(soft)}

    return terms


def _divergences(
    matching: DistillLossConfig,
    shards: communication.Shards,
    logits: Float[Array, "C v"],
    vocab_size: int,
    states: Sequence[Array],
    heads: Sequence[Head],
    given: DistillWeights,
    draws: Array | None,
) -> Float[Array, "C"]:
    """The divergence of each token of a chunk from its teachers, from the student's logits."""
    temperature = matching.temperature if given.temperature is None else given.temperature
    shared = min(vocab_size, *(head.vocab_size for head in heads))
    log_p = teacher_log_probabilities(
        matching, states, heads, shards, temperature=temperature, vocab_size=shared
    )
    if shared < vocab_size:
        logits = jnp.where(columns(logits, shards) < shared, logits, PADDING_LOGIT)
    values: Array = _divergence(
        matching.divergence, shards, logits / temperature, log_p, (given.state, draws, given.key)
    )
    return values * temperature**2 if matching.scales_by_square else values


def teacher_log_probabilities(
    matching: DistillLossConfig,
    states: Sequence[Float[Array, "C _"]],  # each as wide as its teacher
    heads: Sequence[Head],
    shards: communication.Shards,
    *,
    temperature: float | Float[Array, ""],
    vocab_size: int,
) -> Float[Array, "C v"]:
    """The log-probabilities of all teachers together, over the first `vocab_size` columns."""
    heads = [dataclasses.replace(head, vocab_size=vocab_size) for head in heads]
    scaled = [
        local_logits(hidden, head, shards) / temperature for hidden, head in zip(states, heads, strict=True)
    ]
    # One of no weight is left out: 0 times a logit of -inf is no number.
    weighted = [(share, x) for share, x in zip(matching.shares(len(heads)), scaled, strict=True) if share > 0]
    if matching.mean is TeacherMean.LOGITS or len(weighted) == 1:
        return log_softmax(functools.reduce(jnp.add, [share * x for share, x in weighted]), shards)
    return functools.reduce(
        jnp.logaddexp, [math.log(share) + log_softmax(x, shards) for share, x in weighted]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(
    divergence: Divergence, shards: communication.Shards, logits: Array, log_p: Array, given: Any
) -> Array:
    """The divergence of softmax(logits) from p, [C]; only the logits have a gradient, which is computed along
    with the value.
    """
    return _divergence_forward(divergence, shards, logits, log_p, given)[0]


def _divergence_forward(
    divergence: Divergence,
    shards: communication.Shards,
    logits: Array,
    log_p: Array,
    given: tuple[State, Any, Any],
) -> tuple[Array, Array]:
    state, draws, key = given
    log_q = log_softmax(logits, shards)
    values, slope = divergence.value_and_slope(
        log_p, log_q, DivergenceContext(shards=shards, state=state, draws=draws, key=key)
    )
    return values, slope - jnp.exp(log_q) * shards.sum(jnp.sum(slope, axis=-1))[:, None]


def _divergence_backward(
    divergence: Divergence, shards: communication.Shards, gradient: Array, cotangent: Array
) -> tuple[Array, None, None]:
    del divergence, shards
    return gradient * cotangent[:, None], None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)
