"""What a result depends on besides its settings: versions, devices, the commit, the command, some variables.

    run.write_json("environment.json", environment())

Run directories are passed on, so no secret may get into them: variables are recorded only if they are listed
here, and passwords within URLs are hidden.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("slmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")

# Variables that can change the computation or its speed. Others stay out, whatever their names are: values
# of some that begin with JAX_ (a proxy's, for example) may hold a password.
RECORDED_VARIABLES = frozenset(
    """
    JAX_COMPILATION_CACHE_DIR JAX_CPU_COLLECTIVES_IMPLEMENTATION JAX_CPU_ENABLE_ASYNC_DISPATCH
    JAX_DEBUG_INFS JAX_DEBUG_NANS JAX_DEFAULT_MATMUL_PRECISION JAX_DEFAULT_PRNG_IMPL JAX_DISABLE_JIT
    JAX_ENABLE_COMPILATION_CACHE JAX_ENABLE_X64 JAX_LOCAL_DEVICE_IDS JAX_NUM_CPU_DEVICES
    JAX_NUMPY_DTYPE_PROMOTION JAX_NUMPY_RANK_PROMOTION JAX_OPTIMIZATION_LEVEL JAX_PLATFORMS
    JAX_PLATFORM_NAME JAX_THREEFRY_PARTITIONABLE JAX_USE_SHARDY_PARTITIONER

    XLA_CLIENT_MEM_FRACTION XLA_FLAGS XLA_PYTHON_CLIENT_ALLOCATOR XLA_PYTHON_CLIENT_MEM_FRACTION
    XLA_PYTHON_CLIENT_PREALLOCATE

    LIBTPU_INIT_ARGS TPU_ACCELERATOR_TYPE TPU_CHIPS_PER_PROCESS_BOUNDS TPU_PROCESS_BOUNDS TPU_TOPOLOGY
    TPU_VISIBLE_CHIPS TPU_VISIBLE_DEVICES TPU_WORKER_ID

    CUDA_DEVICE_ORDER CUDA_VISIBLE_DEVICES NVIDIA_TF32_OVERRIDE NVIDIA_VISIBLE_DEVICES TF_CPP_MIN_LOG_LEVEL
    TF_GPU_ALLOCATOR NCCL_ALGO NCCL_IB_DISABLE NCCL_NVLS_ENABLE NCCL_P2P_DISABLE NCCL_PROTO
    NCCL_SOCKET_IFNAME

    GLIBC_TUNABLES MALLOC_ARENA_MAX MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ MKL_NUM_THREADS
    OMP_NUM_THREADS OPENBLAS_NUM_THREADS PYTHONHASHSEED PYTHONOPTIMIZE RAYON_NUM_THREADS
    TOKENIZERS_PARALLELISM

    SLMJAX_CACHE SLMJAX_DISTRIBUTED SLMJAX_FAULT SLMJAX_FUSED SLMJAX_JOIN_SECONDS
    """.split()
)
_SECRET_OPTION = re.compile(r"--?[\w.-]*(key|token|secret|password|credentials?)", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
REDACTED = "<redacted>"


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its config, without secrets.

    These are versions, devices, the machine, the commit, the command line and environment variables.
    """
    # Not at the top: commands that only read run directories start faster.
    import jax

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "packages": packages(),
        "backend": jax.default_backend(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "num_processes": jax.process_count(),
        **commit(),
        "command": redact_command(sys.argv),
        "variables": recorded_variables(os.environ),
    }


def packages() -> dict[str, str | None]:
    """Return the versions of the packages that a computation depends on; None for what is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return None


def source_hash() -> str:
    """Return 16 hex digits of the SHA-256 of slmjax's source files, in a checkout or an installed copy."""
    package = Path(__file__).resolve().parents[1]
    return files_hash(sorted(package.rglob("*.py")), root=package)


def files_hash(files: list[Path], *, root: Path) -> str:
    """Return 16 hex digits of the SHA-256 of files with their names below `root`."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        # With lengths, so that no two lists of files have the same text.
        digest.update(f"{file.relative_to(root)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def commit() -> dict[str, Any]:
    """Return the commit of slmjax's checkout and whether files differ from it; None outside of a checkout."""
    here = Path(__file__).resolve()
    # An installed copy may be inside the checkout of another project, for example in its virtual environment.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return {"commit": None, "dirty": None}
    # Untracked files are ignored: runs and data are often in the checkout.
    status = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(here.parent, "rev-parse", "HEAD"), "dirty": status != ""}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def recorded_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `RECORDED_VARIABLES` that are set, sorted."""
    names = sorted(RECORDED_VARIABLES & variables.keys())
    return {name: _without_passwords(variables[name]) for name in names}


def _without_passwords(text: str) -> str:
    """Return a text in which users and passwords within URLs are hidden."""
    return _URL_PASSWORD.sub(REDACTED, text)


def redact_command(arguments: list[str]) -> list[str]:
    """Return a command line in which the values of secret options, and passwords in URLs, are hidden.

    Secret options are those whose name ends in key, token, secret, password or credentials.
    """
    shown: list[str] = []
    hide = False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        is_secret = _SECRET_OPTION.fullmatch(option) is not None
        visible = f"{option}={REDACTED}" if is_secret and equals else _without_passwords(argument)
        shown.append(REDACTED if hide else visible)
        # The value of an option is the next argument, unless it follows an equals sign.
        hide = is_secret and not equals
    return shown
