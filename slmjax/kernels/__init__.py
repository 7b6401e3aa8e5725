"""Which form of a computation runs where: attention, products, rounding, and the loop over layers.

Each function here is defined by a plain form and may run in another one that suits the platform, dtype and
shape; every form equals the plain one, by test. What was picked is logged once. What is particular to CPUs is
in `cpu.py`.
"""

from slmjax.kernels.attention import attention_mask, choose_attention, reference_attention, self_attention
from slmjax.kernels.grouped import choose_grouped_matmul, grouped_matmul
from slmjax.kernels.products import materialised, matmul, outer_sum, unrolled_repeats
from slmjax.kernels.rounding import can_round_groups, round_groups

__all__ = [
    "attention_mask",
    "can_round_groups",
    "choose_attention",
    "choose_grouped_matmul",
    "grouped_matmul",
    "materialised",
    "matmul",
    "outer_sum",
    "reference_attention",
    "round_groups",
    "self_attention",
    "unrolled_repeats",
]
