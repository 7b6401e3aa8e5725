"""Phi-3 and Phi-4-mini: joined projections, some dims of a head rotated, LongRoPE."""

from typing import Any

from slmjax.convert.family import Family, Inexpressible, TensorMap, first_block, joined, linear
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.settings import (
    LONG_TYPES,
    read_attention,
    read_decoder,
    read_mlp,
    read_rope,
    write_attention,
    write_decoder,
    write_mlp,
)
from slmjax.convert.hf.tensors import EMBEDDING, PRE_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.mixers.attention import Biases
from slmjax.models.rope import LongScaling

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 32_064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    # Options that released models leave at these values.
    neutral = {
        "attention_bias": False,
        "lm_head_bias": False,
        "mlp_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    }
    for key, value in neutral.items():
        settings.expect(key, value)
    # The first releases called LongRoPE "yarn".
    rope = read_rope(settings, is_partial=True, long_types=(*LONG_TYPES, "yarn"))
    attention = read_attention(settings, window=settings.optional("sliding_window"), **rope)
    block = BlockConfig(mixer=attention, ffn=read_mlp(settings))
    return read_decoder(settings, [block] * settings.take("num_hidden_layers"))


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    scaling = attention.rope_scaling
    # Without LongRoPE the key has no effect, and repeats the context length.
    original = model.context_length
    if scaling is not None and not isinstance(scaling, LongScaling):
        raise Inexpressible(f"its angles are unscaled or scaled by LongRoPE, not by {type(scaling).__name__}")
    if scaling is not None:
        original = scaling.original_context
        # The library computes the number of factors from width / heads.
        if attention.num_heads * (attention.head_dim or 0) != model.embed_dim:
            raise Inexpressible("with LongRoPE, the dims of a head must be width / heads")
    more = {"sliding_window": attention.window, "original_max_position_embeddings": original}
    return {
        "model_type": "phi3",
        **write_decoder(model),
        **write_attention(attention),
        **write_mlp(ffn),
        **more,
    }


LAYER = (
    *PRE_NORMS,
    joined(("mixer/query/weight", "mixer/key/weight", "mixer/value/weight"), "self_attn.qkv_proj.weight"),
    *linear("mixer/output", "self_attn.o_proj"),
    joined(("ffn/gate/weight", "ffn/up/weight"), "mlp.gate_up_proj.weight"),
    *linear("ffn/down", "mlp.down_proj"),
)
HF = Family(
    architecture="Phi3ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=LAYER),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`.

    Unlike llama.cpp, we use the window of the file. llama.cpp uses the long factors whenever its context is
    longer than the original one; here the length of a document decides.
    """
    attention = gguf_settings.read_attention(
        settings, window=settings.take("attention.sliding_window", 0) or None
    )
    block = BlockConfig(mixer=attention, ffn=gguf_settings.read_mlp(settings))
    return gguf_settings.read_decoder(settings, [block] * settings.take("block_count"))


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_biases(attention, Biases.NONE)
    gguf_settings.check_plain_scale(attention)
    gguf_settings.check_square(model, attention)
    gguf_settings.check_idle_window(model)
    heads = gguf_settings.write_attention(
        attention, scalings=(*gguf_settings.PLAIN_SCALINGS, LongScaling), is_partial=True
    )
    keys = {**gguf_settings.write_decoder(model), **heads, **gguf_settings.write_mlp(ffn)}
    return {**keys, "attention.sliding_window": attention.window or 0}


GGUF_LAYER = (
    *gguf_tensors.PRE_NORMS,
    *gguf_tensors.JOINED_ATTENTION,
    # llama.cpp finds the gate in the first half of this tensor.
    joined(("ffn/gate/weight", "ffn/up/weight"), "ffn_up.weight"),
    *linear("ffn/down", "ffn_down"),
)
GGUF = Family(
    architecture="phi3", read=read_gguf, write=write_gguf, tensor_map=gguf_tensors.tensor_map(*GGUF_LAYER)
)
