"""Layers that use what other layers have: keys and values, and the weights of feed-forward layers.

    blocks = [local, local, full] * 8
    stack_of(with_shared_key_values(blocks, num_shared=10))
    stack_of(with_shared_ffn(blocks))

In Gemma 3n and 4 each of the last layers reads the keys and values of the last layer before them that is of
its kind and has its own. In YOCO (Sun et al. 2024) the second half reads those of one layer with full
attention. The cache of a sequence has entries of the sources alone.

In MobiLlama (Thawakar et al. 2024) all layers have one feed-forward layer, with norms of their own. Its
parameters are stored and updated once, and their gradient is the sum over the layers.
"""

import dataclasses
from collections.abc import Sequence

from slmjax.models.architecture import BlockConfig
from slmjax.models.ffn.mlp import MlpConfig
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


def with_shared_ffn(blocks: Sequence[BlockConfig], *, name: str = "main") -> list[BlockConfig]:
    """Return the layers with one feed-forward layer for all of them; those without one stay as they are.

    Call this for each part of a stack, with different names, where not all layers share the same one.

    >>> block = BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=MlpConfig(hidden_dim=16))
    >>> [shared.ffn.shared_as for shared in with_shared_ffn([block, block])]
    ['main', 'main']

    Args:
      name: part of the path of its parameters, `shared/main/ffn/up/weight`.

    Raises:
      ValueError: the layers have different feed-forward layers, or one that is not an `MlpConfig`.
    """
    ffns = list(dict.fromkeys(block.ffn for block in blocks if block.ffn is not None))
    if len(ffns) != 1:
        raise ValueError(
            f"the layers have {len(ffns)} different feed-forward layers, and can share one only: give all of "
            "them the same"
        )
    (ffn,) = ffns
    if not isinstance(ffn, MlpConfig):
        # Routers would be balanced by loads of all layers together, and a state belongs to one layer.
        raise ValueError(f"layers can share an MlpConfig, not a {type(ffn).__name__}: use the former")
    shared = dataclasses.replace(ffn, shared_as=name)
    return [block if block.ffn is None else dataclasses.replace(block, ffn=shared) for block in blocks]
