"""Divergences between a teacher's distribution p and a student's q: value and gradient in one pass.

Each class is a setting of an experiment and holds its formula. Values are per token, in nats, in float32.

    forward KL               KL(p || q) = sum p log(p / q)
    reverse KL               KL(q || p)
    JSD, beta                beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q;
                             the forward and the reverse KL for beta 0 and 1
    skew KL, alpha           KL(p || alpha p + (1 - alpha) q)
    skew reverse KL, alpha   KL(q || (1 - alpha) p + alpha q)
    total variation          1/2 sum |p - q|
    soft cross entropy       -sum p log q
    TAID                     -sum r log q,  r = softmax((1 - t) log q + t log p) without a gradient; t grows
                             over the run
    top-k with tail          forward KL of k + 1 buckets: the k likeliest tokens of p, and all others together
    sampled                  -sum c / n log q,  c counts n draws from p: an unbiased soft cross entropy

Values are never negative where the formula is not: the sum over the vocabulary is one of `excess`, whose
terms are all non-negative, instead of p log(p / q), whose terms cancel.

Let g_v be the derivative of the value by log q_v. The gradient by the logits z of q = softmax(z) is then
g_v - q_v sum g.

Each device may hold a part of the vocabulary: sums and maxima over it go through `Shards`.

Dims: C tokens, v columns of the vocabulary that a device holds, n draws.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt, UInt32

from slmjax.config import renamed_field
from slmjax.losses.heads import PADDING_LOGIT, UNSHARDED, column_ids
from slmjax.parallel import communication

LogProbabilities = Float[Array, "C v"]
State = Mapping[str, Array]
SMALL = 0.1  # `excess` of smaller exponents is summed as a series


@dataclasses.dataclass(frozen=True)
class DivergenceContext:
    """Inputs of a divergence in addition to the two distributions."""

    shards: communication.Shards = UNSHARDED  # of the vocabulary
    state: State = dataclasses.field(default_factory=dict)  # of the divergence, from step to step
    # UInt32[Array, "C 2"]: different for every token of a step; None for divergences that draw nothing
    draws: Any = None
    key: Any = None  # UInt32[Array, "2"]: key data of the step; None for divergences that draw nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence(abc.ABC):
    """Difference between a student's distribution and its teacher's."""

    @abc.abstractmethod
    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        """Return the divergence of each token, and its derivative by each log q.

        The derivative may be off by a multiple of q, which the gradient of the softmax cancels.
        """

    @property
    def draws_at_random(self) -> bool:
        """Return True if the divergence draws tokens, and needs `key` and `draws` of the context."""
        return False

    def initial_state(self) -> dict[str, Array]:
        """Return the state before the first step: scalars, saved in checkpoints."""
        return {}

    def updated_state(
        self, state: State, *, value: Float[Array, ""], progress: Float[Array, ""]
    ) -> dict[str, Array]:
        """Return the state after a step.

        Args:
          state: the state before the step.
          value: the step's mean over all scored tokens.
          progress: fraction of the run's steps that come before this one.
        """
        del value, progress
        return dict(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardKl(Divergence):
    """KL(p || q): the student must cover every token that the teacher finds likely.

    Its gradient is q - p, the same as that of the soft cross entropy.
    """

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        return _total(excess(log_p, log_q), context), -jnp.exp(log_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKl(Divergence):
    """KL(q || p): the student prefers tokens that the teacher finds likely.

    Source: MiniLLM, https://arxiv.org/abs/2306.08543.
    """

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        return _total(excess(log_q, log_p), context), jnp.exp(log_q) * (log_q - log_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jsd(Divergence):
    """Generalised Jensen-Shannon divergence, at most the entropy of a coin with probability beta.

    It is the forward KL for beta 0 and the reverse KL for beta 1, by definition: as beta goes to 0, the
    formula itself goes to 0, like beta times the forward KL.

    Source: GKD, https://arxiv.org/abs/2306.13649.
    """

    beta: float = 0.5  # weight of the teacher in the mixture: 0 is the forward KL, 1 the reverse KL

    def __post_init__(self) -> None:
        _check_fraction("beta", self.beta)

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        # The formula itself is 0 at both ends: the KLs are the convention of GKD.
        if self.beta in (0.0, 1.0):
            return (ForwardKl() if self.beta == 0.0 else ReverseKl()).value_and_slope(log_p, log_q, context)
        log_m, log_m_over_p, log_m_over_q = log_mixture(log_p, log_q, q_weight=1.0 - self.beta)
        # Both terms take the ratio from `log_mixture`: m and p may agree in all digits of their logarithms.
        of_p = self.beta * excess(log_p, log_m, log_m_over_p)
        of_q = (1.0 - self.beta) * excess(log_q, log_m, log_m_over_q)
        return _total(of_p + of_q, context), -(1.0 - self.beta) * jnp.exp(log_q) * log_m_over_q


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewKl(Divergence):
    """KL(p || alpha p + (1 - alpha) q): a forward KL that stays finite where q is zero.

    Source: DistiLLM, https://arxiv.org/abs/2402.03898.
    """

    # skew coefficient, the teacher's weight in the mixture: 0 is the forward KL, 1 gives zero
    alpha: float = renamed_field(0.1, was="share")

    def __post_init__(self) -> None:
        _check_fraction("alpha", self.alpha)

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        if self.alpha == 0.0:
            return ForwardKl().value_and_slope(log_p, log_q, context)
        log_m, log_m_over_p, log_m_over_q = log_mixture(log_p, log_q, q_weight=1.0 - self.alpha)
        # p q / m as p times q / m, which is at most 1 / (1 - alpha).
        slope = -(1.0 - self.alpha) * jnp.exp(log_p - log_m_over_q)
        return _total(excess(log_p, log_m, log_m_over_p), context), slope


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewReverseKl(Divergence):
    """KL(q || (1 - alpha) p + alpha q): a reverse KL that stays finite where p is zero (DistiLLM)."""

    # skew coefficient, the student's weight in the mixture: 0 is the reverse KL, 1 gives zero
    alpha: float = renamed_field(0.1, was="share")

    def __post_init__(self) -> None:
        _check_fraction("alpha", self.alpha)

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        if self.alpha == 0.0:
            return ReverseKl().value_and_slope(log_p, log_q, context)
        log_m, _, log_m_over_q = log_mixture(log_p, log_q, q_weight=self.alpha)
        slope = jnp.exp(log_q) * (-log_m_over_q - self.alpha * jnp.exp(-log_m_over_q))
        return _total(excess(log_q, log_m, log_m_over_q), context), slope


@dataclasses.dataclass(frozen=True, kw_only=True)
class TotalVariation(Divergence):
    """1/2 sum |p - q|, between 0 and 1.

    Its gradient jumps where a p equals its q. There it is 0, also where the two differ by no more than the
    rounding of their logarithms: the sign of a rounding error would move a student that agrees with its
    teacher.
    """

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        # The derivative by log q_v is q_v times that by q_v, a sign.
        q = jnp.exp(log_q)
        difference = q - jnp.exp(log_p)
        # The error of a log-softmax grows with the magnitude of its result.
        rounding = 32 * jnp.finfo(log_q.dtype).eps * (1.0 - jnp.minimum(log_p, log_q))
        sign = jnp.where(jnp.abs(log_q - log_p) <= rounding, 0.0, jnp.sign(difference))
        return 0.5 * _total(jnp.abs(difference), context), 0.5 * sign * q


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftCrossEntropy(Divergence):
    """-sum p log q: the forward KL plus the teacher's entropy, which has no gradient."""

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        p = jnp.exp(log_p)
        return _total(-p * log_q, context), -p


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taid(Divergence):
    """Soft cross entropy with a distribution between the student and its teacher.

    The teacher's weight t in the mixture of logits grows over the run: faster while the loss falls (the
    momentum of its relative change decides), and never slower than a straight line from `start` to `end`.

    Source: TAID, https://arxiv.org/abs/2501.16937.
    """

    start: float = 0.4  # the teacher's weight in the first step
    end: float = 1.0  # the teacher's weight at the end of the run
    rate: float = 5e-4  # largest fraction of the remaining way that one step goes
    momentum: float = 0.99  # of the relative change of the loss

    def __post_init__(self) -> None:
        for name in ("start", "end", "momentum"):
            _check_fraction(name, getattr(self, name))
        if self.start > self.end or self.rate < 0:
            raise ValueError(
                f"TAID goes from start={self.start} up to end={self.end} at a rate of at least 0, got "
                f"{self.rate}"
            )

    def min_teacher_weight(self, progress: Any) -> Any:  # a float of a float, an array of an array
        """Return the teacher's weight on the straight line after this fraction of the run's steps."""
        return self.start + (self.end - self.start) * progress

    # The keys are those of checkpoints and of the log: "share" is the teacher's weight.
    def initial_state(self) -> dict[str, Array]:
        return {
            "share": jnp.full((), self.start, float),
            "momentum": jnp.zeros(()),
            "previous": jnp.full((), -1.0, float),
        }

    def updated_state(
        self, state: State, *, value: Float[Array, ""], progress: Float[Array, ""]
    ) -> dict[str, Array]:
        previous = state["previous"]
        is_first = previous < 0.0
        change = (previous - value) / (previous + 1e-15)
        momentum = self.momentum * state["momentum"] + (1.0 - self.momentum) * change
        # The step is a fraction of the remaining way, larger while the loss falls.
        adaptive = state["share"] + self.rate * jax.nn.sigmoid(momentum) * (1.0 - state["share"])
        weight = jnp.minimum(self.end, jnp.maximum(self.min_teacher_weight(progress), adaptive))
        # The first step has no loss to compare with: it only remembers its own.
        return {
            "share": jnp.where(is_first, state["share"], weight),
            "momentum": jnp.where(is_first, state["momentum"], momentum),
            "previous": value.astype(previous.dtype),
        }

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        weight = context.state["share"].astype(log_q.dtype)
        # The mixture is a target: the student gets no gradient through it.
        between = jnp.exp(log_softmax((1.0 - weight) * log_q + weight * log_p, context.shards))
        return _total(-between * log_q, context), -between


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Divergence):
    """Forward KL of the teacher's k likeliest tokens and one bucket of all others.

    It is a lower bound of the forward KL. Both sides keep their full normalisers: a token outside the k has a
    gradient too, that of the bucket, and k = 1 is not trivial.
    """

    k: int = 64  # tokens with a bucket of their own

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        is_top = top_columns(log_p, self.k, context.shards)
        tail_p, tail_q = (_log_total(jnp.where(is_top, PADDING_LOGIT, x), context) for x in (log_p, log_q))
        values = _total(jnp.where(is_top, excess(log_p, log_q), 0.0), context) + excess(tail_p, tail_q)
        # Each column of the tail gets the fraction q_v / q of the tail's probability p: in logarithms, as q
        # may be smaller than float32 can represent.
        tail_slope = jnp.exp(tail_p[:, None] + jnp.minimum(log_q - tail_q[:, None], 0.0))
        return values, -jnp.where(is_top, jnp.exp(log_p), tail_slope)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Divergence):
    """Cross entropy with tokens drawn from the teacher, with replacement: unbiased, unlike top-k.

    The draws of a token depend on the step and on the token's position in the data, not on how a batch is
    sharded or cut into microbatches.

    Source: https://arxiv.org/abs/2503.16870.
    """

    draws: int = 50  # tokens drawn for each position

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

    @property
    def draws_at_random(self) -> bool:
        return True

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        # The draws have probabilities p, so their counts over n have the expectation p.
        target = draw_counts(jnp.exp(log_p), self.draws, context).astype(log_q.dtype) / self.draws
        return _total(-target * log_q, context), -target


