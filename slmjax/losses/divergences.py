"""Divergences between a teacher's distribution p and a student's q: value and gradient in one pass, float32,
sharded over the vocabulary.

Each class is a setting of an experiment and holds its formula. Values are per token, in nats, and never below
zero where the formula is not: what is summed over the vocabulary is `excess`, of which every term is
non-negative, instead of p log(p / q), whose terms cancel.

    forward KL            KL(p || q) = sum p log(p / q)
    reverse KL            KL(q || p)
    JSD, beta             beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q;  beta 0 and 1:
    the forward and reverse KL skew KL, share        KL(p || share p + (1 - share) q) skew reverse KL
    KL(q || (1 - share) p + share q) total variation       1/2 sum |p - q| soft cross entropy    -sum p log q
    TAID                  -sum r log q,  r = softmax((1 - t) log q + t log p) without a gradient; t grows by
    itself top-k with tail       forward KL of k + 1 buckets: the k likeliest of p, and all others together
    sampled               -sum c / n log q,  c counts n draws from p: an unbiased soft cross entropy

The gradient is that by the logits z of q = softmax(z): with g_v the derivative of the value by log q_v, it is
g_v - q_v sum g.

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

from slmjax.losses.heads import PADDING_LOGIT, columns
from slmjax.parallel import communication

LogProbabilities = Float[Array, "C v"]
State = Mapping[str, Array]
SMALL = 0.1  # exponents whose excess is summed as a series


@dataclasses.dataclass(frozen=True)
class DivergenceContext:
    """What a divergence may need beside the distributions."""

    shards: communication.Shards  # of the vocabulary
    state: State  # of the objective
    # UInt32[Array, "C 2"]: what is different for every token of a step; None where nothing is drawn
    draws: Any
    key: Any  # UInt32[Array, "2"]: key data of the step; None where nothing is drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence(abc.ABC):
    """How far a student's distribution is from its teacher's."""

    @abc.abstractmethod
    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        """Per token the divergence, and its derivative by each log q (up to a multiple of q, which the
        softmax takes away).
        """

    @property
    def draws_at_random(self) -> bool:
        """Whether it needs randomness."""
        return False

    def initial_state(self) -> dict[str, Array]:
        """What it remembers from step to step: scalars, kept in the checkpoint."""
        return {}

    def updated_state(
        self, state: State, *, value: Float[Array, ""], progress: Float[Array, ""]
    ) -> dict[str, Array]:
        """What it remembers after a step.

        Args:
          value: the step's mean over all scored tokens.
          progress: the share of the run's steps that come before it.
        """
        del value, progress
        return dict(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardKl(Divergence):
    """KL(p || q): the student covers all that the teacher finds likely. Its gradient is q - p, that of the
    soft cross entropy.
    """

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        return _total(excess(log_p, log_q), context), -jnp.exp(log_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKl(Divergence):
    """KL(q || p): the student keeps to what the teacher finds likely (MiniLLM,
    https://arxiv.org/abs/2306.08543).
    """

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        return _total(excess(log_q, log_p), context), jnp.exp(log_q) * (log_q - log_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jsd(Divergence):
    """Generalised Jensen-Shannon divergence (GKD, https://arxiv.org/abs/2306.13649), at most the entropy of a
    coin that falls so.

    As beta goes to 0 it goes to 0 itself, as beta times the forward KL; at 0 it is the forward KL, at 1 the
    reverse KL, by definition.
    """

    beta: float = 0.5  # weight of the teacher in the mixture: 0 is the forward KL, 1 the reverse KL

    def __post_init__(self) -> None:
        _check_share("beta", self.beta)

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        if self.beta in (0.0, 1.0):
            return (ForwardKl() if self.beta == 0.0 else ReverseKl()).value_and_slope(log_p, log_q, context)
        log_m, over_p, over_q = log_mixture(log_p, log_q, share=1.0 - self.beta)
        values = self.beta * excess(log_p, log_m, over_p) + (1.0 - self.beta) * excess(log_q, log_m, over_q)
        return _total(values, context), -(1.0 - self.beta) * jnp.exp(log_q) * over_q


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewKl(Divergence):
    """KL(p || share p + (1 - share) q): a forward KL that stays finite where q is zero (DistiLLM,
    https://arxiv.org/abs/2402.03898).
    """

    share: float = 0.1  # of the teacher in what it is compared with: 0 is the forward KL, 1 gives zero

    def __post_init__(self) -> None:
        _check_share("share", self.share)

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        if self.share == 0.0:
            return ForwardKl().value_and_slope(log_p, log_q, context)
        log_m, over_p, over_q = log_mixture(log_p, log_q, share=1.0 - self.share)
        # p q / m as p times q / m, which is at most 1 / (1 - share).
        return _total(excess(log_p, log_m, over_p), context), -(1.0 - self.share) * jnp.exp(log_p - over_q)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewReverseKl(Divergence):
    """KL(q || (1 - share) p + share q): a reverse KL that stays finite where p is zero (DistiLLM)."""

    share: float = 0.1  # of the student in what it is compared with: 0 is the reverse KL, 1 gives zero

    def __post_init__(self) -> None:
        _check_share("share", self.share)

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        if self.share == 0.0:
            return ReverseKl().value_and_slope(log_p, log_q, context)
        log_m, _, over_q = log_mixture(log_p, log_q, share=self.share)
        return _total(excess(log_q, log_m, over_q), context), jnp.exp(log_q) * (
            -over_q - self.share * jnp.exp(-over_q)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TotalVariation(Divergence):
    """1/2 sum |p - q|, between 0 and 1.

    It has a corner where a p equals its q. The sign that is its gradient there is 0, also where the two
    differ by no more than the
    rounding of their logarithms: which sign rounding has is chance, and would move a student that agrees with
    its teacher.
    """

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        q = jnp.exp(log_q)
        difference = q - jnp.exp(log_p)
        rounding = 32 * jnp.finfo(log_q.dtype).eps * (1.0 - jnp.minimum(log_p, log_q))
        sign = jnp.where(jnp.abs(log_q - log_p) <= rounding, 0.0, jnp.sign(difference))
        return 0.5 * _total(jnp.abs(difference), context), 0.5 * sign * q


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftCrossEntropy(Divergence):
    """-sum p log q: the forward KL and the teacher's entropy, which has no gradient."""

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        p = jnp.exp(log_p)
        return _total(-p * log_q, context), -p


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taid(Divergence):
    """Soft cross entropy with a distribution between the student and its teacher
    (https://arxiv.org/abs/2501.16937).

    The share t of the teacher grows by itself: faster while the loss falls (the momentum of its relative
    change decides), and never slower than a straight line from `start` to `end` over the run.
    """

    start: float = 0.4  # the teacher's share in the first step
    end: float = 1.0  # the teacher's share in the end
    rate: float = 5e-4  # largest part of what is left of the way that one step goes
    momentum: float = 0.99  # of the relative change of the loss

    def __post_init__(self) -> None:
        for name in ("start", "end", "momentum"):
            _check_share(name, getattr(self, name))
        if self.start > self.end or self.rate < 0:
            raise ValueError(
                f"TAID goes from start={self.start} up to end={self.end} at a rate of at least 0, got "
                f"{self.rate}"
            )

    def least_share(self, progress: Any) -> Any:  # a float of a float, an array of an array
        """Return the share on the straight line: `progress` is the part of the run's steps that were
        trained.
        """
        return self.start + (self.end - self.start) * progress

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
        is_first = state["previous"] < 0.0
        change = (previous - value) / (previous + 1e-15)
        momentum = self.momentum * state["momentum"] + (1.0 - self.momentum) * change
        adaptive = state["share"] + self.rate * jax.nn.sigmoid(momentum) * (1.0 - state["share"])
        share = jnp.minimum(self.end, jnp.maximum(self.least_share(progress), adaptive))
        return {
            "share": jnp.where(is_first, state["share"], share),
            "momentum": jnp.where(is_first, state["momentum"], momentum),
            "previous": value.astype(previous.dtype),
        }

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        share = context.state["share"].astype(log_q.dtype)
        between = jnp.exp(log_softmax((1.0 - share) * log_q + share * log_p, context.shards))
        return _total(-between * log_q, context), -between


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Divergence):
    """Forward KL of the teacher's k likeliest tokens and one bucket of all others: a lower bound of the
    forward KL.

    Both sides keep their full normalisers: a token outside the k has a gradient too, that of the bucket, and
    k = 1 is not trivial.
    """

    k: int = 64  # tokens that are kept

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def value_and_slope(
        self, log_p: LogProbabilities, log_q: LogProbabilities, context: DivergenceContext
    ) -> tuple[Float[Array, "C"], LogProbabilities]:
        kept = top_columns(log_p, self.k, context.shards)
        tail_p, tail_q = (_log_total(jnp.where(kept, PADDING_LOGIT, x), context) for x in (log_p, log_q))
        values = _total(jnp.where(kept, excess(log_p, log_q), 0.0), context) + excess(tail_p, tail_q)
        # Of the tail's probability p each of its columns has a share q_v / q: in logarithms, as q may be less
        # than float32 can hold.
        tail_slope = jnp.exp(tail_p[:, None] + jnp.minimum(log_q - tail_q[:, None], 0.0))
        return values, -jnp.where(kept, jnp.exp(log_p), tail_slope)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Divergence):
    """Cross entropy with tokens drawn from the teacher, with replacement (https://arxiv.org/abs/2503.16870):
    unbiased, unlike top-k.

    What is drawn for a token depends on the step and on the token's place in the data, not on how a batch is
    divided.
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
        target = draw_counts(jnp.exp(log_p), self.draws, context).astype(log_q.dtype) / self.draws
        return _total(-target * log_q, context), -target


# Over the vocabulary ----------------------------------------------------------------------------------------
def log_softmax(x: Float[Array, "C v"], shards: communication.Shards) -> LogProbabilities:
    """Log-probabilities over the whole vocabulary, of which each of some devices holds a part. They are
    finite, also of logits of -inf.
    """
    x = jnp.maximum(x, PADDING_LOGIT)
    x = x - shards.max(jnp.max(x, axis=-1))[:, None]
    return x - jnp.log(shards.sum(jnp.sum(jnp.exp(x), axis=-1)))[:, None]


def excess(log_a: Array, log_b: Array, log_ratio: Array | None = None) -> Array:
    """b - a - a log(b / a), never negative; it sums to KL(a || b) where a and b sum to the same.

    Args:
      log_a: a's logarithms.
      log_b: b's.
      log_ratio: log(b / a), where it is known better than by their difference.
    """
    exponent = log_b - log_a if log_ratio is None else log_ratio
    x = jnp.clip(exponent, -SMALL, SMALL)
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
    a = jnp.exp(log_a)
    return jnp.where(jnp.abs(exponent) < SMALL, a * series, jnp.exp(log_b) - a - a * exponent)


def log_mixture(
    log_p: LogProbabilities, log_q: LogProbabilities, *, share: float
) -> tuple[LogProbabilities, LogProbabilities, LogProbabilities]:
    """log m, log(m / p) and log(m / q) of the mixture m = (1 - share) p + share q."""
    x = log_q - log_p
    # From the smaller side, so that e^x - 1 is exact near 0 and finite everywhere; m is no less than the
    # smaller one, also once rounded.
    # log(m / max(p, q))
    log_larger = jnp.log1p(jnp.where(x <= 0, share, 1.0 - share) * jnp.expm1(-jnp.abs(x)))
    log_larger = jnp.maximum(log_larger, -jnp.abs(x))
    return (
        jnp.maximum(log_p, log_q) + log_larger,
        log_larger + jnp.maximum(x, 0.0),
        log_larger - jnp.minimum(x, 0.0),
    )


def top_columns(log_p: LogProbabilities, k: int, shards: communication.Shards) -> Bool[Array, "C v"]:
    """Which columns are the k largest of the whole vocabulary; of equal ones those of the smaller ids.

    By counting, bit by bit, not by sorting: each pass is a sum over the vocabulary, which may be divided.
    """
    k = min(k, log_p.shape[-1] * shards.count)
    # Of numbers that are not negative, the bits are in the order of the numbers.
    bits = jax.lax.bitcast_convert_type(jnp.abs(log_p), {4: jnp.uint32, 8: jnp.uint64}[log_p.dtype.itemsize])
    last = _kth_smallest(bits, k, shards)
    num_before = shards.sum(jnp.sum(bits < last[:, None], axis=-1))
    # Columns that are equal to the last one, by their ids; all others come after them.
    ids = jnp.where(bits == last[:, None], columns(log_p, shards), jnp.iinfo(jnp.int32).max).astype(
        jnp.uint32
    )
    num_bits = (log_p.shape[-1] * shards.count).bit_length()
    return (bits < last[:, None]) | (
        ids <= _kth_smallest(ids, k - num_before, shards, num_bits=num_bits)[:, None]
    )


def _kth_smallest(
    values: UInt[Array, "C v"],
    k: int | Int[Array, "C"],
    shards: communication.Shards,
    *,
    num_bits: int | None = None,
) -> UInt[Array, "C"]:
    """The k-th smallest of each row, below 2**num_bits: the largest number that has fewer than k below it,
    from its highest bit on.
    """
    num_bits = 8 * values.dtype.itemsize if num_bits is None else num_bits

    def step(index: Array, found: Array) -> Array:
        trial = found | (jnp.ones((), values.dtype) << (num_bits - 1 - index).astype(values.dtype))
        num_below = shards.sum(jnp.sum(values < trial[:, None], axis=-1))
        return jnp.where(num_below < k, trial, found)

    return jax.lax.fori_loop(0, num_bits, step, 0 * shards.max(jnp.max(values, axis=-1)))


def draw_counts(p: Float[Array, "C v"], num_draws: int, context: DivergenceContext) -> Int[Array, "C v"]:
    """How often each column is drawn: the columns in which uniform numbers fall, laid over the cumulated
    probabilities.
    """
    cumulated = jnp.cumsum(p, axis=-1)
    ends = jnp.cumsum(context.shards.gather(cumulated[:, -1:], axis=-1), axis=-1)
    end = jax.lax.dynamic_slice_in_dim(ends, context.shards.index(), 1, axis=-1)
    start = end - cumulated[:, -1:]
    before = jnp.where(jnp.arange(ends.shape[-1]) < context.shards.index(), ends, 0.0).max(
        axis=-1, keepdims=True
    )
    # a number that rounds up to the end of all would fall nowhere
    below = jnp.nextafter(ends[:, -1:], jnp.zeros((), ends.dtype))
    numbers = jnp.minimum(_uniform(context.key, context.draws, num_draws, p.dtype) * ends[:, -1:], below)
    mine = (numbers >= before) & (numbers < end)
    find = jax.vmap(lambda sums, values: jnp.searchsorted(sums, values, side="right"))
    # The last column with a probability, where rounding would lead to one of padding behind it.
    last = jax.vmap(lambda sums: jnp.searchsorted(sums, sums[-1]))(cumulated)[:, None]
    places = jnp.minimum(find(cumulated, numbers - start), last)
    rows = jnp.arange(p.shape[0])[:, None]
    return jnp.zeros(p.shape, jnp.int32).at[rows, places].add(mine.astype(jnp.int32))


def _uniform(
    key: UInt32[Array, "2"], ids: UInt32[Array, "C 2"], count: int, dtype: Any
) -> Float[Array, "C n"]:
    def of_token(id: UInt32[Array, "2"]) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), id[0]), id[1])
        return jax.random.uniform(own, (count,), dtype)

    return jax.vmap(of_token)(ids)


def _total(values: Float[Array, "C v"], context: DivergenceContext) -> Float[Array, "C"]:
    return context.shards.sum(jnp.sum(values, axis=-1))


def _log_total(logs: LogProbabilities, context: DivergenceContext) -> Float[Array, "C"]:
    """The logarithm of the sum over the vocabulary of what `logs` are the logarithms of.

    It is at least half of PADDING_LOGIT, so that two sums of nothing are equal, whatever the rounding of
    numbers of that size.
    """
    largest = context.shards.max(jnp.max(logs, axis=-1))
    total = context.shards.sum(jnp.sum(jnp.exp(logs - largest[:, None]), axis=-1))
    return jnp.maximum(largest + jnp.log(total), 0.5 * PADDING_LOGIT)


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0 or math.isnan(value):
        raise ValueError(f"{name} is a share between 0 and 1, got {value}")
