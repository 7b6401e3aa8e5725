"""What every test runs under: 8 CPU devices, strict shapes and types, caches of its own.

Subprocesses inherit the caches. A test that runs a command as a user would takes `user_environment`, which
has one device.
"""

import gc
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

# Before jax is imported: the number of devices and the platform are read once. Tests compile much and compute
# little, so the CPU compiler does not optimise, here and in the commands that tests start: half the time in
# all. Each worker inherits what the process that starts it has set.
ORIGINAL_XLA_FLAGS = os.environ.setdefault("SLMJAX_TESTS_ORIGINAL_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
# Loops that XLA emits itself compile in two thirds of the time of those that pass through MLIR. Later
# versions have the second kind alone, and an unknown flag ends the process.
HAS_OWN_LOOPS = importlib.metadata.version("jaxlib").startswith("0.10.")
# Devices wait for each other in collectives; on busy cores that may be longer than the 40 s after which XLA
# would end the process.
COMMON_XLA_FLAGS = " ".join(
    [
        ORIGINAL_XLA_FLAGS,
        "--xla_backend_optimization_level=0",
        *(["--xla_cpu_use_fusion_emitters=false"] if HAS_OWN_LOOPS else []),
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
).strip()
os.environ["XLA_FLAGS"] = f"{COMMON_XLA_FLAGS} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu compiles for TPUs, and does not look for one
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nor does it keep other processes from doing so

# A program that two tests or processes run is compiled once. A cache named by JAX_COMPILATION_CACHE_DIR
# outlives the session.
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

from slmjax import startup  # noqa: E402

startup.keep_memory = lambda: True  # this process has many other things to do


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Lets go of compiled programs between files once they are many: each takes maps of memory, of which
    Linux gives a process 65,530.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


# Workers take one file after another. The longest come first, so that no worker is left alone with one at the
# end.
LONGEST_FILES = (
    "test_notebooks.py",
    "test_trainer_on_a_mesh.py",
    "test_multiprocess.py",
    "test_quantized_runs.py",
    "test_quantized_model.py",
    "test_trained.py",
    "test_training_imported.py",
    "test_trainer.py",
    "test_mesh.py",
    "test_results.py",
    "test_composed.py",
    "test_import_export.py",
    "test_sampling.py",
    "test_cli.py",
    "test_step.py",
    "test_families.py",
    "test_evaluators.py",
    "test_distill_runs.py",
    "test_linear_divergence.py",
    "test_docs.py",
    "test_newcomer_errors.py",
    "test_distill_step.py",
    "test_generating.py",
    "test_latent.py",
    "test_moe.py",
    "test_coding.py",
    "test_experiments.py",
    "test_export.py",
    "test_estimators.py",
    "test_profiling.py",
    "test_memory.py",
    "test_teachers.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep xdist from ordering files by their number of tests: long files have few."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. The sort is stable, so each file's tests keep their order."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_collection_finish() -> None:
    """Collect garbage less often: imports stay, and traces make millions of objects that live on."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    shutil.rmtree(SESSION_CACHE, ignore_errors=True)


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def user_environment() -> dict[str, str]:
    """Environment variables for a command run as a user runs it: one CPU device, the session's caches."""
    # What a small model takes longest for is compilation: it is done in haste, and the commands of one
    # session share all of it.
    return {
        **os.environ,
        "XLA_FLAGS": COMMON_XLA_FLAGS,
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="session")
def run_command(user_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_command("train", "tiny.py", cwd=...)`: the slmjax command in a process of its own."""

    def run(*arguments: str, cwd: Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "slmjax", *arguments]
        return subprocess.run(
            command, cwd=cwd, env=user_environment, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with text.txt, 60 kB of English, and tiny.py, an experiment that trains on it."""
    directory = tmp_path_factory.mktemp("workplace")
    (directory / "text.txt").write_text(
        "\n".join(topics[name] for name in sorted(topics))[:60_000], encoding="utf-8"
    )
    shutil.copyfile(ROOT / "tests" / "tiny.py", directory / "tiny.py")
    return directory


@pytest.fixture(scope="session")
def trained(
    workplace: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> subprocess.CompletedProcess[str]:
    """`slmjax train tiny.py --json`, run once without interruption; the result is its standard output."""
    done = run_command("train", "tiny.py", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def libtpu() -> None:
    """For a test that compiles for TPUs: the compiler is there, as it must be in CI."""
    if importlib.util.find_spec("libtpu") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "libtpu is not installed: it comes with the extra `plan`, on Linux x86_64"
        )


@pytest.fixture(autouse=True)
def no_mesh_left_behind() -> Iterator[None]:
    """A test that sets a mesh and does not unset it would change the tests after it."""
    yield
    assert jax.sharding.get_abstract_mesh().empty, "this test left a mesh set: use `with jax.set_mesh(mesh):`"