# Over the vocabulary ----------------------------------------------------------------------------------------
def log_softmax(x: Float[Array, "C v"], shards: communication.Shards) -> LogProbabilities:
    """Return log-probabilities over the full vocabulary; they are finite, also for logits of -inf."""
    # -inf would become NaN as soon as it is multiplied by a probability of 0.
    x = jnp.maximum(x, PADDING_LOGIT)
    x = x - shards.max(jnp.max(x, axis=-1))[:, None]
    return x - jnp.log(shards.sum(jnp.sum(jnp.exp(x), axis=-1)))[:, None]


def excess(log_a: Array, log_b: Array, log_ratio: Array | None = None) -> Array:
    """Return b - a - a log(b / a), never negative; it sums to KL(a || b) where a and b sum to the same.

    Args:
      log_a: logarithms of a.
      log_b: logarithms of b.
      log_ratio: log(b / a), if it is known more precisely than from their difference.
    """
    exponent = log_b - log_a if log_ratio is None else log_ratio
    # Near 0 the three terms cancel: the Taylor series of e^x - 1 - x has the digits that the difference lost.
    x = jnp.clip(exponent, -SMALL, SMALL)
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
    a = jnp.exp(log_a)
    return jnp.where(jnp.abs(exponent) < SMALL, a * series, jnp.exp(log_b) - a - a * exponent)


