"""Linear recurrences with decay: the mixers whose state is a matrix of fixed size for each head.

A head keeps a memory S [K, V], to which each token writes its key and value, and which its query reads:

- o_t = S_t^T q_t

- S_t = D_t S_{t-1} + k_t v_t^T                                       linear attention, RetNet, GLA, SSD
- S_t = D_t S_{t-1} + beta_t k_t (v_t - (D_t S_{t-1})^T k_t)^T        delta rule: (Gated) DeltaNet, KDA
- S_t = D_t S_{t-1} - strength_t (S_{t-1}^T removal_t)^T + k_t v_t^T  diagonal plus rank one: RWKV-7

`D_t` is the decay: 1, a number, or a diagonal matrix with a number for each key dim. S is zero where a
document begins. Training multiplies matrices chunk by chunk (`recurrence_chunks.py`), which takes T/C steps
instead of T; a single token takes one step of the recurrence.

Dims: B batch, T time, H heads, G heads of queries and keys, K key dims, V value dims, C tokens of a chunk.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slmjax.kernels.padding import filled_segment_ids
from slmjax.kernels.recurrence_chunks import (
    SMALLEST_LOG_DECAY,
    Tokens,
    advance,
    chunk_decays,
    smallest_block,
)
from slmjax.parallel import communication, mesh

CHUNK_SIZE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentState:
    """The memory after a token, and the document it belongs to.

    The fields are typed `Any` because this is a pytree: it may hold shapes or shardings.
    """

    memory: Any  # Float[Array, "B H K V"], float32
    segment_ids: Any  # Int[Array, "B"]: of the last real token, 0 before the first


def empty_recurrent_state(batch_size: int, *, num_heads: int, key_dim: int, value_dim: int) -> RecurrentState:
    """Return the state before the first token."""
    # float32 whatever the dtype of the model: in bfloat16, what a token adds to a long sum is rounded away.
    return RecurrentState(
        memory=jnp.zeros((batch_size, num_heads, key_dim, value_dim), jnp.float32),
        segment_ids=jnp.zeros((batch_size,), jnp.int32),
    )


def decayed_recurrence(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    *,
    segment_ids: Int[Array, "B T"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    beta: Float[Array, "B T H"] | None = None,
    removal: Float[Array, "B T G K"] | None = None,
    strength: Float[Array, "B T G K"] | None = None,
    state: RecurrentState | None = None,
    chunk_size: int = CHUNK_SIZE,
    smallest_log_decay: float = SMALLEST_LOG_DECAY,
) -> tuple[Float[Array, "B T H V"], RecurrentState]:
    """Return what each token reads, in the dtype of `v`, and the state after the last real token.

    Operands of products have the dtype of `q`; decays, corrections and the memory are float32.

    Args:
      q: queries, scaled. `G` divides `H`: heads of values share queries and keys in contiguous groups.
      k: keys. The delta rule needs keys of length at most 1 (or beta |k|^2 at most 2), else the memory grows.
      v: values.
      segment_ids: document of each token, padding 0. Padding changes no state; its outputs are arbitrary.
      log_decay: natural logarithm of the decay, at most 0, for each head or each of its key dims (none: no
        decay).
      beta: strengths of the delta rule (none: tokens are added).
      removal: directions of the rank-one term that are read (none: no such term).
      strength: directions that it is written to.
      state: state before the first token (none: an empty one).
      chunk_size: tokens of a chunk.
      smallest_log_decay: bound of the log decays, which are clipped to it. Where a mixer has a larger bound,
        more of the work is in large products.

    Raises:
      ValueError: `beta` and `removal` exclude each other; `removal` and `strength` belong together; `G` does
        not divide `H`; `chunk_size` is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    tokens, ids, state = _prepared(
        q,
        k,
        v,
        segment_ids=segment_ids,
        log_decay=log_decay,
        beta=beta,
        removal=removal,
        strength=strength,
        state=state,
        smallest_log_decay=smallest_log_decay,
    )
    if q.shape[1] == 1:
        outputs, memory = _token_by_token(tokens, ids, state)
    else:
        run = functools.partial(
            _on_device, chunk_size=min(chunk_size, q.shape[1]), smallest_log_decay=smallest_log_decay
        )
        # On a mesh each device runs its own rows and heads, and the memory passes from one part of a sharded
        # sequence to the next.
        shared = "heads" if q.shape[2] % mesh.num_devices("heads") == 0 else None
        by_array = {"q": shared, "k": shared, "removal": shared, "strength": shared}
        names = [
            field.name for field in dataclasses.fields(Tokens) if getattr(tokens, field.name) is not None
        ]
        in_dims = [("batch", "time", by_array.get(name, "heads"), None) for name in names]
        outputs, memory = communication.shard_mapped(
            lambda ids, segments, memory, *arrays: run(
                Tokens(**dict(zip(names, arrays, strict=True))), ids, segments, memory
            ),
            in_dims=(("batch", "time"), ("batch",), ("batch", "heads", None, None), *in_dims),
            out_dims=(("batch", "time", "heads", None), ("batch", "heads", None, None)),
        )(ids, state.segment_ids, state.memory, *(getattr(tokens, name) for name in names))
    return outputs, RecurrentState(memory=memory, segment_ids=ids[:, -1])


