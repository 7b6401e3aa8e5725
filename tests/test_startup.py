"""slmjax.startup: the environment variables that are set before jax is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slmjax import startup

ROOT = Path(__file__).resolve().parent.parent
TOLD = (
    "TPU_SKIP_MDS_QUERY",
    "TPU_ACCELERATOR_TYPE",
    "TPU_WORKER_HOSTNAMES",
    "ALLOW_MULTIPLE_LIBTPU_LOAD",
    "JAX_PLATFORMS",
)


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOLD:
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(startup, "_is_installed", lambda module: True)
    monkeypatch.setattr(startup, "_has_tpu", lambda: False)


def test_a_machine_without_a_tpu_is_told_so(untold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    startup.without_tpu()
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1" and os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert "JAX_PLATFORMS" not in os.environ, "a GPU that is there would not be used"


@pytest.mark.parametrize("lacks", ["_is_installed", "_has_tpu"])
def test_other_machines_are_left_alone(untold: None, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    monkeypatch.setattr(startup, lacks, lambda *_: lacks == "_has_tpu")
    startup.without_tpu()
    assert not set(TOLD) & set(os.environ)


def test_programs_for_tpus_run_on_the_cpu(untold: None) -> None:
    startup.compile_for_tpu()
    assert os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"


@pytest.mark.skipif(startup._has_tpu(), reason="with a TPU, its runtime may print messages")
def test_jax_starts_in_silence() -> None:
    """As in a user's notebook: no platform is chosen, so that jax looks for a TPU wherever libtpu is
    installed.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in TOLD and not name.startswith("TF_CPP")
    }
    program = "import slmjax, jax; print(jax.default_backend())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.strip() in ("cpu", "gpu")


@pytest.mark.parametrize("imports", ["import jax, slmjax", "import slmjax, jax"])
def test_python_programs_keep_compiled_programs(tmp_path: Path, imports: str) -> None:
    """As commands do, whichever is imported first; a cache of the user's own stays."""
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    environment |= {"SLMJAX_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # With a program before the import of slmjax: jax then decides whether it has a cache.
    program = (
        f"{imports.replace(', slmjax', '; jax.jit(lambda x: x + 1)(1.0); import slmjax')}; "
        "jax.jit(lambda x: x * 2)(1.0); print(jax.config.jax_compilation_cache_dir)"
    )
    command = [sys.executable, "-c", program]
    settings = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, env=environment, **settings)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path / "compiled" and any(tmp_path.rglob("*-cache"))


def test_a_cache_that_is_turned_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    startup.keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == ""
