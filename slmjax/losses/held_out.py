"""Sums of an evaluation: loss and calibration on the text, and how close a student is to its teachers.

Dims: B batch, T time, C tokens of a chunk, v columns that a device holds, S bins of confidence, G groups.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.losses.divergences import ForwardKl, excess, log_softmax
from slmjax.losses.hard_targets import HardValues, hard_values
from slmjax.losses.heads import PADDING_LOGIT, Head, column_ids, logits
from slmjax.losses.soft_targets import DistillLossConfig, TeacherOutput, teacher_log_probabilities
from slmjax.losses.token_sums import ChunkFn, sharded_sum, weighted_sum
from slmjax.parallel import communication

NUM_BINS = 15  # of confidence, of equal width


def evaluation_sums(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    token_weights: Float[Array, "B T"],
    *,
    teachers: Sequence[TeacherOutput] = (),
    config: DistillLossConfig | None = None,
    groups: Int[Array, "B T"] | None = None,
    num_groups: int = 0,
) -> dict[str, Array]:
    """Return weighted sums over the global batch, in nats and tokens, at temperature 1, without a gradient.

    Args:
      hidden: final hidden states.
      head: the output layer.
      targets: ids below `head.vocab_size`.
      token_weights: the loss mask.
      teachers: outputs of other models for the same batch.
      config: how several teachers are averaged; None: the plain mean of their logits.
      groups: the group of each token, below `num_groups`; None: no sums of groups.
      num_groups: number of groups.

    Returns:
      `nll`, `weight`; for each of `NUM_BINS` bins of confidence, the probability of the likeliest token,
      `bin_weight`, `bin_confidence` and `bin_correct` [S]; with groups `group_nll` [G]; and with teachers
      `teacher_nll`, `teacher_kl` (teacher || student), `agreement` (both find the same token the likeliest).
    """
    _, sums = sharded_sum(
        functools.partial(_chunk_loss_for, config or DistillLossConfig(divergence=ForwardKl()), num_groups),
        hidden,
        head,
        tokens=(targets, token_weights, groups),
        others=tuple((teacher.hidden, teacher.head) for teacher in teachers),
    )
    return sums


def expected_calibration_error(bin_weight: Any, bin_confidence: Any, bin_correct: Any) -> float:
    """Return the mean over tokens of |accuracy - confidence| of their bin, from sums per bin.

    Source: Guo et al., https://arxiv.org/abs/1706.04599.
    """
    return float(abs(bin_correct - bin_confidence).sum() / bin_weight.sum())


# Cached, so that `chunked_sum` gets the same function in every call.
@functools.cache
def _chunk_loss_for(config: DistillLossConfig, num_groups: int, shards: communication.Shards) -> ChunkFn:
    def chunk_loss(
        hidden: Array, head: Head, tokens: Any, constants: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        (targets, token_weights, groups), teacher_hidden = tokens
        _, teacher_heads = constants
        student_logits = logits(hidden, head, shards)
        values = hard_values(student_logits, targets, shards)
        token_weights = token_weights.astype(values.nll.dtype)
        sums = {"nll": weighted_sum(token_weights, values.nll), "weight": jnp.sum(token_weights)}
        sums |= _bins(values, token_weights)
        if groups is not None:
            # As in `weighted_sum`: what is not scored adds nothing, also where it is infinite.
            nll = jnp.where(token_weights == 0.0, 0.0, token_weights * values.nll)
            sums["group_nll"] = jax.ops.segment_sum(nll, groups, num_segments=num_groups)
        if teacher_heads:
            shared_size = min(head.vocab_size, *(other.vocab_size for other in teacher_heads))
            log_p = teacher_log_probabilities(
                [TeacherOutput(hidden=x, head=y) for x, y in zip(teacher_hidden, teacher_heads, strict=True)],
                config,
                temperature=1.0,
                vocab_size=shared_size,
                shards=shards,
            )
            # The KL compares tokens that both have; the loss of the student is over all of its own.
            is_shared = column_ids(student_logits, shards) < shared_size
            shared_logits = jnp.where(is_shared, student_logits, PADDING_LOGIT)
            comparison = _comparison(shared_logits, log_p, targets, shards)
            sums |= {name: weighted_sum(token_weights, value) for name, value in comparison.items()}
        return sums["nll"], sums

    return chunk_loss


def _bins(values: HardValues, token_weights: Float[Array, "C"]) -> dict[str, Float[Array, "S"]]:
    confidence = jnp.exp(values.largest - values.normaliser)
    # A confidence of exactly 1 belongs to the last bin.
    index = jnp.minimum((confidence * NUM_BINS).astype(jnp.int32), NUM_BINS - 1)
    member = jax.nn.one_hot(index, NUM_BINS, dtype=token_weights.dtype) * token_weights[:, None]
    return {
        "bin_weight": member.sum(0),
        "bin_confidence": confidence @ member,
        "bin_correct": values.correct @ member,
    }


def _comparison(
    student_logits: Float[Array, "C v"],
    log_p: Float[Array, "C v"],
    targets: Int[Array, "C"],
    shards: communication.Shards,
) -> dict[str, Array]:
    """Return the teacher's loss, the KL from it, and whether the likeliest tokens agree, per token."""
    log_q = log_softmax(student_logits, shards)
    is_best_of_student = log_q >= shards.max(jnp.max(log_q, axis=-1))[:, None]
    is_best_of_teacher = log_p >= shards.max(jnp.max(log_p, axis=-1))[:, None]
    is_target = column_ids(log_p, shards) == targets[:, None]
    # With ties several columns may be the best of both: they count once.
    num_agreeing = shards.sum(jnp.sum(is_best_of_student & is_best_of_teacher, axis=-1).astype(log_q.dtype))
    return {
        "teacher_nll": -shards.sum(jnp.sum(jnp.where(is_target, log_p, 0.0), axis=-1)),
        "teacher_kl": shards.sum(jnp.sum(excess(log_p, log_q), axis=-1)),
        "agreement": jnp.minimum(num_agreeing, 1.0),
    }
