"""The gated short convolution of LFM2 (Liquid AI 2025): a few tokens, channel by channel, between two gates.

Dims: B batch, T time, D model, W taps.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import Linear, ModelDims
from slmjax.models.mixers.mamba import uniform_taps
from slmjax.models.protocols import Mixer, MixerConfig, StateSize


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvolutionConfig(MixerConfig):
    """A gated causal convolution over a few tokens, as in LFM2."""

    width: int = 3  # tokens that a token sees, itself included, W
    bias: bool = False  # biases of the projections and of the convolution

    def __post_init__(self) -> None:
        if self.width < 2:
            raise ValueError(f"width must be at least 2 for tokens to see each other, got {self.width}")

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "ShortConvolution":
        """Build the module, with freshly initialised parameters."""
        return ShortConvolution(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs per token of the two gates; the convolution is a product with its taps."""
        return 2 * dims.embed_dim

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of the convolution's history, which does not grow with length."""
        return StateSize(history=(self.width - 1) * dims.embed_dim)


class ShortConvolution(Mixer):
    """`output(output_gate(x) * convolution(input_gate(x) * inner(x)))`, without activations."""

    def __init__(self, config: ShortConvolutionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        dim = dims.embed_dim
        self.dim = dim
        self.width = config.width
        self.dtype = dims.dtype
        # Separate maps, not one fused: each is sharded by channels.
        self.input_gate = Linear(dim, dim, std=dims.init_std, bias=config.bias, rngs=rngs)
        self.output_gate = Linear(dim, dim, std=dims.init_std, bias=config.bias, rngs=rngs)
        self.inner = Linear(dim, dim, std=dims.init_std, bias=config.bias, rngs=rngs)
        self.conv_taps = nnx.Param(uniform_taps(rngs.params(), width=config.width, channels=dim))
        self.conv_bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if config.bias else None
        self.output = Linear(dim, dim, std=dims.output_std, bias=config.bias, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        mixed, state = kernels.depthwise_convolution(
            self.input_gate(x) * self.inner(x),
            self.conv_taps[...],
            segment_ids=segment_ids,
            bias=None if self.conv_bias is None else self.conv_bias[...],
            history=state,
        )
        return self.output(self.output_gate(x) * mixed), state

    def init_state(self, batch_size: int, *, max_length: int) -> kernels.ConvolutionHistory:
        """Return the history before the first token; its size does not depend on `max_length`."""
        return kernels.empty_history(batch_size, width=self.width, channels=self.dim, dtype=self.dtype)
