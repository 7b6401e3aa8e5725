"""Conversion of config.json keys shared by families, in both directions.

Readers take keys from `Settings` and return our configs; writers return keys. A writer may leave out what it
cannot represent: the exporter reads the result back, and refuses it if it is not the same model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slmjax.config import ConfigError
from slmjax.convert.family import Inexpressible, T, attentions, expect_kind, lookup
from slmjax.convert.settings import Settings
from slmjax.models.architecture import BlockConfig, HeadKind, ModelConfig, stack_of
from slmjax.models.ffn.mlp import Activation, MlpConfig
from slmjax.models.mixers.attention import AttentionConfig, Biases
from slmjax.models.rope import LinearScaling, Llama3Scaling, LongScaling, RopeScaling, YarnScaling

# Keys about training or running a model that do not affect what it computes.
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

LONG_TYPES = ("longrope", "su")  # names of LongRoPE
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU,
    "gelu_new": Activation.GELU,
    "gelu": Activation.GELU_EXACT,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
}
# Reversed, so that the first of several names of a function is written.
ACTIVATION_NAMES = {value: name for name, value in reversed(ACTIVATIONS.items())}


# Models -----------------------------------------------------------------------------------------------------
def read_decoder(
    settings: Settings, blocks: Sequence[BlockConfig], *, eps: str = "rms_norm_eps", **more: Any
) -> ModelConfig:
    """Read the model around its layers.

    Args:
      eps: the key of what norms add to the mean square.
      more: fields of the `ModelConfig` set by the family.
    """
    settings.ignore(*IGNORED)
    # Interleaved pairs would need the rows of queries and keys in another order.
    settings.expect("rope_interleaved", False)
    head = HeadKind.TIED if settings.take("tie_word_embeddings") else HeadKind.UNTIED
    # Models without attention to all tokens may lack the key.
    if "context_length" not in more:
        more["context_length"] = settings.positive("max_position_embeddings")
    return ModelConfig(
        embed_dim=settings.positive("hidden_size"),
        stack=stack_of(blocks),
        vocab_size=settings.positive("vocab_size"),
        head=head,
        norm_eps=settings.take(eps),
        **more,
    )


def write_decoder(model: ModelConfig, *, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Write the keys of `read_decoder`, and the number of layers."""
    return {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "vocab_size": model.known_vocab_size,
        "max_position_embeddings": model.context_length,
        "tie_word_embeddings": model.head is HeadKind.TIED,
        eps: model.norm_eps,
    }


def check_width(model: ModelConfig, num_heads: int) -> None:
    """Raise Inexpressible unless the width is a multiple of the heads, which some libraries require."""
    if model.embed_dim % num_heads:
        raise Inexpressible(f"its width, {model.embed_dim}, must be a multiple of its heads, {num_heads}")


# Mixers of several kinds ------------------------------------------------------------------------------------
def layer_kinds(model: ModelConfig, kinds: Mapping[str, type]) -> list[str]:
    """Return the name of each layer's kind of mixer. Raises Inexpressible if one has none."""
    names = {kind: name for name, kind in kinds.items()}
    return [lookup(names, type(block.mixer), "the kind of a mixer") for block in model.blocks()]


def mixer_of_kind(model: ModelConfig, kind: type[T]) -> T | None:
    """Return the first mixer of a kind; None if no layer has one."""
    return next((block.mixer for block in model.blocks() if isinstance(block.mixer, kind)), None)


# Attention --------------------------------------------------------------------------------------------------
def read_attention(settings: Settings, *, is_partial: bool = False, **more: Any) -> AttentionConfig:
    """Read heads and rotary positions; `more` are fields of the `AttentionConfig` set by the family.

    Args:
      is_partial: whether the family's library can rotate only some dims of each head.
    """
    heads = settings.positive("num_attention_heads")
    # Families with a head width of their own have a default for this key.
    head_dim = settings.positive("head_dim", settings.positive("hidden_size") // heads)
    # transformers takes a null as one for each head.
    kv_heads = settings.positive("num_key_value_heads", heads, null=heads)
    fields = more if "rope_base" in more else {**read_rope(settings, is_partial=is_partial), **more}
    # The number of rotated dims depends on the head's width, which `read_rope` does not know.
    if (factor := fields.pop("partial_rotary_factor", 1.0)) != 1.0:
        fields |= rotated_part(head_dim, factor, base=fields["rope_base"], scaling=fields["rope_scaling"])
    return AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **fields)


