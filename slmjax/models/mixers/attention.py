"""Softmax attention: grouped-query, full or sliding-window, rotary or without positions, with its decoding
cache.

One rule says who sees whom, in training as in decoding: a key is visible when it belongs to the same
document, does not lie ahead, and is nearer than the window. Documents packed in one row therefore never see
each other.

Dims: B batch, T time, S cache slots, D model, N query heads, K key-value heads, H head dim.
"""

import dataclasses
import enum
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.config import ConfigError
from slmjax.models.layers import ArrayFunction, Linear, ModelDims, Norm
from slmjax.models.protocols import CachingMixer, MixerConfig
from slmjax.models.rope import LongScaling, RopeScaling, rotary, sequence_lengths

log = logging.getLogger(__name__)


class QkNorm(enum.Enum):
    """Normalisation of queries and keys before the product."""

    NONE = "none"
    PER_HEAD = "per_head"  # over each head's own dims (Qwen3, Gemma 3)
    ALL_HEADS = "all_heads"  # over the dims of all heads together, with a scale of their own each (OLMo 2)


class Biases(enum.Enum):
    """Which projections carry a bias."""

    NONE = "none"
    QKV = "qkv"
    ALL = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Softmax attention."""

    num_heads: int  # query heads, N
    num_kv_heads: int | None = None  # key-value heads, K; it divides num_heads (none: as many as query heads)
    head_dim: int | None = None  # dims per head, H (none: embed_dim / num_heads)
    window: int | None = None  # how many tokens, itself included, a token sees (none: all before it)
    rope_base: float | None = 10_000.0  # base of the rotary angles (none: no position information)
    # dims of each head that are rotated, the first ones (none: all, or all but an odd one)
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None  # how the angles differ from plain ones (none: they do not)
    qk_norm: QkNorm = QkNorm.NONE  # normalise queries and keys
    biases: Biases = Biases.NONE  # biases of the projections
    scale: float | None = None  # multiplies the scores (none: one over the root of head_dim)
    softcap: float | None = None  # scores are bounded to this by a tanh
    # a learned score for each head that takes its share of the softmax and gives nothing (GPT-OSS)
    sinks: bool = False

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}: need the second to divide "
                "the first"
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1 or none, got {self.head_dim}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (a token sees itself) or none, got {self.window}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive or none, got {self.softcap}")
        if self.rope_base is not None and self.rope_base <= 0:
            raise ValueError(f"rope_base must be positive, or none for no positions, got {self.rope_base}")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(
                f"rotary_dim={self.rotary_dim}: dims are rotated in pairs, so that it must be even and at "
                "least 2; "
                "none rotates all of a head, and rope_base none rotates nothing"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def resolved_head_dim(self, dims: ModelDims) -> int:
        """Dims per head. Raises ValueError where the model's width does not divide by the heads."""
        if self.head_dim is not None:
            return self.head_dim
        if dims.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={dims.embed_dim} does not divide by num_heads={self.num_heads}: change one, or "
                "set head_dim"
            )
        return dims.embed_dim // self.num_heads

    def resolved_rotary_dim(self, dims: ModelDims) -> int:
        """Return how many dims of a head are rotated, 0 without positions.

        Raises:
          ValueError: a head has fewer, or LongRoPE has divisors for another number.
        """
        if self.rope_base is None:
            return 0
        head_dim = self.resolved_head_dim(dims)
        rotated = head_dim - head_dim % 2 if self.rotary_dim is None else self.rotary_dim
        if not 2 <= rotated <= head_dim:
            way_out = "set rotary_dim to an even number of them, or rope_base to none to rotate nothing"
            raise ValueError(f"rotary_dim={self.rotary_dim} and heads of {head_dim} dims: {way_out}")
        if isinstance(self.rope_scaling, LongScaling):
            self.rope_scaling.check_pairs(rotated // 2)
        return rotated

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Read `rope_fraction`, which `rotary_dim` replaced, where `head_dim` is given or all dims are
        rotated.
        """
        return with_rotary_dim(fields, embed_dim=None)

    @classmethod
    def downgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields with `rope_fraction` in the place of a `rotary_dim` that it can stand for."""
        return with_rope_fraction(fields, embed_dim=None)

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Attention":
        """The module, with freshly initialised parameters."""
        return Attention(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """FLOPs of scores and weighted sum per token, averaged over a causal sequence of `length` tokens."""
        window = length if self.window is None else min(self.window, length)
        mean_visible = (window * (window + 1) / 2 + (length - window) * window) / length
        return 4 * mean_visible * self.num_heads * self.resolved_head_dim(dims)

    def state_bytes(self, dims: ModelDims, *, length: int, itemsize: int) -> int:
        """Bytes of cached keys and values of one sequence: a window layer holds no more than its window."""
        slots = length if self.window is None else min(self.window, length)
        return 2 * slots * self.kv_heads * self.resolved_head_dim(dims) * itemsize


def with_rotary_dim(fields: dict[str, Any], *, embed_dim: Any) -> dict[str, Any]:
    """Return JSON fields of an `AttentionConfig` with `rotary_dim` instead of the `rope_fraction` of earlier
    versions.

    They rotated `2 * int(head_dim * rope_fraction / 2)` dims.

    Args:
      embed_dim: the model's, for heads whose width follows from it; None where it is not known.

    Raises:
      ConfigError: a share that is none, or that of a head whose width is not known.
    """
    if "rope_fraction" not in fields:
        return fields
    fields, fraction = {"rotary_dim": None, **fields}, fields["rope_fraction"]
    del fields["rope_fraction"]
    if type(fraction) not in (int, float) or not 0 <= fraction <= 1:
        raise ConfigError(
            f"rope_fraction must lie between 0 and 1, got {fraction!r}: set rotary_dim instead, a number of "
            "dims"
        )
    if fraction == 1 or fields.get("rope_base") is None:
        return fields
    head_dim = _head_dim_of(fields, embed_dim)
    if head_dim is None:
        raise ConfigError(
            f"rope_fraction={fraction} of an earlier version needs head_dim: set rotary_dim instead, a "
            "number of dims"
        )
    fields["rotary_dim"] = 2 * int(head_dim * fraction / 2)
    note = "rope_fraction=%s of an earlier version is read as rotary_dim=%d, of heads of %d dims"
    log.info(note, fraction, fields["rotary_dim"], head_dim)
    return fields


def with_rope_fraction(fields: dict[str, Any], *, embed_dim: Any) -> dict[str, Any]:
    """Return JSON fields with the `rope_fraction` that `with_rotary_dim` reads; as they are where the width
    is not known.
    """
    if "rotary_dim" not in fields:
        return fields
    rotated = fields["rotary_dim"]
    head_dim = _head_dim_of(fields, embed_dim)
    if rotated is not None and head_dim is None:
        return fields
    others = {name: value for name, value in fields.items() if name != "rotary_dim"}
    return others | {"rope_fraction": 1.0 if rotated is None or head_dim is None else rotated / head_dim}


def _head_dim_of(fields: dict[str, Any], embed_dim: Any) -> int | None:
    """The width of a head by JSON fields of any kind, None where they do not say."""
    head_dim = fields.get("head_dim")
    num_heads = fields.get("num_heads")
    if head_dim is None and isinstance(embed_dim, int) and isinstance(num_heads, int) and num_heads > 0:
        head_dim = embed_dim // num_heads
    return head_dim if isinstance(head_dim, int) and head_dim > 0 else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KvCache:
    """Keys and values already seen. The token at position p lives in slot p % S; segment id 0 marks an empty
    slot.

    Heads come before slots: the products of attention then read a cache as it lies, instead of a copy for
    every token. The fields are typed `Any` because a cache is a pytree: it may hold shapes or shardings.
    """

    keys: Any  # Float[Array, "B K S H"]
    values: Any  # Float[Array, "B K S H"]
    positions: Any  # Int[Array, "B S"]
    segment_ids: Any  # Int[Array, "B S"]


def ring_slots(
    num_slots: int, *, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """The slot of a cache that each token is written to; `num_slots`, which is none, for tokens that are not
    kept.

    Kept are those of the last document where there are several (segment ids count up). Padding is left out,
    and so is what a ring of so many slots would overwrite at once.
    """
    real = (segment_ids > 0) & (segment_ids == jnp.max(segment_ids, axis=1, keepdims=True))
    last = jnp.max(jnp.where(real, positions, -1), axis=1, keepdims=True)
    kept = real & (positions > last - num_slots)
    return jnp.where(kept, positions % num_slots, num_slots)


def write_cache(
    cache: KvCache,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> KvCache:
    """The cache with these tokens added: which ones, and where, `ring_slots` says."""
    slots = ring_slots(cache.positions.shape[1], positions=positions, segment_ids=segment_ids)
    rows = jnp.arange(positions.shape[0])[:, None]
    return KvCache(
        keys=cache.keys.at[rows, :, slots].set(keys.astype(cache.keys.dtype), mode="drop"),
        values=cache.values.at[rows, :, slots].set(values.astype(cache.values.dtype), mode="drop"),
        positions=cache.positions.at[rows, slots].set(positions, mode="drop"),
        segment_ids=cache.segment_ids.at[rows, slots].set(segment_ids, mode="drop"),
    )


def join(cache: Any, new: Any) -> Any:
    """The slots of two caches of a kind, one after the other: the middle dim of each array, the last of
    two.
    """
    return jax.tree.map(
        lambda old, late: jnp.concatenate([old, late.astype(old.dtype)], axis=old.ndim // 2), cache, new
    )


class Attention(CachingMixer):
    """Grouped-query softmax attention."""

    def __init__(self, config: AttentionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        head_dim = config.resolved_head_dim(dims)
        self.config = config
        self.head_dim = head_dim
        self.dtype = dims.dtype
        self.rotary_dim = config.resolved_rotary_dim(dims)
        self.scale = head_dim**-0.5 if config.scale is None else config.scale
        wide = {"std": dims.init_std, "bias": config.biases is not Biases.NONE, "rngs": rngs}
        self.query = Linear(dims.embed_dim, config.num_heads * head_dim, **wide)
        self.key = Linear(dims.embed_dim, config.kv_heads * head_dim, **wide)
        self.value = Linear(dims.embed_dim, config.kv_heads * head_dim, **wide)
        self.output = Linear(
            config.num_heads * head_dim,
            dims.embed_dim,
            std=dims.output_std,
            bias=config.biases is Biases.ALL,
            rngs=rngs,
        )
        self.query_norm = self._norm(dims, config.num_heads)
        self.key_norm = self._norm(dims, config.kv_heads)
        self.sinks = nnx.Param(jnp.zeros((config.num_heads,), jnp.float32)) if config.sinks else None
        self.cache_quantizer: ArrayFunction | None = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: Any,
        max_lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        is_decoding = state is not None
        lengths = sequence_lengths(positions, segment_ids, max_lengths=max_lengths, is_decoding=is_decoding)
        queries = self._heads(self.query(x), self.query_norm, positions, lengths)
        keys = self._heads(self.key(x), self.key_norm, positions, lengths)
        values = self._split(self.value(x))
        if self.cache_quantizer is not None:
            keys = self.cache_quantizer(keys)
            values = self.cache_quantizer(values)
        sinks = None if self.sinks is None else self.sinks[...]
        how: dict[str, Any] = {
            "window": self.config.window,
            "scale": self.scale,
            "softcap": self.config.softcap,
            "sinks": sinks,
        }
        if state is None:
            mixed = kernels.self_attention(queries, keys, values, segment_ids=segment_ids, **how)
        else:
            as_cached = {"keys": jnp.swapaxes(keys, 1, 2), "values": jnp.swapaxes(values, 1, 2)}
            new = KvCache(**as_cached, positions=positions, segment_ids=segment_ids)
            written = write_cache(state, keys, values, positions=positions, segment_ids=segment_ids)
            # One token finds all it may see in the cache; several may need slots that a ring has just given
            # away.
            seen = written if x.shape[1] == 1 else join(state, new)
            mixed = kernels.reference_attention(
                queries,
                jnp.swapaxes(seen.keys, 1, 2),
                jnp.swapaxes(seen.values, 1, 2),
                q_segments=segment_ids,
                k_segments=seen.segment_ids,
                q_positions=positions,
                k_positions=seen.positions,
                **how,
            )
            state = written
        batch, length = positions.shape
        return self.output(mixed.reshape(batch, length, -1)), state

    def init_state(self, batch_size: int, *, max_length: int) -> KvCache:
        """An empty cache: of the window's size where there is one, of `max_length` slots where not."""
        num_slots = max_length if self.config.window is None else min(self.config.window, max_length)
        shape = (batch_size, self.config.kv_heads, num_slots, self.head_dim)
        marks = jnp.zeros((batch_size, num_slots), jnp.int32)
        return KvCache(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            positions=marks,
            segment_ids=marks,
        )

    def cached_shape(self) -> tuple[int, ...]:
        """Keys and values: [2, K, H]."""
        return 2, self.config.kv_heads, self.head_dim

    def _norm(self, dims: ModelDims, num_heads: int) -> Norm | None:
        num_normed = {QkNorm.NONE: 0, QkNorm.PER_HEAD: 1, QkNorm.ALL_HEADS: num_heads}[self.config.qk_norm]
        return dims.norm(num_normed * self.head_dim) if num_normed else None

    def _split(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def _heads(
        self,
        x: Float[Array, "B T NH"],
        norm: Norm | None,
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "B T N H"]:
        if norm is not None and self.config.qk_norm is QkNorm.ALL_HEADS:
            x = norm(x)
        x_BTNH = self._split(x)
        if norm is not None and self.config.qk_norm is QkNorm.PER_HEAD:
            x_BTNH = norm(x_BTNH)
        if self.config.rope_base is None:
            return x_BTNH
        return rotary(
            x_BTNH,
            positions,
            base=self.config.rope_base,
            rotary_dim=self.rotary_dim,
            scaling=self.config.rope_scaling,
            lengths=lengths,
        )
