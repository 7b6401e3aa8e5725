"""The arithmetic of a chunk of a linear recurrence: matrix products in place of a loop over its tokens.

`linear_recurrence.py` states the recurrence and runs it chunk by chunk. Inside a chunk the memory of every
token is written out as a sum over the tokens before it, which gives triangular matrices [C, C].

Everything that decays is a product of exponentials of sums of log decays. Each sum runs over tokens of one
document only, from an earlier token to a later one. No exponent is therefore above zero, whatever the gates
are, and a document's numbers do not depend on what precedes it in the row.

Dims: B batch, G groups of heads with the same queries and keys, R heads of a group, C tokens of a chunk,
K key dims, V value dims, W dims of the decay (1 or K).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# exp(-30) is 1e-13: a token with this log decay has forgotten all before it. Sums of larger numbers would
# lose the digits of the small ones.
SMALLEST_LOG_DECAY = -30.0
# float32 overflows above exp(88); a product of two factors keeps a margin.
LARGEST_EXPONENT = 60.0

# The product of two stacks of matrices.
Multiply = Callable[[Array, Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The inputs of a recurrence, by token. The fields are typed `Any` because this is a pytree."""

    q: Any  # Float[Array, "... K"]
    k: Any  # Float[Array, "... K"]
    v: Any  # Float[Array, "... V"]
    log_decay: Any  # Float[Array, "... W"], float32
    beta: Any = None  # Float[Array, "... 1"] | None, float32: strength of the delta rule
    removal: Any = None  # Float[Array, "... K"] | None: the direction that is read and removed
    strength: Any = None  # Float[Array, "... K"] | None: the direction that the removal is written to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkDecays:
    """Sums of log decays of one chunk, and which tokens they connect."""

    sums: Any  # Float[Array, "B G R C W"], from the first token of the document in this chunk
    segments: Any  # Int[Array, "B C"]
    is_read: Any  # Bool[Array, "B C"]: the token's document is that of the incoming state
    is_kept: Any  # Bool[Array, "B C"]: the token's document is that of the outgoing state


def chunk_decays(
    log_decay: Float[Array, "B G R C W"], segments: Int[Array, "B C"], state_segment: Int[Array, " B"]
) -> ChunkDecays:
    """Return the sums of log decays up to and including each token, over its own document."""
    earlier = _same_document(segments, segments) & _lower_triangle(segments.shape[1], diagonal=0)
    # A product with a mask, not a difference of cumulative sums: other documents add exact zeros.
    sums = jnp.matmul(
        earlier[:, None, None].astype(jnp.float32), log_decay, precision=jax.lax.Precision.HIGHEST
    )
    return ChunkDecays(
        sums=sums,
        segments=segments,
        is_read=segments == state_segment[:, None],
        is_kept=segments == segments[:, -1:],
    )


