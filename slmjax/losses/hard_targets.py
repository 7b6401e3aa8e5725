"""Cross entropy on the targets of the text.

    loss_sum, metrics = cross_entropy(hidden, head, targets, token_weights, z_loss=1e-4)

Dims: B batch, T time, C tokens of a chunk, D model, v columns of the vocabulary that a device holds.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax.losses.heads import UNSHARDED, Head, accumulation_dtype, column_ids, logits
from slmjax.losses.token_sums import ChunkFn, Vocabulary, sharded_sum, weighted_sum
from slmjax.parallel import communication

Metrics = dict[str, Float[Array, ""]]


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    token_weights: Float[Array, "B T"],
    *,
    factors: Float[Array, "B T"] | None = None,
    z_loss: float | Float[Array, ""] = 0.0,
    chunk_size: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the sum over tokens of `weight * (nll + z_loss * logsumexp(logits)**2)`, in nats.

    The sum is over the global batch, on any mesh or without one, in chunks of tokens.

    Args:
      hidden: final hidden states; their dtype is that of the matrix products.
      head: the output layer; its gradient is summed in float32.
      targets: ids below `head.vocab_size`.
      token_weights: the loss mask, or any weights; they get no gradient.
      factors: multiply the weights, and get a gradient: probabilities, for an expected loss.
      z_loss: coefficient that keeps the softmax normaliser near 1 (PaLM, https://arxiv.org/abs/2204.02311,
        section 5).
      chunk_size: tokens of a device per chunk; None gives about 256 MB of logits.
      vocabulary: how the tensor axis splits the work; None for the split that sends less.

    Returns:
      The sum, and weighted sums without a gradient: `nll`, `z` (squared logsumexp, without its coefficient)
      and `correct` (no logit is larger than the target's, so ties count as correct).
    """
    return sharded_sum(
        _chunk_loss_for if factors is None else _chunk_expectation_for,
        hidden,
        head,
        tokens=(targets, token_weights),
        factors=factors,
        constants=jnp.asarray(z_loss, accumulation_dtype(hidden.dtype)),
        chunk_size=chunk_size,
        vocabulary=vocabulary,
    )


# Cached, so that `chunked_sum` gets the same function in every call.
@functools.cache
def _chunk_loss_for(shards: communication.Shards) -> ChunkFn:
    def chunk_loss(
        hidden: Array, head: Head, tokens: Any, constants: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        (targets, token_weights), _ = tokens
        z_loss, _ = constants
        return hard_loss(logits(hidden, head, shards), targets, token_weights, z_loss, shards)

    return chunk_loss


@functools.cache
def _chunk_expectation_for(shards: communication.Shards) -> ChunkFn:
    def chunk_loss(hidden: Any, head: Head, tokens: Any, constants: Any) -> tuple[Float[Array, ""], Metrics]:
        states, factors = hidden
        (targets, token_weights), _ = tokens
        z_loss, _ = constants
        return hard_loss(logits(states, head, shards), targets, token_weights * factors[:, 0], z_loss, shards)

    return chunk_loss


def hard_loss(
    logits: Float[Array, "C v"],
    targets: Int[Array, "C"],
    token_weights: Float[Array, "C"],
    z_loss: Float[Array, ""],
    shards: communication.Shards = UNSHARDED,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the sum and the metrics of `cross_entropy` from the logits of a chunk."""
    values = hard_values(logits, targets, shards)
    z = jnp.square(values.normaliser)
    metrics = {"nll": values.nll, "z": z, "correct": values.correct}
    sums = {name: jax.lax.stop_gradient(weighted_sum(token_weights, x)) for name, x in metrics.items()}
    return weighted_sum(token_weights, values.nll + z_loss * z), sums


@dataclasses.dataclass(frozen=True)
class HardValues:
    """Values of each token of a chunk, [C]."""

    nll: Array  # negative log-likelihood of the target
    normaliser: Array  # logsumexp of the logits
    largest: Array  # largest logit, without a gradient
    correct: Array  # 1 where no logit is larger than the target's, so ties count as correct


def hard_values(
    logits: Float[Array, "C v"],
    targets: Int[Array, "C"],
    shards: communication.Shards = UNSHARDED,
) -> HardValues:
    """Return the negative log-likelihood of each target, and the statistics of its logits."""
    # Subtracting the maximum, over all shards of the vocabulary, keeps the exponentials finite.
    largest = shards.max(jnp.max(logits, axis=-1))
    normaliser = largest + jnp.log(shards.sum(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)))
    # A masked sum instead of a gather: its gradient is elementwise and not a scatter into [C, V].
    is_target = column_ids(logits, shards) == targets[:, None]
    target_logit = shards.sum(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
    # Compared with the maximum, which is at hand: argmax would be another, slow pass over all logits on CPU.
    correct = (target_logit >= largest).astype(normaliser.dtype)
    return HardValues(nll=normaliser - target_logit, normaliser=normaliser, largest=largest, correct=correct)
