"""One spelling for each model, so that what an exported configuration would be read back as can be compared
with the original.
"""

import dataclasses
import math
from typing import Any

from slmjax.models.architecture import BlockConfig, ModelConfig, Precision, Remat, stack_of
from slmjax.models.ffn.moe import Balance, MoeConfig
from slmjax.models.layers import ModelDims
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.latent import LatentAttentionConfig


def canonical(config: ModelConfig) -> ModelConfig:
    """The configuration with every default spelt out, without what only says how it is trained or
    computed.
    """
    shape = config.layer_shape()
    blocks = [_canonical_block(block, shape) for block in config.blocks()]
    return dataclasses.replace(
        config,
        stack=stack_of(blocks),
        vocab_multiple=1,
        dropout=0.0,
        init_std=0.02,
        precision=Precision.FLOAT32,
        remat=Remat.NONE,
    )


def _canonical_block(block: BlockConfig, dims: ModelDims) -> BlockConfig:
    mixer = block.mixer
    ffn = block.ffn
    if isinstance(mixer, AttentionConfig):
        head_dim = mixer.resolved_head_dim(dims)
        scale = head_dim**-0.5 if mixer.scale is None else mixer.scale
        rotated = mixer.resolved_rotary_dim(dims)
        mixer = dataclasses.replace(
            mixer, num_kv_heads=mixer.kv_heads, head_dim=head_dim, rotary_dim=rotated or None, scale=scale
        )
        if mixer.rope_base is None:
            mixer = dataclasses.replace(mixer, rope_scaling=None)
    if isinstance(mixer, LatentAttentionConfig):
        scale = mixer.key_dim**-0.5 if mixer.scale is None else mixer.scale
        mixer = dataclasses.replace(
            mixer, scale=scale, latent_norm_eps=mixer.latent_norm_eps or dims.norm_eps
        )
    if isinstance(ffn, MoeConfig):
        # the one that is part of the model
        balance = Balance.BIAS if ffn.balance is Balance.BIAS else Balance.NONE
        ffn = dataclasses.replace(
            ffn, balance=balance, balance_weight=0.0, bias_rate=0.0, z_weight=0.0, capacity_factor=None
        )
    return dataclasses.replace(block, mixer=mixer, ffn=ffn)


def differences(wanted: ModelConfig, found: ModelConfig, *, tolerance: float = 0.0) -> list[str]:
    """What is not the same in two canonical configurations, as "field = value (read back as other)"; layers
    one by one.

    Args:
      tolerance: numbers that differ by no more than this share of them are the same.
    """
    found_text = []
    for field in dataclasses.fields(wanted):
        if field.name != "stack":
            found_text += _differing(
                field.name, getattr(wanted, field.name), getattr(found, field.name), tolerance
            )
    ours = list(wanted.blocks())
    theirs = list(found.blocks())
    if len(ours) != len(theirs):
        return [*found_text, f"{len(ours)} layers (read back as {len(theirs)})"]
    for layer, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        found_text += _differing(f"layer {layer}", mine, other, tolerance)
    return found_text


def _differing(where: str, wanted: Any, found: Any, tolerance: float) -> list[str]:
    if wanted == found or _is_close(wanted, found, tolerance):
        return []
    if dataclasses.is_dataclass(wanted) and type(wanted) is type(found):
        return [
            text
            for field in dataclasses.fields(wanted)
            for text in _differing(
                f"{where}.{field.name}", getattr(wanted, field.name), getattr(found, field.name), tolerance
            )
        ]
    return [f"{where} = {_text(wanted)} (read back as {_text(found)})"]


def _is_close(wanted: Any, found: Any, tolerance: float) -> bool:
    if isinstance(wanted, tuple) and isinstance(found, tuple):
        return len(wanted) == len(found) and all(
            _is_close(one, other, tolerance) for one, other in zip(wanted, found, strict=True)
        )
    return (
        isinstance(wanted, float)
        and isinstance(found, float)
        and math.isclose(wanted, found, rel_tol=tolerance)
    )


def _text(value: Any) -> str:
    return str(getattr(value, "value", type(value).__name__ if dataclasses.is_dataclass(value) else value))
