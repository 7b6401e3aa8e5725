"""Norms, linear maps, embeddings and the gated MLP: typed pure functions, then thin NNX modules.

Math is a free function of arrays; a module holds parameters and calls it. Parameters are float32; a module computes in
`Shape.dtype` (float32 or bfloat16), with norms, angles and softmax in float32. This file also states the two protocols a
block is made of: token mixers (`MixerConfig`, `Mixer`) and feed-forward layers (`FfnConfig`, `Ffn`).

Dims: B batch, T time, D model, N heads, H head dim, F feed-forward, V vocabulary; `...` any leading dims.
"""

import abc
import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels, sharding
from slmjax.numerics.inputs import RoundedInput


class Activation(enum.Enum):
    """Non-linearity of a feed-forward layer."""

    SILU = "silu"
    GELU = "gelu"  # by a tanh, as GPT-2 and Gemma have it
    GELU_EXACT = "gelu_exact"  # by the error function
    RELU = "relu"
    RELU2 = "relu2"
    CLAMPED_SILU = "clamped_silu"  # of gated layers alone: bounded inputs, a steeper sigmoid, one more than the other half (GPT-OSS)


ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    Activation.SILU: jax.nn.silu,
    Activation.GELU: lambda x: jax.nn.gelu(x, approximate=True),
    Activation.GELU_EXACT: lambda x: jax.nn.gelu(x, approximate=False),
    Activation.RELU: jax.nn.relu,
    Activation.RELU2: lambda x: jnp.square(jax.nn.relu(x)),
}
CLAMP, STEEPNESS = 7.0, 1.702  # of CLAMPED_SILU


class NormKind(enum.Enum):
    """What every norm of a model computes."""

    RMS = "rms"  # divided by the root mean square, times a scale
    CENTERED_RMS = "centered_rms"  # the same, with a scale that is stored as its difference from one (Gemma)
    LAYER = "layer"  # mean removed, divided by the deviation, times a scale, plus a bias (GPT-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What every layer of a model shares; the model derives it from its config."""

    embed_dim: int  # D
    num_layers: int  # outputs into the residual stream start smaller by the root of twice this
    norm_eps: float
    init_std: float
    norm_kind: NormKind = NormKind.RMS
    dtype: Any  # of the computation: jnp.float32 or jnp.bfloat16

    def norm(self, dim: int) -> "Norm":
        """A fresh norm over `dim` dims, of the kind that the model has throughout."""
        return NORMS[self.norm_kind](dim, eps=self.norm_eps)

    @property
    def output_std(self) -> float:
        """Standard deviation of the weights that write into the residual stream (GPT-2's depth scaling)."""
        return self.init_std / math.sqrt(2 * self.num_layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnAux:
    """What a feed-forward layer reports beside its output: sums over the batch's real tokens, never means.

    The sums are typed `Any` because this is a pytree: it may hold shapes.
    """

    losses: dict[str, Any]  # already multiplied by their coefficients; to divide by the count of real tokens
    metrics: dict[str, Any]


class Mixer(nnx.Module):
    """A token mixer: `(x, segment_ids, positions, state) -> (y, state)`; state None means a whole sequence at once."""

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"], state: Any
    ) -> tuple[Float[Array, "B T D"], Any]: ...

    @abc.abstractmethod
    def init_state(self, batch_size: int, *, max_length: int) -> Any:
        """Empty decoding state for sequences of at most `max_length` tokens."""


