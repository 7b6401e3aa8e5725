"""Losses on final hidden states and a `Head`: chunked over tokens, masked, sharded; no [B, T, V] array
exists.

    loss_sum, metrics = cross_entropy(hidden, head, targets, weights, z_loss=1e-4)          # tokens in one
    dim loss_sum, metrics = sharded_cross_entropy(hidden, head, targets, weights, z_loss=1e-4)  # [B, T], any
    mesh value, metrics = sharded_divergence(hidden, head, teachers, ForwardKl(), targets, weights)  #
    distillation: soft_targets.py

Everything returned is a sum; the caller divides by global counts. Soft-cap, softmax and sums are float32,
also where hidden states are bfloat16 (float64 for float64).
"""

from slmjax.losses.chunks import CHUNK_BYTES, MIN_CHUNK_SIZE, chunked_sum, default_chunk_size
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
from slmjax.losses.hard_targets import Metrics, cross_entropy, sharded_cross_entropy
from slmjax.losses.heads import PADDING_LOGIT, Head, logits
from slmjax.losses.held_out import evaluation_sums, expected_calibration_error
from slmjax.losses.sharded import Vocabulary, choose_vocabulary
from slmjax.losses.soft_targets import (
    DistillLossConfig,
    TeacherMean,
    TeacherOutput,
    fit_rows,
    fit_table,
    linear_divergence,
    sharded_divergence,
    token_divergence,
)

__all__ = [
    "CHUNK_BYTES",
    "MIN_CHUNK_SIZE",
    "PADDING_LOGIT",
    "Divergence",
    "ForwardKl",
    "Head",
    "Jsd",
    "DistillLossConfig",
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
    "chunked_sum",
    "cross_entropy",
    "default_chunk_size",
    "evaluation_sums",
    "expected_calibration_error",
    "fit_rows",
    "fit_table",
    "linear_divergence",
    "logits",
    "sharded_cross_entropy",
    "sharded_divergence",
    "token_divergence",
]