def log_mixture(
    log_p: LogProbabilities, log_q: LogProbabilities, *, q_weight: float
) -> tuple[LogProbabilities, LogProbabilities, LogProbabilities]:
    """Return log m, log(m / p) and log(m / q) of the mixture m = (1 - q_weight) p + q_weight q."""
    x = log_q - log_p
    # log(m / max(p, q)), from the smaller side: e^x - 1 is then exact near 0 and finite everywhere.
    smaller_weight = jnp.where(x <= 0, q_weight, 1.0 - q_weight)
    log_m_over_larger = jnp.log1p(smaller_weight * jnp.expm1(-jnp.abs(x)))
    # m is no less than the smaller one, also after rounding.
    log_m_over_larger = jnp.maximum(log_m_over_larger, -jnp.abs(x))
    return (
        jnp.maximum(log_p, log_q) + log_m_over_larger,
        log_m_over_larger + jnp.maximum(x, 0.0),
        log_m_over_larger - jnp.minimum(x, 0.0),
    )


def top_columns(log_p: LogProbabilities, k: int, shards: communication.Shards) -> Bool[Array, "C v"]:
    """Return a mask of the k largest columns of the full vocabulary; among equal ones, smaller ids first.

    The threshold is found bit by bit, by counting: each pass is a sum over the vocabulary, which works on
    shards, while a sort would gather them.
    """
    # A k beyond the vocabulary keeps all of it.
    k = min(k, log_p.shape[-1] * shards.count)
    # The bit patterns of non-negative floats are ordered as the floats are; log p is negative, so that its
    # largest values have the smallest patterns.
    bits = jax.lax.bitcast_convert_type(jnp.abs(log_p), {4: jnp.uint32, 8: jnp.uint64}[log_p.dtype.itemsize])
    threshold = _kth_smallest(bits, k, shards)[:, None]
    is_before = bits < threshold
    # Ties: of the columns equal to the k-th, those of the smallest ids fill the remaining places.
    num_before = shards.sum(jnp.sum(is_before, axis=-1))
    ids = jnp.where(bits == threshold, column_ids(log_p, shards), jnp.iinfo(jnp.int32).max).astype(jnp.uint32)
    num_bits = (log_p.shape[-1] * shards.count).bit_length()
    last_id = _kth_smallest(ids, k - num_before, shards, num_bits=num_bits)[:, None]
    return is_before | (ids <= last_id)


