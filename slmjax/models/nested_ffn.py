"""Nested feed-forward layers: prefixes of the hidden units that are smaller layers (MatFormer).

    granularity = drawn(config, key)                         # of a step: 0 is the smallest prefix
    params = with_prefixes(params, config, granularity)      # hidden units behind it have no effect
    smaller = sliced_config(config, [0.5, 0.25])             # a dense model, by layer
    smaller_params[name] = sliced(value, name, smaller_shape)

A step trains one granularity, the same in all layers, drawn uniformly from `MlpConfig.nested` and the whole
layer (Devvrit et al. 2023, https://arxiv.org/abs/2310.07707, section 3.2). Its parameters are not sliced but
masked: a program has one shape, is sharded as any other, and costs what the whole layer costs. As the sizes
of layers are trained together, each layer may have one of its own in the sliced model ("mix and match").

Dims: F hidden units, R layers of a stack.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from slmjax.models.architecture import BlockConfig, ModelConfig, stack_of
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.paths import FURTHER, SHARED, block_at

# Folded into a step's key; the keys of dropout are folded from small numbers.
DRAW = 0xFF17
FFN = "/ffn/"


def num_granularities(config: ModelConfig) -> int:
    """Return how many sizes each nested layer is trained in; 1 where none is nested."""
    return max((len(ffn.widths) for ffn in config.nested_ffns), default=1)


def drawn(config: ModelConfig, key: Array) -> Int[Array, ""] | None:
    """Return the granularity of a step with this key, from 0 for the smallest; None where none is nested."""
    count = num_granularities(config)
    return None if count == 1 else jax.random.randint(jax.random.fold_in(key, DRAW), (), 0, count)


def with_prefixes(
    params: Mapping[str, Array], config: ModelConfig, granularity: Int[Array, ""] | None
) -> dict[str, Array]:
    """Return the parameters, by stack path, of a model in which only prefixes of hidden units have an effect.

    Behind the prefix the values that are activated are 0, and so is the hidden unit: every activation maps 0
    to 0. Its other parameters then get no gradient.

    Args:
      params: as layers multiply with them.
      granularity: as from `drawn`; None for the whole layers.
    """
    if granularity is None:
        return dict(params)
    result = {}
    for path, value in params.items():
        ffn = ffn_at(config, path)
        activated = "gate" if ffn is not None and ffn.gated else "up"
        if ffn is not None and ffn.nested and path.partition(FFN)[2].split("/")[0] == activated:
            # Weight [R, D, F] and bias [R, F] have the hidden units last.
            is_kept = jnp.arange(ffn.hidden_dim) < jnp.asarray(ffn.widths)[granularity]
            value = jnp.where(jnp.expand_dims(is_kept, tuple(range(value.ndim - 1))), value, 0.0)
        result[path] = value
    return result


def ffn_at(config: ModelConfig, path: str) -> MlpConfig | None:
    """Return the dense layer that a weight or bias belongs to, by stack path; None for other parameters."""
    module, _, inner = path.partition(FFN)
    if not re.fullmatch("(gate|up|down)/(weight|bias)", inner):
        return None
    if path.startswith(SHARED):
        ffn = config.shared_ffns[module.removeprefix(SHARED)]
    elif path.startswith(FURTHER):
        ffn = config.multi_token_block.ffn
    else:
        ffn = block_at(config, path).ffn
    return ffn if isinstance(ffn, MlpConfig) else None


# Slices -----------------------------------------------------------------------------------------------------
def sliced_config(config: ModelConfig, fractions: Sequence[float]) -> ModelConfig:
    """Return the dense model whose nested layers have these fractions of their hidden units.

    Modules of `multi_token` keep their layers whole.

    Args:
      fractions: one for all layers, or one for each: of `MlpConfig.nested`, or 1.

    Raises:
      ValueError: no layer is nested, a fraction was not trained, or their number is not that of the layers.
    """
    if not config.nested_ffns:
        raise ValueError("no layer has ffn.nested: such a model has no smaller ones inside")
    by_layer = list(fractions) * (config.num_layers if len(fractions) == 1 else 1)
    if len(by_layer) != config.num_layers:
        raise ValueError(
            f"{len(fractions)} fractions for {config.num_layers} layers: give one for all, or one for each"
        )
    blocks = [
        _sliced_block(block, fraction, layer)
        for layer, (block, fraction) in enumerate(zip(config.blocks(), by_layer, strict=True))
    ]
    further = config.multi_token
    if further is not None:
        further = dataclasses.replace(further, block=_sliced_block(config.multi_token_block, 1.0, None))
    return dataclasses.replace(config, stack=stack_of(blocks), multi_token=further)


def _sliced_block(block: BlockConfig, fraction: float, layer: int | None) -> BlockConfig:
    ffn = block.ffn
    # A layer that is not nested is part of every smaller model.
    if not isinstance(ffn, MlpConfig) or not ffn.nested:
        return block
    widths = dict(zip((*ffn.nested, 1.0), ffn.widths, strict=True))
    if fraction not in widths:
        raise ValueError(
            f"the fraction {fraction} of layer {layer} was not trained: choose from "
            f"{', '.join(map(str, widths))}"
        )
    ffn = dataclasses.replace(ffn, hidden_dim=widths[fraction], nested=())
    return dataclasses.replace(block, ffn=ffn)


def sliced(value: Any, name: str, smaller_shape: Sequence[int]) -> Any:
    """Return the leading part of a parameter, by logical path, that a model of `sliced_config` has."""
    if FFN not in name:
        return value
    return value[tuple(slice(size) for size in smaller_shape)]