class CachingMixer(Mixer):
    """A mixer whose decoding state keeps numbers of every token, which rules of quantization can name as `layers/{i}/mixer/cache`.

    It rounds them by `self.cache` before it uses them, in training as in decoding. The attribute is None until the model sets it.
    Cached numbers are computed once. Whatever in them depends on the length of the sequence needs the length that
    it may reach, so that such a mixer is called with `max_lengths` beside the arguments of every mixer.
    """

    cache: RoundedInput | None

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
        max_lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Mix tokens; `max_lengths`: tokens that each row's sequence may reach, None for whole documents."""

    @abc.abstractmethod
    def cached_shape(self) -> tuple[int, ...]:
        """The shape of what is kept of a token; the last dim is what is rounded together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(abc.ABC):
    """Settings of a token mixer."""

    @abc.abstractmethod
    def build(self, shape: Shape, *, rngs: nnx.Rngs) -> Mixer:
        """The module, with freshly initialised parameters."""

    @abc.abstractmethod
    def mixing_flops(self, shape: Shape, *, length: int) -> float:
        """Forward FLOPs per token beside the weights' own, averaged over a causal sequence of `length` tokens."""

    @abc.abstractmethod
    def state_bytes(self, shape: Shape, *, length: int, itemsize: int) -> int:
        """Bytes of decoding state of one sequence of `length` tokens."""


class Ffn(nnx.Module):
    """A feed-forward layer: `(x, segment_ids) -> (y, aux)`."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"]) -> tuple[Float[Array, "B T D"], FfnAux]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FfnConfig(abc.ABC):
    """Settings of a feed-forward layer."""

    @abc.abstractmethod
    def build(self, shape: Shape, *, rngs: nnx.Rngs) -> Ffn:
        """The module, with freshly initialised parameters."""

    @abc.abstractmethod
    def active_share(self) -> float:
        """Share of the parameters under `experts/` that one token uses."""

    @abc.abstractmethod
    def for_inference(self) -> "FfnConfig":
        """The layer with the same parameters as it is evaluated and sampled from: what a token gets depends on no later or other one."""


# Functions ------------------------------------------------------------------------------------------------------------
def truncated_normal(key: Array, shape: tuple[int, ...], std: float) -> Float[Array, "..."]:
    """Normal draws of deviation `std`, cut at three deviations: the initialisation of every weight."""
    return std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)


def along_last(vector: Float[Array, " D"], ndim: int) -> Float[Array, "..."]:
    """A vector reshaped to broadcast along the last dim of an array of `ndim` dims."""
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))


def effective_weight(weight: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """The weight a layer multiplies with: its float32 parameter, decoded already where it has a format, in the dtype of the computation."""
    return weight.astype(dtype)


def linear(x: Float[Array, "*B I"], weight: Float[Array, "I O"], bias: Float[Array, " O"] | None = None) -> Float[Array, "*B O"]:
    """`x @ weight + bias` in the dtype of `x`; the weight is cast to it."""
    y = kernels.matmul(x, effective_weight(weight, weight.dtype))
    return y if bias is None else y + along_last(bias.astype(x.dtype), y.ndim)


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, dtype: Any) -> Float[Array, "B T D"]:
    """The rows of a table that tokens name, in `dtype`. On a mesh each device takes those that it holds, and one of them has it.

    It is looked up in float32, because the gradient sums as many rows as a token has occurrences: bfloat16 stops at 256.
    """

    def on_device(table: Array, tokens: Array) -> Array:
        rows, shards = sharding.gathered_table(table)
        if shards.count == 1:
            return shards.sum(jnp.take(rows, tokens, axis=0, mode="clip").astype(dtype))
        own = tokens - shards.index() * rows.shape[0]
        is_here = (own >= 0) & (own < rows.shape[0])
        taken = jnp.take(rows, jnp.where(is_here, own, 0), axis=0, mode="clip")
        return shards.sum(jnp.where(is_here[:, :, None], taken, 0.0).astype(dtype))

    dims = sharding.table_dims(table.shape[0], batch_size=tokens.shape[0])
    return sharding.local(on_device, in_dims=(dims, ("batch", "time")), out_dims=("batch", "time", None))(table, tokens)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], *, eps: float) -> Float[Array, "*B D"]:
    """`scale * x / rms(x)` over the last dim, in float32, returned in the dtype of `x` (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * along_last(scale, x.ndim)).astype(x.dtype)


def layer_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"], *, eps: float) -> Float[Array, "*B D"]:
    """`scale * (x - mean) / deviation + bias` over the last dim, in float32, returned in the dtype of `x` (Ba et al. 2016)."""
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    return (normed * along_last(scale, x.ndim) + along_last(bias, x.ndim)).astype(x.dtype)