def read_biases(settings: Settings) -> Biases:
    """Read whether all projections of attention have biases."""
    return Biases.ALL if settings.take("attention_bias") else Biases.NONE


def write_biases(attention: AttentionConfig) -> dict[str, Any]:
    """Write the key of `read_biases`."""
    return {"attention_bias": attention.biases is Biases.ALL}


def write_attention(attention: AttentionConfig) -> dict[str, Any]:
    """Write the keys of `read_attention`."""
    return {
        "num_attention_heads": attention.num_heads,
        # Written even if it is the library's default: families differ in their defaults.
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        **write_rope(attention),
    }


def read_windows(
    settings: Settings, *, num_layers: int, window: int | None, default: Sequence[bool]
) -> list[int | None]:
    """Read the window of each layer, from `layer_types` or else from `default`: whether a layer has one."""
    # Newer releases list the kind of every layer; older ones compute it in the family's code.
    kinds = settings.take("layer_types", None)
    local = list(default) if kinds is None else [_is_local(kind) for kind in kinds]
    # A list of another length was written for another model.
    if len(local) != num_layers:
        raise ConfigError(
            f"config.json: layer_types names {len(local)} layers, but num_hidden_layers is {num_layers}"
        )
    if any(local) and window is None:
        raise ConfigError(
            "config.json: layer_types has layers of sliding_attention, but there is no sliding_window"
        )
    return [window if is_local else None for is_local in local]


def _is_local(kind: str) -> bool:
    if kind not in ("sliding_attention", "full_attention"):
        raise ConfigError(
            f"config.json: layer_types has {kind!r}; supported are sliding_attention and full_attention"
        )
    return kind == "sliding_attention"


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """Write `sliding_window` and `layer_types`."""
    windows = [attention.window for attention in attentions(model)]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    # Some libraries require a number even if no layer has a window.
    return {
        "sliding_window": next((window for window in windows if window), model.context_length),
        "layer_types": kinds,
    }


# Rotary positions -------------------------------------------------------------------------------------------
def rope_table(settings: Settings, *, default: Mapping[str, Any] | None = None) -> Settings:
    """Return the keys of rotary positions, from `rope_parameters` or `rope_scaling`.

    As in transformers, all of `rope_parameters` is replaced by `rope_scaling`.

    Args:
      default: the keys if neither is present.
    """
    scaling = settings.take("rope_scaling", None)
    parameters = settings.take("rope_parameters", None)
    # Newer releases write `rope_parameters`, older ones `rope_scaling` for scaled angles only.
    if not scaling:
        return settings.nested("rope_parameters", (default or {}) if parameters is None else parameters)
    table = settings.nested("rope_scaling", scaling)
    used = {
        name: scaling.get(name, settings.take(name, None))
        for name in parameters or {}
        if name not in ("rope_type", "type")
    }
    # A value that `rope_scaling` or a top-level key repeats is not lost.
    lost = [name for name, value in used.items() if value != parameters[name]]
    if lost:
        settings.notes.append(
            "rope_scaling replaces all of rope_parameters, as in transformers: "
            f"{lost[0]} = {parameters[lost[0]]!r} of the latter is not used"
        )
    return table


def read_rope(
    settings: Settings,
    *,
    is_partial: bool = False,
    fraction: float = 1.0,
    default: Mapping[str, Any] | None = None,
    long_types: Sequence[str] = LONG_TYPES,
    ignored: Sequence[str] = (),
) -> dict[str, Any]:
    """Return `rope_base` and `rope_scaling`, from top-level keys or a nested table.

    A `partial_rotary_factor` other than 1 is passed on to `read_attention`, which knows the width of a head.

    Args:
      is_partial: whether the family's library can rotate only some dims of each head.
      fraction: the library's default of `partial_rotary_factor`.
      default: the table if there is none.
      long_types: the family's names of LongRoPE.
      ignored: keys of the table that do not affect the result.
    """
    if not is_partial:
        settings.expect("partial_rotary_factor", 1.0)
    context = settings.positive("max_position_embeddings")
    # Phi-3 has this key at the top level, other families in the table.
    original = settings.take("original_max_position_embeddings", None)
    base = settings.positive("rope_theta")
    fraction = settings.take("partial_rotary_factor", fraction)
    inner = rope_table(settings, default=default)
    inner.ignore(*ignored)
    if not is_partial:
        inner.expect("partial_rotary_factor", 1.0)
    fields = rope_fields(
        inner, base=base, fraction=fraction, context=context, original=original, long_types=long_types
    )
    inner.finish()
    return fields


