"""Paths of parameters.

A stacked path, `segments/0/blocks/1/mixer/query/weight`, names the parameters of all repeats of a layer
group; a logical path, `layers/3/mixer/query/weight`, those of one layer. A module that several layers share
is outside the groups, and has one path: `shared/main/ffn/up/weight`. So are modules that predict further
tokens: `multi_token/0/projection/weight`.
"""

import re
from collections.abc import Sequence

from slmjax.models.architecture import BlockConfig, ModelConfig

# Numbers of each channel, for each tap of a convolution or state of a recurrence: no map between two spaces.
PER_CHANNEL = re.compile(r"(taps|log_rates)$")

PER_LAYER_TABLE = "embed/per_layer"  # of `ModelConfig.per_layer_embeddings`
PER_LAYER_PROJECTION = "per_layer/projection/weight"
SHARED = "shared/"  # begins the paths of what several layers share
FURTHER = "multi_token/"  # begins the paths of modules that predict the tokens after the next one


def is_multiplied(path: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter before the head holds matrices that tokens are multiplied with.

    A stacked matrix has the layer dim and two more. So have biases of experts and numbers of each channel,
    which are no matrices.
    """
    if path == PER_LAYER_PROJECTION:
        return True
    is_matrix = not path.endswith("bias") and not PER_CHANNEL.search(path)
    num_dims = len(shape) - path.startswith("segments/")
    return is_in_layers(path) and num_dims > 1 and is_matrix


def is_in_layers(path: str) -> bool:
    """Return whether a parameter, by stack or logical path, belongs to layers, or to modules like them."""
    return path.startswith(("segments/", "layers/", SHARED, FURTHER))


def num_uses(config: ModelConfig, path: str) -> int:
    """Return how often a token is computed with each slice of a parameter, by stack path: once per loop.

    A shared module counts for every layer that has it, and anything outside the layers once.
    """
    if path.startswith("head_quantizer/"):
        # The modules of further tokens read the table too.
        return 1 + (0 if config.multi_token is None else config.multi_token.num_tokens)
    if not is_in_layers(path) or path.startswith(FURTHER):
        return 1
    if path.startswith(SHARED):
        name = path.split("/")[1]
        uses = sum(
            block.num_loops
            for block in config.blocks()
            if block.ffn is not None and block.ffn.shared_name() == name
        )
    else:
        uses = block_at(config, path).num_loops
    return uses * config.num_stack_loops


def block_at(config: ModelConfig, path: str) -> BlockConfig:
    """Return the configuration of the block that a stacked parameter belongs to."""
    parts = path.split("/")
    return config.stack[int(parts[1])].pattern[int(parts[3])]


def layer_indices(config: ModelConfig, path: str) -> list[int] | None:
    """Return the layers whose slices a stacked parameter holds, in order; None for one outside the layers."""
    parts = path.split("/")
    if parts[0] != "segments":
        return None
    index = int(parts[1])
    offset = int(parts[3])
    group = config.stack[index]
    # The groups before this one come first; within the group, blocks of the pattern alternate.
    first = sum(len(earlier.pattern) * earlier.repeats for earlier in config.stack[:index])
    return [first + offset + len(group.pattern) * repeat for repeat in range(group.repeats)]


def logical_paths(config: ModelConfig, path: str) -> list[str]:
    """Return `layers/{i}/...` for each slice of a stacked parameter, and the path itself for any other."""
    layers = layer_indices(config, path)
    return [path] if layers is None else [f"layers/{layer}/{path.split('/', 4)[4]}" for layer in layers]
