"""Conversion of Gated DeltaNet, in both directions, shared by Qwen3-Next, Qwen3.5 and OLMo Hybrid."""

from collections.abc import Mapping, Sequence
from typing import Any

from slmjax.config import ConfigError
from slmjax.convert.family import Rule, same
from slmjax.convert.hf.settings import layer_kinds, mixer_of_kind, write_attention, write_biases
from slmjax.convert.settings import Settings
from slmjax.models.architecture import ModelConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.models.mixers.delta_net import GatedDeltaNetConfig

LINEAR = "linear_attention"
FULL = "full_attention"
# Fields of the mixer, and their keys.
SIZES = {
    "num_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "conv_width": "linear_conv_kernel_dim",
}
TAPS = tuple(f"mixer/heads/{name}_convolution/taps" for name in ("query", "key", "value"))
TENSORS: tuple[Rule, ...] = (
    same("mixer/log_decay_rate", "linear_attn.A_log"),
    same("mixer/step_bias", "linear_attn.dt_bias"),
)


def read_delta_net(
    settings: Settings, *, default: Mapping[str, int] | None = None, **more: Any
) -> GatedDeltaNetConfig:
    """Read the mixer; `more` are fields of the `GatedDeltaNetConfig` set by the family.

    Args:
      default: values of keys that have no constant as their default.
    """
    # The library's convolutions have the activation of the feed-forward layers; ours have silu.
    settings.expect("hidden_act", "silu")
    # All other keys have a published default.
    sizes = {name: settings.positive(key, (default or {}).get(key)) for name, key in SIZES.items()}
    return GatedDeltaNetConfig(**sizes, **more)


def write_delta_net(mixer: GatedDeltaNetConfig) -> dict[str, Any]:
    """Write the keys of `read_delta_net`."""
    return {key: getattr(mixer, name) for name, key in SIZES.items()}


def read_layer_kinds(settings: Settings, *, default: Sequence[str]) -> list[str]:
    """Read the kind of each layer, LINEAR or FULL, from `layer_types` or else from `default`."""
    num_layers = settings.take("num_hidden_layers")
    kinds = list(settings.take("layer_types", default))
    if len(kinds) != num_layers:
        raise ConfigError(
            f"config.json: layer_types names {len(kinds)} layers, but num_hidden_layers is {num_layers}"
        )
    if unknown := [kind for kind in kinds if kind not in (LINEAR, FULL)]:
        raise ConfigError(f"config.json: layer_types has {unknown[0]!r}; supported are {LINEAR} and {FULL}")
    return kinds


def write_layers(model: ModelConfig) -> dict[str, Any]:
    """Write the keys of mixers and `layer_types`. A kind that no layer has leaves its keys out."""
    attention = mixer_of_kind(model, AttentionConfig)
    delta_net = mixer_of_kind(model, GatedDeltaNetConfig)
    return {
        "layer_types": layer_kinds(model, {FULL: AttentionConfig, LINEAR: GatedDeltaNetConfig}),
        **({} if attention is None else {**write_attention(attention), **write_biases(attention)}),
        **({} if delta_net is None else write_delta_net(delta_net)),
    }
