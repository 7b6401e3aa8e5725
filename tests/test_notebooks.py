"""Every notebook runs from its first cell to its last, as a user would run it, on fewer steps."""

import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.py"))


# Each takes as long to compile as all it does: two of them run by default, and the others every night.
DEFAULT = ("01_train_and_sample", "02_import_evaluate_export")


@pytest.mark.parametrize(
    "notebook",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in DEFAULT else pytest.mark.nightly)
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs(notebook: Path, user_environment: dict[str, str], tmp_path: Path) -> None:
    environment = {**user_environment, "SLMJAX_NOTEBOOK_STEPS": "2"}
    done = subprocess.run(
        [sys.executable, notebook], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and list(tmp_path.glob("runs/notebook-*/report.html"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        assert notebook.read_text().startswith("# %%"), f"{notebook.name} is no py:percent notebook"