def recurrence_flops(
    *,
    key_dim: int,
    value_dim: int,
    chunk_size: int,
    heads_per_group: int = 1,
    has_channel_decay: bool = False,
    has_delta_rule: bool = False,
    has_removal: bool = False,
    smallest_log_decay: float = SMALLEST_LOG_DECAY,
) -> float:
    """Return the forward FLOPs of `decayed_recurrence` per token and head: its products, and substitution.

    >>> recurrence_flops(key_dim=64, value_dim=64, chunk_size=32)  # 2 C + 2 C (K + V) + 4 K V
    24640.0
    """
    pairs = 2 * chunk_size * key_dim / heads_per_group
    if has_channel_decay:
        block = smallest_block(chunk_size, smallest_log_decay=smallest_log_decay)
        pairs = (chunk_size + block) * key_dim
    sums = 2 * chunk_size * (key_dim if has_channel_decay else 1)
    weighted = 2 * chunk_size * value_dim
    memory = 2 * key_dim * value_dim  # one read, or one write
    # A triangular system takes half of a product with a full matrix.
    substitution = chunk_size * value_dim
    flops = sums + pairs + weighted + 2 * memory
    if has_delta_rule:
        flops += pairs + substitution + memory
    if has_removal:
        flops += 3 * pairs + 2 * weighted + substitution + 2 * memory
    return float(flops)


