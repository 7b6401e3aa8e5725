"""Paths of parameters: `segments/0/blocks/1/mixer/query/weight` of a stack, `layers/3/mixer/query/weight` of
a layer.
"""

from slmjax.models.architecture import BlockConfig, ModelConfig


def block_at(config: ModelConfig, path: str) -> BlockConfig:
    """The configuration of the block that a stacked parameter belongs to."""
    parts = path.split("/")
    return config.stack[int(parts[1])].pattern[int(parts[3])]


def layer_indices(config: ModelConfig, path: str) -> list[int] | None:
    """The layers whose slices a stacked parameter holds, in order; None for a parameter outside the
    layers.
    """
    parts = path.split("/")
    if parts[0] != "segments":
        return None
    index = int(parts[1])
    offset = int(parts[3])
    first = sum(len(segment.pattern) * segment.repeats for segment in config.stack[:index])
    segment = config.stack[index]
    return [first + offset + len(segment.pattern) * repeat for repeat in range(segment.repeats)]


def logical_paths(config: ModelConfig, path: str) -> list[str]:
    """Logical paths of a parameter: `layers/{i}/...` for each slice of a stacked one, the path itself for any
    other.
    """
    layers = layer_indices(config, path)
    return [path] if layers is None else [f"layers/{layer}/{path.split('/', 4)[4]}" for layer in layers]
