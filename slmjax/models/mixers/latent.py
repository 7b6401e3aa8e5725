"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads are made from one small
vector per token.

A token is brought down to a latent, from which each head's values and the plain part of its keys are brought
up again; the part that is rotated has a projection of its own, which all heads share. Training expands
everything. Decoding keeps latents and rotated keys alone: what brings a latent up to a key is multiplied into
the queries instead, and what brings it up to a value comes after the weighted sum.

Dims: B batch, T time, S cache slots, D model, N heads, L latent, P plain and R rotated dims of queries and
keys (H = P + R), V value dims, C what is cached of a token (L + R), U what a latent is brought up to per head
(P + V).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.models.layers import ArrayFunction, Linear, ModelDims
from slmjax.models.mixers.attention import join, ring_slots
from slmjax.models.protocols import CachingMixer, MixerConfig
from slmjax.models.rope import LongScaling, RopeScaling, rotary, sequence_lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(MixerConfig):
    """Multi-head latent attention, as in DeepSeek-V2 and MiniCPM3."""

    num_heads: int  # heads, N
    latent_dim: int  # width of what keys and values are made from, L
    plain_dim: int  # dims of a head's queries and keys that are not rotated, P
    # dims of a head's queries that are rotated, and of the one key for them that all heads share, R
    rope_dim: int
    value_dim: int  # dims of a head's values, V
    # width of what queries are made from (none: from the residual stream itself)
    query_rank: int | None = None
    rope_base: float | None = 10_000.0  # base of the rotary angles (none: no position information)
    rope_scaling: RopeScaling | None = None  # how the angles differ from plain ones (none: they do not)
    scale: float | None = None  # multiplies the scores (none: one over the root of plain_dim + rope_dim)
    bias: bool = False  # biases of the two projections down and of the output
    # of the norms after the projections down (none: the model's norm_eps)
    latent_norm_eps: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "latent_dim", "plain_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise ValueError(
                f"rope_dim must be even and at least 2 (dims are rotated in pairs), got {self.rope_dim}"
            )
        if isinstance(self.rope_scaling, LongScaling):
            self.rope_scaling.check_pairs(self.rope_dim // 2)
        if self.query_rank is not None and self.query_rank < 1:
            raise ValueError(
                "query_rank must be at least 1, or none for queries without a projection down, got "
                f"{self.query_rank}"
            )
        if self.rope_base is not None and self.rope_base <= 0:
            raise ValueError(f"rope_base must be positive, or none for no positions, got {self.rope_base}")
        if self.latent_norm_eps is not None and self.latent_norm_eps <= 0:
            raise ValueError(
                f"latent_norm_eps must be positive, or none for the model's, got {self.latent_norm_eps}"
            )

    @property
    def key_dim(self) -> int:
        """Dims of a head's queries and keys, H."""
        return self.plain_dim + self.rope_dim

    @property
    def cached_dim(self) -> int:
        """Numbers that decoding keeps of a token, C."""
        return self.latent_dim + self.rope_dim

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "LatentAttention":
        """The module, with freshly initialised parameters."""
        return LatentAttention(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """FLOPs of scores and weighted sum per token, averaged over a causal sequence of `length` tokens, as
        they are in training.
        """
        mean_visible = (length + 1) / 2
        return 2 * mean_visible * self.num_heads * (self.key_dim + self.value_dim)

    def state_bytes(self, dims: ModelDims, *, length: int, itemsize: int) -> int:
        """Bytes of the latents and rotated keys of one sequence, however many heads there are."""
        return length * self.cached_dim * itemsize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentCache:
    """What is kept of tokens already seen: the normed latent, then the rotated key. Slots are as in
    `attention.KvCache`.

    The fields are typed `Any` because a cache is a pytree: it may hold shapes or shardings.
    """

    entries: Any  # Float[Array, "B S C"]
    positions: Any  # Int[Array, "B S"]
    segment_ids: Any  # Int[Array, "B S"]


def write_entries(cache: LatentCache, new: LatentCache) -> LatentCache:
    """The cache with the tokens of another added; which ones, and where, `attention.ring_slots` says."""
    slots = ring_slots(cache.positions.shape[1], positions=new.positions, segment_ids=new.segment_ids)
    rows = jnp.arange(slots.shape[0])[:, None]
    return jax.tree.map(
        lambda old, late: old.at[rows, slots].set(late.astype(old.dtype), mode="drop"), cache, new
    )


def expanded_attention(
    queries: Float[Array, "B T N H"],
    plain_keys: Float[Array, "B T N P"],
    shared_keys: Float[Array, "B T R"],
    values: Float[Array, "B T N V"],
    *,
    segment_ids: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N V"]:
    """Attention of a sequence over itself, each head with its own keys, which end in the rotated ones that
    all heads share.
    """
    shared_BTNR = jnp.broadcast_to(shared_keys[:, :, None, :], (*plain_keys.shape[:3], shared_keys.shape[-1]))
    keys = jnp.concatenate([plain_keys, shared_BTNR], axis=-1)
    # Fused kernels take queries, keys and values of one width. Zeros add nothing to a product.
    width = max(keys.shape[-1], values.shape[-1])
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in (queries, keys, values)
    )
    return kernels.self_attention(q, k, v, segment_ids=segment_ids, window=None, scale=scale)[
        ..., : values.shape[-1]
    ]


def absorbed_attention(
    queries: Float[Array, "B T N H"],
    seen: LatentCache,
    up: Float[Array, "L N U"],
    *,
    plain_dim: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N V"]:
    """The same over cached entries, without expanding them: to attention these are one head's keys and
    values, for all query heads.
    """
    key_up, value_up = jnp.split(up, [plain_dim], axis=-1)
    plain, rotated = jnp.split(queries, [plain_dim], axis=-1)
    q_BTNC = jnp.concatenate([jnp.einsum("btnp,lnp->btnl", plain, key_up), rotated], axis=-1)
    entries_BS1C = seen.entries[:, :, None, :]
    mixed = kernels.reference_attention(
        q_BTNC,
        entries_BS1C,
        entries_BS1C,
        q_segments=segment_ids,
        k_segments=seen.segment_ids,
        q_positions=positions,
        k_positions=seen.positions,
        window=None,
        scale=scale,
    )
    return jnp.einsum("btnl,lnv->btnv", mixed[..., : up.shape[0]], value_up)


class LatentAttention(CachingMixer):
    """Multi-head latent attention."""

    def __init__(self, config: LatentAttentionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dims.dtype
        self.scale = config.key_dim**-0.5 if config.scale is None else config.scale
        normed = (
            dims
            if config.latent_norm_eps is None
            else dataclasses.replace(dims, norm_eps=config.latent_norm_eps)
        )
        query_dims = config.num_heads * config.key_dim
        rank = config.query_rank
        plain = {"std": dims.init_std, "rngs": rngs}
        down = {"std": dims.init_std, "bias": config.bias, "rngs": rngs}
        self.query = Linear(dims.embed_dim, query_dims, **plain) if rank is None else None
        self.query_down = None if rank is None else Linear(dims.embed_dim, rank, **down)
        self.query_norm = None if rank is None else normed.norm(rank)
        self.query_up = None if rank is None else Linear(rank, query_dims, **plain)
        self.latent_down = Linear(dims.embed_dim, config.cached_dim, **down)
        self.latent_norm = normed.norm(config.latent_dim)
        self.latent_up = Linear(
            config.latent_dim, config.num_heads * (config.plain_dim + config.value_dim), **plain
        )
        self.output = Linear(
            config.num_heads * config.value_dim,
            dims.embed_dim,
            std=dims.output_std,
            bias=config.bias,
            rngs=rngs,
        )
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
        queries = self._queries(x, positions, lengths)
        latents, shared_keys = jnp.split(self.latent_down(x), [self.config.latent_dim], axis=-1)
        latents = self.latent_norm(latents)
        shared_keys = self._rotated(shared_keys[:, :, None, :], positions, lengths)[:, :, 0, :]
        if self.cache_quantizer is not None:
            kept = self.cache_quantizer(jnp.concatenate([latents, shared_keys], axis=-1))
            latents, shared_keys = jnp.split(kept, [self.config.latent_dim], axis=-1)
        if state is None:
            plain_keys, values = jnp.split(
                self._by_head(self.latent_up(latents)), [self.config.plain_dim], axis=-1
            )
            mixed = expanded_attention(
                queries, plain_keys, shared_keys, values, segment_ids=segment_ids, scale=self.scale
            )
        else:
            if (rounding := self.latent_up.input_quantizer) is not None:
                latents = rounding(latents)  # as it is where they are brought up
            entries = jnp.concatenate([latents, shared_keys], axis=-1)
            new = LatentCache(entries=entries, positions=positions, segment_ids=segment_ids)
            written = write_entries(state, new)
            # One token finds all it may see in the cache; of several documents in a call, the cache keeps the
            # last alone.
            seen = written if x.shape[1] == 1 else join(state, new)
            up = self._by_head(self.latent_up.weight[...].astype(x.dtype))
            mixed = absorbed_attention(
                queries,
                seen,
                up,
                plain_dim=self.config.plain_dim,
                positions=positions,
                segment_ids=segment_ids,
                scale=self.scale,
            )
            state = written
        return self.output(mixed.reshape(*positions.shape, -1)), state

    def init_state(self, batch_size: int, *, max_length: int) -> LatentCache:
        """An empty cache of `max_length` slots."""
        marks = jnp.zeros((batch_size, max_length), jnp.int32)
        entries = jnp.zeros((batch_size, max_length, self.config.cached_dim), self.dtype)
        return LatentCache(entries=entries, positions=marks, segment_ids=marks)

    def cached_shape(self) -> tuple[int, ...]:
        """The latent and the rotated key: [C]."""
        return (self.config.cached_dim,)

    def _queries(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], lengths: Int[Array, "B #T"] | None
    ) -> Float[Array, "B T N H"]:
        if self.query is not None:
            queries = self.query(x)
        else:
            assert self.query_down is not None and self.query_norm is not None and self.query_up is not None
            queries = self.query_up(self.query_norm(self.query_down(x)))
        plain, turning = jnp.split(self._by_head(queries), [self.config.plain_dim], axis=-1)
        return jnp.concatenate([plain, self._rotated(turning, positions, lengths)], axis=-1)

    def _by_head(self, x: Float[Array, "*B NH"]) -> Float[Array, "*B N H"]:
        return x.reshape(*x.shape[:-1], self.config.num_heads, -1)

    def _rotated(
        self, x: Float[Array, "B T N R"], positions: Int[Array, "B T"], lengths: Int[Array, "B #T"] | None
    ) -> Float[Array, "B T N R"]:
        if self.config.rope_base is None:
            return x
        scaling = self.config.rope_scaling
        return rotary(x, positions, base=self.config.rope_base, scaling=scaling, lengths=lengths)
