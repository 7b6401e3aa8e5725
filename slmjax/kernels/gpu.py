"""Attention on NVIDIA GPUs: cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

The kernel takes half precision, heads of at most 128 dims in multiples of 8, no soft-cap, and even lengths.
Visibility is passed as a mask, because a row holds several documents. That attention is causal, and how far
back it reaches, is passed as well, so that the kernel skips what lies outside.

Dims: B batch, T query time, S key time, N heads, K kv heads, H head dim.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MAX_HEAD_DIM = 128


def is_supported(*, dtype: Any, head_dim: int, length: int, num_keys: int, is_plain: bool) -> bool:
    """Return whether cuDNN's kernel covers this case and its gradient.

    Args:
      is_plain: a softmax without a soft-cap and without sinks.
    """
    return (
        dtype in (jnp.bfloat16, jnp.float16)
        and is_plain
        and head_dim <= MAX_HEAD_DIM
        and head_dim % 8 == 0
        and length % 2 == 0
        and num_keys % 2 == 0
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
      window: the window in the mask, if any. The kernel uses it where queries and keys are the same tokens.
      implementation: "xla" computes the same without the kernel, for tests.
    """
    # The kernel counts windows and causality from equal starts; with more keys than queries the mask decides.
    is_square = q.shape[1] == k.shape[1]
    local_window = None if window is None or not is_square else (window - 1, 0)
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask[:, None],
        scale=scale,
        is_causal=is_square,
        local_window_size=local_window,
        implementation=implementation,
    )
    return jnp.where(jnp.any(mask, axis=2)[:, :, None, None], mixed, 0)
