"""Sizes and costs of an architecture, from its config alone; nothing is computed or allocated."""

import dataclasses
import math
from collections.abc import Sequence

from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.definition import define
from slmjax.models.paths import FURTHER, block_at, is_multiplied, num_uses
from slmjax.models.protocols import StateSize

LENGTHS = (4096, 131072)  # tokens of the sequences at which architectures are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthCosts:
    """Costs of one sequence of a length, also beyond the context length."""

    length: int  # tokens
    training_flops_per_token: float  # forward and backward
    state_bytes: int  # of the decoding state after all tokens: float32 states, the rest in bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Sizes and costs of an architecture, computed from its config."""

    parameters: int  # all trained parameters; a tied table counts once
    # parameters that the prediction of the next token uses: of the experts, only the selected ones
    active_parameters: int
    embedding_parameters: int  # parameters of the tables with one row per token: embedding and untied head
    training_flops_per_token: float  # forward and backward, at the context length
    bytes_bf16: int  # bytes of all parameters in bfloat16
    cache_bytes_per_token: float  # bytes of the decoding state of a full context in bfloat16, over its length
    by_length: tuple[LengthCosts, ...]  # at the lengths that were asked for


def describe(config: ModelConfig, *, lengths: Sequence[int] = LENGTHS) -> Summary:
    """Return the sizes and costs of an architecture. Nothing is computed or allocated.

    Training costs 6 FLOPs per token for each parameter in a matrix product (2 forward, 4 backward), once per
    loop of a block, and once per layer of those that share the parameter. The head counts even if it is tied;
    the lookup in the embedding table does not. To this come 3 times the FLOPs of mixers without their
    weights, averaged over a sequence of the context length. Recomputation by a rematerialisation policy is
    not counted.

    Args:
      config: the architecture.
      lengths: of sequences whose costs are wanted besides those at the context length.

    Raises:
      ValueError: the config has no vocabulary size.
    """
    shapes = {path: leaf.shape for path, leaf in define(config).params.items()}
    sizes = {path: math.prod(dims) for path, dims in shapes.items()}
    tables = sum(size for path, size in sizes.items() if path in ("embed/table", "head/weight"))
    active = 0.0
    # The product of the head, with rows of padding; the lookup of embeddings multiplies nothing.
    multiplied = float(config.table_rows * config.embed_dim)
    further = 0 if config.multi_token is None else config.multi_token.num_tokens
    # Each module of further tokens has a product with the head of its own.
    multiplied *= 1 + further
    for path, dims in shapes.items():
        used = sizes[path] * _active_fraction(config, path)
        # They are left out where the next token alone is predicted.
        active += 0 if path.startswith(FURTHER) else used
        if is_multiplied(path, dims):
            multiplied += used * num_uses(config, path)

    def at(length: int) -> LengthCosts:
        return LengthCosts(
            length=length,
            training_flops_per_token=6 * multiplied + 3 * _mixing_flops(config, length=length),
            state_bytes=state_size(config, length=length).bytes(2),
        )

    own = at(config.context_length)
    return Summary(
        parameters=sum(sizes.values()),
        active_parameters=round(active),
        embedding_parameters=tables,
        training_flops_per_token=own.training_flops_per_token,
        bytes_bf16=2 * sum(sizes.values()),
        cache_bytes_per_token=own.state_bytes / own.length,
        by_length=tuple(map(at, lengths)),
    )


def _mixing_flops(config: ModelConfig, *, length: int) -> float:
    """Return the FLOPs per token of all mixers without their weights, averaged over a sequence."""
    dims = config.layer_dims()
    # Each loop of a block computes and caches its own keys and values.
    mixers = [block.mixer for block in config.blocks() for _ in range(block.num_loops)]
    if config.multi_token is not None:
        mixers += [config.multi_token_block.mixer] * config.multi_token.num_tokens
    return sum(mixer.mixing_flops(dims, length=length) for mixer in mixers)


def state_size(config: ModelConfig, *, length: int) -> StateSize:
    """Return the size of the decoding state of one sequence of `length` tokens, of all layers and loops."""
    return sum((block_state_size(block, config, length=length) for block in config.blocks()), StateSize())


def block_state_size(block: BlockConfig, config: ModelConfig, *, length: int) -> StateSize:
    """Return the size of the decoding state of one layer, with all its loops."""
    dims = config.layer_dims()
    size = block.mixer.state_size(dims, length=length)
    if block.ffn is not None:
        size += block.ffn.state_size(dims)
    # Each loop of a block has a state of its own.
    return sum((size for _ in range(block.num_loops)), StateSize())


def _active_fraction(config: ModelConfig, path: str) -> float:
    """Return the fraction of a parameter that one token uses."""
    ffn = block_at(config, path).ffn if "/experts/" in path else None
    return 1.0 if ffn is None else ffn.active_fraction()
