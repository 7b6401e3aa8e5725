"""Attention on NVIDIA GPUs: cuDNN's fused kernel through `jax.nn.dot_product_attention`, where it can express
the case.

It takes half precision, heads of at most 128 dims in multiples of 8, no soft-cap, and even lengths. Who sees
whom is given to it as a mask, as documents are packed in a row; that they are causal and how far back they go
it is told beside that, and skips the rest.

Dims: B batch, T query time, S key time, N heads, K kv heads, H head dim.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MAX_HEAD_DIM = 128


def is_expressible(*, dtype: Any, head_dim: int, length: int, num_keys: int, is_plain: bool) -> bool:
    """Whether cuDNN's kernel has this case, its gradient included. Plain is a softmax without soft-cap and
    sinks.
    """
    is_half = dtype in (jnp.bfloat16, jnp.float16)
    return (
        is_half
        and is_plain
        and head_dim <= MAX_HEAD_DIM
        and not head_dim % 8
        and not length % 2
        and not num_keys % 2
    )


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    window: int | None,
    scale: float,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Softmax attention under a mask; a query that sees nothing gives 0.

    Args:
      window: what the mask allows at most, where queries and keys are the same places.
      implementation: "xla" computes the same without the kernel: for tests.
    """
    is_square = q.shape[1] == k.shape[1]
    back = None if window is None or not is_square else (window - 1, 0)
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask[:, None],
        scale=scale,
        is_causal=is_square,
        local_window_size=back,
        implementation=implementation,
    )
    return jnp.where(jnp.any(mask, axis=2)[:, :, None, None], mixed, 0)