def _kth_smallest(
    values: UInt[Array, "C v"],
    k: int | Int[Array, "C"],
    shards: communication.Shards,
    *,
    num_bits: int | None = None,
) -> UInt[Array, "C"]:
    """Return the k-th smallest of each token's values, which are below 2**num_bits.

    It is the largest number with fewer than k values below it, built from its highest bit down.
    """
    num_bits = 8 * values.dtype.itemsize if num_bits is None else num_bits

    def step(index: Array, threshold: Array) -> Array:
        trial = threshold | (jnp.ones((), values.dtype) << (num_bits - 1 - index).astype(values.dtype))
        num_below = shards.sum(jnp.sum(values < trial[:, None], axis=-1))
        return jnp.where(num_below < k, trial, threshold)

    # Zeros that vary over the same mesh axes as the sums do, as the loop's carry must.
    zeros = 0 * shards.max(jnp.max(values, axis=-1))
    return jax.lax.fori_loop(0, num_bits, step, zeros)


def draw_counts(p: Float[Array, "C v"], num_draws: int, context: DivergenceContext) -> Int[Array, "C v"]:
    """Return how often each column is drawn from p, [C, v].

    Uniform numbers are drawn over the cumulative sum of the full vocabulary, the same on every device; each
    device counts those that fall into its own columns.
    """
    shards = context.shards
    cumulative = jnp.cumsum(p, axis=-1)
    ends = jnp.cumsum(shards.gather(cumulative[:, -1:], axis=-1), axis=-1)
    end = jax.lax.dynamic_slice_in_dim(ends, shards.index(), 1, axis=-1)
    start = end - cumulative[:, -1:]
    is_earlier = jnp.arange(ends.shape[-1]) < shards.index()
    # The end of the shard before, and not `start`, which is rounded: shards must neither overlap nor leave
    # gaps.
    previous_end = jnp.where(is_earlier, ends, 0.0).max(axis=-1, keepdims=True)
    # A number that rounds up to the last end would fall nowhere.
    below_last_end = jnp.nextafter(ends[:, -1:], jnp.zeros((), ends.dtype))
    uniform = _uniform(context.key, context.draws, num_draws, p.dtype)
    numbers = jnp.minimum(uniform * ends[:, -1:], below_last_end)
    is_mine = (numbers >= previous_end) & (numbers < end)
    find = jax.vmap(lambda sums, values: jnp.searchsorted(sums, values, side="right"))
    # The last column with a probability, in case rounding leads to a padding column after it.
    last = jax.vmap(lambda sums: jnp.searchsorted(sums, sums[-1]))(cumulative)[:, None]
    drawn = jnp.minimum(find(cumulative, numbers - start), last)
    token_index = jnp.arange(p.shape[0])[:, None]
    # Numbers of other shards are added as 0, at any column.
    return jnp.zeros(p.shape, jnp.int32).at[token_index, drawn].add(is_mine.astype(jnp.int32))


