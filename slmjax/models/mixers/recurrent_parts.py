"""Parts that recurrent mixers share: decays and their initial values, unit vectors, short convolutions.

Dims: B batch, T time, D model, N heads, H dims of a head, C channels, W taps.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import ModelDims

SMALLEST_STEP = 1e-3
LARGEST_STEP = 1e-1
STEP_FLOOR = 1e-4


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError if one of these fields of a config is set and below 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def divided(total: int, parts: int, *, names: str) -> int:
    """Return `total / parts`. Raises ValueError if it is not an integer."""
    if total % parts:
        raise ValueError(f"{total} dims do not divide by {parts}: change {names}")
    return total // parts


# Functions --------------------------------------------------------------------------------------------------
def split_heads(x: Float[Array, "B T NH"], num_heads: int) -> Float[Array, "B T N H"]:
    """Split the last dim into heads."""
    return x.reshape(*x.shape[:2], num_heads, -1)


def unit_vectors(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Return `x / |x|` over the last dim, computed in float32; zero stays zero."""
    x32 = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(squares + 1e-6)).astype(x.dtype)


def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `log(1 + exp(x))`, which does not overflow."""
    return jnp.logaddexp(x, 0.0)


# Initialisation ---------------------------------------------------------------------------------------------
def initial_step_bias(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draw biases whose softplus, the step of Mamba, is log-uniform in [0.001, 0.1]."""
    low = math.log(SMALLEST_STEP)
    high = math.log(LARGEST_STEP)
    steps = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high)), STEP_FLOOR)
    # The inverse of softplus.
    return steps + jnp.log(-jnp.expm1(-steps))


def initial_log_scale(key: Array, shape: tuple[int, ...], *, low: float) -> Float[Array, "..."]:
    """Draw the logarithm of values that are uniform in [low, 16]: `A_log` of Mamba-2 and Gated DeltaNet."""
    return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=16.0))


def initial_taps(key: Array, shape: tuple[int, int]) -> Float[Array, "W C"]:
    """Draw the taps of a depthwise convolution as PyTorch does: uniform, bounded by one over root W."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


# State ------------------------------------------------------------------------------------------------------
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryState:
    """The decoding state of a recurrent mixer. The fields are typed `Any` because this is a pytree."""

    recurrent: Any  # kernels.RecurrentState
    histories: Any  # dict[str, kernels.ConvolutionHistory]: the last inputs of convolutions


def parts_of(state: MemoryState | None) -> tuple[kernels.RecurrentState | None, Mapping[str, Any]]:
    """Return the memory and the histories of a state; None, and histories that are None, without one."""
    if state is None:
        return None, collections.defaultdict(lambda: None)
    return state.recurrent, state.histories


# Modules ----------------------------------------------------------------------------------------------------
class SiluConvolution(nnx.Module):
    """`silu(convolution(x))`, a causal depthwise convolution over the last tokens."""

    def __init__(
        self, channels: int, *, width: int, bias: bool = False, dims: ModelDims, rngs: nnx.Rngs
    ) -> None:
        self.taps = nnx.Param(initial_taps(rngs.params(), (width, channels)))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32)) if bias else None
        self.width = width
        self.channels = channels
        self.dtype = dims.dtype

    def __call__(
        self,
        x: Float[Array, "B T C"],
        *,
        segment_ids: Int[Array, "B T"],
        history: kernels.ConvolutionHistory | None,
    ) -> tuple[Float[Array, "B T C"], kernels.ConvolutionHistory | None]:
        y, history = kernels.depthwise_convolution(
            x,
            self.taps[...],
            segment_ids=segment_ids,
            bias=None if self.bias is None else self.bias[...],
            history=history,
            channel_dim="heads",
        )
        return jax.nn.silu(y), history

    def empty_history(self, batch_size: int) -> kernels.ConvolutionHistory:
        """Return the history before the first token."""
        # Not from the shape of the taps, which those of all layers may be stacked in.
        return kernels.empty_history(batch_size, width=self.width, channels=self.channels, dtype=self.dtype)
