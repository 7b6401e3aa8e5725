"""Losses on final hidden states and a `Head`: chunked over tokens, masked, sharded.

    loss_sum, metrics = cross_entropy(hidden, head, targets, token_weights, z_loss=1e-4)
    loss_sum, metrics = distill_loss(hidden, head, teachers, config, targets, token_weights)

No [B, T, V] array of logits exists. A loss goes down these levels, and its sums go back up:

    batch     hidden [B, T, D], targets, head       hard_targets.py, soft_targets.py, held_out.py
      |         `sharded_sum`: shard_map            token_sums.py
      v
    shard     hidden [N, D] of one device           token_sums.py
      |         `chunked_sum`: scan, gradient too   token_sums.py
      v
    chunk     hidden [C, D] -> logits [C, v]        heads.py
      |         `chunk_loss`                        hard_targets.py, soft_targets.py, held_out.py
      v
    formula   `hard_loss`, `Divergence`             hard_targets.py, divergences.py

On one device there is one shard; a batch that fits is one chunk. v is the part of the vocabulary that a
device holds: a formula sums over the rest through `Shards`, which does nothing on one device.

Every result is a sum; the caller divides by global counts. Soft-cap, softmax and sums are float32, also where
hidden states are bfloat16 (float64 for float64).
"""

from slmjax.losses.divergences import (
    Divergence,
    ForwardKl,
    Jsd,
    ReverseKl,
    Sampled,
    SkewKl,
    SkewReverseKl,
    SoftCrossEntropy,
    Taid,
    TopK,
    TotalVariation,
)
from slmjax.losses.hard_targets import Metrics, cross_entropy
from slmjax.losses.heads import PADDING_LOGIT, Head, logits
from slmjax.losses.held_out import evaluation_sums, expected_calibration_error
from slmjax.losses.soft_targets import (
    DistillLossConfig,
    DistillWeights,
    TeacherMean,
    TeacherOutput,
    distill_loss,
    fit_rows,
    fit_table,
)
from slmjax.losses.token_sums import (
    CHUNK_BYTES,
    MIN_CHUNK_SIZE,
    Vocabulary,
    choose_vocabulary,
    default_chunk_size,
)

__all__ = [
    "CHUNK_BYTES",
    "MIN_CHUNK_SIZE",
    "PADDING_LOGIT",
    "DistillLossConfig",
    "DistillWeights",
    "Divergence",
    "ForwardKl",
    "Head",
    "Jsd",
    "Metrics",
    "ReverseKl",
    "Sampled",
    "SkewKl",
    "SkewReverseKl",
    "SoftCrossEntropy",
    "Taid",
    "TeacherMean",
    "TeacherOutput",
    "TopK",
    "TotalVariation",
    "Vocabulary",
    "choose_vocabulary",
    "cross_entropy",
    "default_chunk_size",
    "distill_loss",
    "evaluation_sums",
    "expected_calibration_error",
    "fit_rows",
    "fit_table",
    "logits",
]
