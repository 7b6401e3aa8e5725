"""slmjax.telemetry.meter and slmjax.planning.device_peaks: pace and utilisation, against numbers worked out
by hand.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from slmjax.planning import device_peaks
from slmjax.telemetry.meter import Meter


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_figures_of_a_stretch_and_of_all() -> None:
    clock = FakeClock()
    meter = Meter(flops_per_token=2e6, peak_flops=1e9, tokens=50, waiting=1.0, clock=clock)
    clock.now = 160.0  # compilation
    meter.restart(tokens=150, waiting=3.0)
    clock.now = 175.0
    meter.leave_out(5.0)  # an evaluation
    metrics = meter.measure(tokens=1150, waiting=4.0, nll=80.0 * math.log(2), num_bytes=40.0)
    assert metrics.tokens_per_second == pytest.approx(100.0) and metrics.data_wait_share == pytest.approx(0.1)
    assert metrics.mfu == pytest.approx(100 * 2e6 / 1e9) and metrics.bits_per_byte == pytest.approx(2.0)
    clock.now = 205.0
    assert meter.measure(tokens=2150, waiting=4.0, nll=1.0, num_bytes=1.0).tokens_per_second == pytest.approx(
        1000 / 30
    )
    assert meter.tokens_per_second == pytest.approx(2000 / 40) and meter.data_wait_share == pytest.approx(
        1 / 40
    )


def test_a_stretch_without_tokens_and_a_device_without_a_peak() -> None:
    clock = FakeClock()
    meter = Meter(flops_per_token=2e6, peak_flops=None, tokens=0, waiting=0.0, clock=clock)
    assert meter.tokens_per_second == 0.0
    clock.now += 1.0
    metrics = meter.measure(tokens=0, waiting=0.0, nll=0.0, num_bytes=0.0)
    assert math.isnan(metrics.tokens_per_second) and metrics.mfu is None and math.isnan(metrics.bits_per_byte)


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", jnp.bfloat16, 756e12),
        ("NVIDIA H200", jnp.float32, 494.7e12),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 312e12),
        ("NVIDIA L40S", jnp.bfloat16, 362.05e12),
        ("NVIDIA L4", jnp.bfloat16, 121e12),
        ("NVIDIA L40", jnp.bfloat16, 181.05e12),
        ("NVIDIA H100 NVL", jnp.bfloat16, 835.5e12),
        ("TPU v5 lite", jnp.bfloat16, 197e12),
        ("TPU v5p", jnp.bfloat16, 459e12),
        ("TPU v6 lite", jnp.bfloat16, 918e12),
        ("TPU v5 lite", jnp.float32, None),
        ("Something Else 9000", jnp.bfloat16, None),
    ],
)
def test_the_table_of_peaks(kind: str, dtype: jnp.dtype, expected: float | None) -> None:
    device = SimpleNamespace(platform="tpu" if "TPU" in kind else "gpu", device_kind=kind)
    assert device_peaks.peak_flops(device, dtype) == expected
    if expected is not None:
        assert device_peaks.peak_flops(device, dtype, num_devices=8) == 8 * expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cpu_is_measured_and_its_devices_share_it(dtype: jnp.dtype) -> None:
    peak = device_peaks.peak_flops(jax.devices()[0], dtype)
    assert peak is not None and 1e9 < peak < 1e15
    assert device_peaks.peak_flops(jax.devices()[0], dtype, num_devices=8) == peak
