"""The wheel, installed in a fresh environment outside the checkout, trains a model."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `make wheel` builds."""
    target = tmp_path_factory.mktemp("dist")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", target)
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT, cwd=target)
    (built,) = target.glob("slmjax-*.whl")
    return built


@pytest.mark.nightly
def test_the_wheel_holds_the_whole_package(wheel: Path) -> None:
    tracked = run("git", "ls-files", "slmjax", cwd=ROOT).split()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("slmjax/")}
    assert packed >= set(tracked) and len(tracked) > 100


@pytest.mark.nightly
def test_the_installed_wheel_trains(
    wheel: Path, workplace: Path, user_environment: dict[str, str], tmp_path: Path
) -> None:
    """Dependencies come from the environment of the tests, slmjax itself from the wheel alone."""
    fresh = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=tmp_path)
    python = fresh / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=tmp_path)
    paths = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    # Python ignores .pth files in a directory that a .pth file adds: an editable slmjax stays hidden.
    (Path(paths.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    environment = {name: value for name, value in user_environment.items() if name != "PYTHONPATH"}
    place = run(python, "-c", "import slmjax; print(slmjax.__file__)", cwd=tmp_path, environment=environment)
    assert Path(place.strip()).is_relative_to(fresh)
    command = (fresh / "bin" / "slmjax", "train", workplace / "tiny.py", "--json", "--run.steps", "4")
    options = ("--data.path", workplace / "text.txt", "--optim.warmup-steps", "1")
    result = json.loads(run(*command, *options, cwd=tmp_path, environment=environment))
    assert result["status"] == "finished" and result["step"] == 4
    assert (tmp_path / result["run_dir"] / "result.json").is_file()