def advance(
    tokens: Tokens,
    decays: ChunkDecays,
    memory: Float[Array, "B G R K V"],
    *,
    smallest_log_decay: float,
) -> tuple[Float[Array, "B G R C V"], Float[Array, "B G R K V"]]:
    """Return the outputs of a chunk and the memory after its last token.

    With `L` the sums of log decays, the memory of token i is
    `S_i = exp(L_i) S + sum over j <= i of exp(L_i - L_j) k_j u_j^T`,
    where `u_j` is the value `v_j`. With the delta rule it is the value corrected by what the memory already
    holds, which depends on the corrections of earlier tokens: `(I + N) u = right side`, with `N` strictly
    lower triangular. The system is solved by substitution. A product of powers of `N` would need fewer steps,
    but the powers grow without bound where the inverse does not.

    Args:
      tokens: inputs, [B, G, R, C, ...]; R is 1 where the heads of a group share the array.
      decays: their decays.
      memory: the incoming state.
      smallest_log_decay: no log decay is below it.
    """
    pairs = functools.partial(decayed_pairs, decays=decays, smallest_log_decay=smallest_log_decay)
    multiply = functools.partial(_multiply, dtype=tokens.q.dtype)
    # Reads of the incoming memory decay up to the token, and writes decay from it to the end of the chunk.
    read = _masked_exp(decays.sums, decays.is_read[:, None, None, :, None])
    total = decays.sums[:, :, :, -1:]
    write = _masked_exp(total - decays.sums, decays.is_kept[:, None, None, :, None])
    keep = jnp.swapaxes(read[:, :, :, -1:], -1, -2)

    written = tokens.v
    if tokens.beta is not None:
        # u = beta * (v - S^T k), where S has decayed up to the token.
        known = _read(tokens.k, read, memory, _multiply_exactly)
        system = tokens.beta * pairs(tokens.k, tokens.k, diagonal=-1, multiply=_multiply_exactly)
        written = _substitute(system, tokens.beta * (tokens.v - known))
    outputs = _read(tokens.q, read, memory, multiply)
    outputs += multiply(pairs(tokens.q, tokens.k, diagonal=0, multiply=multiply), written)
    new_memory = keep * memory + _write(tokens.k, write, written, multiply)
    if tokens.removal is not None:
        # c = S^T removal, where S is the memory before the token and its decay.
        excluded = decays.sums - tokens.log_decay
        read_before = _masked_exp(excluded, decays.is_read[:, None, None, :, None])
        removal_pairs = functools.partial(
            pairs, tokens.removal, row_sums=excluded, diagonal=-1, multiply=_multiply_exactly
        )
        known = _read(tokens.removal, read_before, memory, _multiply_exactly)
        known += _multiply_exactly(removal_pairs(tokens.k), tokens.v)
        removed = _substitute(removal_pairs(tokens.strength), known)
        outputs -= multiply(pairs(tokens.q, tokens.strength, diagonal=0, multiply=multiply), removed)
        new_memory -= _write(tokens.strength, write, removed, multiply)
    return outputs.astype(tokens.v.dtype), new_memory


def smallest_block(length: int, *, smallest_log_decay: float) -> int:
    """Return the size of the blocks on the diagonal of a chunk, in which no exponent overflows.

    >>> smallest_block(64, smallest_log_decay=-30.0)
    2
    >>> smallest_block(64, smallest_log_decay=-0.6)
    64
    """
    size = 1
    while 2 * size <= length and -2 * size * smallest_log_decay <= LARGEST_EXPONENT:
        size *= 2
    return size


def decayed_pairs(
    rows: Float[Array, "B G _ C K"],
    columns: Float[Array, "B G _ C K"],
    *,
    decays: ChunkDecays,
    smallest_log_decay: float,
    diagonal: int,
    multiply: Multiply,
    row_sums: Float[Array, "B G R C W"] | None = None,
) -> Float[Array, "B G R C C"]:
    """Return `sum over K of rows_i columns_j exp(L_i - L_j)` for the pairs j <= i of one document, else 0.

    Args:
      rows: vectors of later tokens.
      columns: vectors of earlier tokens.
      decays: the sums L.
      smallest_log_decay: no log decay is below it.
      diagonal: 0 includes the pairs i = j, -1 leaves them out.
      multiply: the product of two stacks of matrices.
      row_sums: the sums L_i of rows (none: those of `decays`).
    """
    later_sums: Array = decays.sums if row_sums is None else row_sums
    length = decays.segments.shape[1]
    mask = _same_document(decays.segments, decays.segments) & _lower_triangle(length, diagonal=diagonal)
    mask = mask[:, None, None]
    if decays.sums.shape[-1] == 1:
        # One decay for all key dims: a factor of the product.
        factors = _masked_exp(later_sums - jnp.swapaxes(decays.sums, -1, -2), mask)
        return multiply(rows, jnp.swapaxes(columns, -1, -2)) * factors
    # The blocks of the recursion have sizes of powers of two.
    padding = (1 << (length - 1).bit_length()) - length
    padded = [_pad_rows(x, padding) for x in (rows, columns, later_sums, decays.sums)]
    segments = jnp.pad(decays.segments, ((0, 0), (0, padding)), constant_values=-1)
    products = _channel_pairs(
        *padded, segments=segments, smallest_log_decay=smallest_log_decay, multiply=multiply
    )
    return jnp.where(mask, products[..., :length, :length], 0.0)


