"""Scored targets that a run has been trained on, counted on the host.

    trained = TokenCount(0)
    trained.add(metrics["trained_targets"])    # after every step: waits for nothing
    trained.total()                            # at a line of the log or a checkpoint: waits for all steps

Runs pass 2**31 targets, which an int32 on the device could not count, and a float32 could not count exactly.
Python's integers do both.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

# A checkpoint holds the count as two int32: millions and the rest. The first versions counted so on the
# device.
MILLION = 1_000_000
# Counts of steps that may be pending, for runs that rarely log: a scalar on the device for each.
MOST_PENDING = 1000


class TokenCount:
    """Targets that were trained on so far, in all sessions of a run; those of skipped steps are left out."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._before = total
        self._pending: list[Float[Array, ""] | int] = []

    def add(self, num_targets: Float[Array, ""] | int) -> None:
        """Add the targets of a step: a number, or an array that may not be computed yet."""
        # Only the reference is kept: reading the value would wait for the step, and devices would idle.
        self._pending.append(num_targets)
        if len(self._pending) >= MOST_PENDING:
            self.total()

    def total(self) -> int:
        """Return the count. Waits for the steps that were added."""
        self._total += sum(int(count) for count in jax.device_get(self._pending))
        self._pending.clear()
        return self._total

    def in_session(self) -> int:
        """Return the count without that of earlier sessions. Waits for the steps that were added."""
        return self.total() - self._before

    def stored(self, sharding: Any) -> Int32[Array, "2"]:
        """Return the count as a checkpoint holds it, with this sharding, which replicates."""
        pair = np.asarray(divmod(self.total(), MILLION), np.int32)
        return jax.device_put(pair, sharding)


def stored_shape(sharding: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of a stored count, to restore it by."""
    return jax.ShapeDtypeStruct((2,), np.int32, sharding=sharding)


def read_count(stored: Int32[Array, "2"]) -> TokenCount:
    """Return the count that a checkpoint holds."""
    millions, rest = jax.device_get(stored)
    return TokenCount(int(millions) * MILLION + int(rest))
