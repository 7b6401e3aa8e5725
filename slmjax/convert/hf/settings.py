"""The vocabulary that most config.json files share, in both directions: heads, rotary positions, windows,
norms, tables.

Readers take keys from `Settings` and give configs of ours; writers give keys. What a writer cannot say it may
leave out: the exporter reads back what was written, and refuses what is not the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slmjax.config import ConfigError
from slmjax.convert.family import Inexpressible, attentions, expect_kind, lookup
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig, stack_of
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.mixers.attention import AttentionConfig, Biases
from slmjax.models.rope import LinearScaling, Llama3Scaling, LongScaling, RopeScaling, YarnScaling

# Keys that say how a model was trained or is to be run, not what it computes.
IGNORED = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "resid_pdrop",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "is_llama_config",
    "sep_token_id",
    "unk_token_id",
)

LONG_TYPES = ("longrope", "su")  # what LongRoPE is called
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU,
    "gelu_new": Activation.GELU,
    "gelu": Activation.GELU_EXACT,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
}
ACTIVATION_NAMES = {value: name for name, value in reversed(ACTIVATIONS.items())}


# Models -----------------------------------------------------------------------------------------------------
def read_decoder(settings: Settings, blocks: Sequence[BlockConfig], **more: Any) -> ModelConfig:
    """The model around its layers; `more` are fields of the `ModelConfig` that this family sets."""
    settings.ignore(*IGNORED)
    settings.expect("rope_interleaved", False)
    head = HeadKind.TIED if settings.take("tie_word_embeddings") else HeadKind.UNTIED
    return ModelConfig(
        embed_dim=settings.positive("hidden_size"),
        stack=stack_of(blocks),
        vocab_size=settings.positive("vocab_size"),
        head=head,
        context_length=settings.positive("max_position_embeddings"),
        norm_eps=settings.take("rms_norm_eps"),
        **more,
    )


def write_decoder(model: ModelConfig) -> dict[str, Any]:
    """The keys that `read_decoder` takes, and the number of layers."""
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "vocab_size": model.known_vocab_size,
        "max_position_embeddings": model.context_length,
        "tie_word_embeddings": model.head is HeadKind.TIED,
        "rms_norm_eps": model.norm_eps,
    }


def check_width(model: ModelConfig, num_heads: int) -> None:
    """Raises Inexpressible for what some families' libraries refuse to load: a width that heads do not
    divide.
    """
    if model.embed_dim % num_heads:
        raise Inexpressible(f"its width, {model.embed_dim}, has to be a multiple of its heads, {num_heads}")


# Attention --------------------------------------------------------------------------------------------------
def read_attention(settings: Settings, *, is_partial: bool = False, **more: Any) -> AttentionConfig:
    """Heads and rotary positions; `more` are fields of the `AttentionConfig` that this family sets.

    Args:
      is_partial: the family's libraries can rotate a part of each head's dims.
    """
    heads = settings.positive("num_attention_heads")
    head_dim = settings.positive("head_dim", settings.positive("hidden_size") // heads)
    kv_heads = settings.positive("num_key_value_heads", heads, null=heads)
    fields = more if "rope_base" in more else {**read_rope(settings, is_partial=is_partial), **more}
    if (factor := fields.pop("partial_rotary_factor", 1.0)) != 1.0:
        fields |= rotated_part(head_dim, factor, base=fields["rope_base"], scaling=fields["rope_scaling"])
    return AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **fields)


def read_biases(settings: Settings) -> Biases:
    """Whether all projections of attention have biases."""
    return Biases.ALL if settings.take("attention_bias") else Biases.NONE


def write_biases(attention: AttentionConfig) -> dict[str, Any]:
    """The key that `read_biases` takes."""
    return {"attention_bias": attention.biases is Biases.ALL}


def write_attention(attention: AttentionConfig) -> dict[str, Any]:
    """The keys that `read_attention` takes."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        **write_rope(attention),
    }


