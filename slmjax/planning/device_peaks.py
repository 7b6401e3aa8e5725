"""What a device could do at best: the denominator of model FLOPs utilisation.

    peak = peak_flops(jax.devices()[0], jnp.bfloat16)     # FLOP/s, or None where it is not known

Accelerators are looked up in a table; a CPU is measured, by the matrix product that it does best.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from slmjax import kernels

# Dense TFLOP/s per device, of bfloat16 and of what float32 products run in by default: tensor cores in TF32
# on NVIDIA, whose data sheets give twice as much for sparse matrices; several bfloat16 passes on TPU, for
# which vendors give no figure. The first name that is part of the device's kind counts, in lower case.
# Sources: the vendors' data sheets and cloud documentation.
_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    ("tpu v6 lite", 918.0, None),
    ("tpu v5 lite", 197.0, None),
    ("tpu v5", 459.0, None),
    ("tpu v4", 275.0, None),
    ("b200", 2250.0, 1125.0),
    ("gh200", 989.4, 494.7),
    ("h200", 989.4, 494.7),
    ("h100 pcie", 756.0, 378.0),
    ("h100 nvl", 835.5, 417.5),
    ("h100", 989.4, 494.7),
    ("a100", 312.0, 156.0),
    ("a10g", 70.0, 35.0),
    ("l40s", 362.05, 183.2),
    ("l40", 181.05, 90.5),
    ("nvidia l4", 121.0, 60.5),
    ("rtx 5090", 209.5, 104.8),
    ("rtx 4090", 165.2, 82.6),
    ("rtx 3090", 71.0, 35.6),
)

_MEASURED_SIZE = 1024  # rows and columns: 2 GFLOP, milliseconds
_MEASURED_SECONDS = 0.5  # long enough for a moment without other programs


def peak_flops(device: Any, dtype: Any, *, num_devices: int = 1) -> float | None:
    """Return the peak FLOP/s of devices like this jax.Device in products of this dtype; None if not known."""
    # The devices of a CPU have its cores in common, so that their number does not count.
    if device.platform == "cpu":
        return _measured(jnp.dtype(dtype).name)
    is_half = jnp.dtype(dtype) == jnp.bfloat16
    kind = device.device_kind.lower()
    for name, half, single in _PEAKS:
        if name in kind:
            peak = half if is_half else single
            return None if peak is None else peak * 1e12 * num_devices
    return None


@functools.cache
def _measured(dtype: str) -> float:
    """Return the best FLOP/s of many products on this machine's CPU, which is below its peak on paper."""
    ones = jax.device_put(
        jnp.ones((_MEASURED_SIZE, _MEASURED_SIZE), dtype), jax.local_devices(backend="cpu")[0]
    )
    product = jax.jit(kernels.matmul)
    product(ones, ones).block_until_ready()
    # The minimum, not the mean: other programs can only make a product slower.
    best = float("inf")
    begun = time.perf_counter()
    while time.perf_counter() - begun < _MEASURED_SECONDS:
        started = time.perf_counter()
        product(ones, ones).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * _MEASURED_SIZE**3 / best
