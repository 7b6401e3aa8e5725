"""Gemma 3: sandwich norms, five windowed layers to each full one, each kind with its own base of angles.

The larger ones have a vision tower, of which only the language model is imported.
"""

import dataclasses
from typing import Any

from slmjax.convert.families import gemma2
from slmjax.convert.family import (
    Family,
    Inexpressible,
    Rule,
    TensorMap,
    attentions,
    check_whole_rotation,
    first_block,
)
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.hf.settings import (
    IGNORED,
    check_width,
    read_attention,
    read_biases,
    read_decoder,
    read_mlp,
    read_ropes_by_kind,
    read_windows,
    write_attention,
    write_decoder,
    write_mlp,
    write_scaling,
    write_windows,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, SANDWICH_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig, NormPlacement
from slmjax.models.ffn.mlp import Activation
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import Biases, QkNorm

# Defaults of keys that a config.json may leave out; those of the larger models do.
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_bidirectional_attention": False,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    settings.expect("use_bidirectional_attention", False)
    num_layers = settings.take("num_hidden_layers")
    biases = read_biases(settings)
    attention = read_attention(
        settings,
        rope_base=None,
        biases=biases,
        scale=settings.positive("query_pre_attn_scalar") ** -0.5,
        qk_norm=QkNorm.PER_HEAD,
        softcap=settings.optional("attn_logit_softcapping"),
    )
    # Windowed layers have unscaled angles of a smaller base, as distances in them are short.
    ropes = read_ropes_by_kind(settings, local="rope_local_base_freq")
    # Files without layer_types give the period of full layers.
    period = settings.positive("sliding_window_pattern", 6)
    if settings.has("layer_types"):
        settings.ignore("_sliding_window_pattern")
    else:
        settings.expect("_sliding_window_pattern", period)  # written by transformers, but not read
    windows = read_windows(
        settings,
        num_layers=num_layers,
        window=settings.optional("sliding_window"),
        default=[(layer + 1) % period != 0 for layer in range(num_layers)],
    )
    ffn = read_mlp(settings, activation="hidden_activation")
    mixers = [
        dataclasses.replace(attention, window=window, **ropes[window is not None]) for window in windows
    ]
    return read_decoder(
        settings,
        [BlockConfig(mixer=mixer, ffn=ffn, norm=NormPlacement.SANDWICH) for mixer in mixers],
        norm_kind=NormKind.CENTERED_RMS,
        embed_multiplier=settings.take("hidden_size") ** 0.5,
        logit_softcap=settings.optional("final_logit_softcapping"),
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    check_width(model, attention.num_heads)
    mixers = attentions(model)
    # Layers of a kind share their angles: a model in which they differ does not read back as the same.
    local = next((mixer for mixer in mixers if mixer.window is not None), None)
    full = next((mixer for mixer in mixers if mixer.window is None), None)
    for mixer in mixers:
        check_whole_rotation(mixer)
    if local is not None and local.rope_scaling is not None:
        raise Inexpressible("windowed layers have unscaled angles")
    ropes = {
        # A kind of layer that the model lacks gets the library's default.
        "rope_theta": 1e6 if full is None else full.rope_base,
        "rope_local_base_freq": 1e4 if local is None else local.rope_base,
        "rope_scaling": None if full is None else write_scaling(full.rope_scaling),
    }
    keys = {
        **write_decoder(model),
        **write_attention(attention),
        **write_mlp(ffn, activation="hidden_activation"),
    }
    return {
        "model_type": "gemma3_text",
        **keys,
        **write_windows(model),
        **gemma2.write_scores(model, attention),
        **ropes,
    }


LAYER = (*SANDWICH_NORMS, *ATTENTION, *GATED_MLP)
HF = Family(
    architecture="Gemma3ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=LAYER),
)


# With a vision tower ----------------------------------------------------------------------------------------
def read_text_part(settings: Settings) -> ModelConfig:
    """Read the config.json of a model with a vision tower as the `ModelConfig` of its language model."""
    inner = settings.inner("text_config", defaults=DEFAULTS)
    model = read(inner)
    inner.finish()
    settings.ignore(*IGNORED, *VISION_KEYS)
    return model


def refuse(model: ModelConfig) -> dict[str, Any]:
    """Refuse to write a model with a vision tower: we have none."""
    raise Inexpressible("it has a vision tower")


def _below(rule: Rule, prefix: str) -> Rule:
    return dataclasses.replace(rule, theirs=tuple(prefix + name for name in rule.theirs))


# Keys outside text_config, which do not affect the language model; the head is tied in all releases.
VISION_KEYS = (
    "vision_config",
    "mm_tokens_per_image",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "boi_token_id",
    "eoi_token_id",
    "image_token_id",
    "tie_word_embeddings",
)
HF_WITH_VISION = Family(
    architecture="Gemma3ForConditionalGeneration",
    read=read_text_part,
    write=refuse,
    tensor_map=TensorMap(
        around=tuple(_below(rule, "language_model.") for rule in EMBEDDING),
        layer=LAYER,
        prefix="language_model.model.layers.{i}.",
        ignored=(r"vision_tower\..*", r"multi_modal_projector\..*"),
    ),
)


# GGUF -------------------------------------------------------------------------------------------------------
LARGEST = gguf_settings.NamedSize(name="Gemma 3 27B", num_layers=62)


def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    # In llama.cpp's code, every sixth layer is full, and the angles of windowed layers are not scaled.
    settings.expect("attention.sliding_window_pattern", 6)
    num_layers = settings.take("block_count")
    # Unlike in Gemma 2, llama.cpp applies no soft cap to logits by default.
    softcap = settings.take("final_logit_softcapping", 0.0)
    attention = gguf_settings.read_attention(
        settings, qk_norm=QkNorm.PER_HEAD, scale=gguf_settings.read_named_scale(settings, LARGEST)
    )
    local = dataclasses.replace(
        attention, rope_base=float(settings.take("rope.freq_base_swa", 10_000.0)), rope_scaling=None
    )
    windows = gguf_settings.pattern_windows(num_layers, settings.take("attention.sliding_window", None), 6)
    ffn = gguf_settings.read_mlp(settings, Activation.GELU)
    mixers = [
        attention if window is None else dataclasses.replace(local, window=window) for window in windows
    ]
    return gguf_settings.read_decoder(
        settings,
        [BlockConfig(mixer=mixer, ffn=ffn, norm=NormPlacement.SANDWICH) for mixer in mixers],
        norm_kind=NormKind.CENTERED_RMS,
        embed_multiplier=settings.take("embedding_length") ** 0.5,
        logit_softcap=float(softcap) if softcap else None,
    )


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_biases(attention, Biases.NONE)
    gguf_settings.check_named_scale(model, attention, LARGEST)
    mixers = attentions(model)
    local = next((mixer for mixer in mixers if mixer.window is not None), None)
    full = next((mixer for mixer in mixers if mixer.window is None), local)
    assert full is not None, "a model has layers"
    extra: dict[str, Any] = (
        {} if model.logit_softcap is None else {"final_logit_softcapping": model.logit_softcap}
    )
    if local is not None:
        extra |= {"attention.sliding_window": local.window, "rope.freq_base_swa": local.rope_base}
    return {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(full),
        **gguf_settings.write_mlp(ffn),
        **extra,
    }


GGUF = Family(architecture="gemma3", read=read_gguf, write=write_gguf, tensor_map=gemma2.GGUF_TENSOR_MAP)
