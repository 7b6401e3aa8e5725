"""Sizes and costs of an architecture, from its config alone; nothing is computed or allocated."""

import dataclasses
import math
from collections.abc import Sequence

from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.definition import define
from slmjax.models.paths import FURTHER, PER_LAYER_TABLE, block_at, is_multiplied, num_uses
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
    # parameters that the prediction of the next token uses: of the experts only the selected ones, of the
    # table of per-layer embeddings one row
    active_parameters: int
    # parameters of the tables with one row per token: embedding, untied head, per-layer embeddings
    embedding_parameters: int
    # of them those of per-layer embeddings, which are only looked up and may lie in slower memory
    per_layer_parameters: int
    training_flops_per_token: float  # forward and backward, at the context length
    inference_flops_per_token: float  # forward alone, of what the logits of the next token need
    bytes_bf16: int  # bytes of all parameters in bfloat16
    resident_bytes_bf16: int  # of them those that must be near the processor: without per-layer embeddings
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
    per_layer = sizes.get(PER_LAYER_TABLE, 0)
    tables = per_layer + sum(size for path, size in sizes.items() if path in ("embed/table", "head/weight"))
    active = 0.0
    # The product of the head, with rows of padding; the lookup of embeddings multiplies nothing.
    head = float(config.table_rows * config.embed_dim)
    # Products with weights of the layers, and of the modules of further tokens: inference leaves those out.
    multiplied = 0.0
    multiplied_further = 0.0
    for path, dims in shapes.items():
        used = sizes[path] * _active_fraction(config, path)
        products = used * num_uses(config, path) if is_multiplied(path, dims) else 0.0
        if path.startswith(FURTHER):
            multiplied_further += products
            continue
        multiplied += products
        active += used if path != PER_LAYER_TABLE else dims[-1]
    # The loss needs the logits of every module of further tokens, and with an exit gate those of every loop.
    num_heads = 1 if config.multi_token is None else 1 + config.multi_token.num_tokens
    if config.exit_gate is not None:
        num_heads = config.num_stack_loops
        multiplied += config.num_stack_loops * config.embed_dim  # the gate

    def inference_flops(length: int) -> float:
        return 2 * (multiplied + head) + _mixing_flops(config, length=length)

    def at(length: int) -> LengthCosts:
        further_flops = 2 * (multiplied_further + (num_heads - 1) * head)
        further_flops += _further_mixing_flops(config, length=length)
        return LengthCosts(
            length=length,
            # A backward pass has two products for each one of the forward pass.
            training_flops_per_token=3 * (inference_flops(length) + further_flops),
            state_bytes=state_size(config, length=length).bytes(2),
        )

    own = at(config.context_length)
    return Summary(
        parameters=sum(sizes.values()),
        active_parameters=round(active),
        embedding_parameters=tables,
        per_layer_parameters=per_layer,
        training_flops_per_token=own.training_flops_per_token,
        inference_flops_per_token=inference_flops(own.length),
        bytes_bf16=2 * sum(sizes.values()),
        resident_bytes_bf16=2 * (sum(sizes.values()) - per_layer),
        cache_bytes_per_token=own.state_bytes / own.length,
        by_length=tuple(map(at, lengths)),
    )


def _mixing_flops(config: ModelConfig, *, length: int) -> float:
    """Return forward FLOPs per token of the mixers of all layers and loops, without their weights."""
    dims = config.layer_dims()
    once = sum(block.num_loops * block.mixer.mixing_flops(dims, length=length) for block in config.blocks())
    return config.num_stack_loops * once


def _further_mixing_flops(config: ModelConfig, *, length: int) -> float:
    """Return the same of the modules of further tokens."""
    if config.multi_token is None:
        return 0.0
    mixer = config.multi_token_block.mixer
    return config.multi_token.num_tokens * mixer.mixing_flops(config.layer_dims(), length=length)


def state_size(config: ModelConfig, *, length: int) -> StateSize:
    """Return the size of the decoding state of one sequence of `length` tokens, of all layers and loops."""
    return sum((block_state_size(block, config, length=length) for block in config.blocks()), StateSize())


def block_state_size(block: BlockConfig, config: ModelConfig, *, length: int) -> StateSize:
    """Return the size of the decoding state of one layer, with all its loops."""
    dims = config.layer_dims()
    size = block.mixer.state_size(dims, length=length)
    if block.ffn is not None:
        size += block.ffn.state_size(dims)
    # Each loop of a block, and of the stack, has a state of its own.
    return sum((size for _ in range(block.num_loops * config.num_stack_loops)), StateSize())


def _active_fraction(config: ModelConfig, path: str) -> float:
    """Return the fraction of a parameter that one token uses."""
    ffn = block_at(config, path).ffn if "/experts/" in path else None
    return 1.0 if ffn is None else ffn.active_fraction()
