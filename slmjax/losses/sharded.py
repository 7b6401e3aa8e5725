"""A chunked sum over the tokens of a whole batch, on any mesh.

Each device walks over its own tokens with the whole table, or over those of its group with its part of the
table: that by which less is sent is chosen. Tables are gathered once, before the loop, over the axes that
their columns are divided over, and their gradients are reduced once, after it.

Dims: B batch, T time, D model, E another model's width, V rows of the tables.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from slmjax.losses.chunks import ChunkFn, chosen_chunk_size, chunked_sum
from slmjax.losses.heads import Head, check_rows
from slmjax.parallel import communication
from slmjax.parallel.mesh import Dims, num_devices


class Vocabulary(enum.Enum):
    """What a device of the tensor axis does of a group's logits."""

    # all logits of its part of the tokens: the whole table is sent to it, and its gradient back
    GATHERED = "gathered"
    # its part of the logits of all tokens: the gradient of the hidden states is summed over devices
    DIVIDED = "divided"


def choose_vocabulary(num_tokens: int, table_rows: int) -> Vocabulary:
    """The way in which less is sent: rows as wide as hidden states are, of which one way sends the table's
    and the other the tokens'.

    Args:
      num_tokens: tokens of the devices that share a table.
      table_rows: rows of the table.
    """
    divides = table_rows % num_devices("vocab") == 0 and num_devices("vocab") > 1
    return Vocabulary.DIVIDED if divides and num_tokens < table_rows else Vocabulary.GATHERED


def sharded_sum(
    terms: Callable[[communication.Shards], ChunkFn],
    hidden: Float[Array, "B T D"],
    head: Head,
    *,
    tokens: Any,
    others: tuple[tuple[Array, Head], ...] = (),
    constants: Any = (),
    chunk_size: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Float[Array, ""], Any]:
    """`chunked_sum` over the batch on the current mesh; the sums are over the global batch, the same on every
    device.

    Args:
      terms: of the shards of the tables, the function of a chunk: `fn(hidden [C, D], head, (tokens,
        other_hidden), (constants, other_heads))`, as `chunked_sum` takes it; of each there is one function.
      hidden: final hidden states, with a gradient, as has `head`.
      tokens: pytree of arrays [B, T, ...] without a gradient.
      others: final hidden states [B, T, E] and heads of other models, without a gradient; their tables have
        as many rows as `head`'s.
      constants: pytree of scalars and small arrays.
      chunk_size: a device's own tokens per chunk; None gives about 256 MB of logits.
      vocabulary: how the devices of the tensor axis share the work; None for what is sent less
        (`choose_vocabulary`).
    """
    check_rows(head, *(other for _, other in others))
    (batch_size, length) = hidden.shape[:2]
    num_rows = head.weight.shape[0]
    if vocabulary is None:
        tokens_here = batch_size * length // (num_devices("batch") * num_devices("time"))
        vocabulary = choose_vocabulary(tokens_here, num_rows)
    is_whole = vocabulary is Vocabulary.GATHERED
    token_dim, bias_rows = ("tokens", None) if is_whole else ("time", "vocab")
    models = ((hidden, head), *others)

    def on_device(
        states: tuple[Array, ...],
        tables: tuple[Array, ...],
        biases: tuple[Any, ...],
        tokens: Any,
        constants: Any,
    ) -> Any:
        gathered = [communication.gathered_table(table, replicated=is_whole) for table in tables]
        heads = tuple(
            dataclasses.replace(one, weight=table, bias=bias)
            for (_, one), (table, _), bias in zip(models, gathered, biases, strict=True)
        )
        (own, *states_of_others), tokens = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (states, tokens)
        )
        size = chosen_chunk_size(chunk_size, own, heads[0])
        given = {"tokens": (tokens, tuple(states_of_others)), "constants": (constants, heads[1:])}
        return communication.sum_over(
            chunked_sum(terms(gathered[0][1]), own, heads[0], **given, chunk_size=size), "batch", token_dim
        )

    per_model = tuple(zip(*((states, one.weight, one.bias) for states, one in models), strict=True))
    table_dims = _table_dims(num_rows, batch_size=batch_size, length=length, is_whole=is_whole)
    in_dims = (("batch", token_dim, None), table_dims, (bias_rows,), ("batch", token_dim), ())
    return communication.shard_mapped(on_device, in_dims=in_dims, out_dims=())(*per_model, tokens, constants)


def _table_dims(num_rows: int, *, batch_size: int, length: int, is_whole: bool) -> Dims:
    dims = communication.table_dims(num_rows, batch_size=batch_size)
    if is_whole and (dims == ("vocab", None) or length % num_devices("tokens")):
        return (
            None,
            dims[1],
        )  # devices with the same tokens must have the same table, not one that each has gathered
    return dims
