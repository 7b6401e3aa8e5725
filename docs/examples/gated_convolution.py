"""A mixer defined in an experiment file: a gated short convolution between layers of attention.

slmjax train docs/examples/gated_convolution.py
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import slmjax
from slmjax.models import (
    BlockConfig,
    LayerGroup,
    Linear,
    Mixer,
    MixerConfig,
    MlpConfig,
    ModelDims,
    StateSize,
    last_real,
    truncated_normal,
)


def short_convolution(
    history: Float[Array, "B S D"], segments: Int[Array, "B S"], taps: Float[Array, "W D"]
) -> Float[Array, "B T D"]:
    """Return each token's weighted sum of itself and the W - 1 tokens before it in its document.

    `history` begins with the W - 1 tokens before the first output: S = W - 1 + T.
    """
    width = taps.shape[0]
    length = history.shape[1] - taps.shape[0] + 1
    output_segments = segments[:, width - 1 :]
    total = jnp.zeros((history.shape[0], length, history.shape[2]), history.dtype)
    for back in range(width):
        start = width - 1 - back
        in_document = segments[:, start : start + length] == output_segments
        tokens = jnp.where(in_document[..., None], history[:, start : start + length], 0)
        total += tokens * taps[back][None, None, :].astype(history.dtype)
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedConvolutionConfig(MixerConfig):
    """A causal convolution over a few tokens, channel by channel, with a gate."""

    width: int = 4  # tokens that a token sees, itself included

    def __post_init__(self) -> None:
        if self.width < 2:
            raise ValueError(f"width must be at least 2 for tokens to see each other, got {self.width}")

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "GatedConvolution":
        return GatedConvolution(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        return (2 * self.width + 1) * dims.embed_dim

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        return StateSize(history=(self.width - 1) * dims.embed_dim)


class GatedConvolution(Mixer):
    """`output(silu(gate(x)) * convolution(value(x)))`; the decoding state is the last W - 1 values."""

    def __init__(self, config: GatedConvolutionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        dim = dims.embed_dim
        self.width = config.width
        self.dim = dim
        self.dtype = dims.dtype
        self.value = Linear(dim, dim, std=dims.init_std, rngs=rngs)
        self.gate = Linear(dim, dim, std=dims.init_std, rngs=rngs)
        self.output = Linear(dim, dim, std=dims.output_std, rngs=rngs)
        self.taps = nnx.Param(truncated_normal(rngs.params(), (config.width, dim), config.width**-0.5))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: dict[str, Array] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
        before = self.init_state(x.shape[0], max_length=0) if state is None else state
        values = jnp.concatenate([before["values"], self.value(x)], axis=1)
        segments = jnp.concatenate([before["segments"], segment_ids], axis=1)
        mixed = nnx.silu(self.gate(x)) * short_convolution(values, segments, self.taps[...])
        if state is not None:
            size = self.width - 1
            state = {
                "values": last_real(values, segment_ids, size=size),
                "segments": last_real(segments, segment_ids, size=size),
            }
        return self.output(mixed), state

    def init_state(self, batch_size: int, *, max_length: int) -> dict[str, Array]:
        return {
            "values": jnp.zeros((batch_size, self.width - 1, self.dim), self.dtype),
            "segments": jnp.zeros((batch_size, self.width - 1), jnp.int32),
        }


def experiment() -> slmjax.Experiment:
    """`nano` with two convolutions before each layer of attention."""
    nano = slmjax.load_experiment("nano")
    attention = nano.model.stack[0].pattern[0]
    convolution = BlockConfig(mixer=GatedConvolutionConfig(width=4), ffn=MlpConfig(hidden_dim=512))
    stack = (LayerGroup(pattern=(convolution, convolution, attention), repeats=2),)
    model = dataclasses.replace(nano.model, stack=stack)
    return dataclasses.replace(nano, model=model, run=dataclasses.replace(nano.run, name="gated-convolution"))
