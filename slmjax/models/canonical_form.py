"""Canonical configurations, with which an exported configuration is compared with the original."""

import dataclasses
import math
from typing import Any

from slmjax import kernels
from slmjax.models.architecture import BlockConfig, ModelConfig, Precision, Remat, stack_of
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.ffn.moe import Balance, MoeConfig
from slmjax.models.layers import ModelDims
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.delta_net import GatedDeltaNetConfig
from slmjax.models.mixers.differential import DifferentialAttentionConfig
from slmjax.models.mixers.griffin import RgLruConfig
from slmjax.models.mixers.latent import LatentAttentionConfig
from slmjax.models.mixers.mamba2 import PROJECTIONS, GatedNorm, Mamba2Config
from slmjax.models.mixers.parallel import ParallelMixerConfig, with_parts_changed
from slmjax.models.parameterization import Parameterization
from slmjax.models.protocols import MixerConfig


def canonical(config: ModelConfig) -> ModelConfig:
    """Return the configuration with all defaults resolved, and without settings of training and precision."""
    dims = config.layer_dims()
    blocks = [_canonical_block(block, dims) for block in config.blocks()]
    return dataclasses.replace(
        config,
        stack=stack_of(blocks),
        # What the parameterization multiplies with is part of the model; how it trains is not.
        residual_multiplier=config.residual_multiplier * config.scaling.residual,
        logit_multiplier=config.logit_multiplier * config.scaling.logits,
        parameterization=Parameterization.STANDARD,
        base_width=None,
        base_depth=None,
        base_head_dim=None,
        # These settings change how a model is trained or laid out, not what it computes.
        vocab_multiple=1,
        dropout=0.0,
        init_std=0.02,
        precision=Precision.FLOAT32,
        remat=Remat.NONE,
        # Its modules are not run to predict the next token.
        multi_token=None,
    )


def _canonical_mixer(mixer: MixerConfig, dims: ModelDims) -> MixerConfig:
    # None and its explicit default are the same model: both become the explicit value.
    if isinstance(mixer, AttentionConfig):
        head_dim = mixer.resolved_head_dim(dims)
        scale = dims.scaling.score_scale(head_dim, mixer.scale)
        rotated = mixer.resolved_rotary_dim(dims)
        mixer = dataclasses.replace(
            mixer, num_kv_heads=mixer.kv_heads, head_dim=head_dim, rotary_dim=rotated or None, scale=scale
        )
        # Without a rotation its scaling has no effect, and is no difference.
        if mixer.rope_base is None:
            mixer = dataclasses.replace(mixer, rope_scaling=None)
    if isinstance(mixer, LatentAttentionConfig):
        scale = dims.scaling.score_scale(mixer.key_dim, mixer.scale)
        mixer = dataclasses.replace(
            mixer, scale=scale, latent_norm_eps=mixer.latent_norm_eps or dims.norm_eps
        )
    if isinstance(mixer, DifferentialAttentionConfig):
        mixer = dataclasses.replace(
            mixer, num_kv_heads=mixer.kv_heads, head_dim=mixer.resolved_head_dim(dims)
        )
    if isinstance(mixer, Mamba2Config):
        mixer = _canonical_mamba2(mixer, dims)
    if isinstance(mixer, GatedDeltaNetConfig):
        mixer = dataclasses.replace(
            mixer,
            num_value_heads=mixer.value_heads,
            key_dim=mixer.resolved_key_dim(dims),
            value_dim=mixer.resolved_value_dim(dims),
            head_norm_eps=mixer.head_norm_eps or dims.norm_eps,
            # How the computation is divided changes no result.
            chunk_size=kernels.CHUNK_SIZE,
        )
    if isinstance(mixer, RgLruConfig):
        mixer = dataclasses.replace(mixer, chunk_size=None)
    if isinstance(mixer, ParallelMixerConfig):
        ones = (1.0,) * len(mixer.mixers)
        mixer = dataclasses.replace(
            with_parts_changed(mixer, lambda part: _canonical_mixer(part, dims)),
            input_multipliers=mixer.input_multipliers or ones,
            output_multipliers=mixer.output_multipliers or ones,
        )
    return mixer


