"""Losses on final hidden states and a `Head`: chunked over tokens, masked, sharded; no [B, T, V] array exists.

    loss_sum, metrics = cross_entropy(hidden, head, targets, weights, z_loss=1e-4)          # tokens in one dim
    loss_sum, metrics = sharded_cross_entropy(hidden, head, targets, weights, z_loss=1e-4)  # [B, T], any mesh

Everything returned is a sum; the caller divides by global counts. Soft-cap, softmax and sums are float32, also where hidden states
are bfloat16 (float64 for float64).
"""

from slmjax.losses.chunks import CHUNK_BYTES, MIN_CHUNK_SIZE, chunked_sum, default_chunk_size
from slmjax.losses.hard_targets import Metrics, cross_entropy, sharded_cross_entropy
from slmjax.losses.heads import PADDING_LOGIT, Head, logits
from slmjax.losses.sharded import Vocabulary, choose_vocabulary

__all__ = [
    "CHUNK_BYTES", "MIN_CHUNK_SIZE", "PADDING_LOGIT", "Head", "Metrics", "Vocabulary", "choose_vocabulary", "chunked_sum", "cross_entropy",
    "default_chunk_size", "logits", "sharded_cross_entropy",
]  # fmt: skip
