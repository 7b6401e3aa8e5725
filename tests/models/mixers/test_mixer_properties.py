"""Mixers with a state of fixed size have the properties of every mixer."""

import dataclasses

import pytest

from slmjax.models import (
    DeltaNetConfig,
    DifferentialAttentionConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    GatedNorm,
    KimiDeltaAttentionConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MambaConfig,
    ParallelMixerConfig,
    RetentionConfig,
    RetentionDecay,
    RgLruConfig,
    Rwkv4Config,
    Rwkv7Config,
    ShortConvolutionConfig,
)
from slmjax.testing import check_mixer

RWKV7 = Rwkv7Config(head_dim=8, is_first=True, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4)
MAMBA2 = Mamba2Config(head_dim=8, state_dim=4, num_groups=2)
# Three heads in one norm, biases of projections but not of convolutions, and multipliers.
MAMBA2_OPTIONS = Mamba2Config(
    head_dim=8,
    state_dim=4,
    inner_dim=24,
    norm=GatedNorm.BEFORE_GATE,
    input_bias=True,
    output_bias=True,
    conv_bias=False,
    projection_multipliers=(0.5, 2.0, 0.3, 1.5, 0.7),
)
# With values of parameters that let the state decay slowly.
CASES = {
    "linear": (LinearAttentionConfig(num_heads=2), {}),
    "retention": (RetentionConfig(num_heads=2), {}),
    "lightning": (RetentionConfig(num_heads=2, decay=RetentionDecay.LIGHTNING, rope_base=None), {}),
    "gated_linear": (GatedLinearAttentionConfig(num_heads=2, decay_rank=4), {"decay_up/bias": 8.0}),
    "mamba2": (MAMBA2, {"step_bias": -7.0}),
    "mamba2_options": (MAMBA2_OPTIONS, {"step_bias": -7.0}),
    "delta": (DeltaNetConfig(num_heads=2, negative_eigenvalues=True), {}),
    "gated_delta": (GatedDeltaNetConfig(num_heads=2, num_value_heads=4, key_dim=4), {"step_bias": -7.0}),
    "kimi": (KimiDeltaAttentionConfig(num_heads=2), {"step_bias": -7.0}),
    "rwkv7_first": (RWKV7, {"decay/rank_up/bias": -8.0}),
    "short_convolution": (ShortConvolutionConfig(), {}),
    "rg_lru": (RgLruConfig(inner_dim=32, num_blocks=2), {"decay_rates": -10.0}),
    "mamba": (MambaConfig(inner_dim=32, state_dim=4), {"step_bias": -6.0}),
    "rwkv4": (Rwkv4Config(inner_dim=32), {"log_decay_rates": -7.0}),
    "differential": (DifferentialAttentionConfig(num_heads=4, num_kv_heads=2), {}),
    "parallel": (
        ParallelMixerConfig(mixers=(DifferentialAttentionConfig(num_heads=2, num_kv_heads=1), MAMBA2)),
        {"step_bias": -7.0},
    ),
}
# One whose kernel has all parts; the kernels have tests of their own.
DEFAULT = ("gated_delta",)


@pytest.mark.parametrize(
    ("config", "slow_decay"),
    [
        pytest.param(*case, id=name, marks=() if name in DEFAULT else pytest.mark.nightly)
        for name, case in CASES.items()
    ],
)
def test_properties_of_every_mixer(config, slow_decay):
    check_mixer(config, slow_decay=slow_decay or None)


@pytest.mark.nightly
def test_properties_of_a_reader_of_first_values():
    later = dataclasses.replace(RWKV7, is_first=False)
    check_mixer(later, before=(RWKV7,), slow_decay={"decay/rank_up/bias": -8.0})
