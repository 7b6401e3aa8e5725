"""OLMo Hybrid: Gated DeltaNet with norms before layers, and OLMo 3's attention with norms after them.

Attention has no positions in releases.
"""

from typing import Any

import numpy as np

from slmjax.convert.family import Family, Inexpressible, Rule, TensorMap, convolution, linear, norm
from slmjax.convert.hf import delta_net_settings
from slmjax.convert.hf.delta_net_settings import (
    FULL,
    LINEAR,
    TAPS,
    read_delta_net,
    read_layer_kinds,
)
from slmjax.convert.hf.settings import (
    mixer_of_kind,
    read_attention,
    read_biases,
    read_decoder,
    read_mlp,
    read_rope,
    rope_table,
    write_decoder,
    write_mlp,
)
from slmjax.convert.hf.tensors import ATTENTION, EMBEDDING, GATED_MLP, POST_NORMS
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig, NormPlacement
from slmjax.models.mixers.attention import AttentionConfig, QkNorm
from slmjax.models.mixers.delta_net import GatedDeltaNetConfig

# Fixed in the library's code, whatever rms_norm_eps is.
HEAD_NORM_EPS = 1e-5

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 100_352,
    "hidden_size": 3840,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 30,
    "hidden_act": "silu",
    "max_position_embeddings": 65_536,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
    "rope_theta": 10_000.0,
}


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    # The range of initial values.
    settings.ignore(
        "linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"
    )
    attention = read_attention(
        settings, qk_norm=QkNorm.ALL_HEADS, biases=read_biases(settings), **_read_positions(settings)
    )
    ffn = read_mlp(settings)
    blocks = {
        LINEAR: BlockConfig(mixer=_read_delta_net(settings), ffn=ffn),
        FULL: BlockConfig(mixer=attention, ffn=ffn, norm=NormPlacement.POST),
    }
    num_layers = settings.take("num_hidden_layers")
    default = [FULL if layer % 4 == 3 else LINEAR for layer in range(num_layers)]
    # The library makes sure that there is one.
    if FULL not in default:
        default[-1] = FULL
    return read_decoder(settings, [blocks[kind] for kind in read_layer_kinds(settings, default=default)])


def _read_positions(settings: Settings) -> dict[str, Any]:
    """Return `rope_base` and `rope_scaling`; a null as `rope_theta` means that there are no positions."""
    outside = settings.take("rope_theta", null=None)
    base = rope_table(settings).take("rope_theta", outside, null=None)
    return {"rope_base": None} if base is None else read_rope(settings)


def _read_delta_net(settings: Settings) -> GatedDeltaNetConfig:
    # Heads are those of attention, and all keys together have three quarters of the model's width.
    num_heads = settings.positive("num_attention_heads")
    num_key_heads = settings.positive("linear_num_key_heads", num_heads)
    key_dim = settings.positive(
        "linear_key_head_dim", int(0.75 * settings.positive("hidden_size") / num_key_heads)
    )
    default = {
        "linear_num_key_heads": num_key_heads,
        "linear_num_value_heads": num_heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": 2 * key_dim,
    }
    return read_delta_net(
        settings,
        default=default,
        negative_eigenvalues=settings.take("linear_allow_neg_eigval"),
        head_norm_eps=HEAD_NORM_EPS,
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    attention = mixer_of_kind(model, AttentionConfig)
    delta_net = mixer_of_kind(model, GatedDeltaNetConfig)
    if attention is None or delta_net is None:
        raise Inexpressible("it has layers of attention and of Gated DeltaNet")
    keys = {
        **write_decoder(model),
        **delta_net_settings.write_layers(model),
        **write_mlp(next(model.blocks()).ffn),
        "linear_allow_neg_eigval": delta_net.negative_eigenvalues,
    }
    # Absent, it would stand for the library's default.
    if attention.rope_base is None:
        keys["rope_theta"] = None
    return {"model_type": "olmo_hybrid", **keys}


# Tensors ----------------------------------------------------------------------------------------------------
def convolutions() -> Rule:
    """Rule for the taps of queries, keys and values, a tensor for each.

    transformers holds them as one tensor, and saves thirds of it, whatever the widths of the three are.
    """
    fused = convolution(TAPS, "")
    names = tuple(f"linear_attn.{name}_conv1d.weight" for name in ("q", "k", "v"))
    return Rule(
        ours=TAPS,
        theirs=names,
        read=lambda arrays, shapes: fused.read([np.concatenate(arrays)], shapes),
        write=lambda arrays: [array.T[:, None, :] for array in arrays],
    )


DELTA_NET = (
    *linear("mixer/heads/query", "linear_attn.q_proj"),
    *linear("mixer/heads/key", "linear_attn.k_proj"),
    *linear("mixer/heads/value", "linear_attn.v_proj"),
    *linear("mixer/heads/strength", "linear_attn.b_proj"),
    *linear("mixer/decay", "linear_attn.a_proj"),
    *linear("mixer/gate", "linear_attn.g_proj"),
    *linear("mixer/output", "linear_attn.o_proj"),
    *norm("mixer/norm", "linear_attn.o_norm"),
    convolutions(),
    *delta_net_settings.TENSORS,
    *norm("mixer_norm", "attention_layer_norm"),
    *norm("ffn_norm", "feedforward_layer_norm"),
)
# transformers has one name in both kinds of layers, and saves another than releases have.
OTHER_NAMES = (
    ("attention_layer_norm", "input_layernorm"),
    ("feedforward_layer_norm", "post_attention_layernorm"),
    ("post_attention_layernorm", "feedforward_layer_norm"),
)


def layer_rules(block: BlockConfig) -> tuple[Rule, ...]:
    """Return the rules of a layer, which depend on its mixer."""
    if isinstance(block.mixer, GatedDeltaNetConfig):
        return (*DELTA_NET, *GATED_MLP)
    return (*POST_NORMS, *ATTENTION, *GATED_MLP)


HF = Family(
    architecture="OlmoHybridForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=TensorMap(around=EMBEDDING, layer=layer_rules, other_names=OTHER_NAMES),
)
