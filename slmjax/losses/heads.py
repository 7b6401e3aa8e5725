"""`Head`: turns hidden states into logits.

Matrix products run in the dtype of the hidden states and give float32 (float64 for float64); multiplier, bias
and soft-cap are float32.

Dims: D model, V rows of the table (padding included), v rows that a device holds; `*B` any leading dims.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from slmjax import kernels
from slmjax.parallel import communication

# Logits of the padding columns: finite, so that no product with a zero probability is NaN.
PADDING_LOGIT = -1e30

UNSHARDED = communication.Shards()  # of a vocabulary that every device has in full


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Output layer: `softcap(scale * (hidden @ weight.T + bias))` on the first `vocab_size` rows.

    The arrays are typed `Any` because a Head is a pytree: it may hold shapes, shardings or gradients instead.
    """

    weight: Any  # Float[Array, "V D"]
    bias: Any = None  # Float[Array, "V"] or None
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})  # cap * tanh(x / cap)
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    # real rows of the table; those after them are padding
    vocab_size: int = dataclasses.field(metadata={"static": True})


def logits(
    hidden: Float[Array, "*B D"], head: Head, shards: communication.Shards = UNSHARDED
) -> Float[Array, "*B v"]:
    """Return logits in float32 over the rows of the table that this device holds: all, without `shards`.

    Padding columns are `PADDING_LOGIT`, and no gradient goes there.
    """
    num_rows = head.weight.shape[0] * shards.count
    assert 0 < head.vocab_size <= num_rows, f"a head of {num_rows} rows has no {head.vocab_size} real ones"
    x = _project(hidden, head.weight)
    if head.bias is not None:
        x = x + jnp.broadcast_to(head.bias.astype(x.dtype), x.shape)
    if head.scale != 1.0:
        x = x * head.scale
    if head.softcap is not None:
        x = head.softcap * jnp.tanh(x / head.softcap)
    if head.vocab_size < num_rows:
        x = jnp.where(column_ids(x, shards) < head.vocab_size, x, PADDING_LOGIT)
    return x


def column_ids(x: Float[Array, "*B v"], shards: communication.Shards = UNSHARDED) -> Int[Array, "*B v"]:
    """Return the token id of each logit: its row in the full table."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) + shards.index() * x.shape[-1]


def accumulation_dtype(dtype: Any) -> Any:
    """Return the dtype in which products of `dtype` are summed."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_vjp
def _project(hidden: Array, weight: Array) -> Array:
    """Return hidden [*B, D] times weight [V, D] transposed: operands in the dtype of `hidden`, float32 sums.

    The gradient is written out because the derived one multiplies a float32 cotangent with bfloat16 operands,
    that is, in float32, and rounds the gradient of the table to bfloat16 in every chunk.
    """
    dims = (((hidden.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        hidden, weight.astype(hidden.dtype), dims, preferred_element_type=accumulation_dtype(hidden.dtype)
    )


def _project_forward(hidden: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _project(hidden, weight), (hidden, weight)


def _project_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    hidden, weight = saved
    # Both products of the backward pass then run in the dtype of the forward pass.
    cotangent = cotangent.astype(hidden.dtype)
    hidden_gradient = jax.lax.dot_general(
        cotangent,
        weight.astype(hidden.dtype),
        (((cotangent.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=accumulation_dtype(hidden.dtype),
    )
    # Summed over all tokens of the chunk in float32.
    weight_gradient = kernels.outer_sum(
        cotangent.reshape(-1, cotangent.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    )
    return hidden_gradient.astype(hidden.dtype), weight_gradient.astype(weight.dtype)


_project.defvjp(_project_forward, _project_backward)
