"""llama.cpp's keys and tensors of Mamba-2 layers, shared by Mamba-2, Granite 4 and Falcon-H1."""

from typing import Any

import numpy as np

from slmjax.config import ConfigError
from slmjax.convert.family import Arrays, Inexpressible, Rule, Shapes, joined, matrix, same
from slmjax.convert.settings import Settings
from slmjax.models.mixers.mamba2 import PROJECTIONS, Mamba2Config


def read_mamba2(settings: Settings, **more: Any) -> Mamba2Config:
    """Read a mixer, without biases of its projections and with those of its convolutions.

    Args:
      more: fields of the `Mamba2Config` set by the family.
    """
    settings.ignore("has_ssm_norm")
    inner_dim = settings.positive("ssm.inner_size")
    heads = settings.positive("ssm.time_step_rank")
    if inner_dim % heads:
        raise ConfigError(f"ssm.inner_size is {inner_dim}, which must be a multiple of {heads} heads")
    return Mamba2Config(
        inner_dim=inner_dim,
        head_dim=inner_dim // heads,
        state_dim=settings.positive("ssm.state_size"),
        num_groups=settings.positive("ssm.group_count"),
        conv_width=settings.positive("ssm.conv_kernel"),
        **more,
    )


def write_mamba2(mixer: Mamba2Config) -> dict[str, Any]:
    """Write the keys of `read_mamba2`. Raises Inexpressible for other biases: llama.cpp has no tensors."""
    if mixer.input_bias or mixer.output_bias or not mixer.conv_bias:
        raise Inexpressible(
            "in llama.cpp the convolutions of a Mamba-2 layer have biases, its projections none"
        )
    assert mixer.inner_dim is not None, "the canonical form has a width"
    return {
        "ssm.inner_size": mixer.inner_dim,
        "ssm.time_step_rank": mixer.inner_dim // mixer.head_dim,
        "ssm.state_size": mixer.state_dim,
        "ssm.group_count": mixer.num_groups,
        "ssm.conv_kernel": mixer.conv_width,
    }


def mamba2_rules(num_groups: int, *, ours: str = "mixer") -> tuple[Rule, ...]:
    """Rules for a mixer at this path below its layer."""
    convolutions = [f"{ours}/{name}_convolution" for name in ("value", "key", "query")]
    return (
        joined([f"{ours}/{name}/weight" for name in PROJECTIONS], "ssm_in.weight"),
        joined([f"{path}/taps" for path in convolutions], "ssm_conv1d.weight"),
        joined([f"{path}/bias" for path in convolutions], "ssm_conv1d.bias"),
        same(f"{ours}/step_bias", "ssm_dt.bias"),
        Rule(ours=(f"{ours}/log_decay_rate",), theirs=("ssm_a",), read=_read_decay, write=_write_decay),
        _as_matrix(f"{ours}/skip", "ssm_d", num_rows=None),
        _as_matrix(f"{ours}/norm_scale", "ssm_norm.weight", num_rows=num_groups),
        matrix(f"{ours}/output/weight", "ssm_out.weight"),
    )


def _read_decay(arrays: Arrays, shapes: Shapes) -> Arrays:
    """Return logarithms of the rates of decay, which llama.cpp stores with a minus sign."""
    rates = -arrays[0].reshape(shapes[0])
    if not np.all(rates > 0):
        raise ValueError("its values must be negative: they are rates of decay with a minus sign")
    return [np.log(rates)]


def _write_decay(arrays: Arrays) -> Arrays:
    return [-np.exp(arrays[0].astype(np.float32))[:, None]]


def _as_matrix(ours: str, theirs: str, *, num_rows: int | None) -> Rule:
    """Rule for a vector that is a matrix in llama.cpp; without a number of rows each has one entry."""

    def write(arrays: Arrays) -> Arrays:
        return [arrays[0].reshape(num_rows or len(arrays[0]), -1)]

    def read(arrays: Arrays, shapes: Shapes) -> Arrays:
        return [arrays[0].reshape(shapes[0])]

    return Rule(ours=(ours,), theirs=(theirs,), read=read, write=write)
