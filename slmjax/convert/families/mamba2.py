"""Mamba-2: recurrent layers alone, without feed-forward layers and without attention."""

import math
from typing import Any

from slmjax.convert.family import Family, Inexpressible, TensorMap, expect_kind, norm, same
from slmjax.convert.gguf import mamba2_settings as gguf_mamba2
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.mamba2_settings import mamba2_rules, read_mamba2, write_expansion, write_mamba2
from slmjax.convert.hf.settings import IGNORED
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig, stack_of
from slmjax.models.mixers.mamba2 import Mamba2Config

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "num_heads": 128,
    "head_dim": 64,
    "vocab_size": 32_768,
    "hidden_size": 4096,
    "state_size": 128,
    "num_hidden_layers": 64,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_limit": [0.0, math.inf],
    "tie_word_embeddings": False,
}
NAMES = {
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "state_dim": "state_size",
    "num_groups": "n_groups",
    "conv_width": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "input_bias": "use_bias",
}
# The length of the texts that the models of the paper were trained with.
CONTEXT = 2048
# Keys of releases that the class in transformers does not read: its gate always comes before a norm.
UNREAD = (
    "norm_before_gate",
    "rms_norm",
    "time_step_init_scheme",
    "time_step_scale",
    "time_step_rank",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "chunk_size",
)


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    settings.ignore(*IGNORED, *UNREAD)
    # The activation of the convolutions and of the gate.
    settings.expect("hidden_act", "silu")
    width = settings.positive("hidden_size")
    inner_dim = settings.positive("expand") * width
    settings.expect("intermediate_size", inner_dim, None)
    mixer = read_mamba2(settings, inner_dim=inner_dim, names=NAMES, output_bias=settings.take("use_bias"))
    if not settings.has("max_position_embeddings"):
        settings.notes.append(
            f"config.json has no max_position_embeddings, as a recurrent model has no longest text: "
            f"context_length is {CONTEXT}"
        )
    return ModelConfig(
        embed_dim=width,
        stack=stack_of([BlockConfig(mixer=mixer, ffn=None)] * settings.take("num_hidden_layers")),
        context_length=settings.positive("max_position_embeddings", CONTEXT),
        vocab_size=settings.positive("vocab_size"),
        norm_eps=settings.take("layer_norm_epsilon"),
        head=HeadKind.TIED if settings.take("tie_word_embeddings") else HeadKind.UNTIED,
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    mixer = expect_kind(next(model.blocks()).mixer, Mamba2Config, "layer 0's mixer")
    if mixer.input_bias != mixer.output_bias:
        raise Inexpressible("either both projections of a Mamba-2 layer have biases, or neither has")
    return {
        "model_type": "mamba2",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "vocab_size": model.known_vocab_size,
        # No key of the library, which keeps it: without it the length would be lost.
        "max_position_embeddings": model.context_length,
        "tie_word_embeddings": model.head is HeadKind.TIED,
        "layer_norm_epsilon": model.norm_eps,
        "hidden_act": "silu",
        "expand": write_expansion(mixer, model.embed_dim),
        **write_mamba2(mixer, names=NAMES),
    }


HF = Family(
    architecture="Mamba2ForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(
        around=(
            same("embed/table", "backbone.embeddings.weight"),
            *norm("final_norm", "backbone.norm_f"),
            same("head/weight", "lm_head.weight"),
        ),
        layer=(*norm("mixer_norm", "norm"), *mamba2_rules("mixer")),
        prefix="backbone.layers.{i}.",
        base="backbone.",
    ),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    settings.ignore("attention.head_count", "attention.head_count_kv")
    block = BlockConfig(mixer=gguf_mamba2.read_mamba2(settings), ffn=None)
    return gguf_settings.read_decoder(settings, [block] * settings.take("block_count"))


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    mixer = expect_kind(next(model.blocks()).mixer, Mamba2Config, "layer 0's mixer")
    # llama.cpp requires these keys, and does not use them here.
    unused = {"feed_forward_length": 0, "attention.head_count": 0}
    return {**gguf_settings.write_decoder(model), **gguf_mamba2.write_mamba2(mixer), **unused}


def gguf_tensor_map(model: ModelConfig) -> TensorMap:
    """Return the tensor map of a model, which depends on the groups of its heads."""
    mixer = expect_kind(next(model.blocks()).mixer, Mamba2Config, "layer 0's mixer")
    rules = gguf_mamba2.mamba2_rules(mixer.num_groups)
    return gguf_tensors.tensor_map(*norm("mixer_norm", "attn_norm"), *rules)


GGUF = Family(architecture="mamba2", read=read_gguf, write=write_gguf, tensor_map=gguf_tensor_map)
