"""Peak memory of a part of a process: of its devices, or on a CPU the resident memory of the process.

peak = PeakMemory(jax.local_devices())
...                                    # the part
peak.bytes_so_far()                    # None where an earlier part of the process hides it
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory since this object was made, on the device that used most.

    Devices and processes know their peak since they began. Where it cannot be reset, that of a part is known
    only if it is above all that came before.
    """

    def __init__(self, devices: Sequence[Any]) -> None:
        self._devices = tuple(devices)
        is_reset = not has_statistics(self._devices) and _reset_resident()
        self._before = 0 if is_reset else peak_bytes(self._devices)

    def bytes_so_far(self) -> int | None:
        """Return the peak in bytes; None if an earlier part of the process needed as much."""
        now = peak_bytes(self._devices)
        return now if now > self._before else None


def peak_bytes(devices: Sequence[Any]) -> int:
    """Return the peak of the device that used most, or of the resident memory of the process on a CPU."""
    if has_statistics(devices):
        return max(int(device.memory_stats()["peak_bytes_in_use"]) for device in devices)
    # Also the peak of the other threads. `getrusage` would keep it when it is reset.
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def has_statistics(devices: Sequence[Any]) -> bool:
    """Return whether these devices know their peak; JAX has no memory statistics on a CPU."""
    return bool(devices) and all("peak_bytes_in_use" in (each.memory_stats() or {}) for each in devices)


def _reset_resident() -> bool:
    """Set the peak of the resident memory to what is used now, and return whether that is possible."""
    # Linux alone can, and not where the file is read-only, as in some containers.
    with contextlib.suppress(OSError):
        _RESET.write_text("5")
        return True
    return False