def read_ropes_by_kind(settings: Settings, *, local: str | None) -> dict[bool, dict[str, Any]]:
    """Return the same for models whose full layers (False) and windowed layers (True) differ.

    As in transformers, `rope_scaling` is merged into the keys of full layers, and takes precedence.

    Args:
      local: the top-level key for the base of windowed layers; None if they share that of full layers.
    """
    context = settings.positive("max_position_embeddings")
    base = settings.positive("rope_theta")
    # One table for each kind of layer, by the names in `layer_types`.
    both = settings.inner("rope_parameters")
    tables = {False: dict(both.take("full_attention", {})), True: dict(both.take("sliding_attention", {}))}
    both.finish()
    scaling = settings.take("rope_scaling", None)
    if scaling:
        if "rope_type" not in scaling and scaling.get("type", "default") != "default":
            settings.refuse(
                "rope_scaling",
                "releases of transformers differ in whether they read `type` here: use `rope_type`",
            )
        # Only full layers are scaled: distances within a window stay short.
        tables[False].update(scaling)
    if local is None and settings.has("rope_theta") and tables[True].get("rope_theta") is None:
        # transformers 4 uses it in all layers, 5 only in full ones: only their common default is unambiguous.
        settings.expect("rope_theta", settings.published("rope_theta"))
    bases = {False: base, True: base if local is None else settings.positive(local)}
    fields = {}
    for kind, table in tables.items():
        inner = settings.nested(f"rotary positions of {'sliding' if kind else 'full'}_attention", table)
        inner.expect("partial_rotary_factor", 1.0)
        inner.expect("truncate", True)  # transformers does not read it from these tables
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
    """Return the same from the keys of `rope_parameters` or `rope_scaling`, for all layers or one kind.

    Args:
      base: default of `rope_theta`.
      fraction: default of `partial_rotary_factor`.
      context: the model's context length.
      original: context length of the first training, if given by a top-level key.
      long_types: the family's names of LongRoPE.
    """
    # The table takes precedence over top-level keys.
    base = inner.positive("rope_theta", base)
    fraction = inner.take("partial_rotary_factor", fraction)
    scaling = _read_scaling(inner, context=context, original=original, long_types=long_types)
    part = {} if fraction == 1.0 else {"partial_rotary_factor": fraction}
    return {"rope_base": float(base), "rope_scaling": scaling, **part}


