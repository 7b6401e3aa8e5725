"""Softmax attention: grouped-query, full or sliding-window, rotary or without positions, with a KV cache.

Visibility follows one rule in training and decoding: a query sees a key of the same document, not after it,
and within the window. Documents packed in one row therefore never see each other.

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
from slmjax.config import ConfigError, added_field
from slmjax.models.layers import ArrayFunction, Linear, ModelDims, Norm
from slmjax.models.protocols import (
    NO_CONTEXT,
    CachingMixer,
    ContextMixer,
    MixerConfig,
    MixerContext,
    StateSize,
    Visibility,
)
from slmjax.models.rope import LongScaling, RopeScaling, rotary, sequence_lengths

log = logging.getLogger(__name__)


class QkNorm(enum.Enum):
    """Normalisation of queries and keys before their product."""

    # Vectors of bounded length keep the scores from growing (Henry et al. 2020; Dehghani et al. 2023).
    NONE = "none"
    PER_HEAD = "per_head"  # over the dims of each head (Qwen3, Gemma 3)
    ALL_HEADS = "all_heads"  # over the dims of all heads together, with a scale for each dim (OLMo 2)


class Biases(enum.Enum):
    """Projections that have a bias."""

    NONE = "none"
    # As in Qwen2.5; OUTPUT is RecurrentGemma's, ALL is GPT-2's.
    QKV = "qkv"  # all but the output projection
    OUTPUT = "output"  # the output projection alone
    ALL = "all"


class OutputGate(enum.Enum):
    """Gates of what heads return, before the output projection (Qiu et al. 2025)."""

    # A head that finds nothing can close its gate, instead of attending to the first token.
    NONE = "none"
    PER_HEAD = "per_head"  # one gate for each head
    PER_ELEMENT = "per_element"  # one for each dim of each head (Qwen3-Next)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Softmax attention."""

    num_heads: int  # query heads, N
    # Grouped-query attention (Ainslie et al. 2023); one key-value head is multi-query (Shazeer 2019).
    num_kv_heads: int | None = None  # key-value heads, K, a divisor of num_heads (none: num_heads)
    head_dim: int | None = None  # dims per head, H (none: embed_dim / num_heads)
    # A sliding window (Beltagy et al. 2020) bounds the cache and the cost of a token.
    window: int | None = None  # tokens that a token sees, itself included (none: all before it)
    rope_base: float | None = 10_000.0  # base of the rotary angles (none: no position information)
    rotary_dim: int | None = None  # rotated dims of each head, its first ones (none: all that form pairs)
    rope_scaling: RopeScaling | None = None  # scaling of the rotary frequencies (none: unscaled)
    qk_norm: QkNorm = QkNorm.NONE  # normalise queries and keys
    biases: Biases = Biases.NONE  # biases of the projections
    scale: float | None = None  # factor of the scores (none: one over the square root of head_dim)
    softcap: float | None = None  # bound of the scores, by a tanh (none: unbounded)
    # Heads with nothing to attend to otherwise put their weight on the first tokens (Xiao et al. 2023).
    sinks: bool = False  # a learned score per head that takes part in the softmax without a value (GPT-OSS)
    # multiply what heads return with the sigmoid of a projection of the layer's input
    output_gate: OutputGate = added_field(OutputGate.NONE, before=OutputGate.NONE)
    # later layers may read keys and values under this name (none: no layer does)
    writes_kv: str | None = added_field(None, before=None)
    # take the keys and values of the layer that last wrote this name (none: this layer has its own)
    reads_kv: str | None = added_field(None, before=None)

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads must be divisible by num_kv_heads, and both at least 1, got "
                f"num_heads={self.num_heads} and num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1 or none, got {self.head_dim}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (a token sees itself) or none, got {self.window}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive or none, got {self.softcap}")
        if self.writes_kv is not None and self.reads_kv is not None:
            raise ValueError(
                f"writes_kv={self.writes_kv!r} and reads_kv={self.reads_kv!r}: a layer that reads keys and "
                "values has none to write, so set one of them"
            )
        if self.rope_base is not None and self.rope_base <= 0:
            raise ValueError(f"rope_base must be positive, or none for no positions, got {self.rope_base}")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(
                f"rotary_dim={self.rotary_dim}: dims are rotated in pairs, so it must be even and at least "
                "2; none rotates all of a head, and rope_base none rotates nothing"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def reads(self) -> tuple[str, ...]:
        """Return the name of the keys and values that are read, if they are those of an earlier layer."""
        return () if self.reads_kv is None else (self.reads_kv,)

    def writes(self) -> tuple[str, ...]:
        """Return the name under which keys and values are written, if they are."""
        return () if self.writes_kv is None else (self.writes_kv,)

    def source_problem(self, name: str, source: MixerConfig, dims: ModelDims) -> str | None:
        """Return how keys and values of `source` differ in shape, rotation or window from those read here."""
        if not isinstance(source, AttentionConfig):
            return f"it is written by {type(source).__name__}, and must be by AttentionConfig"
        ours = {"key-value heads": self.kv_heads, "head_dim": self.resolved_head_dim(dims)}
        theirs = {"key-value heads": source.kv_heads, "head_dim": source.resolved_head_dim(dims)}
        # Keys are rotated where they are made. A cache of another window lacks keys that training sees.
        for field in ("window", "rope_base", "rotary_dim", "rope_scaling"):
            ours[field] = getattr(self, field)
            theirs[field] = getattr(source, field)
        differing = (field for field in ours if ours[field] != theirs[field])
        return next(
            (
                f"{field} is {ours[field]} here and {theirs[field]} in the layer that writes it: set the same"
                for field in differing
            ),
            None,
        )

    def resolved_head_dim(self, dims: ModelDims) -> int:
        """Return the dims per head. Raises ValueError if the heads do not divide the model's width."""
        if self.head_dim is not None:
            return self.head_dim
        if dims.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={dims.embed_dim} does not divide by num_heads={self.num_heads}: change one, or "
                "set head_dim"
            )
        return dims.embed_dim // self.num_heads

    def resolved_rotary_dim(self, dims: ModelDims) -> int:
        """Return the number of rotated dims of a head, 0 without positions.

        Raises:
          ValueError: a head has fewer dims, or LongRoPE has divisors for another number of them.
        """
        if self.rope_base is None:
            return 0
        head_dim = self.resolved_head_dim(dims)
        # Dims rotate in pairs: an odd head leaves its last dim as it is.
        rotated = head_dim - head_dim % 2 if self.rotary_dim is None else self.rotary_dim
        if not 2 <= rotated <= head_dim:
            way_out = "set rotary_dim to an even number of them, or rope_base to none to rotate nothing"
            raise ValueError(f"rotary_dim={self.rotary_dim} and heads of {head_dim} dims: {way_out}")
        if isinstance(self.rope_scaling, LongScaling):
            self.rope_scaling.check_pairs(rotated // 2)
        return rotated

    def training_note(self, dims: ModelDims) -> str | None:
        """Return a warning about heads whose last dim is not rotated; None if all are, or none."""
        head_dim = self.resolved_head_dim(dims)
        # Not an error: files of earlier versions have such heads.
        if self.rope_base is None or self.rotary_dim is not None or not head_dim % 2:
            return None
        return (
            f"heads of {head_dim} dims, an odd number: dims are rotated in pairs, so the last one has no "
            f"position. Set mixer.rotary_dim={head_dim - 1} if that is meant, or an even mixer.head_dim"
        )

    @classmethod
    def upgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Read `rope_fraction`, which `rotary_dim` replaced; it needs `head_dim`, unless all dims rotate."""
        return with_rotary_dim(fields, embed_dim=None)

    @classmethod
    def downgraded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields with `rope_fraction` instead of `rotary_dim`, where it can represent it."""
        return with_rope_fraction(fields, embed_dim=None)

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Attention":
        """Build the module, with freshly initialised parameters."""
        return Attention(self, dims, rngs=rngs)

    def visibilities(self) -> frozenset[Visibility]:
        """Return all kinds: causal, prefix and both ways."""
        return frozenset(Visibility)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs of scores and weighted sum per token, averaged over a causal sequence."""
        # The first `window` tokens see 1, 2, ... tokens, the others all of the window.
        window = length if self.window is None else min(self.window, length)
        mean_visible = (window * (window + 1) / 2 + (length - window) * window) / length
        # Two products, scores and weighted sum, of 2 FLOPs for each multiplication and addition.
        return 4 * mean_visible * self.num_heads * self.resolved_head_dim(dims)

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of cached keys and values of one sequence, at most those of the window.

        A layer that reads those of another caches nothing.
        """
        if self.reads_kv is not None:
            return StateSize()
        slots = length if self.window is None else min(self.window, length)
        return StateSize(cached=2 * slots * self.kv_heads * self.resolved_head_dim(dims))


def with_rotary_dim(fields: dict[str, Any], *, embed_dim: Any) -> dict[str, Any]:
    """Return JSON fields of an `AttentionConfig` with `rotary_dim` for an earlier version's `rope_fraction`.

    Earlier versions rotated `2 * int(head_dim * rope_fraction / 2)` dims.

    Args:
      fields: JSON fields, which may be of either version.
      embed_dim: the model's width, for heads without `head_dim`; None if it is unknown.

    Raises:
      ConfigError: the fraction is not between 0 and 1, or the head's width is unknown.
    """
    if "rope_fraction" not in fields:
        return fields
    fraction = fields["rope_fraction"]
    others = {name: value for name, value in fields.items() if name != "rope_fraction"}
    fields = {"rotary_dim": None, **others}
    # Not isinstance: a bool is an int too, and JSON's true is no fraction.
    if type(fraction) not in (int, float) or not 0 <= fraction <= 1:
        raise ConfigError(
            f"rope_fraction must be between 0 and 1, got {fraction!r}: set rotary_dim, a number of dims, "
            "instead"
        )
    # None already stands for all dims, of heads of any width.
    if fraction == 1 or fields.get("rope_base") is None:
        return fields
    head_dim = _head_dim_of(fields, embed_dim)
    if head_dim is None:
        raise ConfigError(
            f"rope_fraction={fraction} of an earlier version needs head_dim: set rotary_dim, a number of "
            "dims, instead"
        )
    fields["rotary_dim"] = 2 * int(head_dim * fraction / 2)
    note = "rope_fraction=%s of an earlier version is read as rotary_dim=%d, of heads of %d dims"
    log.info(note, fraction, fields["rotary_dim"], head_dim)
    return fields


def with_rope_fraction(fields: dict[str, Any], *, embed_dim: Any) -> dict[str, Any]:
    """Return JSON fields with the `rope_fraction` that `with_rotary_dim` reads, if the width is known."""
    if "rotary_dim" not in fields:
        return fields
    rotated = fields["rotary_dim"]
    head_dim = _head_dim_of(fields, embed_dim)
    # A fraction of an unknown width cannot be written: the new field stays.
    if rotated is not None and head_dim is None:
        return fields
    others = {name: value for name, value in fields.items() if name != "rotary_dim"}
    return others | {"rope_fraction": 1.0 if rotated is None or head_dim is None else rotated / head_dim}


def _head_dim_of(fields: dict[str, Any], embed_dim: Any) -> int | None:
    """Return the width of a head from unchecked JSON fields; None if they do not contain it."""
    head_dim = fields.get("head_dim")
    num_heads = fields.get("num_heads")
    if head_dim is None and isinstance(embed_dim, int) and isinstance(num_heads, int) and num_heads > 0:
        head_dim = embed_dim // num_heads
    return head_dim if isinstance(head_dim, int) and head_dim > 0 else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KvCache:
    """A ring of S slots for keys and values.

    The token at position p is in slot p % S, so that a ring of the window's size overwrites just the keys
    that have left the window. Segment id 0 marks an empty slot, which attention masks as it masks padding.
    Heads come before slots: the products of attention then read the cache in its layout in memory, instead of
    copying it for every token. The fields are typed `Any` because a cache is a pytree: it may hold shapes or
    shardings.
    """

    keys: Any  # Float[Array, "B K S H"]
    values: Any  # Float[Array, "B K S H"]
    positions: Any  # Int[Array, "B S"]
    segment_ids: Any  # Int[Array, "B S"]


def ring_slots(
    num_slots: int, *, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Return the cache slot of each token, or `num_slots`, out of bounds, for tokens that are not cached.

    Only tokens of the last document are cached, if there are several (segment ids count up). Padding is not,
    and neither are tokens that later ones of the same call would overwrite: a scatter with equal indices has
    no defined order.
    """
    in_last_document = (segment_ids > 0) & (segment_ids == jnp.max(segment_ids, axis=1, keepdims=True))
    last_position = jnp.max(jnp.where(in_last_document, positions, -1), axis=1, keepdims=True)
    is_cached = in_last_document & (positions > last_position - num_slots)
    return jnp.where(is_cached, positions % num_slots, num_slots)


def write_cache(
    cache: KvCache,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> KvCache:
    """Return the cache with these tokens written to the slots of `ring_slots`."""
    slots = ring_slots(cache.positions.shape[1], positions=positions, segment_ids=segment_ids)
    rows = jnp.arange(positions.shape[0])[:, None]
    return KvCache(
        # Index arrays on both sides of a slice move to the front: the update is [B, T, K, H], as `keys` is.
        keys=cache.keys.at[rows, :, slots].set(keys.astype(cache.keys.dtype), mode="drop"),
        values=cache.values.at[rows, :, slots].set(values.astype(cache.values.dtype), mode="drop"),
        positions=cache.positions.at[rows, slots].set(positions, mode="drop"),
        segment_ids=cache.segment_ids.at[rows, slots].set(segment_ids, mode="drop"),
    )


def join(cache: Any, new: Any) -> Any:
    """Concatenate the slots of two caches of the same type."""
    # Slots are dim 1 of [B, S] and [B, S, C], and dim 2 of [B, K, S, H].
    return jax.tree.map(
        lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=old.ndim // 2), cache, new
    )


def extend_cache(
    cache: KvCache,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> tuple[KvCache, KvCache]:
    """Return the entries that these tokens may see, theirs included, and the cache after them."""
    written = write_cache(cache, keys, values, positions=positions, segment_ids=segment_ids)
    # A single token finds all visible keys in the updated cache. The first of several tokens may need keys
    # that the last of them overwrite in the ring.
    if positions.shape[1] == 1:
        return written, written
    new = KvCache(
        keys=jnp.swapaxes(keys, 1, 2),
        values=jnp.swapaxes(values, 1, 2),
        positions=positions,
        segment_ids=segment_ids,
    )
    return join(cache, new), written


def gated_heads(heads: Float[Array, "B T N H"], gates: Float[Array, "B T G"]) -> Float[Array, "B T N H"]:
    """Return what heads return times the sigmoid of their gates, computed in float32.

    G is N for a gate per head, and N H for a gate per dim of each head, in the order of the heads.
    """
    gates_BTNG = gates.astype(jnp.float32).reshape(*heads.shape[:3], -1)
    return (heads.astype(jnp.float32) * jax.nn.sigmoid(gates_BTNG)).astype(heads.dtype)


class Attention(CachingMixer, ContextMixer):
    """Grouped-query softmax attention.

    The decoding state is a cache; it is empty in a layer that reads the keys and values of another.
    """

    def __init__(self, config: AttentionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        head_dim = config.resolved_head_dim(dims)
        self.config = config
        self.head_dim = head_dim
        self.dtype = dims.dtype
        self.rotary_dim = config.resolved_rotary_dim(dims)
        self.scale = dims.scaling.score_scale(head_dim, config.scale)
        has_bias = config.biases in (Biases.QKV, Biases.ALL)
        linear_kwargs = {"std": dims.init_std, "bias": has_bias, "rngs": rngs}
        self.query = Linear(dims.embed_dim, config.num_heads * head_dim, **linear_kwargs)
        has_own = config.reads_kv is None
        kv_dim = config.kv_heads * head_dim
        self.key = Linear(dims.embed_dim, kv_dim, **linear_kwargs) if has_own else None
        self.value = Linear(dims.embed_dim, kv_dim, **linear_kwargs) if has_own else None
        self.output = Linear(
            config.num_heads * head_dim,
            dims.embed_dim,
            std=dims.output_std,
            bias=config.biases in (Biases.OUTPUT, Biases.ALL),
            rngs=rngs,
        )
        self.query_norm = self._norm(dims, config.num_heads)
        self.key_norm = self._norm(dims, config.kv_heads) if has_own else None
        # A sink of 0 acts as one more key with the score 0.
        self.sinks = nnx.Param(jnp.zeros((config.num_heads,), jnp.float32)) if config.sinks else None
        # Drawn last: the other initial weights do not depend on it.
        num_gates = {
            OutputGate.NONE: 0,
            OutputGate.PER_HEAD: config.num_heads,
            OutputGate.PER_ELEMENT: config.num_heads * head_dim,
        }[config.output_gate]
        self.output_gate = Linear(dims.embed_dim, num_gates, **linear_kwargs) if num_gates else None
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
        lengths = None
        # Only scaled rotary frequencies may depend on the length of the sequence.
        if self.config.rope_scaling is not None:
            lengths = sequence_lengths(
                positions, segment_ids, max_lengths=max_lengths, is_decoding=state is not None
            )
        queries = self._heads(self.query(x), self.query_norm, positions, lengths)
        is_decoding = state is not None
        # Keys and values of these tokens, or in decoding a cache with them.
        visible: Any
        if self.config.reads_kv is not None:
            visible = context.shared[self.config.reads_kv]
        else:
            keys, values = self._own(x, positions, lengths)
            visible = keys, values
            if is_decoding:
                visible, state = extend_cache(
                    state, keys, values, positions=positions, segment_ids=segment_ids
                )
        if self.config.writes_kv is not None:
            context.write(self.config.writes_kv, visible)
        # Keys that earlier queries see too; none where attention is causal.
        two_way = None
        if context.visibility is not Visibility.CAUSAL:
            is_prefix = context.is_prefix
            two_way = jnp.ones_like(segment_ids, dtype=bool) if is_prefix is None else is_prefix
        mix = self._mix_cached if is_decoding else self._mix
        mixed = mix(queries, visible, positions=positions, segment_ids=segment_ids, two_way=two_way)
        if self.output_gate is not None:
            mixed = gated_heads(mixed, self.output_gate(x))
        batch, length = positions.shape
        return self.output(mixed.reshape(batch, length, -1)), state

    def _settings(self) -> dict[str, Any]:
        return {
            "window": self.config.window,
            "scale": self.scale,
            "softcap": self.config.softcap,
            "sinks": None if self.sinks is None else self.sinks[...],
        }

    def _mix(
        self, queries: Array, visible: Any, *, positions: Array, segment_ids: Array, two_way: Array | None
    ) -> Float[Array, "B T N H"]:
        """Return the attention of whole sequences."""
        # Fused kernels are for causal sequences that attend to themselves.
        settings = self._settings()
        if two_way is None:
            return kernels.self_attention(queries, *visible, segment_ids=segment_ids, **settings)
        return kernels.two_way_attention(
            queries, *visible, segment_ids=segment_ids, is_visible=two_way, **settings
        )

    def _mix_cached(
        self, queries: Array, visible: Any, *, positions: Array, segment_ids: Array, two_way: Array | None
    ) -> Float[Array, "B T N H"]:
        """Return the attention over a cache."""
        if two_way is not None:
            # A prefix is read in one call, whose tokens are the last slots: those before are seen anyway.
            num_before = visible.positions.shape[1] - two_way.shape[1]
            two_way = jnp.pad(two_way, ((0, 0), (num_before, 0))) if positions.shape[1] > 1 else None
        return kernels.reference_attention(
            queries,
            jnp.swapaxes(visible.keys, 1, 2),
            jnp.swapaxes(visible.values, 1, 2),
            q_segments=segment_ids,
            k_segments=visible.segment_ids,
            q_positions=positions,
            k_positions=visible.positions,
            k_is_visible=two_way,
            **self._settings(),
        )

    def init_state(self, batch_size: int, *, max_length: int) -> KvCache | tuple[()]:
        """Return an empty cache of `max_length` slots, or of the window's size if that is smaller."""
        if self.config.reads_kv is not None:
            return ()
        num_slots = max_length if self.config.window is None else min(self.config.window, max_length)
        shape = (batch_size, self.config.kv_heads, num_slots, self.head_dim)
        ids = jnp.zeros((batch_size, num_slots), jnp.int32)
        # Segment id 0 masks every slot until it is written.
        return KvCache(
            keys=jnp.zeros(shape, self.dtype),
            values=jnp.zeros(shape, self.dtype),
            positions=ids,
            segment_ids=ids,
        )

    def cached_shape(self) -> tuple[int, ...] | None:
        """Return the shape of a token's keys and values, [2, K, H]; None if another layer has them."""
        if self.config.reads_kv is not None:
            return None
        return 2, self.config.kv_heads, self.head_dim

    def _norm(self, dims: ModelDims, num_heads: int) -> Norm | None:
        # PER_HEAD has H scales, which all heads share; ALL_HEADS has one for each of N * H dims.
        num_normed = {QkNorm.NONE: 0, QkNorm.PER_HEAD: 1, QkNorm.ALL_HEADS: num_heads}[self.config.qk_norm]
        return dims.norm(num_normed * self.head_dim) if num_normed else None

    def _own(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], lengths: Int[Array, "B #T"] | None
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Return the keys and values of this layer."""
        assert self.key is not None and self.value is not None
        keys = self._heads(self.key(x), self.key_norm, positions, lengths)
        values = self._split_heads(self.value(x))
        # In training too: the model then learns with the rounded keys and values that decoding caches.
        if self.cache_quantizer is not None:
            keys = self.cache_quantizer(keys)
            values = self.cache_quantizer(values)
        return keys, values

    def _split_heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def _heads(
        self,
        x: Float[Array, "B T NH"],
        norm: Norm | None,
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B #T"] | None,
    ) -> Float[Array, "B T N H"]:
        """Split queries or keys into heads, normed and rotated."""
        # Norms precede the rotation, which changes no vector's length; learned scales would otherwise depend
        # on the position.
        if norm is not None and self.config.qk_norm is QkNorm.ALL_HEADS:
            x = norm(x)
        x_BTNH = self._split_heads(x)
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
