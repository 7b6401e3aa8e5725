"""Which form of a computation runs where: attention, products, and the loop over layers.

Each function here is defined by a plain form and may run in another one that suits the platform, dtype and shape; every form equals
the plain one, by test. What was picked is logged once. What is particular to CPUs is in `cpu.py`.
"""

from slmjax.kernels.attention import attention_mask, choose_attention, reference_attention, self_attention
from slmjax.kernels.grouped import choose_grouped_matmul, grouped_matmul
from slmjax.kernels.products import materialised, matmul, outer_sum, unrolled_layers

__all__ = [
    "attention_mask", "choose_attention", "choose_grouped_matmul", "grouped_matmul", "materialised", "matmul", "outer_sum",
    "reference_attention", "self_attention", "unrolled_layers",
]  # fmt: skip