def rotated_part(head_dim: int, factor: float, *, base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return `rotary_dim` and `rope_base` for a `partial_rotary_factor`, as transformers rotates.

    It computes R = int(head_dim * factor), and a frequency `base ** (-2i / R)` for each even 2i below R. For
    an odd R these are (R + 1) / 2 pairs, the same as for R + 1 dims and the base `base ** ((R + 1) / R)`.

    Raises:
      ConfigError: R is odd and frequencies are scaled, which transformers refuses.
    """
    # Truncated, as in transformers.
    rotated = int(head_dim * factor)
    if rotated % 2 == 0 or rotated < 0:
        return {"rotary_dim": rotated, "rope_base": base}
    if scaling is not None:
        raise ConfigError(
            f"config.json: partial_rotary_factor {factor} of heads of {head_dim} dims rotates {rotated}, an "
            f"odd number, which transformers does not support with scaled frequencies "
            f"({type(scaling).__name__})"
        )
    even_base = np.float32(base ** ((rotated + 1) / rotated))  # angles are float32
    return {"rotary_dim": rotated + 1, "rope_base": float(str(even_base))}


def rotary_factor(rotary_dim: int, head_dim: int) -> float:
    """Return a `partial_rotary_factor` f with `int(head_dim * f) == rotary_dim`."""
    # The quotient may round down, so that int() loses one: then the next float does it.
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else math.nextafter(factor, math.inf)


def _read_scaling(
    inner: Settings, *, context: int, original: int | None, long_types: Sequence[str]
) -> RopeScaling | None:
    # `type` is the older name of `rope_type`.
    kind = inner.take("type", "default")
    kind = inner.take("rope_type", kind)
    original_context = int(
        inner.positive("original_max_position_embeddings", context) if original is None else original
    )
    # Also taken if the top-level key was used.
    inner.ignore("original_max_position_embeddings")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=float(inner.positive("factor")))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(inner.positive("factor")),
            original_context=original_context,
            low_frequency_factor=float(inner.take("low_freq_factor")),
            high_frequency_factor=float(inner.take("high_freq_factor")),
        )
    if kind == "yarn" and kind not in long_types:
        return _read_yarn(inner, context=context, original=original_context)
    if kind in long_types:
        # Phi-3's files have no factor: it follows from the two context lengths.
        factor = float(inner.positive("factor", context / original_context))
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_context))
        return LongScaling(
            short_factors=tuple(map(float, inner.take("short_factor"))),
            long_factors=tuple(map(float, inner.take("long_factor"))),
            original_context=original_context,
            attention_factor=float(inner.take("attention_factor", magnitude)),
        )
    raise ConfigError(
        f"config.json: rotary positions of type {kind!r} are not supported; supported are default, linear, "
        "llama3, yarn and longrope"
    )


def _read_yarn(inner: Settings, *, context: int, original: int) -> YarnScaling:
    factor = float(inner.positive("factor", context / original))
    # DeepSeek's variant: the magnitude is a quotient of two, with weights of their own.
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
        # transformers takes 0 as absent: `beta_fast or 32`.
        fast_turns=float(inner.take("beta_fast", 32) or 32),
        slow_turns=float(inner.take("beta_slow", 1) or 1),
        whole_dims=bool(inner.take("truncate", True)),
        attention_factor=float(
            inner.take("attention_factor", yarn_magnitude(factor) if magnitude is None else magnitude)
        ),
    )


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's factor of queries and keys (Peng et al. 2023)."""
    # The constants are the authors' fit to Llama models.
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def write_rope(attention: AttentionConfig) -> dict[str, Any]:
    """Write `rope_theta`, `partial_rotary_factor` and `rope_scaling`, for all releases of transformers."""
    # Top-level keys and `rope_scaling`: the layout that old and new releases read.
    keys: dict[str, Any] = {} if attention.rope_base is None else {"rope_theta": attention.rope_base}
    if attention.rotary_dim not in (None, attention.head_dim):
        keys["partial_rotary_factor"] = rotary_factor(attention.rotary_dim or 0, attention.head_dim or 1)
    return keys | {"rope_scaling": write_scaling(attention.rope_scaling)}


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Write the keys of `rope_scaling`; None without scaling."""
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
    raise Inexpressible(f"rope_scaling is {type(scaling).__name__}, which config.json cannot represent")


# Feed-forward layers ----------------------------------------------------------------------------------------
def read_mlp(
    settings: Settings, *, width: str = "intermediate_size", activation: str = "hidden_act", **more: Any
) -> MlpConfig:
    """Read a gated MLP; the arguments are names of keys, `more` are fields of the `MlpConfig`."""
    return MlpConfig(
        hidden_dim=settings.positive(width), activation=read_activation(settings, activation), **more
    )


def write_mlp(
    ffn: Any, *, width: str = "intermediate_size", activation: str = "hidden_act"
) -> dict[str, Any]:
    """Write the keys of `read_mlp`."""
    mlp = expect_kind(ffn, MlpConfig, "a feed-forward layer")
    return {width: mlp.hidden_dim, activation: write_activation(mlp.activation)}


def read_activation(settings: Settings, name: str = "hidden_act") -> Activation:
    """Read an activation function."""
    text = settings.take(name)
    if text not in ACTIVATIONS:
        raise ConfigError(f"config.json: {name} is {text!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[text]


def write_activation(activation: Activation) -> str:
    """Return the name of an activation function. Raises Inexpressible if it has none."""
    return lookup(ACTIVATION_NAMES, activation, "the activation")
