"""Cross entropy on the targets of the text.

    loss_sum, metrics = cross_entropy(hidden, head, targets, weights, z_loss=1e-4)          # tokens in one
    dim loss_sum, metrics = sharded_cross_entropy(hidden, head, targets, weights, z_loss=1e-4)  # [B, T], any
    mesh

Dims: B batch, T time, N tokens, C tokens of a chunk, D model.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.losses.chunks import ChunkFn, chosen_chunk_size, chunked_sum, weighted_sum
from slmjax.losses.heads import Head, accumulation_dtype, columns, local_logits
from slmjax.losses.sharded import Vocabulary, sharded_sum
from slmjax.parallel import communication

Metrics = dict[str, Float[Array, ""]]


def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Head,
    targets: Int[Array, "N"],
    weights: Float[Array, "N"],
    *,
    z_loss: float | Float[Array, ""] = 0.0,
    chunk_size: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Sum over tokens of `weight * (nll + z_loss * logsumexp(logits)**2)`, in nats, in chunks of tokens.

    Args:
      hidden: final hidden states; their dtype is that of the matrix products.
      head: the head; its gradient is summed in float32.
      targets: ids below `head.vocab_size`.
      weights: the loss mask, or any weights; no gradient goes through them.
      z_loss: coefficient that keeps the softmax normaliser near 1 (PaLM, https://arxiv.org/abs/2204.02311,
        section 5).
      chunk_size: tokens per chunk; None gives about 256 MB of logits.

    Returns:
      The sum, and weighted sums without a gradient: `nll`, `z` (squared logsumexp, without its coefficient)
        and `correct`
      (whether no logit is larger than the target's, so that equal ones count).
    """
    size = chosen_chunk_size(chunk_size, hidden, head)
    coefficient = jnp.asarray(z_loss, accumulation_dtype(hidden.dtype))
    terms = _cross_entropy_terms(communication.Shards())
    return chunked_sum(
        terms, hidden, head, tokens=((targets, weights), ()), constants=(coefficient, ()), chunk_size=size
    )


@functools.cache
def _cross_entropy_terms(shards: communication.Shards) -> ChunkFn:
    """The terms of `cross_entropy` over the table that is divided into these shards; of each there is one
    function.
    """

    def terms(hidden: Array, head: Head, tokens: Any, constants: Any) -> tuple[Float[Array, ""], Metrics]:
        (targets, weights), _ = tokens
        return hard_terms(local_logits(hidden, head, shards), targets, weights, constants[0], shards)

    return terms


@dataclasses.dataclass(frozen=True)
class HardValues:
    """Of each token of a chunk, [C]."""

    nll: Array  # of its target
    normaliser: Array  # logsumexp of its logits
    largest: Array  # of its logits, without a gradient
    correct: Array  # 1 where no logit is larger than the target's, so that equal ones count


def hard_values(
    logits: Float[Array, "C v"], targets: Int[Array, "C"], shards: communication.Shards
) -> HardValues:
    """What is told of each target from a chunk's logits, or the shard of them that a device holds."""
    largest = shards.max(jnp.max(logits, axis=-1))
    normaliser = largest + jnp.log(shards.sum(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)))
    # A masked sum instead of a gather: its gradient is elementwise and not a scatter into [C, V].
    is_target = columns(logits, shards) == targets[:, None]
    target_logit = shards.sum(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
    # Against the maximum, which is there: argmax would be another pass over all logits, and a slow one on
    # CPU.
    correct = (target_logit >= largest).astype(normaliser.dtype)
    return HardValues(nll=normaliser - target_logit, normaliser=normaliser, largest=largest, correct=correct)


def hard_terms(
    logits: Float[Array, "C v"],
    targets: Int[Array, "C"],
    weights: Float[Array, "C"],
    z_loss: Float[Array, ""],
    shards: communication.Shards,
) -> tuple[Float[Array, ""], Metrics]:
    """The sum and the metrics of `cross_entropy` from a chunk's logits."""
    found = hard_values(logits, targets, shards)
    z = jnp.square(found.normaliser)
    metrics = {"nll": found.nll, "z": z, "correct": found.correct}
    metrics = {name: jax.lax.stop_gradient(weighted_sum(weights, value)) for name, value in metrics.items()}
    return weighted_sum(weights, found.nll + z_loss * z), metrics


def sharded_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float | Float[Array, ""] = 0.0,
    chunk_size: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`cross_entropy` of a whole batch on the current mesh (`sharded_sum`): every device walks over the
    tokens it holds.
    """
    coefficient = jnp.asarray(z_loss, accumulation_dtype(hidden.dtype))
    return sharded_sum(
        _cross_entropy_terms,
        hidden,
        head,
        tokens=(targets, weights),
        constants=coefficient,
        chunk_size=chunk_size,
        vocabulary=vocabulary,
    )
