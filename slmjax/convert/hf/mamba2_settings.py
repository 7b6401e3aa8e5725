"""Conversion of Mamba-2 layers, in both directions, shared by Mamba-2, Granite 4 and Falcon-H1."""

import math
from collections.abc import Mapping
from typing import Any

from slmjax.config import ConfigError
from slmjax.convert.family import Inexpressible, Rule, convolution, joined, matrix, same
from slmjax.convert.settings import Settings
from slmjax.models.mixers.mamba2 import PROJECTIONS, Mamba2Config

# Keys of hybrid models, by our names.
HYBRID_NAMES: Mapping[str, str] = {
    "num_heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "state_dim": "mamba_d_state",
    "num_groups": "mamba_n_groups",
    "conv_width": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias",
    "input_bias": "mamba_proj_bias",
}
# Defaults of these keys, and of those below, in models of both hybrid families.
HYBRID_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": [0.0, math.inf],
}
# Initial values of the steps, and how many tokens of a sequence are computed at once.
IGNORED = ("time_step_min", "time_step_max", "time_step_floor", "mamba_chunk_size")


def read_mamba2(
    settings: Settings, *, inner_dim: int, names: Mapping[str, str] = HYBRID_NAMES, **more: Any
) -> Mamba2Config:
    """Read a mixer.

    Args:
      inner_dim: width of the values of all heads.
      names: their keys by our names; "head_dim" may be "auto".
      more: fields of the `Mamba2Config` set by the family.

    Raises:
      ConfigError: the heads are not as wide together as the values, or steps have bounds.
    """
    settings.ignore(*IGNORED)
    _check_steps(settings)
    heads = settings.positive(names["num_heads"])
    head_dim = settings.positive(names["head_dim"])
    if head_dim == "auto":
        head_dim = inner_dim // heads
    if heads * head_dim != inner_dim:
        raise ConfigError(
            f"config.json: {names['num_heads']} = {heads} heads of {head_dim} dims are not as wide together "
            f"as the values of a layer, {inner_dim}"
        )
    return Mamba2Config(
        inner_dim=inner_dim,
        head_dim=head_dim,
        state_dim=settings.positive(names["state_dim"]),
        num_groups=settings.positive(names["num_groups"]),
        conv_width=settings.positive(names["conv_width"]),
        conv_bias=settings.take(names["conv_bias"]),
        input_bias=settings.take(names["input_bias"]),
        **more,
    )


def _check_steps(settings: Settings) -> None:
    """Raise ConfigError if the steps have bounds, which transformers applies to prompts only."""
    bounds = settings.take("time_step_limit")
    # JSON has no infinity: transformers writes an object for it, earlier releases wrote a bare word.
    numbers = [bound["__float__"] if isinstance(bound, Mapping) else bound for bound in bounds]
    if [float(number) for number in numbers] != [0.0, math.inf]:
        settings.refuse("time_step_limit", "bounds of steps are not supported, only [0, Infinity]")


def write_mamba2(mixer: Mamba2Config, *, names: Mapping[str, str] = HYBRID_NAMES) -> dict[str, Any]:
    """Write the keys of `read_mamba2`, without those of the width.

    Raises:
      Inexpressible: fewer or more dims are normed together than those of a group of heads.
    """
    if mixer.norm_groups not in (None, mixer.num_groups):
        raise Inexpressible(
            f"norms are over the dims of a group of heads: norm_groups={mixer.norm_groups} must be "
            f"num_groups={mixer.num_groups}"
        )
    assert mixer.inner_dim is not None, "the canonical form has a width"
    values = {
        "num_heads": mixer.inner_dim // mixer.head_dim,
        **{name: getattr(mixer, name) for name in names if name != "num_heads"},
    }
    return {names[name]: value for name, value in values.items()}


def write_expansion(mixer: Mamba2Config, embed_dim: int) -> int:
    """Return the width of the values as a multiple of the model's. Raises Inexpressible if it is none."""
    assert mixer.inner_dim is not None, "the canonical form has a width"
    expansion, rest = divmod(mixer.inner_dim, embed_dim)
    if rest:
        raise Inexpressible(
            f"the values of a Mamba-2 layer have {mixer.inner_dim} dims, which must be a multiple of the "
            f"model's {embed_dim}"
        )
    return expansion


def mamba2_rules(theirs: str, *, ours: str = "mixer") -> tuple[Rule, ...]:
    """Rules for a Mamba-2 mixer at these paths; theirs has one matrix for all projections of the input."""
    inputs = [f"{ours}/{name}" for name in PROJECTIONS]
    convolutions = [f"{ours}/{name}_convolution" for name in ("value", "key", "query")]
    return (
        joined([f"{path}/weight" for path in inputs], f"{theirs}.in_proj.weight"),
        joined([f"{path}/bias" for path in inputs], f"{theirs}.in_proj.bias"),
        convolution([f"{path}/taps" for path in convolutions], f"{theirs}.conv1d.weight"),
        joined([f"{path}/bias" for path in convolutions], f"{theirs}.conv1d.bias"),
        same(f"{ours}/log_decay_rate", f"{theirs}.A_log"),
        same(f"{ours}/step_bias", f"{theirs}.dt_bias"),
        same(f"{ours}/skip", f"{theirs}.D"),
        same(f"{ours}/norm_scale", f"{theirs}.norm.weight"),
        matrix(f"{ours}/output/weight", f"{theirs}.out_proj.weight"),
        same(f"{ours}/output/bias", f"{theirs}.out_proj.bias"),
    )
