"""slmjax.telemetry.recorded_environment: what a result depends on, without secrets."""

import subprocess
import sys
from pathlib import Path

import pytest

from slmjax.telemetry import recorded_environment
from slmjax.telemetry.recorded_environment import REDACTED
from slmjax.telemetry.run_directory import RunDirectory


def test_environment_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "WANDB_API_KEY HF_TOKEN DATABASE_URL JAX_API_KEY JAX_PROXY TPU_TOKEN xla_password NCCL_X PYTHON_X"
    for name in names.split():
        monkeypatch.setenv(name, "http://user:canary@proxy")
    monkeypatch.setenv("SLMJAX_CACHE", "gs://user:canary@bucket/cache")
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "slmjax",
            "train",
            "--track.api-key",
            "canary",
            "--hf-token=canary",
            "--tokenizer.vocab-size",
            "512",
            "--data.path",
            "https://me:canary@host/a.txt",
        ],
    )
    shown = recorded_environment.environment()
    assert "canary" not in RunDirectory(tmp_path).write_json("environment.json", shown).read_text()
    assert shown["variables"]["JAX_ENABLE_X64"] == "0"
    assert shown["command"][2:] == [
        "--track.api-key",
        REDACTED,
        f"--hf-token={REDACTED}",
        "--tokenizer.vocab-size",
        "512",
        "--data.path",
        f"https://{REDACTED}@host/a.txt",
    ]
    assert shown["variables"]["SLMJAX_CACHE"] == f"gs://{REDACTED}@bucket/cache"


def test_environment_names_what_a_result_depends_on() -> None:
    shown = recorded_environment.environment()
    assert shown["packages"]["jax"] and shown["packages"]["optax"]
    assert shown["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (shown["backend"], len(shown["devices"]), shown["num_processes"]) == ("cpu", 8, 1)
    assert "XLA_FLAGS" in shown["variables"]


def git(directory: Path, *arguments: str) -> None:
    identity = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "core.hooksPath=/dev/null",
    ]
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


def test_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "slmjax" / "runlog.py"
    module.parent.mkdir()
    module.write_text("")
    monkeypatch.setattr(recorded_environment, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    nowhere = {"commit": None, "dirty": None}
    assert recorded_environment.commit() == nowhere
    git(tmp_path, "init", "--quiet")
    assert recorded_environment.commit() == nowhere, (
        "a package inside another project's folder is not that project"
    )
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    result = recorded_environment.commit()
    assert len(result["commit"]) == 40 and result["dirty"] is False
    module.write_text("changed")
    assert recorded_environment.commit() == {"commit": result["commit"], "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recorded_environment.commit() == nowhere, "git is not installed"
