"""Norms, linear maps, embeddings and the gated MLP: typed pure functions, then thin NNX modules.

Math is a free function of arrays; a module holds parameters and calls it. Parameters are float32; a module
computes in `ModelDims.dtype` (float32 or bfloat16), with norms, angles and softmax in float32. This file also
states the two protocols a block is made of: token mixers (`MixerConfig`, `Mixer`) and feed-forward layers
(`FfnConfig`, `Ffn`).

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

from slmjax import kernels
from slmjax.parallel import communication

# What a layer may apply to its inputs or its cache. Quantization sets such functions; layers know no more of it.
ArrayFunction = Callable[[Array], Array]


class NormKind(enum.Enum):
    """What every norm of a model computes."""

    RMS = "rms"  # divided by the root mean square, times a scale
    CENTERED_RMS = "centered_rms"  # the same, with a scale that is stored as its difference from one (Gemma)
    LAYER = "layer"  # mean removed, divided by the deviation, times a scale, plus a bias (GPT-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDims:
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


# Functions --------------------------------------------------------------------------------------------------
def truncated_normal(key: Array, shape: tuple[int, ...], std: float) -> Float[Array, "..."]:
    """Normal draws of deviation `std`, cut at three deviations: the initialisation of every weight."""
    return std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)


def along_last(vector: Float[Array, " D"], ndim: int) -> Float[Array, "..."]:
    """A vector reshaped to broadcast along the last dim of an array of `ndim` dims."""
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))


def linear(
    x: Float[Array, "*B I"], weight: Float[Array, "I O"], bias: Float[Array, " O"] | None = None
) -> Float[Array, "*B O"]:
    """`x @ weight + bias` in the dtype of `x`; the weight is cast to it."""
    y = kernels.matmul(x, weight)
    return y if bias is None else y + along_last(bias.astype(x.dtype), y.ndim)


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, dtype: Any) -> Float[Array, "B T D"]:
    """The rows of a table that tokens name, in `dtype`. On a mesh each device takes those that it holds, and
    one of them has it.

    It is looked up in float32, because the gradient sums as many rows as a token has occurrences: bfloat16
    stops at 256.
    """

    def on_device(table: Array, tokens: Array) -> Array:
        rows, shards = communication.gathered_table(table)
        if shards.count == 1:
            return shards.sum(jnp.take(rows, tokens, axis=0, mode="clip").astype(dtype))
        own = tokens - shards.index() * rows.shape[0]
        is_here = (own >= 0) & (own < rows.shape[0])
        taken = jnp.take(rows, jnp.where(is_here, own, 0), axis=0, mode="clip")
        return shards.sum(jnp.where(is_here[:, :, None], taken, 0.0).astype(dtype))

    dims = communication.table_dims(table.shape[0], batch_size=tokens.shape[0])
    return communication.shard_mapped(
        on_device, in_dims=(dims, ("batch", "time")), out_dims=("batch", "time", None)
    )(table, tokens)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], *, eps: float) -> Float[Array, "*B D"]:
    """`scale * x / rms(x)` over the last dim, in float32, returned in the dtype of `x` (Zhang & Sennrich
    2019).
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * along_last(scale, x.ndim)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"], *, eps: float
) -> Float[Array, "*B D"]:
    """`scale * (x - mean) / deviation + bias` over the last dim, in float32, returned in the dtype of `x` (Ba
    et al. 2016).
    """
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    return (normed * along_last(scale, x.ndim) + along_last(bias, x.ndim)).astype(x.dtype)


def dropout(x: Float[Array, "..."], key: Array | None, *, rate: float) -> Float[Array, "..."]:
    """Inverted dropout; the identity when `key` is None (evaluation) or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), jnp.zeros_like(x))


# Modules ----------------------------------------------------------------------------------------------------
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
    """`RmsNorm` whose parameter is the scale less one: at zero, where it starts and decays to, it scales
    nothing.
    """

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
    """Linear map with weight [in, out] and an optional bias; `input_quantizer`, if set, is applied to inputs."""

    def __init__(self, in_dim: int, out_dim: int, *, std: float, bias: bool = False, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(truncated_normal(rngs.params(), (in_dim, out_dim), std))
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32)) if bias else None
        self.input_quantizer: ArrayFunction | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return linear(x, self.weight[...], None if self.bias is None else self.bias[...])


class Embedding(nnx.Module):
    """Token table [V, D]."""

    def __init__(self, num_rows: int, dim: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(truncated_normal(rngs.params(), (num_rows, dim), std))

    def __call__(self, tokens: Int[Array, "B T"], *, dtype: Any) -> Float[Array, "B T D"]:
        return lookup(self.table[...], tokens, dtype=dtype)
