"""Differential attention: the difference of two softmax maps, over values that are twice as wide.

A head has two queries and two keys for each token. Attention that both maps put on irrelevant tokens cancels
(Ye et al. 2024, arXiv 2410.05258):

- head = (softmax(q1 k1) - lambda softmax(q2 k2)) V
- lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init,   lambda_init = 0.8 - 0.6 exp(-0.3 layer)
- output = W_o concat((1 - lambda_init) RMSNorm(head))

Each map is an ordinary attention over the same values, so that every implementation of attention serves it.

Dims: B batch, T time, S keys, D model, N heads, K key-value heads, H dims of a query and of a key; a value
has 2 H.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import ArrayFunction, Linear, ModelDims, RmsNorm
from slmjax.models.mixers.attention import KvCache, extend_cache
from slmjax.models.protocols import (
    NO_CONTEXT,
    CachingMixer,
    ContextMixer,
    MixerConfig,
    MixerContext,
    StateSize,
)
from slmjax.models.rope import rotary

# Deviation of the vectors of lambda, whose products then begin near 0.
LARGEST_EXPONENT = 30.0  # e^30 is 1e13, whose square is a number of float32
LAMBDA_STD = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentialAttentionConfig(MixerConfig):
    """Differential attention."""

    # Half as many as the heads of softmax attention with as many parameters.
    num_heads: int  # heads, each of two maps, N
    num_kv_heads: int | None = None  # key-value heads, K, a divisor of num_heads (none: num_heads)
    # A value has twice as many.
    head_dim: int | None = None  # dims of a query and of a key, H (none: embed_dim / (2 num_heads))
    window: int | None = None  # tokens that a token sees, itself included (none: all before it)
    rope_base: float | None = 10_000.0  # base of the rotary angles (none: no position information)

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                "num_heads must be divisible by num_kv_heads, and both at least 1, got "
                f"num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1 or none, got {self.head_dim}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (a token sees itself) or none, got {self.window}")
        if self.rope_base is not None and self.rope_base <= 0:
            raise ValueError(f"rope_base must be positive, or none for no positions, got {self.rope_base}")

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads, each of two keys and one value."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def resolved_head_dim(self, dims: ModelDims) -> int:
        """Return the dims of a query. Raises ValueError if they do not suit the model's width or rotation."""
        head_dim = self.head_dim
        if head_dim is None:
            if dims.embed_dim % (2 * self.num_heads):
                raise ValueError(
                    f"embed_dim={dims.embed_dim} does not divide by twice num_heads={self.num_heads}: change "
                    "one, or set head_dim"
                )
            head_dim = dims.embed_dim // (2 * self.num_heads)
        if self.rope_base is not None and head_dim % 2:
            raise ValueError(
                f"head_dim={head_dim}: dims are rotated in pairs, so it must be even, or rope_base none"
            )
        return head_dim

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "DifferentialAttention":
        """Build the module, with freshly initialised parameters."""
        return DifferentialAttention(self, dims, rngs=rngs)

    def layer_constants(
        self, dims: ModelDims, *, index: int, num_layers: int
    ) -> Mapping[str, np.ndarray | np.generic | float]:
        """Return `lambda_init`: 0.2 for the first layer, near 0.8 for late ones."""
        return {"lambda_init": 0.8 - 0.6 * math.exp(-0.3 * index)}

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs of both maps per token, averaged over a causal sequence."""
        window = length if self.window is None else min(self.window, length)
        mean_visible = (window * (window + 1) / 2 + (length - window) * window) / length
        # Of each map, scores and a weighted sum of 2 H dims: queries and keys are padded to that.
        return 2 * 8 * mean_visible * self.num_heads * self.resolved_head_dim(dims)

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of cached keys and values of one sequence, at most those of the window."""
        slots = length if self.window is None else min(self.window, length)
        return StateSize(cached=4 * slots * self.kv_heads * self.resolved_head_dim(dims))


def lambda_of(vectors: Float[Array, "4 H"], lambda_init: Float[Array, ""] | float) -> Float[Array, ""]:
    """Return exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init, for the rows l_q1, l_k1, l_q2, l_k2."""
    query1, key1, query2, key2 = vectors.astype(jnp.float32)
    # Where both exponentials overflow, their difference is no number.
    first = jnp.exp(jnp.minimum(jnp.sum(query1 * key1), LARGEST_EXPONENT))
    second = jnp.exp(jnp.minimum(jnp.sum(query2 * key2), LARGEST_EXPONENT))
    return first - second + lambda_init


