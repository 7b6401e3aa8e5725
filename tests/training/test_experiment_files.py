"""Experiment files: they import the modules of their folder, which are copied into the run with them."""

from pathlib import Path

import pytest

from slmjax.training import recipes

FILE = """
import parts.layers
from rates import RATE
from slmjax import load_experiment
from slmjax.training import Experiment, OptimConfig

def experiment() -> Experiment:
    import dataclasses
    from later import NAME
    nano = load_experiment("nano")
    run = dataclasses.replace(nano.run, name=NAME + parts.layers.SUFFIX)
    return dataclasses.replace(nano, optim=OptimConfig(lr=RATE), run=run)
"""


def write_folder(folder: Path, *, rate: float) -> Path:
    """An experiment with a module, a package and a module that its function imports."""
    (folder / "parts").mkdir(parents=True)
    (folder / "rates.py").write_text(f"RATE = {rate}\n")
    (folder / "later.py").write_text(f"NAME = 'rate-{rate}'\n")
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "layers.py").write_text("SUFFIX = '-x'\n")
    (folder / "unused.py").write_text("")
    (folder / "mine.py").write_text(FILE)
    return folder / "mine.py"


def test_modules_of_the_folder_are_imported_and_copied(tmp_path: Path) -> None:
    file = write_folder(tmp_path / "first", rate=0.25)
    assert recipes.load_experiment(str(file)).optim.lr == 0.25
    # A file whose folder has no such modules does not hide that they are those of the first folder.
    (tmp_path / "between").mkdir()
    (tmp_path / "between" / "nothing.py").write_text("")
    recipes.run_file(tmp_path / "between" / "nothing.py")
    other = write_folder(tmp_path / "second", rate=0.5)
    loaded = recipes.load_experiment(str(other))
    assert (loaded.optim.lr, loaded.run.name) == (0.5, "rate-0.5-x"), "modules of the first folder"
    run = tmp_path / "run"
    run.mkdir()
    recipes.copy_code(other, run)
    copies = sorted(str(path.relative_to(run)) for path in run.rglob("*.py"))
    modules = ("later.py", "parts/__init__.py", "parts/layers.py", "rates.py")
    assert copies == ["experiment.py", *(f"{recipes.MODULES}/{name}" for name in modules)]
    # The copy is complete: it runs without the folder that it came from.
    (tmp_path / "second").rename(tmp_path / "gone")
    assert recipes.load_experiment(str(run / "experiment.py")).run.name == "rate-0.5-x"
    recipes.copy_code(run / "experiment.py", run)  # as a resumed run does
    assert (run / "experiment.py").read_text() == (tmp_path / "gone" / "mine.py").read_text()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "returned an int, not an Experiment"),
        ("pass", "returned None .is a `return` missing"),
        ("from slmjax.training import Experiment\n    return Experiment", "returned a class, Experiment"),
    ],
)
def test_a_function_that_returns_something_else(tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def experiment():\n    {body}\n")
    with pytest.raises(ValueError, match=message):
        recipes.load_experiment(str(file))
