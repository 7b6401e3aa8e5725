"""What has to happen in a process before jax is imported: the one place for it, called by the command line.

XLA's CPU client takes its large buffers anew at every step, and glibc by default gives each back to the kernel and faults it
in again, page by page. `keep_memory` makes glibc keep what it once had: steps on CPU are spared the faults, and the process
stays as large as its largest moment (`benchmarks/keep_memory.py` measures what it is worth).

`keep_compiled` has programs that were compiled once kept on disk for the next process (`benchmarks/first_step.py`).
"""

import ctypes
import importlib.util
import os
import platform
import sys
from pathlib import Path

# Names and numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8

CACHED_BYTES = 4 * 2**30  # of compiled programs: the least recently used go first


def keep_memory() -> bool:
    """Tells glibc to keep freed memory; True if it did. Elsewhere (macOS, musl) nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 * 2**20, _M_ARENA_MAX: 1}
    return all(mallopt(name, value) for name, value in settings.items())


def cache_directory() -> Path:
    """Where prepared data and compiled programs are kept: $SLMJAX_CACHE, else ~/.cache/slmjax."""
    return Path(os.environ.get("SLMJAX_CACHE") or "~/.cache/slmjax").expanduser()


def keep_compiled() -> None:
    """Has jax keep what it compiles, unless the environment says where already (empty: nowhere). A machine's name is part of
    the place: programs are compiled for its processor, and a home directory may be shared."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_directory() / "compiled" / (platform.node() or "machine"))
    if importlib.util.find_spec("filelock") is not None:  # which jax needs to keep to a size
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHED_BYTES))