def _uniform(
    key: UInt32[Array, "2"], ids: UInt32[Array, "C 2"], count: int, dtype: Any
) -> Float[Array, "C n"]:
    def of_token(id: UInt32[Array, "2"]) -> Array:
        # A key of its own for every token: its draws do not change with the tokens next to it.
        token_key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), id[0]), id[1])
        return jax.random.uniform(token_key, (count,), dtype)

    return jax.vmap(of_token)(ids)


def _total(values: Float[Array, "C v"], context: DivergenceContext) -> Float[Array, "C"]:
    return context.shards.sum(jnp.sum(values, axis=-1))


def _log_total(logs: LogProbabilities, context: DivergenceContext) -> Float[Array, "C"]:
    """Return the logsumexp over the full vocabulary, at least half of PADDING_LOGIT.

    The bound makes two sums over masked columns alone equal, whatever the rounding at that magnitude.
    """
    largest = context.shards.max(jnp.max(logs, axis=-1))
    total = context.shards.sum(jnp.sum(jnp.exp(logs - largest[:, None]), axis=-1))
    return jnp.maximum(largest + jnp.log(total), 0.5 * PADDING_LOGIT)


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0 or math.isnan(value):
        raise ValueError(f"{name} is a fraction between 0 and 1, got {value}")
