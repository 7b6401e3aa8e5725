"""RecurrentGemma: two layers with a gated linear recurrence to each layer of windowed attention."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from slmjax.config import ConfigError
from slmjax.convert.family import (
    Arrays,
    Family,
    Rule,
    TensorMap,
    convolution,
    expect_kind,
    linear,
    norm,
    same,
)
from slmjax.convert.hf.settings import (
    layer_kinds,
    mixer_of_kind,
    read_activation,
    read_attention,
    read_decoder,
    rope_fields,
    rope_table,
    rotary_factor,
    write_activation,
    write_attention,
    write_decoder,
)
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.layers import NormKind
from slmjax.models.mixers.attention import AttentionConfig, Biases
from slmjax.models.mixers.griffin import RgLruConfig

RECURRENT = "recurrent"
ATTENTION = "attention"

# Defaults of keys that a config.json may leave out.
DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2560,
    "intermediate_size": 7680,
    "num_hidden_layers": 26,
    "num_attention_heads": 10,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "block_types": [RECURRENT, RECURRENT, ATTENTION],
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
}
# A constant of the library's code.
ROTARY_FACTOR = 0.5
# The library knows no limit, as states do not grow. Releases were trained with this.
CONTEXT_LENGTH = 8192


def read(settings: Settings) -> ModelConfig:
    """Read a config.json as a `ModelConfig`."""
    # Of initial values, and a former name of block_types that the library no longer reads.
    settings.ignore("w_init_variance_scale", "final_w_init_variance_scale", "_block_types")
    settings.expect("embeddings_scale_by_sqrt_dim", True)
    # The recurrence's gate has it too, and ours has this function alone.
    settings.expect("hidden_activation", "gelu_pytorch_tanh", "gelu_new")
    width = settings.positive("hidden_size")
    ffn = MlpConfig(
        # The key counts both projections into the hidden layer.
        hidden_dim=settings.positive("intermediate_size") // 2,
        activation=read_activation(settings, "hidden_activation"),
        bias=True,
    )
    mixers = {RECURRENT: _read_recurrence(settings), ATTENTION: _read_attention(settings)}
    return read_decoder(
        settings,
        [BlockConfig(mixer=mixers[kind], ffn=ffn) for kind in _read_kinds(settings)],
        norm_kind=NormKind.CENTERED_RMS,
        context_length=settings.positive("max_position_embeddings", CONTEXT_LENGTH),
        embed_multiplier=embed_multiplier(width),
        logit_softcap=float(settings.positive("logits_soft_cap")),
    )


def embed_multiplier(width: int) -> float:
    """Return the factor of embeddings, which the library rounds to bfloat16."""
    return float(np.float32(width**0.5).astype(jnp.bfloat16))


def _read_kinds(settings: Settings) -> list[str]:
    """Read the kind of each layer: `block_types` is repeated."""
    pattern = list(settings.take("block_types"))
    if unknown := [kind for kind in pattern if kind not in (RECURRENT, ATTENTION)]:
        raise ConfigError(
            f"config.json: block_types has {unknown[0]!r}; supported are {RECURRENT} and {ATTENTION}"
        )
    if not pattern:
        raise ConfigError(f"config.json: block_types is empty: name {RECURRENT} or {ATTENTION} layers")
    return [pattern[layer % len(pattern)] for layer in range(settings.take("num_hidden_layers"))]


def _read_attention(settings: Settings) -> AttentionConfig:
    # The library computes it, whatever the key says.
    settings.expect("head_dim", settings.positive("hidden_size") // settings.positive("num_attention_heads"))
    inner = rope_table(settings)
    rope = rope_fields(
        inner,
        base=settings.positive("rope_theta"),
        fraction=settings.take("partial_rotary_factor", ROTARY_FACTOR),
        context=CONTEXT_LENGTH,
    )
    inner.finish()
    if rope["rope_scaling"] is not None:
        raise ConfigError("config.json: RecurrentGemma supports no scaling of rotary positions")
    return read_attention(
        settings,
        window=settings.positive("attention_window_size"),
        biases=Biases.ALL if settings.take("attention_bias") else Biases.OUTPUT,
        **rope,
    )


def _read_recurrence(settings: Settings) -> RgLruConfig:
    return RgLruConfig(
        inner_dim=settings.positive("lru_width", settings.positive("hidden_size")),
        num_blocks=settings.positive("num_attention_heads"),
        width=settings.positive("conv1d_width"),
        bias=True,
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """Write a model as the keys of a config.json."""
    blocks = list(model.blocks())
    mlp = expect_kind(blocks[0].ffn, MlpConfig, "a feed-forward layer")
    keys = {
        **write_decoder(model),
        "intermediate_size": 2 * mlp.hidden_dim,
        "hidden_activation": write_activation(mlp.activation),
        "logits_soft_cap": model.logit_softcap,
        "block_types": layer_kinds(model, {ATTENTION: AttentionConfig, RECURRENT: RgLruConfig}),
    }
    # A kind that no layer has leaves its keys out.
    if (recurrence := mixer_of_kind(model, RgLruConfig)) is not None:
        keys |= {
            "lru_width": recurrence.inner_dim,
            "conv1d_width": recurrence.width,
            "num_attention_heads": recurrence.num_blocks,
        }
    if (attention := mixer_of_kind(model, AttentionConfig)) is not None:
        keys |= {
            **write_attention(attention),
            "attention_window_size": attention.window,
            "attention_bias": attention.biases is Biases.ALL,
            # Written if all dims are rotated too, which is not the library's default.
            "partial_rotary_factor": rotary_factor(attention.rotary_dim or 0, attention.head_dim or 1),
        }
    return {"model_type": "recurrent_gemma", **keys}


# Tensors ----------------------------------------------------------------------------------------------------
def by_block(ours: str, theirs: str, *, num_blocks: int) -> Rule:
    """Rule for a vector that is a row for each block of channels."""

    def write(arrays: Arrays) -> Arrays:
        return [arrays[0].reshape(num_blocks, -1)]

    return Rule(ours=(ours,), theirs=(theirs,), read=lambda arrays, _: [arrays[0].reshape(-1)], write=write)


def tensor_map(model: ModelConfig) -> TensorMap:
    """Return the tensor map of a model, which depends on its number of blocks of channels."""
    recurrence = mixer_of_kind(model, RgLruConfig)
    num_blocks = 1 if recurrence is None else recurrence.num_blocks
    recurrent = (
        *linear("mixer/inner", "temporal_block.linear_x"),
        *linear("mixer/gate", "temporal_block.linear_y"),
        *linear("mixer/output", "temporal_block.linear_out"),
        convolution(("mixer/conv_taps",), "temporal_block.conv_1d.weight"),
        same("mixer/conv_bias", "temporal_block.conv_1d.bias"),
        same("mixer/input_blocks", "temporal_block.rg_lru.input_gate_weight"),
        by_block("mixer/input_bias", "temporal_block.rg_lru.input_gate_bias", num_blocks=num_blocks),
        same("mixer/decay_blocks", "temporal_block.rg_lru.recurrent_gate_weight"),
        by_block("mixer/decay_bias", "temporal_block.rg_lru.recurrent_gate_bias", num_blocks=num_blocks),
        same("mixer/decay_rates", "temporal_block.rg_lru.recurrent_param"),
    )
    attention = tuple(
        rule
        for name, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))
        for rule in linear(f"mixer/{name}", f"temporal_block.{theirs}_proj")
    )

    def layer(block: BlockConfig) -> tuple[Rule, ...]:
        mixer = attention if isinstance(block.mixer, AttentionConfig) else recurrent
        return (*AROUND_MIXER, *mixer, *MLP)

    return TensorMap(around=AROUND, layer=layer)


AROUND = (
    same("embed/table", "model.embed_tokens.weight"),
    *norm("final_norm", "model.final_norm"),
    same("head/weight", "lm_head.weight"),
)
AROUND_MIXER = (*norm("mixer_norm", "temporal_pre_norm"), *norm("ffn_norm", "channel_pre_norm"))
MLP = (
    *linear("ffn/gate", "mlp_block.gate_proj"),
    *linear("ffn/up", "mlp_block.up_proj"),
    *linear("ffn/down", "mlp_block.down_proj"),
)
HF = Family(
    architecture="RecurrentGemmaForCausalLM",
    read=read,
    write=write,
    defaults=DEFAULTS,
    tensor_map=tensor_map,
)
