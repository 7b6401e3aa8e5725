"""Sizes and costs of an architecture, from its config alone: nothing is computed or allocated."""

import dataclasses
import math

from slmjax.models.architecture import ModelConfig
from slmjax.models.definition import define
from slmjax.models.paths import block_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Sizes and costs of an architecture, worked out from its config."""

    parameters: int  # all that are trained; a tied table counts once
    active_parameters: int  # those that one token uses: of the experts, only the selected
    embedding_parameters: int  # of them in the tables that have one row per token: embedding and untied head
    training_flops_per_token: float  # forward and backward, at the context length
    bytes_bf16: int  # of all parameters
    cache_bytes_per_token: float  # of the decoding state of a full context in bfloat16, divided by its length


def describe(config: ModelConfig) -> Summary:
    """Sizes and costs of an architecture. Nothing is computed or allocated.

    Training costs 6 FLOPs per token for each parameter that a token is multiplied with (2 forward, 4
    backward: once per pass of a block; the head counts also where it is tied, the lookup in the table does
    not) and 3 times what mixers compute beside their weights, averaged over a sequence of the context length.
    Recomputation by a rematerialisation policy is not counted.

    Raises:
      ValueError: the config leaves the size of the vocabulary open.
    """
    shape = config.layer_shape()
    length = config.context_length
    # What is learned beside weights of some format is no parameter of the architecture.
    shapes = {path: leaf.shape for path, leaf in define(config).params.items()}
    sizes = {path: math.prod(dims) for path, dims in shapes.items()}
    tables = sum(size for path, size in sizes.items() if path in ("embed/table", "head/weight"))
    active = 0.0
    multiplied = float(config.table_rows * config.embed_dim)
    for path, dims in shapes.items():
        used = sizes[path] * _active_share(config, path)
        active += used
        # A matrix, beside the layer dim; biases of experts have as many dims.
        if path.startswith("segments/") and len(dims) > 2 and not path.endswith("bias"):
            multiplied += used * block_at(config, path).num_loops
    passes = [block.mixer for block in config.blocks() for _ in range(block.num_loops)]
    return Summary(
        parameters=sum(sizes.values()),
        active_parameters=round(active),
        embedding_parameters=tables,
        training_flops_per_token=6 * multiplied
        + 3 * sum(mixer.mixing_flops(shape, length=length) for mixer in passes),
        bytes_bf16=2 * sum(sizes.values()),
        cache_bytes_per_token=sum(mixer.state_bytes(shape, length=length, itemsize=2) for mixer in passes)
        / length,
    )


def _active_share(config: ModelConfig, path: str) -> float:
    """The share of a parameter that one token uses."""
    ffn = block_at(config, path).ffn if "/experts/" in path else None
    return 1.0 if ffn is None else ffn.active_share()
