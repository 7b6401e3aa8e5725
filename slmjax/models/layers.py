"""Norms, linear maps and embeddings: typed pure functions, then thin NNX modules.

Math is a free function of arrays; a module holds parameters and calls it. Parameters are float32; a module
computes in `ModelDims.dtype` (float32 or bfloat16), with norms, angles and softmax in float32.

Dims: B batch, T time, D model, I in, O out, V vocabulary; `...` any leading dims.
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
from slmjax.models.parameterization import UNSCALED, Scaling
from slmjax.parallel import communication, mesh

# A function that a layer applies to its inputs or its cache. Quantization sets it; layers only call it.
ArrayFunction = Callable[[Array], Array]


class NormKind(enum.Enum):
    """Kind of all norms of a model."""

    RMS = "rms"  # divided by the root mean square, times a scale
    CENTERED_RMS = "centered_rms"  # RMS with a scale that is stored as its difference from one (Gemma)
    LAYER = "layer"  # mean removed, divided by the standard deviation, times a scale, plus a bias (GPT-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Dims and settings that all layers of a model share, derived from the model's config."""

    embed_dim: int  # D
    num_layers: int  # as executed, each loop of a block counted; sets `output_std`
    norm_eps: float
    init_std: float  # of matrices between hidden layers
    norm_kind: NormKind = NormKind.RMS
    dtype: Any  # dtype of the computation: jnp.float32 or jnp.bfloat16
    scaling: Scaling = UNSCALED  # the model's size relative to its base
    # of the layer that is built, by name (`MixerConfig.layer_constants`): arrays, which differ between layers
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def norm(self, dim: int) -> "Norm":
        """Build a norm over `dim` dims, of the model's kind."""
        return NORMS[self.norm_kind](dim, eps=self.norm_eps)

    @property
    def output_std(self) -> float:
        """Standard deviation of the weights that write into the residual stream (GPT-2's depth scaling)."""
        # Two such writes per layer: their variances add up to that of one weight of `init_std`. Where updates
        # are divided by the depth relative to the base, the base's depth counts.
        return self.init_std / math.sqrt(2 * self.num_layers / self.scaling.depth)

    @property
    def router_std(self) -> float:
        """Standard deviation of the weights of routers, which have a fixed number of outputs."""
        return self.init_std * self.scaling.router_std / self.scaling.hidden_std


# Functions --------------------------------------------------------------------------------------------------
def truncated_normal(key: Array, shape: tuple[int, ...], std: float) -> Float[Array, "..."]:
    """Draw normal values of standard deviation `std`, cut at three of them: the initialisation of weights."""
    # Not rescaled: the cut lowers the deviation by 1.3 %.
    return std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)


def along_last(vector: Float[Array, " D"], ndim: int) -> Float[Array, "..."]:
    """Reshape a vector so that it broadcasts along the last dim of an array of `ndim` dims.

    Explicit, because implicit rank promotion is an error in the tests: it hides mistakes in shapes.
    """
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))


def linear(
    x: Float[Array, "*B I"], weight: Float[Array, "I O"], bias: Float[Array, " O"] | None = None
) -> Float[Array, "*B O"]:
    """Return `x @ weight + bias` in the dtype of `x`; weight and bias are cast to it."""
    y = kernels.matmul(x, weight)
    return y if bias is None else y + along_last(bias.astype(x.dtype), y.ndim)


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, dtype: Any) -> Float[Array, "B T D"]:
    """Return the rows of a table at the indices `tokens`, in `dtype`.

    The lookup is in float32 and cast afterwards: its gradient sums as many rows as a token has occurrences,
    and a sum of ones in bfloat16 stops at 256.
    """
    # `jnp.take` fills NaN for indices out of bounds by default; clipping needs no mask.
    if mesh.is_single_device():
        return jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)

    def on_device(table: Array, tokens: Array) -> Array:
        rows, shards = communication.gathered_table(table)
        if shards.count == 1:
            # The sum over one device shows the tracer that the result does not vary over its axis.
            return shards.sum(jnp.take(rows, tokens, axis=0, mode="clip").astype(dtype))
        # Each row is on one device of the vocabulary: the others add zeros.
        local_tokens = tokens - shards.index() * rows.shape[0]
        is_local = (local_tokens >= 0) & (local_tokens < rows.shape[0])
        taken = jnp.take(rows, jnp.where(is_local, local_tokens, 0), axis=0, mode="clip")
        # Cast before the sum: all terms but one are zero, so nothing is lost, and half the bytes travel.
        return shards.sum(jnp.where(is_local[:, :, None], taken, 0.0).astype(dtype))

    dims = communication.table_dims(table.shape[0], batch_size=tokens.shape[0])
    return communication.shard_mapped(
        on_device, in_dims=(dims, ("batch", "time")), out_dims=("batch", "time", None)
    )(table, tokens)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], *, eps: float) -> Float[Array, "*B D"]:
    """Return `scale * x / rms(x)` over the last dim, computed in float32 (Zhang & Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    # The scale multiplies before the cast, as in Gemma. Llama's code casts first: in bfloat16 the last bit
    # may differ.
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * along_last(scale, x.ndim)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"], *, eps: float
) -> Float[Array, "*B D"]:
    """Return `scale * (x - mean) / std + bias` over the last dim, computed in float32 (Ba et al. 2016)."""
    x32 = x.astype(jnp.float32)
    # The variance of centered values: E[x^2] - E[x]^2 would cancel.
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    return (normed * along_last(scale, x.ndim) + along_last(bias, x.ndim)).astype(x.dtype)


def dropout(x: Float[Array, "..."], key: Array | None, *, rate: float) -> Float[Array, "..."]:
    """Apply inverted dropout; the identity if `key` is None (evaluation) or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    # Inverted: the division in training spares evaluation a factor.
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
    """`RmsNorm` whose parameter is the scale minus one, so that weight decay pulls the scale towards one."""

    def __init__(self, dim: int, *, eps: float) -> None:
        # Zero stands for a scale of one.
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
    """Linear map with weight [in, out] and an optional bias; `input_quantizer`, if set, precedes it."""

    def __init__(self, in_dim: int, out_dim: int, *, std: float, bias: bool = False, rngs: nnx.Rngs) -> None:
        # [in, out] is the transpose of PyTorch's layout: conversion transposes every matrix.
        self.weight = nnx.Param(truncated_normal(rngs.params(), (in_dim, out_dim), std))
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32)) if bias else None
        # Marked as data, because quantization may set a module with variables here.
        self.input_quantizer: ArrayFunction | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return linear(x, self.weight[...], None if self.bias is None else self.bias[...])


class Embedding(nnx.Module):
    """Embedding table [V, D], and if the layers have one (`models/per_layer.py`), their table [V, N*P]."""

    def __init__(
        self, num_rows: int, dim: int, *, std: float, rngs: nnx.Rngs, per_layer_dim: int | None = None
    ) -> None:
        key = rngs.params()
        self.table = nnx.Param(truncated_normal(key, (num_rows, dim), std))
        # Both are looked up by token: rules of weight decay and Muon for `embed/` hold for both.
        self.per_layer = (
            None
            if per_layer_dim is None
            else nnx.Param(truncated_normal(jax.random.fold_in(key, 1), (num_rows, per_layer_dim), std))
        )

    def __call__(self, tokens: Int[Array, "B T"], *, dtype: Any) -> Float[Array, "B T D"]:
        return lookup(self.table[...], tokens, dtype=dtype)
