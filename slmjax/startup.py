"""Process settings that must be made before jax is imported; called by the package and the command line.

`keep_memory` tells glibc to keep freed memory. XLA's CPU client allocates its large buffers at every step,
and by default glibc returns each to the kernel and faults it in again, page by page. With the setting, steps
on CPU avoid the faults, and the process stays as large as its peak (`benchmarks/keep_memory.py` measures the
gain).

`keep_compiled` turns on jax's compilation cache on disk (`benchmarks/first_step.py`), in which the members of
a study and the sessions of a run find the programs of those before them.

`without_tpu` silences the runtime of libtpu on machines that have libtpu for its compiler alone;
`compile_for_tpu` is for programs that compile for TPUs which are not present.
"""

import ctypes
import glob
import importlib.util
import os
import platform
import sys
from pathlib import Path

# Names and numbers of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

CACHED_BYTES = 4 * 2**30  # size of the compilation cache; the least recently used programs are deleted


def keep_memory() -> bool:
    """Tell glibc to keep freed memory; return True if it does. No effect elsewhere (macOS, musl)."""
    # musl and macOS have no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # No mmap for large buffers, no trimming of the heap, growth in large pieces, one arena for all threads.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 * 2**20, _M_ARENA_MAX: 1}
    return all(mallopt(name, value) for name, value in settings.items())


def cache_directory() -> Path:
    """Return the directory of prepared data and compiled programs: $SLMJAX_CACHE, else ~/.cache/slmjax."""
    return Path(os.environ.get("SLMJAX_CACHE") or "~/.cache/slmjax").expanduser()


def keep_compiled() -> None:
    """Turn on jax's compilation cache, unless JAX_COMPILATION_CACHE_DIR is set (empty: off).

    The directory has the name of the machine: programs are compiled for its processor, and several machines
    may share a home directory.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = str(cache_directory() / "compiled" / (platform.node() or "machine"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    # jax needs filelock to limit the size of its cache, and fails without it.
    has_limit = importlib.util.find_spec("filelock") is not None
    if has_limit:
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHED_BYTES))
    # jax reads the variables when it is imported, which a program may have done before.
    jax = sys.modules.get("jax")
    if jax is None or jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    if has_limit:
        jax.config.update("jax_compilation_cache_max_size", CACHED_BYTES)
    # With its first program jax decides whether it has a cache.
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


# libtpu queries a metadata server for its slice of a pod and complains on standard error when there is none.
# These variables are read first. No topology to compile for depends on them.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def without_tpu() -> None:
    """Keep libtpu from looking for a TPU where there is none; variables that are already set stay."""
    # On a machine with a TPU these variables would hide it.
    if _is_installed("libtpu") and not _has_tpu():
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)


def compile_for_tpu() -> None:
    """Prepare a program, before it imports jax, to compile for TPUs that need not be present.

    It runs on the CPU, and several such programs may run at a time.
    `jax.experimental.topologies.get_topology_desc("v5e:2x2", "tpu")` then gives the devices to compile for.
    """
    without_tpu()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # By default libtpu admits one process, as if it had the TPU to itself.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def _has_tpu() -> bool:
    # The devices of TPU VMs, of older and newer generations.
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # some import finders raise it instead of returning None
        return False