def _canonical_mamba2(mixer: Mamba2Config, dims: ModelDims) -> Mamba2Config:
    is_normed = mixer.norm is not GatedNorm.NONE
    return dataclasses.replace(
        mixer,
        inner_dim=mixer.resolved_inner_dim(dims),
        # The width is stated above, and without a norm its groups have no effect.
        expansion=2,
        norm_groups=(mixer.norm_groups if is_normed else None) or mixer.num_groups,
        projection_multipliers=mixer.projection_multipliers or (1.0,) * len(PROJECTIONS),
        # How a sequence is computed, not what.
        chunk_size=kernels.CHUNK_SIZE,
    )


def _canonical_block(block: BlockConfig, dims: ModelDims) -> BlockConfig:
    ffn = block.ffn
    if isinstance(ffn, MoeConfig):
        # Selection biases are part of the model; the other settings of balance affect training only.
        balance = Balance.BIAS if ffn.balance is Balance.BIAS else Balance.NONE
        ffn = dataclasses.replace(
            ffn, balance=balance, balance_weight=0.0, bias_rate=0.0, z_weight=0.0, capacity_factor=None
        )
    if isinstance(ffn, MlpConfig):
        # Which prefixes were trained does not change what the whole layer computes.
        ffn = dataclasses.replace(ffn, nested=())
    return dataclasses.replace(block, mixer=_canonical_mixer(block.mixer, dims), ffn=ffn)


def differences(expected: ModelConfig, actual: ModelConfig, *, tolerance: float = 0.0) -> list[str]:
    """List the differences between canonical configurations, as "field = value (read back as other)".

    Layers are compared one by one.

    Args:
      tolerance: floats that differ by at most this fraction are equal.
    """
    texts = []
    for field in dataclasses.fields(expected):
        if field.name != "stack":
            texts += _differing(
                field.name, getattr(expected, field.name), getattr(actual, field.name), tolerance
            )
    expected_blocks = list(expected.blocks())
    actual_blocks = list(actual.blocks())
    if len(expected_blocks) != len(actual_blocks):
        # Layers after a missing one would all differ from their counterparts: only the count is listed.
        return [*texts, f"{len(expected_blocks)} layers (read back as {len(actual_blocks)})"]
    for layer, (block, other) in enumerate(zip(expected_blocks, actual_blocks, strict=True)):
        texts += _differing(f"layer {layer}", block, other, tolerance)
    return texts


def _differing(where: str, expected: Any, actual: Any, tolerance: float) -> list[str]:
    if expected == actual or _is_close(expected, actual, tolerance):
        return []
    # Of nested settings only the fields that differ are listed, each with its path.
    if dataclasses.is_dataclass(expected) and type(expected) is type(actual):
        return [
            text
            for field in dataclasses.fields(expected)
            for text in _differing(
                f"{where}.{field.name}", getattr(expected, field.name), getattr(actual, field.name), tolerance
            )
        ]
    # Parallel mixers are a tuple of configs.
    if isinstance(expected, tuple) and isinstance(actual, tuple) and len(expected) == len(actual):
        pairs = list(zip(expected, actual, strict=True))
        if all(dataclasses.is_dataclass(item) for pair in pairs for item in pair):
            return [
                text
                for index, (item, other) in enumerate(pairs)
                for text in _differing(f"{where}[{index}]", item, other, tolerance)
            ]
    return [f"{where} = {_text(expected)} (read back as {_text(actual)})"]


def _is_close(expected: Any, actual: Any, tolerance: float) -> bool:
    # Tuples of floats are LongRoPE's divisors, which files may have rounded like single floats.
    if isinstance(expected, tuple) and isinstance(actual, tuple):
        return len(expected) == len(actual) and all(
            _is_close(item, other, tolerance) for item, other in zip(expected, actual, strict=True)
        )
    return (
        isinstance(expected, float)
        and isinstance(actual, float)
        and math.isclose(expected, actual, rel_tol=tolerance)
    )


def _text(value: Any) -> str:
    """Return the value of an enum, the type's name of a dataclass, and any other value as it is."""
    return str(getattr(value, "value", type(value).__name__ if dataclasses.is_dataclass(value) else value))
