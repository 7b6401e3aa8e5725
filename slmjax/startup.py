"""What has to happen in a process before jax is imported: the one place for it, called by the command line.

XLA's CPU client takes its large buffers anew at every step, and glibc by default gives each back to the kernel and faults it
in again, page by page. `keep_memory` makes glibc keep what it once had: steps on CPU are spared the faults, and the process
stays as large as its largest moment (`benchmarks/keep_memory.py` measures what it is worth).
"""

import ctypes
import sys

# Names and numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Tells glibc to keep freed memory; True if it did. Elsewhere (macOS, musl) nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 * 2**20, _M_ARENA_MAX: 1}
    return all(mallopt(name, value) for name, value in settings.items())
