"""The losses on tokens in one dim, [N], as the reference implementations have them."""

from collections.abc import Sequence
from typing import Any

import jax

from slmjax import losses
from slmjax.losses import DistillLossConfig, DistillWeights, Divergence, Head, TeacherOutput
from slmjax.losses.divergences import DivergenceContext
from slmjax.losses.soft_targets import token_divergences


def flat_cross_entropy(
    hidden: jax.Array, head: Head, targets: jax.Array, token_weights: jax.Array, **options: Any
) -> tuple[jax.Array, losses.Metrics]:
    """Return `losses.cross_entropy` of tokens [N], as a batch of one row."""
    return losses.cross_entropy(hidden[None], head, targets[None], token_weights[None], **options)


def flat_distill_loss(
    hidden: jax.Array,
    head: Head,
    teachers: Sequence[TeacherOutput],
    config: Divergence | DistillLossConfig,
    targets: jax.Array,
    token_weights: jax.Array,
    *,
    draws: jax.Array | None = None,
    chunk_size: int | None = None,
    **weights: Any,
) -> tuple[jax.Array, losses.Metrics]:
    """Return `losses.distill_loss` of tokens [N], as a batch of one row.

    Args:
      hidden: hidden states of the student, [N, D].
      head: head of the student.
      teachers: hidden states [N, E] and heads.
      config: a divergence, or the settings of the loss.
      targets: [N].
      token_weights: [N].
      draws: two numbers for each token, [N, 2].
      chunk_size: tokens per chunk.
      **weights: fields of `DistillWeights`.
    """
    return losses.distill_loss(
        hidden[None],
        head,
        [TeacherOutput(hidden=teacher.hidden[None], head=teacher.head) for teacher in teachers],
        config_of(config),
        targets[None],
        token_weights[None],
        weights=DistillWeights(**weights),
        draws=None if draws is None else draws[None],
        chunk_size=chunk_size,
    )


def divergence_of_tokens(
    hidden: jax.Array,
    head: Head,
    teachers: Sequence[TeacherOutput],
    config: Divergence | DistillLossConfig,
    *,
    draws: jax.Array | None = None,
    temperature: Any = 1.0,
    state: Any = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Return the divergence of each token, [N], without chunks."""
    config = config_of(config)
    state = config.divergence.initial_state() if state is None else state
    return token_divergences(
        losses.logits(hidden, head),
        head.vocab_size,
        teachers,
        config,
        temperature=temperature,
        context=DivergenceContext(state=state, draws=draws, key=key),
    )


def config_of(config: Divergence | DistillLossConfig) -> DistillLossConfig:
    """Return the settings of a loss with this divergence."""
    return config if isinstance(config, DistillLossConfig) else DistillLossConfig(divergence=config)
