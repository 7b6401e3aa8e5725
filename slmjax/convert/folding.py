"""A model whose multipliers are part of its weights, for formats without a field for them.

    folded(local_model)    # computes the same logits with multipliers of 1 and the default scale of scores

muP and CompleteP multiply logits, residual updates and attention scores. Of released architectures Granite
has fields for these. For others, factors go where the next operation is linear:

- of residual updates: into the output matrices of sublayers, or into the norms after them
- of logits: into the final norm, which also suits a tied head
- of scores: into the projection of queries, or into their norm
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from slmjax.checkpoints.stored_model import LocalModel
from slmjax.models.architecture import BlockConfig, ModelConfig, NormPlacement, stack_of
from slmjax.models.canonical_form import canonical
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from slmjax.models.mixers.latent import LatentAttentionConfig

# Parameters that write into the residual stream, below the path of a layer; biases are multiplied as well.
SUBLAYER_OUTPUTS = {
    "mixer": ("mixer/output/weight", "mixer/output/bias"),
    "ffn": (
        "ffn/down/weight",
        "ffn/down/bias",
        "ffn/experts/down",
        "ffn/experts/down_bias",
        "ffn/shared/down/weight",
        "ffn/shared/down/bias",
    ),
}


def folded(local_model: LocalModel, *, keeps_codes: bool = True) -> LocalModel:
    """Return the model with multipliers in its weights.

    Args:
      local_model: the model.
      keeps_codes: whether quantized weights are written as codes; otherwise they are dequantized, and so can
        be multiplied.

    Raises:
      ValueError: a mixer has no place for multipliers, or codes are kept and a weight that would be
        multiplied is quantized.
    """
    config = canonical(local_model.config)
    for block in config.blocks():
        if not isinstance(block.mixer, AttentionConfig | LatentAttentionConfig):
            raise ValueError(
                f"multipliers of parameterization={local_model.config.parameterization.value} cannot become "
                f"part of the weights of {type(block.mixer).__name__}, which no other format has: export a "
                "model with attention or latent attention alone"
            )
    factors = {path: factor for path, factor in _factors(config) if factor != 1.0}
    quantized = sorted(set(factors) & set(local_model.formats)) if keeps_codes else []
    if quantized:
        raise ValueError(
            f"{quantized[0]} is quantized, so that the multiplier {factors[quantized[0]]:g} of "
            f"parameterization={local_model.config.parameterization.value} cannot become part of it: export "
            "as a family with multipliers (Granite, without norms of queries and keys), leave this weight in "
            "floating point, or write dequantized weights (--dtype f32)"
        )
    is_centered = config.norm_kind is NormKind.CENTERED_RMS

    def read(path: str) -> np.ndarray:
        array = local_model.read(path)
        factor = factors.get(path)
        if factor is None:
            return array
        scaled = array.astype(np.float32) * np.float32(factor)
        # The parameter of a centered norm is its scale minus one.
        if is_centered and path.endswith("norm/scale"):
            scaled += np.float32(factor) - 1
        return scaled.astype(array.dtype)

    blocks = [_without_scale(block) for block in config.blocks()]
    plain = dataclasses.replace(config, stack=stack_of(blocks), residual_multiplier=1.0, logit_multiplier=1.0)
    return dataclasses.replace(local_model, config=plain, read=read)


def _without_scale(block: BlockConfig) -> BlockConfig:
    assert isinstance(block.mixer, AttentionConfig | LatentAttentionConfig)
    return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, scale=None))


def _factors(config: ModelConfig) -> Iterator[tuple[str, float]]:
    """Yield the factor of every parameter by logical path, of present and absent ones alike."""
    for name in ("scale", "bias"):
        yield f"final_norm/{name}", config.logit_multiplier
    for layer, block in enumerate(config.blocks()):
        for sublayer, outputs in SUBLAYER_OUTPUTS.items():
            # After a norm, a factor of the norm's inputs would have no effect.
            if block.norm is not NormPlacement.PRE:
                outputs = tuple(f"{sublayer}_post_norm/{name}" for name in ("scale", "bias"))
            for path in outputs:
                yield f"layers/{layer}/{path}", config.residual_multiplier
        for path, factor in _score_factors(block, config):
            yield f"layers/{layer}/mixer/{path}", factor


def _score_factors(block: BlockConfig, config: ModelConfig) -> Iterator[tuple[str, float]]:
    mixer = block.mixer
    # The canonical form has an explicit scale.
    assert isinstance(mixer, AttentionConfig | LatentAttentionConfig) and mixer.scale is not None
    if isinstance(mixer, LatentAttentionConfig):
        # The norm of the latent of queries comes before the projection.
        name = "query" if mixer.query_rank is None else "query_up"
        yield f"{name}/weight", mixer.scale * math.sqrt(mixer.key_dim)
        return
    factor = mixer.scale * math.sqrt(mixer.resolved_head_dim(config.layer_dims()))
    names = ("query/weight", "query/bias")
    if mixer.qk_norm is not QkNorm.NONE:
        names = ("query_norm/scale", "query_norm/bias")
    for name in names:
        yield name, factor
