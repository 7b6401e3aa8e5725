"""Conversion of GGUF metadata shared by families, in both directions.

A reader returns what llama.cpp computes, including constants in its code. Keys lack the architecture's
prefix. Some settings follow from the tensors, but are passed like metadata: `vocab_size` and `has_output`;
`qkv_bias`, `output_bias` and `ffn_bias`; and the arrays `rope_freqs`, `rope_factors_long` and
`rope_factors_short`, which divide frequencies.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from slmjax.config import ConfigError
from slmjax.convert.family import Inexpressible, attentions, check_whole_rotation, expect_kind
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig, stack_of
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.ffn.moe import MoeConfig
from slmjax.models.mixers.attention import AttentionConfig, Biases
from slmjax.models.rope import LinearScaling, Llama3Scaling, LongScaling, RopeScaling, YarnScaling

# Widths are ignored only after a family has read those that apply to it.
IGNORED = ("rope.scaling.finetuned", "attention.causal", "feed_forward_length", "expert_feed_forward_length")
PLAIN_SCALINGS = (LinearScaling, YarnScaling)  # stored in the metadata; the others are tensors
SCALINGS = ("none", "linear", "yarn", "longrope")  # rope.scaling.type
FAST_TURNS = 32.0  # defaults of YaRN
SLOW_TURNS = 1.0


# Models -----------------------------------------------------------------------------------------------------
def read_decoder(settings: Settings, blocks: Sequence[BlockConfig], **more: Any) -> ModelConfig:
    """Read the model around its layers; `more` are fields of the `ModelConfig` set by the family."""
    settings.ignore(*IGNORED)
    # Families with LayerNorm have another key for it.
    eps = (
        {}
        if "norm_eps" in more
        else {"norm_eps": shortest(settings.take("attention.layer_norm_rms_epsilon"))}
    )
    return ModelConfig(
        embed_dim=settings.take("embedding_length"),
        stack=stack_of(blocks),
        vocab_size=settings.take("vocab_size"),
        head=HeadKind.UNTIED if settings.take("has_output", False) else HeadKind.TIED,
        context_length=settings.take("context_length"),
        **eps,
        **more,
    )


def write_decoder(model: ModelConfig) -> dict[str, Any]:
    """Write the keys of `read_decoder`, and the number of layers."""
    return {
        "block_count": model.num_layers,
        "context_length": model.context_length,
        "embedding_length": model.embed_dim,
        # Rounded as the file does, so that the value read back is compared with the same number.
        "attention.layer_norm_rms_epsilon": float(np.float32(model.norm_eps)),
        "vocab_size": model.known_vocab_size,
        "has_output": model.head is HeadKind.UNTIED,
    }


def shortest(value: float) -> float:
    """Return the shortest decimal number that rounds to this float32."""
    # 1e-5 in a config is 9.9999997e-06 in float32; NumPy prints the shortest number that restores it.
    return float(str(np.float32(value)))


# Attention --------------------------------------------------------------------------------------------------
def read_attention(settings: Settings, *, is_hybrid: bool = False, **more: Any) -> AttentionConfig:
    """Read heads and rotary positions.

    Args:
      is_hybrid: whether there are layers without attention, which `has_attention` reads.
      more: fields of the `AttentionConfig` set by the family.
    """
    heads = settings.take("attention.head_count")
    # Files of models without grouped queries may leave the key out.
    kv_heads = settings.take("attention.head_count_kv", settings.take("attention.head_count"))
    if is_hybrid and isinstance(kv_heads, list):
        counts = set(kv_heads) - {0}
        kv_heads = counts.pop() if len(counts) == 1 else kv_heads
    # Files of models such as OpenELM have a list with an entry for each layer.
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise ConfigError("attention.head_count differs between layers, which is not supported")
    # llama.cpp's default; the key is only needed if the heads are not together as wide as the model.
    head_dim = settings.take("attention.key_length", settings.take("embedding_length") // heads)
    # Our plain attention has one size for keys and values.
    settings.expect("attention.value_length", head_dim)
    has_qkv_bias = settings.take("qkv_bias", False)
    has_output_bias = settings.take("output_bias", False)
    biases = {
        (False, False): Biases.NONE,
        (True, False): Biases.QKV,
        (False, True): Biases.OUTPUT,
        (True, True): Biases.ALL,
    }[bool(has_qkv_bias), bool(has_output_bias)]
    fields: dict[str, Any] = {"biases": biases} | more
    # Families with learned positions set the base to None, and have no keys of rotary positions.
    if "rope_base" not in more:
        fields = read_rope(settings, head_dim=head_dim) | fields
    return AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **fields)


def write_attention(
    attention: AttentionConfig,
    *,
    scalings: tuple[type[RopeScaling], ...] = PLAIN_SCALINGS,
    is_partial: bool = False,
) -> dict[str, Any]:
    """Write the keys of `read_attention`.

    Args:
      scalings: scalings of rotary positions that llama.cpp supports for this family. It looks for tensors of
        divisors in few families.
      is_partial: whether llama.cpp can rotate only some dims of each head in this family; in others it
        aborts.

    Raises:
      Inexpressible: llama.cpp would compute other angles.
    """
    if attention.rope_base is not None:
        if not is_partial:
            check_whole_rotation(attention)
        if attention.rope_scaling is not None and not isinstance(attention.rope_scaling, scalings):
            names = ", ".join(scaling.__name__ for scaling in scalings)
            raise Inexpressible(
                f"rope_scaling is {type(attention.rope_scaling).__name__}, but llama.cpp supports {names} "
                "for this architecture"
            )
    return {
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "qkv_bias": attention.biases in (Biases.QKV, Biases.ALL),
        "output_bias": attention.biases in (Biases.OUTPUT, Biases.ALL),
        **write_rope(attention),
    }


def has_attention(settings: Settings) -> list[bool]:
    """Return which layers of a hybrid model have attention: those with key-value heads."""
    num_layers = settings.take("block_count")
    counts = settings.take("attention.head_count_kv")
    if not isinstance(counts, list) or len(counts) != num_layers or not any(counts):
        raise ConfigError(
            f"attention.head_count_kv is {counts!r}: a hybrid model has a number for each of its "
            f"{num_layers} layers, 0 for those without attention, and at least one layer with attention"
        )
    return [count > 0 for count in counts]


def write_hybrid_attention(model: ModelConfig, **more: Any) -> dict[str, Any]:
    """Write the keys of `read_attention` and `has_attention`; `more` are arguments of `write_attention`.

    Raises:
      Inexpressible: no layer has attention.
    """
    kinds = [isinstance(block.mixer, AttentionConfig) for block in model.blocks()]
    mixers = (block.mixer for block in model.blocks())
    attention = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    if attention is None:
        raise Inexpressible("at least one layer has attention")
    keys = write_attention(attention, **more)
    return {**keys, "attention.head_count_kv": [attention.kv_heads if kind else 0 for kind in kinds]}


def check_square(model: ModelConfig, attention: AttentionConfig) -> None:
    """Raise Inexpressible unless the heads are together as wide as the model.

    Some of llama.cpp's architectures have one size for both.
    """
    if attention.num_heads * (attention.head_dim or 0) != model.embed_dim:
        raise Inexpressible(
            f"{attention.num_heads} heads of {attention.head_dim} dims must be as wide as the model, "
            f"{model.embed_dim}"
        )


def check_head(model: ModelConfig, supported: HeadKind) -> None:
    """Raise Inexpressible unless the model has the kind of head that llama.cpp expects."""
    if model.head is not supported:
        raise Inexpressible(f"the head is {supported.value!r}, not {model.head.value!r}")


def check_idle_window(model: ModelConfig) -> None:
    """Raise Inexpressible for a window shorter than the context, if llama.cpp supports no windows."""
    for layer, attention in enumerate(attentions(model)):
        # A window as long as the context hides nothing, and may be lost.
        window = attention.window
        if window is not None and window < model.context_length:
            raise Inexpressible(
                f"llama.cpp has no windows for this architecture, but that of layer {layer}, {window}, is "
                "shorter than the context"
            )


def pattern_windows(num_layers: int, window: int | None, period: int) -> list[int | None]:
    """Return the window of each layer: all but the last of every `period` layers have one."""
    return [window if window and layer % period < period - 1 else None for layer in range(num_layers)]


def common_window(model: ModelConfig) -> int | None:
    """Return the window of the first layer that has one; None if none has."""
    return next((attention.window for attention in attentions(model) if attention.window is not None), None)


# Rotary positions -------------------------------------------------------------------------------------------
def read_rope(settings: Settings, *, head_dim: int) -> dict[str, Any]:
    """Return `rope_base`, `rotary_dim` and `rope_scaling`.

    Raises:
      ConfigError: the number of rotated dims is not even and from 2 to `head_dim`.
    """
    # llama.cpp rotates all dims by default.
    rotated = settings.take("rope.dimension_count", head_dim)
    base = float(settings.take("rope.freq_base", 10_000.0))
    if type(rotated) is not int or rotated % 2 or not 2 <= rotated <= head_dim:
        raise ConfigError(
            f"rope.dimension_count is {rotated!r}: dims are rotated in pairs, so it must be even, at least "
            f"2, and at most the dims of a head, {head_dim}"
        )
    scaling = _read_scaling(settings, base, rotated)
    part = None if rotated == head_dim else rotated
    return {"rope_base": shortest(base), "rotary_dim": part, "rope_scaling": scaling}


def _read_scaling(settings: Settings, base: float, rotated: int) -> RopeScaling | None:
    # llama.cpp reads a factor without a type as linear, and applies divisors and the magnitude for any type.
    kind = settings.take("rope.scaling.type", "linear")
    context = settings.take("context_length")
    # A length of 0, and a factor of 0, mean the default.
    original = settings.take("rope.scaling.original_context_length", context) or context
    factor = shortest(settings.take("rope.scaling.factor", 1.0)) or 1.0
    magnitude = shortest(settings.positive("rope.scaling.attn_factor", 1.0))
    if kind not in SCALINGS:
        raise ConfigError(f"rope.scaling.type is {kind!r}; supported are {', '.join(SCALINGS)}")
    # llama.cpp would apply both, which none of our scalings does.
    has_divisors = settings.has("rope_factors_short") or settings.has("rope_freqs")
    if has_divisors and (kind == "yarn" or factor != 1.0):
        raise ConfigError(
            f"divisors of frequencies together with rope.scaling {kind!r} of factor {factor:g} are not "
            "supported"
        )
    if settings.has("rope_factors_short"):
        short, long = (
            tuple(shortest(float(x)) for x in settings.take(f"rope_factors_{name}"))
            for name in ("short", "long")
        )
        return LongScaling(
            short_factors=short, long_factors=long, original_context=original, attention_factor=magnitude
        )
    if kind == "yarn":
        return YarnScaling(
            factor=factor,
            original_context=original,
            fast_turns=shortest(settings.take("rope.scaling.yarn_beta_fast", FAST_TURNS)),
            slow_turns=shortest(settings.take("rope.scaling.yarn_beta_slow", SLOW_TURNS)),
            # llama.cpp multiplies YaRN's own magnitude with the file's `attn_factor`.
            attention_factor=yarn_attention_factor(factor, magnitude),
        )
    if magnitude != 1.0:
        raise ConfigError(
            f"rope.scaling.attn_factor = {magnitude:g} without YaRN or LongRoPE is not supported"
        )
    if settings.has("rope_freqs"):
        return _scaling_of_divisors(np.asarray(settings.take("rope_freqs")), base, rotated, context)
    if kind == "longrope":
        raise ConfigError(
            "rope.scaling.type is 'longrope', but the file has no tensors rope_factors_short and "
            "rope_factors_long"
        )
    return None if kind == "none" or factor == 1.0 else LinearScaling(factor=factor)


def yarn_attention_factor(factor: float, magnitude: float) -> float:
    """Return the factor by which llama.cpp multiplies rotated dims; `magnitude` is that of the file."""
    return magnitude * (1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0)


def _scaling_of_divisors(factors: np.ndarray, base: float, rotated: int, context: int) -> RopeScaling:
    """Return the `Llama3Scaling` with these divisors of frequencies, or a `LongScaling` if there is none."""
    # Released contexts are powers of two; the other bounds have their defaults.
    for exponent in range(3, 21):
        scaling = Llama3Scaling(factor=float(factors.max()), original_context=2**exponent)
        if np.allclose(frequency_divisors(scaling, base, rotated), factors, rtol=1e-6):
            return scaling
    divisors = tuple(float(factor) for factor in factors)
    return LongScaling(short_factors=divisors, long_factors=divisors, original_context=context)


def frequency_divisors(scaling: Llama3Scaling, base: float, rotated: int) -> np.ndarray:
    """Return the divisor of each frequency, float32."""
    frequencies = np.float64(base) ** (-np.arange(0, rotated, 2) / rotated)
    turns = scaling.original_context * frequencies / (2 * math.pi)
    # Llama 3's ramp: 0 for long wavelengths, which are divided by the factor, and 1 for short ones.
    unscaled = np.clip(
        (turns - scaling.low_frequency_factor)
        / (scaling.high_frequency_factor - scaling.low_frequency_factor),
        0,
        1,
    )
    return (1.0 / ((1 - unscaled) / scaling.factor + unscaled)).astype(np.float32)


def write_rope(attention: AttentionConfig) -> dict[str, Any]:
    """Write the keys of `read_rope`."""
    if attention.rope_base is None:
        return {}
    rotated = attention.rotary_dim or attention.head_dim or 0
    keys: dict[str, Any] = {"rope.freq_base": attention.rope_base, "rope.dimension_count": rotated}
    scaling = attention.rope_scaling
    if isinstance(scaling, LinearScaling):
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    elif isinstance(scaling, Llama3Scaling):
        # llama.cpp has no type for Llama 3's scaling: its converter writes the divisors as a tensor.
        keys |= {"rope_freqs": frequency_divisors(scaling, attention.rope_base, rotated)}
    elif isinstance(scaling, LongScaling):
        arrays = {"short": scaling.short_factors, "long": scaling.long_factors}
        keys |= {f"rope_factors_{name}": np.asarray(factors, np.float32) for name, factors in arrays.items()}
        keys |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": scaling.attention_factor}
        keys |= {"rope.scaling.original_context_length": scaling.original_context}
    elif isinstance(scaling, YarnScaling):
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.original_context,
            "rope.scaling.yarn_beta_fast": scaling.fast_turns,
            "rope.scaling.yarn_beta_slow": scaling.slow_turns,
            # Divided by what llama.cpp multiplies with.
            "rope.scaling.attn_factor": scaling.attention_factor / yarn_attention_factor(scaling.factor, 1.0),
        }
    elif scaling is not None:
        raise Inexpressible(f"rope_scaling is {type(scaling).__name__}, which GGUF cannot represent")
    return keys


def check_plain_scale(attention: AttentionConfig) -> None:
    """Raise Inexpressible unless the scale of scores is 1 / sqrt(head_dim)."""
    # Most of llama.cpp's architectures compute this scale and read no key for it.
    usual = (attention.head_dim or 1) ** -0.5
    if attention.scale is not None and not math.isclose(attention.scale, usual, rel_tol=1e-6):
        raise Inexpressible(
            f"scores are multiplied by {usual:g}, 1 / sqrt(head_dim), not by {attention.scale:g}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedSize:
    """A released size that llama.cpp recognises by its number of layers; scores scale by width / heads."""

    name: str
    num_layers: int


def read_named_scale(settings: Settings, size: NamedSize) -> float | None:
    """Return the scale of scores that llama.cpp uses for this size; None for the usual 1 / sqrt(head_dim)."""
    if settings.take("block_count") != size.num_layers:
        return None
    return _named_scale(settings.take("embedding_length"), settings.take("attention.head_count"))


def check_named_scale(model: ModelConfig, attention: AttentionConfig, size: NamedSize) -> None:
    """Raise Inexpressible if llama.cpp would use another scale of scores."""
    if model.num_layers != size.num_layers:
        check_plain_scale(attention)
        return
    scale = (attention.head_dim or 1) ** -0.5 if attention.scale is None else attention.scale
    theirs = _named_scale(model.embed_dim, attention.num_heads)
    if not math.isclose(scale, theirs, rel_tol=1e-6):
        raise Inexpressible(
            f"llama.cpp takes every model of {size.num_layers} layers for {size.name} and multiplies its "
            f"scores by {theirs:g}, 1 / sqrt(width / heads) = 1 / sqrt({model.embed_dim} // "
            f"{attention.num_heads}), but this model has {scale:g}. Export with --to hf, or train with "
            f"another number of layers or the scale {theirs:g}"
        )


def _named_scale(width: int, num_heads: int) -> float:
    # Integer division, as in llama.cpp's code.
    return (width // num_heads) ** -0.5


# Feed-forward layers ----------------------------------------------------------------------------------------
def read_mlp(settings: Settings, activation: Activation = Activation.SILU, **more: Any) -> MlpConfig:
    """Read a gated MLP, with the activation that llama.cpp uses for this family."""
    fields = {"bias": settings.take("ffn_bias", False)} | more
    return MlpConfig(hidden_dim=settings.take("feed_forward_length"), activation=activation, **fields)


def write_mlp(ffn: Any, *, has_bias: bool = False) -> dict[str, Any]:
    """Write the keys of `read_mlp`. Raises Inexpressible for biases unless `has_bias`: llama.cpp has them."""
    mlp = expect_kind(ffn, MlpConfig, "a feed-forward layer")
    if mlp.bias and not has_bias:
        raise Inexpressible("feed-forward layers have no biases")
    return {"feed_forward_length": mlp.hidden_dim, "ffn_bias": mlp.bias}


def check_biases(attention: AttentionConfig, supported: Biases) -> None:
    """Raise Inexpressible unless attention has the biases that llama.cpp expects."""
    if attention.biases is not supported:
        raise Inexpressible(f"biases of attention are {supported.value!r}, not {attention.biases.value!r}")


def read_moe(settings: Settings, *, width: str = "expert_feed_forward_length", **more: Any) -> MoeConfig:
    """Read experts whose weights sum to one."""
    return MoeConfig(
        num_experts=settings.take("expert_count"),
        num_selected=settings.take("expert_used_count"),
        hidden_dim=settings.take(width),
        **more,
    )


def write_moe(ffn: Any) -> dict[str, Any]:
    """Write the keys of `read_moe`, with the width under both of its names."""
    moe = expect_kind(ffn, MoeConfig, "a feed-forward layer")
    return {
        "expert_count": moe.num_experts,
        "expert_used_count": moe.num_selected,
        "expert_feed_forward_length": moe.hidden_dim,
        # llama.cpp's architectures differ in which of the two they read.
        "feed_forward_length": moe.hidden_dim,
    }
