"""Computations with an implementation per platform: matrix products, attention, grouped products, rounding.

Each function is defined by a reference implementation and may run another one that suits platform, dtype and
shape. Tests compare every implementation with the reference. Each choice is logged once.

Files in reading order:

- products.py: matrix products and the loop over layers
- gpu.py: cuDNN attention
- tpu.py: splash attention
- attention.py: the reference implementation of attention, and the choice of a kernel
- grouped.py: grouped products for experts
- rounding.py: rounding in groups on TPU
- causal_convolution.py: causal depthwise convolution and token shift
- padding.py: padding on the right, for recurrences
- recurrence_chunks.py: the arithmetic of a chunk of a linear recurrence
- linear_recurrence.py: linear recurrences with decay, delta rule or a rank-one term
- scans.py: recurrences of independent channels: selective scan, RG-LRU, RWKV-4
"""

from slmjax.kernels.attention import (
    attention_mask,
    choose_attention,
    reference_attention,
    self_attention,
    two_way_attention,
)
from slmjax.kernels.causal_convolution import (
    ConvolutionHistory,
    convolve_token,
    depthwise_convolution,
    empty_history,
    token_shift,
)
from slmjax.kernels.grouped import choose_grouped_matmul, grouped_matmul
from slmjax.kernels.linear_recurrence import (
    CHUNK_SIZE,
    RecurrentState,
    decayed_recurrence,
    empty_recurrent_state,
    recurrence_flops,
    reference_recurrence,
)
from slmjax.kernels.products import materialised, matmul, outer_sum, unrolled_repeats
from slmjax.kernels.rounding import can_round_groups, round_groups
from slmjax.kernels.scans import (
    ScanState,
    rg_lru,
    rg_lru_state,
    selective_scan,
    selective_scan_state,
    wkv4,
    wkv4_state,
)

__all__ = [
    "CHUNK_SIZE",
    "ConvolutionHistory",
    "RecurrentState",
    "ScanState",
    "attention_mask",
    "can_round_groups",
    "choose_attention",
    "choose_grouped_matmul",
    "convolve_token",
    "decayed_recurrence",
    "depthwise_convolution",
    "empty_history",
    "empty_recurrent_state",
    "grouped_matmul",
    "materialised",
    "matmul",
    "outer_sum",
    "recurrence_flops",
    "reference_attention",
    "reference_recurrence",
    "rg_lru",
    "rg_lru_state",
    "round_groups",
    "selective_scan",
    "selective_scan_state",
    "self_attention",
    "token_shift",
    "two_way_attention",
    "unrolled_repeats",
    "wkv4",
    "wkv4_state",
]
