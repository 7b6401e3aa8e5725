"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads come from one small vector.

A token is projected down to a latent, and the latent up to each head's values and the unrotated part of its
keys. The rotated part of the keys has a projection of its own, and all heads share it. Training computes all
keys and values. Decoding caches only latents and rotated keys: the up-projection of keys is absorbed into the
queries, and that of values is applied after the weighted sum.

Dims: B batch, T time, S cache slots, D model, N heads, L latent, P unrotated ("plain") and R rotated dims of
queries and keys (H = P + R), V value dims, C cached dims of a token (L + R), U up-projected dims of a head
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
from slmjax.models.protocols import CachingMixer, MixerConfig, StateSize
from slmjax.models.rope import LongScaling, RopeScaling, rotary, sequence_lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(MixerConfig):
    """Multi-head latent attention, as in DeepSeek-V2 and MiniCPM3."""

    num_heads: int  # heads, N
    latent_dim: int  # width of the latent of keys and values, L
    plain_dim: int  # unrotated dims of a head's queries and keys, P
    # Rotated dims are apart from the latent: a rotation between two projections depends on the position, so
    # that the up-projection of keys could not be absorbed into the queries.
    rope_dim: int  # rotated dims of a head's queries, and of the one rotated key that all heads share, R
    value_dim: int  # dims of a head's values, V
    # Saves activation memory in training; queries are not cached.
    query_rank: int | None = None  # width of the latent of queries (none: no down-projection of queries)
    rope_base: float | None = 10_000.0  # base of the rotary angles (none: no position information)
    rope_scaling: RopeScaling | None = None  # scaling of the rotary frequencies (none: unscaled)
    scale: float | None = None  # factor of the scores (none: one over the root of plain_dim + rope_dim)
    bias: bool = False  # biases of the down-projections and of the output
    # Released code builds these norms with a default eps, whatever the model's is.
    latent_norm_eps: float | None = None  # eps of the norms of latents (none: the model's norm_eps)

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
                "query_rank must be at least 1, or none for queries without a down-projection, got "
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
        """Dims that decoding caches of a token, C."""
        return self.latent_dim + self.rope_dim

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "LatentAttention":
        """Build the module, with freshly initialised parameters."""
        return LatentAttention(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        """Return the FLOPs of scores and weighted sum per token in training, over a causal sequence."""
        # Decoding multiplies in the latent space instead, with C dims for each head.
        mean_visible = (length + 1) / 2
        return 2 * mean_visible * self.num_heads * (self.key_dim + self.value_dim)

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        """Return the size of latents and rotated keys of one sequence, which does not depend on the heads."""
        return StateSize(cached=length * self.cached_dim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentCache:
    """Cached entries of tokens: the normed latent, then the rotated key. Slots are as in `attention.KvCache`.

    The fields are typed `Any` because a cache is a pytree: it may hold shapes or shardings.
    """

    entries: Any  # Float[Array, "B S C"]
    positions: Any  # Int[Array, "B S"]
    segment_ids: Any  # Int[Array, "B S"]


def write_entries(cache: LatentCache, new: LatentCache) -> LatentCache:
    """Return the cache with the tokens of another written to the slots of `attention.ring_slots`."""
    slots = ring_slots(cache.positions.shape[1], positions=new.positions, segment_ids=new.segment_ids)
    rows = jnp.arange(slots.shape[0])[:, None]
    return jax.tree.map(
        lambda old, new: old.at[rows, slots].set(new.astype(old.dtype), mode="drop"), cache, new
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
    """Return the attention of a sequence over itself, with a key of each head that ends in the shared one."""
    shared_BTNR = jnp.broadcast_to(shared_keys[:, :, None, :], (*plain_keys.shape[:3], shared_keys.shape[-1]))
    keys = jnp.concatenate([plain_keys, shared_BTNR], axis=-1)
    # Fused kernels need queries, keys and values of one width. Zeros add nothing to a product.
    width = max(keys.shape[-1], values.shape[-1])
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))) for x in (queries, keys, values)
    )
    mixed = kernels.self_attention(q, k, v, segment_ids=segment_ids, window=None, scale=scale)
    return mixed[..., : values.shape[-1]]