def reference_recurrence(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    *,
    segment_ids: Int[Array, "B T"],
    state: RecurrentState | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T H V"], RecurrentState]:
    """Return `decayed_recurrence` computed token by token: its definition, for tests."""
    tokens, ids, state = _prepared(q, k, v, segment_ids=segment_ids, state=state, **options)
    outputs, memory = _token_by_token(tokens, ids, state)
    return outputs, RecurrentState(memory=memory, segment_ids=ids[:, -1])


# Inputs -----------------------------------------------------------------------------------------------------
def _prepared(
    q: Array,
    k: Array,
    v: Array,
    *,
    segment_ids: Int[Array, "B T"],
    log_decay: Array | None = None,
    beta: Array | None = None,
    removal: Array | None = None,
    strength: Array | None = None,
    state: RecurrentState | None = None,
    smallest_log_decay: float = SMALLEST_LOG_DECAY,
) -> tuple[Tokens, Int[Array, "B T"], RecurrentState]:
    """Return the inputs with padding that changes nothing, each token's document, and the state."""
    batch, length, groups, key_dim = q.shape
    num_heads = v.shape[2]
    if beta is not None and removal is not None:
        raise ValueError("beta (the delta rule) and removal exclude each other: give one of them")
    if (removal is None) != (strength is None):
        raise ValueError("removal and strength are the two vectors of one term: give both or neither")
    if num_heads % groups:
        raise ValueError(
            f"{num_heads} heads of values do not share {groups} heads of queries and keys evenly"
        )
    if groups > 1 and groups % mesh.num_devices("heads"):
        # A device's heads may need any of the groups: each head gets a copy.
        copies = num_heads // groups
        q = jnp.repeat(q, copies, axis=2)
        k = jnp.repeat(k, copies, axis=2)
        removal = None if removal is None else jnp.repeat(removal, copies, axis=2)
        strength = None if strength is None else jnp.repeat(strength, copies, axis=2)
    is_real = (segment_ids > 0)[:, :, None, None]

    def real(x: Array | None) -> Array | None:
        return None if x is None else jnp.where(is_real, x, jnp.zeros((), x.dtype))

    decay = jnp.zeros((batch, length, num_heads), jnp.float32) if log_decay is None else log_decay
    decay = decay[..., None] if decay.ndim == 3 else decay
    tokens = Tokens(
        q=q,
        k=real(k),
        v=v,
        log_decay=real(jnp.maximum(decay.astype(jnp.float32), smallest_log_decay)),
        beta=None if beta is None else real(beta[..., None].astype(jnp.float32)),
        removal=removal,
        strength=real(strength),
    )
    if state is None:
        state = empty_recurrent_state(batch, num_heads=num_heads, key_dim=key_dim, value_dim=v.shape[-1])
    return tokens, filled_segment_ids(segment_ids, state.segment_ids), state


# Token by token ---------------------------------------------------------------------------------------------
def _token_by_token(
    tokens: Tokens, ids: Int[Array, "B T"], state: RecurrentState
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    num_heads = tokens.v.shape[2]

    def by_head(x: Array) -> Array:
        # Time first, and a copy of shared queries and keys for each head.
        copies = num_heads // x.shape[2]
        return jnp.moveaxis(jnp.repeat(x, copies, axis=2) if copies > 1 else x, 1, 0)

    rows = jax.tree.map(by_head, tokens)
    previous = jnp.concatenate([state.segment_ids[:, None], ids[:, :-1]], axis=1)
    is_same = jnp.moveaxis(ids == previous, 1, 0)
    if ids.shape[1] == 1:
        memory, outputs = _token(state.memory, jax.tree.map(lambda x: x[0], (rows, is_same)))
        return outputs[:, None], memory
    memory, outputs = jax.lax.scan(_token, state.memory, (rows, is_same))
    return jnp.moveaxis(outputs, 0, 1), memory


def _token(
    memory: Float[Array, "B H K V"], inputs: tuple[Tokens, Bool[Array, " B"]]
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """Return the memory after one token, and what the token reads from it."""
    token, is_same = inputs
    before = jnp.where(is_same[:, None, None, None], memory, 0.0)
    after = jnp.exp(token.log_decay)[..., None] * before
    k = token.k.astype(jnp.float32)
    written = token.v.astype(jnp.float32)
    if token.beta is not None:
        written = token.beta * (written - _weighted_rows(after, k))
    after += k[..., None] * written[:, :, None, :]
    if token.removal is not None:
        removed = _weighted_rows(before, token.removal.astype(jnp.float32))
        after -= token.strength.astype(jnp.float32)[..., None] * removed[:, :, None, :]
    return after, _weighted_rows(after, token.q.astype(jnp.float32)).astype(token.v.dtype)


def _weighted_rows(memory: Float[Array, "B H K V"], weights: Float[Array, "B H K"]) -> Float[Array, "B H V"]:
    # A sum, not a product of matrices: one row would leave most of a matrix unit idle.
    return jnp.sum(memory * weights[..., None], axis=2)


# Chunk by chunk ---------------------------------------------------------------------------------------------
def _on_device(
    tokens: Tokens,
    ids: Int[Array, "B T"],
    segments: Int[Array, " B"],
    memory: Float[Array, "B H K V"],
    *,
    chunk_size: int,
    smallest_log_decay: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Run a device's part of the sequence; the parts before it decide the memory that it starts with."""
    run = functools.partial(_chunk_by_chunk, chunk_size=chunk_size, smallest_log_decay=smallest_log_decay)
    parts = communication.shards_of("time")
    if parts.count == 1:
        return run(tokens, ids, segments, memory)
    before = _memories_before(tokens, ids, segments, memory, run=run, parts=parts)
    index = parts.index()
    segments = jax.lax.dynamic_index_in_dim(before.segment_ids, index, keepdims=False)
    outputs, _ = run(
        tokens, ids, segments, jax.lax.dynamic_index_in_dim(before.memory, index, keepdims=False)
    )
    # The sum over one device that is not zero shows the tracer that the result is the same on all.
    last = jnp.where(index == 0, before.memory[-1], 0.0)
    return outputs, parts.sum(last)


def _memories_before(
    tokens: Tokens,
    ids: Int[Array, "B T"],
    segments: Int[Array, " B"],
    memory: Float[Array, "B H K V"],
    *,
    run: Any,
    parts: communication.Shards,
) -> RecurrentState:
    """Return the states before each part of a sharded sequence, and after the last one, in a leading dim.

    A part turns the memory S before it into `M S + E`. Each device computes M and E of its part: E is the
    memory that it leaves when it starts with an empty one, and M the one that the identity turns into when no
    values are written. M is zero if a document begins inside the part.
    """
    batch, num_heads, key_dim, value_dim = memory.shape
    identity = jnp.broadcast_to(jnp.eye(key_dim), (batch, num_heads, key_dim, key_dim))
    start = jnp.concatenate([jnp.zeros_like(memory), identity], axis=-1)
    values = jnp.concatenate([tokens.v, jnp.zeros((*tokens.v.shape[:3], key_dim), tokens.v.dtype)], axis=-1)
    _, end = run(dataclasses.replace(tokens, v=values), ids, ids[:, 0], start)
    all_ends = parts.gather(end[None], axis=0)
    firsts = parts.gather(ids[None, :, 0], axis=0)
    lasts = parts.gather(ids[None, :, -1], axis=0)
    memories = [memory]
    documents = [segments]
    for part in range(parts.count):
        carried = jnp.where((documents[-1] == firsts[part])[:, None, None, None], memories[-1], 0.0)
        added, transition = jnp.split(all_ends[part], [value_dim], axis=-1)
        passed = jnp.matmul(transition, carried, precision=jax.lax.Precision.HIGHEST)
        memories.append(passed + added)
        documents.append(lasts[part])
    return RecurrentState(
        memory=jnp.stack(communication.match_varying(*memories)),
        segment_ids=jnp.stack(communication.match_varying(*documents)),
    )


def _chunk_by_chunk(
    tokens: Tokens,
    ids: Int[Array, "B T"],
    segments: Int[Array, " B"],
    memory: Float[Array, "B H K V"],
    *,
    chunk_size: int,
    smallest_log_decay: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    batch, length = ids.shape
    groups = tokens.q.shape[2]
    num_heads = tokens.v.shape[2]
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length

    def in_chunks(x: Array) -> Array:
        # [B, T, H, ...] -> [chunks, B, G, R, C, ...]; R is 1 if the heads of a group share the array.
        padded = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
        split = padded.reshape(batch, num_chunks, chunk_size, groups, -1, x.shape[-1])
        return jnp.transpose(split, (1, 0, 3, 4, 2, 5))

    def chunk(carry: tuple[Array, Array], inputs: tuple[Tokens, Array]) -> tuple[tuple[Array, Array], Array]:
        memory, segments = carry
        tokens, ids = inputs
        decays = chunk_decays(tokens.log_decay, ids, segments)
        outputs, memory = advance(tokens, decays, memory, smallest_log_decay=smallest_log_decay)
        return (memory, ids[:, -1]), outputs

    # Zeros at the end change no state; they belong to the last document.
    chunked_ids = jnp.pad(ids, ((0, 0), (0, padding)), mode="edge").reshape(batch, num_chunks, chunk_size)
    inputs = (jax.tree.map(in_chunks, tokens), jnp.moveaxis(chunked_ids, 1, 0))
    memory = memory.reshape(batch, groups, num_heads // groups, *memory.shape[2:])
    # Inside `shard_mapped` the carry varies over the devices that the inputs vary over.
    memory, *_ = communication.match_varying(memory, *jax.tree.leaves(inputs))
    segments, _ = communication.match_varying(segments, chunked_ids)
    # The backward pass computes the triangular matrices of a chunk again: saved is the memory before it.
    (memory, _), outputs = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), (memory, segments), inputs)
    outputs = jnp.transpose(outputs, (1, 0, 4, 2, 3, 5)).reshape(batch, -1, num_heads, outputs.shape[-1])
    return outputs[:, :length], memory.reshape(batch, num_heads, *memory.shape[3:])