def _channel_pairs(
    rows: Array,
    columns: Array,
    row_sums: Array,
    column_sums: Array,
    *,
    segments: Int[Array, "B C"],
    smallest_log_decay: float,
    multiply: Multiply,
) -> Float[Array, "B G R C C"]:
    """Return `decayed_pairs` for a decay of each key dim; entries outside its mask are finite, but arbitrary.

    exp(L_i - L_j) is split into exp(L_i - r) exp(r - L_j) with a reference r between j and i, so that the
    sum over key dims is a matrix product. Small blocks on the diagonal take the first token as reference: the
    second exponent is then bounded by the size of the block. Two neighbours are merged to a block of twice
    the size with the last token of the first one as reference: no exponent is positive.
    """
    length = segments.shape[1]
    size = smallest_block(length, smallest_log_decay=smallest_log_decay)

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:3], length // size, size, x.shape[-1])

    def inside(exponent: Array, is_valid: Array) -> Array:
        return _masked_exp(exponent, is_valid[:, None, None, :, :, None])

    # Blocks on the diagonal. A document that begins inside a block has a reference of its own, 0, which is
    # right since its sums begin there.
    documents = segments.reshape(-1, length // size, size)
    in_first = documents == documents[:, :, :1]
    reference = jnp.where(in_first[:, None, None, :, :, None], split(column_sums)[..., :1, :], 0.0)
    scaled_columns = split(columns) * jnp.exp(reference - split(column_sums))
    blocks = multiply(
        split(rows) * jnp.exp(split(row_sums) - reference), jnp.swapaxes(scaled_columns, -1, -2)
    )
    while size < length:
        # Rows of the second block of each two, columns of the first.
        documents = segments.reshape(-1, length // (2 * size), 2, size)
        halves = [
            x.reshape(*x.shape[:3], length // (2 * size), 2, size, x.shape[-1])
            for x in (rows, columns, row_sums, column_sums)
        ]
        last = documents[:, :, 0, -1:]
        reference = halves[3][..., 0, -1:, :]
        scaled_rows = halves[0][..., 1, :, :] * inside(
            halves[2][..., 1, :, :] - reference, documents[:, :, 1] == last
        )
        scaled_columns = halves[1][..., 0, :, :] * inside(
            reference - halves[3][..., 0, :, :], documents[:, :, 0] == last
        )
        below = multiply(scaled_rows, jnp.swapaxes(scaled_columns, -1, -2))
        first = blocks[:, :, :, 0::2]
        second = blocks[:, :, :, 1::2]
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        blocks = jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)
        size *= 2
    return blocks[:, :, :, 0]


# Products ---------------------------------------------------------------------------------------------------
def _multiply(a: Array, b: Array, *, dtype: Any) -> Float[Array, "..."]:
    """Return the product of two stacks of matrices with operands of a dtype, summed in float32."""
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _multiply_exactly(a: Array, b: Array) -> Float[Array, "..."]:
    """Return the product in float32, of which TPUs would round the operands to bfloat16 by default."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _read(rows: Array, decay: Array, memory: Array, multiply: Multiply) -> Float[Array, "B G R C V"]:
    """Return `(rows * decay) memory`; a decay that all key dims share is applied to the narrower product."""
    if decay.shape[-1] == 1:
        return multiply(rows, memory) * decay
    return multiply(rows * decay, memory)


def _write(columns: Array, decay: Array, values: Array, multiply: Multiply) -> Float[Array, "B G R K V"]:
    """Return `(columns * decay)^T values`."""
    if decay.shape[-1] == 1:
        return multiply(jnp.swapaxes(columns, -1, -2), values * decay)
    return multiply(jnp.swapaxes(columns * decay, -1, -2), values)


def _substitute(system: Float[Array, "B G R C C"], right: Float[Array, "B G R C V"]) -> Array:
    """Return `(I + system)^-1 right` for a strictly lower triangular system, by substitution."""
    return jax.lax.linalg.triangular_solve(system, right, left_side=True, lower=True, unit_diagonal=True)


# Masks ------------------------------------------------------------------------------------------------------
def _masked_exp(exponent: Array, mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Return `exp(exponent)` where the mask is true, else 0."""
    # Masked before the exponential: after it, the gradient of an overflow would be 0 * inf.
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


def _same_document(rows: Int[Array, "B C"], columns: Int[Array, "B C"]) -> Bool[Array, "B C C"]:
    return rows[:, :, None] == columns[:, None, :]


def _lower_triangle(length: int, *, diagonal: int) -> Bool[Array, "1 C C"]:
    return jnp.tril(jnp.ones((length, length), bool), diagonal)[None]


def _pad_rows(x: Array, padding: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
