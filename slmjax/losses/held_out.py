"""Sums of an evaluation: loss and calibration on the text, and how near a student is to its teachers.

Dims: B batch, T time, C tokens of a chunk, v columns that a device holds, S bins of confidence.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.losses.chunks import ChunkFn, weighted_sum
from slmjax.losses.divergences import ForwardKl, excess, log_softmax
from slmjax.losses.hard_targets import HardValues, hard_values
from slmjax.losses.heads import PADDING_LOGIT, Head, columns, local_logits
from slmjax.losses.sharded import sharded_sum
from slmjax.losses.soft_targets import DistillLossConfig, TeacherOutput, teacher_log_probabilities
from slmjax.parallel import communication

NUM_BINS = 15  # of confidence, of equal width


def evaluation_sums(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    teachers: Sequence[TeacherOutput] = (),
    matching: DistillLossConfig | None = None,
) -> dict[str, Array]:
    """Weighted sums over the global batch, in nats and tokens, at temperature 1; nothing has a gradient.

    Args:
      teachers: what others say of the same batch.
      matching: how several of them are one; None: all alike, by the mean of their logits.

    Returns:
      `nll`, `weight`; for each of `NUM_BINS` bins of confidence, the probability of the likeliest token,
      `bin_weight`, `bin_confidence` and `bin_correct` [S]; and with teachers `teacher_nll`, `teacher_kl`
      (teacher || student), `agreement` (whether both find the same token the likeliest).
    """
    _, sums = sharded_sum(
        functools.partial(_terms, matching or DistillLossConfig(divergence=ForwardKl())),
        hidden,
        head,
        tokens=(targets, weights),
        others=tuple((teacher.hidden, teacher.head) for teacher in teachers),
    )
    return sums


def expected_calibration_error(bin_weight: Any, bin_confidence: Any, bin_correct: Any) -> float:
    """The mean over tokens of |accuracy - confidence| of their bin (Guo, https://arxiv.org/abs/1706.04599),
    from sums per bin.
    """
    return float(abs(bin_correct - bin_confidence).sum() / bin_weight.sum())


@functools.cache
def _terms(matching: DistillLossConfig, shards: communication.Shards) -> ChunkFn:
    def terms(
        hidden: Array, head: Head, tokens: Any, constants: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        ((targets, weights), states) = tokens
        (_, heads) = constants
        logits = local_logits(hidden, head, shards)
        found = hard_values(logits, targets, shards)
        weights = weights.astype(found.nll.dtype)
        sums = {"nll": weighted_sum(weights, found.nll), "weight": jnp.sum(weights), **_bins(found, weights)}
        if heads:
            shared = min(head.vocab_size, *(other.vocab_size for other in heads))
            log_p = teacher_log_probabilities(
                matching, states, heads, shards, temperature=1.0, vocab_size=shared
            )
            values = _nearness(
                jnp.where(columns(logits, shards) < shared, logits, PADDING_LOGIT), log_p, targets, shards
            )
            sums |= {name: weighted_sum(weights, value) for name, value in values.items()}
        return sums["nll"], sums

    return terms


def _bins(found: HardValues, weights: Float[Array, "C"]) -> dict[str, Float[Array, "S"]]:
    confidence = jnp.exp(found.largest - found.normaliser)
    index = jnp.minimum((confidence * NUM_BINS).astype(jnp.int32), NUM_BINS - 1)
    member = jax.nn.one_hot(index, NUM_BINS, dtype=weights.dtype) * weights[:, None]
    return {
        "bin_weight": member.sum(0),
        "bin_confidence": confidence @ member,
        "bin_correct": found.correct @ member,
    }


def _nearness(
    logits: Float[Array, "C v"],
    log_p: Float[Array, "C v"],
    targets: Int[Array, "C"],
    shards: communication.Shards,
) -> dict[str, Array]:
    log_q = log_softmax(logits, shards)
    is_best = (log_q >= shards.max(jnp.max(log_q, axis=-1))[:, None]) & (
        log_p >= shards.max(jnp.max(log_p, axis=-1))[:, None]
    )
    is_target = columns(log_p, shards) == targets[:, None]
    return {
        "teacher_nll": -shards.sum(jnp.sum(jnp.where(is_target, log_p, 0.0), axis=-1)),
        "teacher_kl": shards.sum(jnp.sum(excess(log_p, log_q), axis=-1)),
        "agreement": jnp.minimum(shards.sum(jnp.sum(is_best, axis=-1).astype(log_q.dtype)), 1.0),
    }
