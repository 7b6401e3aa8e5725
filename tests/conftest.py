"""What every test runs under: 8 CPU devices, strict shapes and types, caches of its own.

Subprocesses inherit the caches. A test that runs a command as a user would takes `user_environment`, which has one device.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported: the number of devices and the platform are read once.
ORIGINAL_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{ORIGINAL_XLA_FLAGS} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

# A program that two tests or processes run is compiled once. A cache named by JAX_COMPILATION_CACHE_DIR outlives the session.
SESSION_CACHE = Path(tempfile.mkdtemp(prefix="slmjax-tests-"))
os.environ["SLMJAX_CACHE"] = str(SESSION_CACHE / "data")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(SESSION_CACHE / "compiled"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before slmjax is imported: every annotation becomes a check. An int may stand for a float, as in PEP 484.
jaxtyping.install_import_hook("slmjax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_unconfigure() -> None:
    shutil.rmtree(SESSION_CACHE, ignore_errors=True)


@pytest.fixture
def user_environment() -> dict[str, str]:
    """Environment variables for a command run as a user runs it: one CPU device, the session's caches."""
    return {**os.environ, "XLA_FLAGS": ORIGINAL_XLA_FLAGS}


@pytest.fixture(autouse=True)
def no_mesh_left_behind() -> Iterator[None]:
    """A test that sets a mesh and does not unset it would change the tests after it."""
    yield
    assert jax.sharding.get_abstract_mesh().empty, "this test left a mesh set: use `with jax.set_mesh(mesh):`"
