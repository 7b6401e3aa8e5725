"""What has to happen in a process before jax is imported: the one place for it, called by the package and the
command line.

XLA's CPU client takes its large buffers anew at every step, and glibc by default gives each back to the
kernel and faults it in again, page by page. `keep_memory` makes glibc keep what it once had: steps on CPU are
spared the faults, and the process stays as large as its largest moment (`benchmarks/keep_memory.py` measures
what it is worth).

`keep_compiled` has programs that were compiled once kept on disk for the next process
(`benchmarks/first_step.py`).

`without_tpu` spares machines that have libtpu for its compiler alone the complaints of its runtime;
`compile_for_tpu` is for programs that compile for TPUs which are not there.
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
    """Has jax keep what it compiles, unless the environment says where already (empty: nowhere). A machine's
    name is part of
    the place: programs are compiled for its processor, and a home directory may be shared."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
        cache_directory() / "compiled" / (platform.node() or "machine")
    )
    if importlib.util.find_spec("filelock") is not None:  # which jax needs to keep to a size
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHED_BYTES))


# libtpu asks its surroundings what slice of a pod it is on, and says on standard error that nothing answered.
# These are the answers it looks for first; no topology that is compiled for depends on them.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def without_tpu() -> None:
    """Where libtpu is installed and no TPU is there, keeps it from looking for one; what the environment says
    already stays.
    """
    if _is_installed("libtpu") and not _has_tpu():
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)


def compile_for_tpu() -> None:
    """For a program that compiles for TPUs which need not be there, before it imports jax: it runs on the
    CPU, and several may at once.

    `jax.experimental.topologies.get_topology_desc("v5e:2x2", "tpu")` then gives the devices to compile for.
    """
    without_tpu()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # else libtpu lets one process in, as if it had the TPU to itself


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what a finder may also say
        return False