def gated(activation: Activation, gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """The hidden layer of a gated feed-forward layer, from its two halves."""
    if activation is not Activation.CLAMPED_SILU:
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
    return gate * jax.nn.sigmoid(STEEPNESS * gate) * (up + 1.0)


def dropout(x: Float[Array, "..."], key: Array | None, *, rate: float) -> Float[Array, "..."]:
    """Inverted dropout; the identity when `key` is None (evaluation) or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), jnp.zeros_like(x))


# Modules --------------------------------------------------------------------------------------------------------------
class Norm(nnx.Module):
    """A norm over the last dim."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]: ...


class RmsNorm(Norm):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, dim: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale[...], eps=self.eps)


class CenteredRmsNorm(Norm):
    """`RmsNorm` whose parameter is the scale less one: at zero, where it starts and decays to, it scales nothing."""

    def __init__(self, dim: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, 1.0 + self.scale[...], eps=self.eps)


class LayerNorm(Norm):
    """Layer norm with a learned scale and bias."""

    def __init__(self, dim: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


NORMS: Mapping[NormKind, Callable[..., Norm]] = {
    NormKind.RMS: RmsNorm,
    NormKind.CENTERED_RMS: CenteredRmsNorm,
    NormKind.LAYER: LayerNorm,
}


class Linear(nnx.Module):
    """Linear map with weight [in, out] and an optional bias. What it multiplies is rounded first where rules of quantization say so."""

    def __init__(self, in_dim: int, out_dim: int, *, std: float, bias: bool = False, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(truncated_normal(rngs.params(), (in_dim, out_dim), std))
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32)) if bias else None
        self.input: RoundedInput | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        x = x if self.input is None else self.input(x)
        return linear(x, self.weight[...], None if self.bias is None else self.bias[...])


class Embedding(nnx.Module):
    """Token table [V, D]."""

    def __init__(self, num_rows: int, dim: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(truncated_normal(rngs.params(), (num_rows, dim), std))

    def __call__(self, tokens: Int[Array, "B T"], *, dtype: Any) -> Float[Array, "B T D"]:
        return lookup(effective_weight(self.table[...], jnp.float32), tokens, dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig(FfnConfig):
    """A dense feed-forward layer."""

    hidden_dim: int  # width of the hidden layer, F
    activation: Activation = Activation.SILU  # non-linearity
    gated: bool = True  # multiply by a second projection (SwiGLU when the activation is silu)
    bias: bool = False  # biases on all projections

    def __post_init__(self) -> None:
        if self.hidden_dim < 1:
            raise ValueError(f"ffn.hidden_dim must be at least 1, got {self.hidden_dim}")
        if self.activation is Activation.CLAMPED_SILU and not self.gated:
            raise ValueError("ffn.activation=clamped_silu is made of two halves: set ffn.gated, or choose another activation")

    def build(self, shape: Shape, *, rngs: nnx.Rngs) -> "Mlp":
        """The module, with freshly initialised parameters."""
        return Mlp(self, shape, rngs=rngs)

    def active_share(self) -> float:
        """A dense layer has no experts; every parameter is used."""
        return 1.0

    def for_inference(self) -> "MlpConfig":
        """The same."""
        return self


class Mlp(Ffn):
    """Gated or plain two-layer MLP."""

    def __init__(self, config: MlpConfig, shape: Shape, *, rngs: nnx.Rngs) -> None:
        self.config = config
        wide = {"std": shape.init_std, "bias": config.bias, "rngs": rngs}
        self.gate = Linear(shape.embed_dim, config.hidden_dim, **wide) if config.gated else None
        self.up = Linear(shape.embed_dim, config.hidden_dim, **wide)
        self.down = Linear(config.hidden_dim, shape.embed_dim, std=shape.output_std, bias=config.bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"]) -> tuple[Float[Array, "B T D"], FfnAux]:
        activation = self.config.activation
        hidden = ACTIVATIONS[activation](self.up(x)) if self.gate is None else gated(activation, self.gate(x), self.up(x))
        return self.down(hidden), FfnAux(losses={}, metrics={})