def differential_attention(
    queries: Float[Array, "B T N 2 H"],
    keys: Float[Array, "B S K 2 H"],
    values: Float[Array, "B S K V"],
    *,
    weight: Float[Array, ""],
    attend: Callable[[Array, Array, Array], Array],
) -> Float[Array, "B T N V"]:
    """Return the first map's mean of the values minus `weight` times the second's, in float32.

    Args:
      attend: attention of queries [B, T, N, V] over keys and values [B, S, K, V].
    """
    # Fused kernels need queries, keys and values of one width. Zeros add nothing to a product.
    padding = [(0, 0)] * 4 + [(0, values.shape[-1] - keys.shape[-1])]
    queries = jnp.pad(queries, padding)
    keys = jnp.pad(keys, padding)
    first, second = (
        attend(queries[..., index, :], keys[..., index, :], values).astype(jnp.float32) for index in (0, 1)
    )
    return first - weight * second


class DifferentialAttention(CachingMixer, ContextMixer):
    """Grouped-query differential attention; the decoding state is a cache of 2 K keys and K values."""

    def __init__(self, config: DifferentialAttentionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        head_dim = config.resolved_head_dim(dims)
        self.config = config
        self.head_dim = head_dim
        self.dtype = dims.dtype
        self.scale = dims.scaling.score_scale(head_dim, None)
        linear_kwargs = {"std": dims.init_std, "rngs": rngs}
        self.query = Linear(dims.embed_dim, config.num_heads * 2 * head_dim, **linear_kwargs)
        self.key = Linear(dims.embed_dim, config.kv_heads * 2 * head_dim, **linear_kwargs)
        self.value = Linear(dims.embed_dim, config.kv_heads * 2 * head_dim, **linear_kwargs)
        self.output = Linear(config.num_heads * 2 * head_dim, dims.embed_dim, std=dims.output_std, rngs=rngs)
        # The heads share one scale per dim of a value.
        self.head_norm = RmsNorm(2 * head_dim, eps=dims.norm_eps)

        def vector() -> nnx.Param:
            return nnx.Param(LAMBDA_STD * jax.random.normal(rngs.params(), (head_dim,), jnp.float32))

        self.lambda_query1 = vector()
        self.lambda_key1 = vector()
        self.lambda_query2 = vector()
        self.lambda_key2 = vector()
        self.cache_quantizer: ArrayFunction | None = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
        max_lengths: Int[Array, " B"] | None = None,
        context: MixerContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B T D"], Any]:
        queries = self._rotated(self.query(x), positions)
        keys = self._rotated(self.key(x), positions)
        # The halves of a value are cached as the values of two keys.
        values = self._split(self.value(x))
        # In training too: the model then learns with the rounded keys and values that decoding caches.
        if self.cache_quantizer is not None:
            keys = self.cache_quantizer(keys)
            values = self.cache_quantizer(values)
        settings: dict[str, Any] = {"window": self.config.window, "scale": self.scale}
        if state is None:

            def attend(q: Array, k: Array, v: Array) -> Array:
                return kernels.self_attention(q, k, v, segment_ids=segment_ids, **settings)
        else:
            visible, state = extend_cache(state, keys, values, positions=positions, segment_ids=segment_ids)
            keys = jnp.swapaxes(visible.keys, 1, 2)
            values = jnp.swapaxes(visible.values, 1, 2)
            ids = {
                "q_segments": segment_ids,
                "k_segments": visible.segment_ids,
                "q_positions": positions,
                "k_positions": visible.positions,
            }

            def attend(q: Array, k: Array, v: Array) -> Array:
                return kernels.reference_attention(q, k, v, **ids, **settings)

        vectors = (self.lambda_query1, self.lambda_key1, self.lambda_query2, self.lambda_key2)
        lambda_init = context.constants["lambda_init"]
        heads = differential_attention(
            self._pairs(queries),
            self._pairs(keys),
            self._pairs(values).reshape(*values.shape[:2], -1, 2 * self.head_dim),
            weight=lambda_of(jnp.stack([vector[...] for vector in vectors]), lambda_init),
            attend=attend,
        )
        heads = self.head_norm(heads) * (1.0 - lambda_init)
        return self.output(heads.astype(x.dtype).reshape(*positions.shape, -1)), state

    def init_state(self, batch_size: int, *, max_length: int) -> KvCache:
        """Return an empty cache of `max_length` slots, or of the window's size if that is smaller."""
        num_slots = max_length if self.config.window is None else min(self.config.window, max_length)
        entries = jnp.zeros((batch_size, 2 * self.config.kv_heads, num_slots, self.head_dim), self.dtype)
        ids = jnp.zeros((batch_size, num_slots), jnp.int32)
        # Segment id 0 masks every slot until it is written.
        return KvCache(keys=entries, values=entries, positions=ids, segment_ids=ids)

    def cached_shape(self) -> tuple[int, ...]:
        """Return the shape of a token's keys and half values, [2, 2 K, H]."""
        return 2, 2 * self.config.kv_heads, self.head_dim

    def _split(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def _pairs(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T M 2 H"]:
        return x.reshape(*x.shape[:2], -1, 2, self.head_dim)

    def _rotated(self, x: Float[Array, "B T NH"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        x_BTNH = self._split(x)
        if self.config.rope_base is None:
            return x_BTNH
        return rotary(x_BTNH, positions, base=self.config.rope_base)
