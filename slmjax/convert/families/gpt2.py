"""GPT-2: learned positions, LayerNorm, biases, an MLP without gate; its matrices are [in, out] like ours."""

from typing import Any

import numpy as np

from slmjax.convert.family import (
    Arrays,
    Family,
    Inexpressible,
    Rule,
    Shapes,
    TensorMap,
    expect_kind,
    first_block,
    linear,
    norm,
    same,
)
from slmjax.convert.gguf import settings as gguf_settings
from slmjax.convert.gguf import tensors as gguf_tensors
from slmjax.convert.hf.settings import IGNORED, check_width, read_activation, write_activation
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig, stack_of
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, Biases

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 50_257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    settings.ignore(
        *IGNORED,
        *SUMMARY_KEYS,
        "attn_pdrop",
        "n_ctx",
        "reorder_and_upcast_attn",
        "task_specific_params",
        *OLD_KEYS,
    )
    # Options that change the scores, or add attention to a second input.
    settings.expect("scale_attn_weights", True)
    settings.expect("scale_attn_by_inverse_layer_idx", False)
    settings.expect("add_cross_attention", False)
    width = settings.positive("n_embd")
    context = settings.positive("n_positions")
    activation = read_activation(settings, "activation_function")
    # A null for the inner width means four times the model's.
    ffn = MlpConfig(
        hidden_dim=settings.take("n_inner", 4 * width), activation=activation, gated=False, bias=True
    )
    block = BlockConfig(
        mixer=AttentionConfig(num_heads=settings.positive("n_head"), rope_base=None, biases=Biases.ALL),
        ffn=ffn,
    )
    return ModelConfig(
        embed_dim=width,
        stack=stack_of([block] * settings.take("n_layer")),
        context_length=context,
        learned_positions=context,
        vocab_size=settings.take("vocab_size"),
        norm_kind=NormKind.LAYER,
        norm_eps=settings.take("layer_norm_epsilon"),
        head=HeadKind.TIED if settings.take("tie_word_embeddings") else HeadKind.UNTIED,
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention, ffn = first_block(model)
    check_width(model, attention.num_heads)
    mlp = expect_kind(ffn, MlpConfig, "a feed-forward layer")
    if model.learned_positions != model.context_length:
        raise Inexpressible("positions are learned, with a row for each position of the context")
    return {
        "model_type": "gpt2",
        "n_embd": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": attention.num_heads,
        "n_positions": model.context_length,
        "n_inner": mlp.hidden_dim,
        "activation_function": write_activation(mlp.activation),
        "vocab_size": model.known_vocab_size,
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.head is HeadKind.TIED,
    }


def concatenated(ours: tuple[str, ...], theirs: str) -> Rule:
    """Rule for several parameters concatenated along the last dim."""

    def read_parts(arrays: Arrays, shapes: Shapes) -> Arrays:
        return np.split(arrays[0], np.cumsum([shape[-1] for shape in shapes])[:-1], axis=-1)

    return Rule(
        ours=ours, theirs=(theirs,), read=read_parts, write=lambda arrays: [np.concatenate(arrays, axis=-1)]
    )


def untransposed_linear(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Rules for a linear layer whose matrix is [in, out] in both."""
    return same(f"{ours}/weight", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")


# Keys of early releases and of the head for classification: without effect on the language model.
OLD_KEYS = ("n_special", "predict_special_tokens", "output_past", "_num_labels")
SUMMARY_KEYS = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)
AROUND = (
    same("embed/table", "transformer.wte.weight"),
    same("positions/weight", "transformer.wpe.weight"),
    *norm("final_norm", "transformer.ln_f"),
    same("head/weight", "lm_head.weight"),
)
LAYER = (
    *norm("mixer_norm", "ln_1"),
    concatenated(("mixer/query/weight", "mixer/key/weight", "mixer/value/weight"), "attn.c_attn.weight"),
    concatenated(("mixer/query/bias", "mixer/key/bias", "mixer/value/bias"), "attn.c_attn.bias"),
    *untransposed_linear("mixer/output", "attn.c_proj"),
    *norm("ffn_norm", "ln_2"),
    *untransposed_linear("ffn/up", "mlp.c_fc"),
    *untransposed_linear("ffn/down", "mlp.c_proj"),
)
HF = Family(
    architecture="GPT2LMHeadModel",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(
        around=AROUND,
        layer=LAYER,
        prefix="transformer.h.{i}.",
        base="transformer.",
        # Buffers with the causal mask, which old files include.
        ignored=(r"(.*\.)?attn\.(bias|masked_bias)",),
    ),
)


# GGUF -------------------------------------------------------------------------------------------------------
def read_gguf(settings: Settings) -> ModelConfig:
    """Read GGUF metadata as a `ModelConfig`."""
    attention = gguf_settings.read_attention(settings, rope_base=None, biases=Biases.ALL)
    ffn = gguf_settings.read_mlp(settings, Activation.GELU, gated=False, bias=True)
    return gguf_settings.read_decoder(
        settings,
        [BlockConfig(mixer=attention, ffn=ffn)] * settings.take("block_count"),
        norm_kind=NormKind.LAYER,
        norm_eps=gguf_settings.shortest(settings.take("attention.layer_norm_epsilon")),
        learned_positions=settings.take("context_length"),
    )


def write_gguf(model: ModelConfig) -> dict[str, Any]:
    """Write a model as GGUF metadata."""
    attention, ffn = first_block(model)
    gguf_settings.check_biases(attention, Biases.ALL)
    # The architecture has no key for the width of a head.
    gguf_settings.check_square(model, attention)
    gguf_settings.check_plain_scale(attention)
    keys = {
        **gguf_settings.write_decoder(model),
        **gguf_settings.write_attention(attention),
        **gguf_settings.write_mlp(ffn, has_bias=True),
    }
    # LayerNorm has a key of its own.
    eps = keys.pop("attention.layer_norm_rms_epsilon")
    return {**keys, "attention.layer_norm_epsilon": eps}


GGUF_LAYER = (
    *gguf_tensors.PRE_NORMS,
    *gguf_tensors.JOINED_ATTENTION,
    *linear("ffn/up", "ffn_up"),
    *linear("ffn/down", "ffn_down"),
)
GGUF_AROUND = (*gguf_tensors.AROUND, same("positions/weight", "position_embd.weight"))
GGUF = Family(
    architecture="gpt2",
    read=read_gguf,
    write=write_gguf,
    tensor_map=gguf_tensors.tensor_map(*GGUF_LAYER, around=GGUF_AROUND),
)