def absorbed_attention(
    queries: Float[Array, "B T N H"],
    visible: LatentCache,
    up: Float[Array, "L N U"],
    *,
    plain_dim: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N V"]:
    """Return the attention over cached entries, without up-projecting them.

    Since q (W c) = (q W) c, the up-projection of keys is applied to the queries. Attention then sees the
    entries as the keys and values of one head that all query heads share.
    """
    key_up, value_up = jnp.split(up, [plain_dim], axis=-1)
    plain, rotated = jnp.split(queries, [plain_dim], axis=-1)
    q_BTNC = jnp.concatenate([jnp.einsum("btnp,lnp->btnl", plain, key_up), rotated], axis=-1)
    # A single key-value head: multi-query attention over the latents.
    entries_BS1C = visible.entries[:, :, None, :]
    mixed = kernels.reference_attention(
        q_BTNC,
        entries_BS1C,
        entries_BS1C,
        q_segments=segment_ids,
        k_segments=visible.segment_ids,
        q_positions=positions,
        k_positions=visible.positions,
        window=None,
        scale=scale,
    )
    # The last R dims belong to rotated keys, which are no part of the values.
    return jnp.einsum("btnl,lnv->btnv", mixed[..., : up.shape[0]], value_up)


class LatentAttention(CachingMixer):
    """Multi-head latent attention."""

    def __init__(self, config: LatentAttentionConfig, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = dims.dtype
        self.scale = dims.scaling.score_scale(config.key_dim, config.scale)
        latent_dims = dims
        if config.latent_norm_eps is not None:
            latent_dims = dataclasses.replace(dims, norm_eps=config.latent_norm_eps)
        query_dims = config.num_heads * config.key_dim
        rank = config.query_rank
        # Up-projections have no bias: with one, q (W c) = (q W) c would not hold.
        up_kwargs = {"std": dims.init_std, "rngs": rngs}
        down_kwargs = {"std": dims.init_std, "bias": config.bias, "rngs": rngs}
        self.query = Linear(dims.embed_dim, query_dims, **up_kwargs) if rank is None else None
        self.query_down = None if rank is None else Linear(dims.embed_dim, rank, **down_kwargs)
        self.query_norm = None if rank is None else latent_dims.norm(rank)
        self.query_up = None if rank is None else Linear(rank, query_dims, **up_kwargs)
        # Latent and rotated key in one product, as in released weights (kv_a_proj_with_mqa).
        self.latent_down = Linear(dims.embed_dim, config.cached_dim, **down_kwargs)
        self.latent_norm = latent_dims.norm(config.latent_dim)
        # Each head has its P dims of keys, then its V dims of values, as in kv_b_proj.
        self.latent_up = Linear(
            config.latent_dim, config.num_heads * (config.plain_dim + config.value_dim), **up_kwargs
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
        lengths = None
        # Only scaled rotary frequencies may depend on the length of the sequence.
        if self.config.rope_scaling is not None:
            lengths = sequence_lengths(
                positions, segment_ids, max_lengths=max_lengths, is_decoding=state is not None
            )
        queries = self._queries(x, positions, lengths)
        latents, shared_keys = jnp.split(self.latent_down(x), [self.config.latent_dim], axis=-1)
        latents = self.latent_norm(latents)
        # `rotary` takes a dim of heads: the shared key is one head.
        shared_keys = self._rotated(shared_keys[:, :, None, :], positions, lengths)[:, :, 0, :]
        if self.cache_quantizer is not None:
            # Rounded as the one vector that is cached, in training too.
            entries = self.cache_quantizer(jnp.concatenate([latents, shared_keys], axis=-1))
            latents, shared_keys = jnp.split(entries, [self.config.latent_dim], axis=-1)
        if state is None:
            # Keys and values of each head cost a long sequence fewer FLOPs than C dims for each head.
            plain_keys, values = jnp.split(
                self._by_head(self.latent_up(latents)), [self.config.plain_dim], axis=-1
            )
            mixed = expanded_attention(
                queries, plain_keys, shared_keys, values, segment_ids=segment_ids, scale=self.scale
            )
        else:
            # As `latent_up`, which training calls, quantizes them. Its weight is used directly below.
            if (quantizer := self.latent_up.input_quantizer) is not None:
                latents = quantizer(latents)
            entries = jnp.concatenate([latents, shared_keys], axis=-1)
            new = LatentCache(entries=entries, positions=positions, segment_ids=segment_ids)
            written = write_entries(state, new)
            # A single token finds all visible entries in the updated cache. Of several documents in a call,
            # the cache keeps only the last, and tokens of the others need their entries as well.
            visible = written if x.shape[1] == 1 else join(state, new)
            up = self._by_head(self.latent_up.weight[...].astype(x.dtype))
            mixed = absorbed_attention(
                queries,
                visible,
                up,
                plain_dim=self.config.plain_dim,
                positions=positions,
                segment_ids=segment_ids,
                scale=self.scale,
            )
            state = written
        return self.output(mixed.reshape(*positions.shape, -1)), state

    def init_state(self, batch_size: int, *, max_length: int) -> LatentCache:
        """Return an empty cache of `max_length` slots."""
        ids = jnp.zeros((batch_size, max_length), jnp.int32)
        entries = jnp.zeros((batch_size, max_length, self.config.cached_dim), self.dtype)
        return LatentCache(entries=entries, positions=ids, segment_ids=ids)

    def cached_shape(self) -> tuple[int, ...]:
        """Return the shape of a token's latent and rotated key, [C]."""
        return (self.config.cached_dim,)

    def _queries(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], lengths: Int[Array, "B #T"] | None
    ) -> Float[Array, "B T N H"]:
        if self.query is not None:
            queries = self.query(x)
        else:
            assert self.query_down is not None and self.query_norm is not None and self.query_up is not None
            queries = self.query_up(self.query_norm(self.query_down(x)))
        plain, rotary_part = jnp.split(self._by_head(queries), [self.config.plain_dim], axis=-1)
        return jnp.concatenate([plain, self._rotated(rotary_part, positions, lengths)], axis=-1)

    def _by_head(self, x: Float[Array, "*B NH"]) -> Float[Array, "*B N H"]:
        return x.reshape(*x.shape[:-1], self.config.num_heads, -1)

    def _rotated(
        self, x: Float[Array, "B T N R"], positions: Int[Array, "B T"], lengths: Int[Array, "B #T"] | None
    ) -> Float[Array, "B T N R"]:
        if self.config.rope_base is None:
            return x
        scaling = self.config.rope_scaling
        return rotary(x, positions, base=self.config.rope_base, scaling=scaling, lengths=lengths)
