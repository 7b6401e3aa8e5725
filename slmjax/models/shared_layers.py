"""Layers that use what other layers have: keys and values.

    blocks = [local, local, full] * 8
    stack_of(with_shared_key_values(blocks, num_shared=10))

In Gemma 3n and 4 each of the last layers reads the keys and values of the last layer before them that is of
its kind and has its own. In YOCO (Sun et al. 2024) the second half reads those of one layer with full
attention. The cache of a sequence has entries of the sources alone.
"""

import dataclasses
from collections.abc import Sequence

from slmjax.models.architecture import BlockConfig
from slmjax.models.mixers.attention import AttentionConfig


def with_shared_key_values(blocks: Sequence[BlockConfig], *, num_shared: int) -> list[BlockConfig]:
    """Return the layers, of which the last `num_shared` read keys and values of earlier ones.

    Each reads those of the last layer before all of them with the same `AttentionConfig`, which writes them
    under `keys_and_values_0`, `keys_and_values_1` and so on. Layers with other mixers stay as they are.

    >>> local, full = (
    ...     BlockConfig(mixer=AttentionConfig(num_heads=2, window=window), ffn=None) for window in (8, None)
    ... )
    >>> for block in with_shared_key_values([local, full, local, full, full], num_shared=2):
    ...     print(block.mixer.window, block.mixer.writes_kv, block.mixer.reads_kv)
    8 None None
    None None None
    8 None None
    None None keys_and_values_0
    None None keys_and_values_0

    Raises:
      ValueError: there are fewer layers, or none before them is of the kind of a reader.
    """
    if not 0 < num_shared < len(blocks):
        raise ValueError(
            f"num_shared={num_shared} of {len(blocks)} layers: at least one must share, and at least one "
            "have keys and values of its own"
        )
    result = list(blocks)
    first_reader = len(blocks) - num_shared
    names: dict[AttentionConfig, str] = {}
    for layer in range(first_reader, len(blocks)):
        mixer = blocks[layer].mixer
        if not isinstance(mixer, AttentionConfig):
            continue
        if mixer not in names:
            source = next((i for i in range(first_reader - 1, -1, -1) if blocks[i].mixer == mixer), None)
            if source is None:
                raise ValueError(
                    f"layer {layer} has no earlier layer of its kind to read from: none of the first "
                    f"{first_reader} has {mixer}"
                )
            names[mixer] = f"keys_and_values_{len(names)}"
            writer = dataclasses.replace(mixer, writes_kv=names[mixer])
            result[source] = dataclasses.replace(blocks[source], mixer=writer)
        reader = dataclasses.replace(mixer, reads_kv=names[mixer])
        result[layer] = dataclasses.replace(blocks[layer], mixer=reader)
    return result