def read_windows(
    settings: Settings, *, num_layers: int, window: int | None, default: Sequence[bool]
) -> list[int | None]:
    """The window of each layer, by `layer_types` where it is given, else by `default`, which says which
    layers have one.
    """
    kinds = settings.take("layer_types", None)
    local = list(default) if kinds is None else [_is_local(kind) for kind in kinds]
    if len(local) != num_layers:
        raise ConfigError(
            f"config.json: layer_types names {len(local)} layers, and num_hidden_layers is {num_layers}"
        )
    if any(local) and window is None:
        raise ConfigError(
            "config.json: layer_types has layers of sliding_attention, and there is no sliding_window"
        )
    return [window if is_local else None for is_local in local]


def _is_local(kind: str) -> bool:
    if kind not in ("sliding_attention", "full_attention"):
        raise ConfigError(
            f"config.json: layer_types has {kind!r}: sliding_attention and full_attention are understood"
        )
    return kind == "sliding_attention"


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types`."""
    windows = [attention.window for attention in attentions(model)]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    # Where no layer has one, some libraries want a number all the same.
    return {
        "sliding_window": next((window for window in windows if window), model.context_length),
        "layer_types": kinds,
    }


# Rotary positions -------------------------------------------------------------------------------------------
def rope_table(settings: Settings, *, default: Mapping[str, Any] | None = None) -> Settings:
    """Return the keys of rotary positions, from either name; as in transformers, `rope_scaling` replaces
    `rope_parameters` whole.

    Args:
      default: the keys where neither is there.
    """
    scaling = settings.take("rope_scaling", None)
    parameters = settings.take("rope_parameters", None)
    if not scaling:
        return settings.nested("rope_parameters", (default or {}) if parameters is None else parameters)
    table = settings.nested("rope_scaling", scaling)
    used = {
        name: scaling.get(name, settings.take(name, None))
        for name in parameters or {}
        if name not in ("rope_type", "type")
    }
    lost = [name for name, value in used.items() if value != parameters[name]]
    if lost:
        settings.notes.append(
            "rope_scaling replaces rope_parameters whole, as in transformers: of the latter, "
            f"{lost[0]} = {parameters[lost[0]]!r} is not used"
        )
    return table


def read_rope(
    settings: Settings,
    *,
    is_partial: bool = False,
    default: Mapping[str, Any] | None = None,
    long_types: Sequence[str] = LONG_TYPES,
) -> dict[str, Any]:
    """Return `rope_base` and `rope_scaling`, from keys beside the others or in a table of their own.

    A `partial_rotary_factor` other than 1 is handed on to `read_attention`, which knows the width of a head.

    Args:
      is_partial: the family's libraries can rotate a part of each head's dims.
      default: the table where there is none.
      long_types: what the family calls LongRoPE.
    """
    if not is_partial:
        settings.expect("partial_rotary_factor", 1.0)
    context = settings.positive("max_position_embeddings")
    original = settings.take("original_max_position_embeddings", None)
    base = settings.positive("rope_theta")
    fraction = settings.take("partial_rotary_factor", 1.0)
    inner = rope_table(settings, default=default)
    if not is_partial:
        inner.expect("partial_rotary_factor", 1.0)
    fields = rope_fields(
        inner, base=base, fraction=fraction, context=context, original=original, long_types=long_types
    )
    inner.finish()
    return fields


def read_ropes_by_kind(settings: Settings, *, local: str | None) -> dict[bool, dict[str, Any]]:
    """The same for models whose full layers (False) and layers in a window (True) differ, from either
    spelling.

    As in transformers, `rope_scaling` is added to the keys of full layers, and wins over those that are
    there.

    Args:
      local: the key beside the others with the base of layers in a window; None where they have that of full
        layers.
    """
    context = settings.positive("max_position_embeddings")
    base = settings.positive("rope_theta")
    both = settings.inner("rope_parameters")
    tables = {False: dict(both.take("full_attention", {})), True: dict(both.take("sliding_attention", {}))}
    both.finish()
    scaling = settings.take("rope_scaling", None)
    if scaling:
        if "rope_type" not in scaling and scaling.get("type", "default") != "default":
            settings.refuse(
                "rope_scaling",
                "releases of transformers differ in whether `type` counts here; call it `rope_type`",
            )
        tables[False].update(scaling)
    if local is None and settings.has("rope_theta") and tables[True].get("rope_theta") is None:
        settings.expect(
            "rope_theta", settings.published("rope_theta")
        )  # transformers 4 has it in all layers, 5 in full ones alone
    bases = {False: base, True: base if local is None else settings.positive(local)}
    fields = {}
    for kind, table in tables.items():
        inner = settings.nested(f"rotary positions of {'sliding' if kind else 'full'}_attention", table)
        inner.expect("partial_rotary_factor", 1.0)
        inner.expect("truncate", True)  # transformers looks for it outside of these tables, and finds none
        fields[kind] = rope_fields(inner, base=bases[kind], context=context)
        inner.finish()
    return fields


def rope_fields(
    inner: Settings,
    *,
    base: float,
    fraction: float = 1.0,
    context: int,
    original: int | None = None,
    long_types: Sequence[str] = LONG_TYPES,
) -> dict[str, Any]:
    """The same from the keys of `rope_parameters` or `rope_scaling`, of all layers or of one kind of layer.

    Args:
      base: where the keys do not say.
      fraction: where the keys do not say.
      context: tokens of the model's context.
      original: tokens it was first trained with, where that is said outside.
      long_types: what the family calls LongRoPE.
    """
    base = inner.positive("rope_theta", base)
    fraction = inner.take("partial_rotary_factor", fraction)
    scaling = _read_scaling(inner, context=context, original=original, long_types=long_types)
    part = {} if fraction == 1.0 else {"partial_rotary_factor": fraction}
    return {"rope_base": float(base), "rope_scaling": scaling, **part}


def rotated_part(head_dim: int, factor: float, *, base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return `rotary_dim` and `rope_base` for a `partial_rotary_factor`, as transformers rotates.

    It makes R = int(head_dim * factor), and a frequency `base ** (-2i / R)` for each even 2i below R. Of an
    odd R these are (R + 1) / 2 pairs, which is what R + 1 dims and the base `base ** ((R + 1) / R)` give.

    Raises:
      ConfigError: an odd number with scaled frequencies, which transformers refuses.
    """
    rotated = int(head_dim * factor)
    if rotated % 2 == 0 or rotated < 0:
        return {"rotary_dim": rotated, "rope_base": base}
    if scaling is not None:
        raise ConfigError(
            f"config.json: partial_rotary_factor {factor} of heads of {head_dim} dims rotates {rotated}, an "
            "odd number, "
            f"which transformers does not compute with scaled frequencies ({type(scaling).__name__})"
        )
    of_pairs = np.float32(base ** ((rotated + 1) / rotated))  # angles are float32
    return {"rotary_dim": rotated + 1, "rope_base": float(str(of_pairs))}


def rotary_factor(rotary_dim: int, head_dim: int) -> float:
    """Return a `partial_rotary_factor` f with `int(head_dim * f) == rotary_dim`: the quotient, or the next
    float.
    """
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, math.inf)


def _read_scaling(
    inner: Settings, *, context: int, original: int | None, long_types: Sequence[str]
) -> RopeScaling | None:
    kind = inner.take("type", "default")
    kind = inner.take("rope_type", kind)
    first_trained = int(
        inner.positive("original_max_position_embeddings", context) if original is None else original
    )
    inner.ignore("original_max_position_embeddings")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=float(inner.positive("factor")))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(inner.positive("factor")),
            original_context=first_trained,
            low_frequency_factor=float(inner.take("low_freq_factor")),
            high_frequency_factor=float(inner.take("high_freq_factor")),
        )
    if kind == "yarn" and kind not in long_types:
        return _read_yarn(inner, context=context, original=first_trained)
    if kind in long_types:
        factor = float(inner.positive("factor", context / first_trained))
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(first_trained))
        return LongScaling(
            short_factors=tuple(map(float, inner.take("short_factor"))),
            long_factors=tuple(map(float, inner.take("long_factor"))),
            original_context=first_trained,
            attention_factor=float(inner.take("attention_factor", magnitude)),
        )
    raise ConfigError(
        f"config.json: rotary positions of type {kind!r} are not understood: default, linear, llama3, yarn "
        "and longrope are"
    )


def _read_yarn(inner: Settings, *, context: int, original: int) -> YarnScaling:
    factor = float(inner.positive("factor", context / original))
    numerator = inner.take("mscale", 0)
    denominator = inner.take("mscale_all_dim", 0)
    magnitude = (
        yarn_magnitude(factor, numerator) / yarn_magnitude(factor, denominator)
        if numerator and denominator
        else None
    )
    return YarnScaling(
        factor=factor,
        original_context=original,
        fast_turns=float(inner.take("beta_fast", 32) or 32),
        slow_turns=float(inner.take("beta_slow", 1) or 1),
        whole_dims=bool(inner.take("truncate", True)),
        attention_factor=float(
            inner.take("attention_factor", yarn_magnitude(factor) if magnitude is None else magnitude)
        ),
    )


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by (Peng et al. 2023)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def write_rope(attention: AttentionConfig) -> dict[str, Any]:
    """`rope_theta`, `partial_rotary_factor` and `rope_scaling`, as libraries of any age read them."""
    keys: dict[str, Any] = {} if attention.rope_base is None else {"rope_theta": attention.rope_base}
    if attention.rotary_dim not in (None, attention.head_dim):
        keys["partial_rotary_factor"] = rotary_factor(attention.rotary_dim or 0, attention.head_dim or 1)
    return keys | {"rope_scaling": write_scaling(attention.rope_scaling)}


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The keys of `rope_scaling`; None where angles are plain."""
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.fast_turns,
            "beta_slow": scaling.slow_turns,
            "truncate": scaling.whole_dims,
            "attention_factor": scaling.attention_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    if isinstance(scaling, LongScaling):
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "attention_factor": scaling.attention_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    raise Inexpressible(f"rope_scaling is {type(scaling).__name__}, which has no name elsewhere")


# Feed-forward layers ----------------------------------------------------------------------------------------
def read_mlp(
    settings: Settings, *, width: str = "intermediate_size", activation: str = "hidden_act", **more: Any
) -> MlpConfig:
    """A gated MLP; the arguments are names of keys, `more` fields of the `MlpConfig` that this family
    sets.
    """
    return MlpConfig(
        hidden_dim=settings.positive(width), activation=read_activation(settings, activation), **more
    )


def write_mlp(
    ffn: Any, *, width: str = "intermediate_size", activation: str = "hidden_act"
) -> dict[str, Any]:
    """The keys that `read_mlp` takes."""
    mlp = expect_kind(ffn, MlpConfig, "a feed-forward layer")
    return {width: mlp.hidden_dim, activation: write_activation(mlp.activation)}


def read_activation(settings: Settings, name: str = "hidden_act") -> Activation:
    """The non-linearity that a key names."""
    text = settings.take(name)
    if text not in ACTIVATIONS:
        raise ConfigError(f"config.json: {name} is {text!r}, and {', '.join(ACTIVATIONS)} are understood")
    return ACTIVATIONS[text]


def write_activation(activation: Activation) -> str:
    """The name of a non-linearity. Raises Inexpressible if it has none."""
    return lookup(ACTIVATION_NAMES, activation, "the activation")
