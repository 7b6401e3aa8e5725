"""The built-in experiments, and the loading of an experiment by built-in name or Python file.

load_experiment("nano")                          # or "shakespeare_char", "finetune"
load_experiment("experiments/nano_moe.py")       # a file with `def experiment() -> Experiment`

As a script, an experiment file imports the modules of its own folder by their names. `copy_code` copies the
file and those modules into a run directory, from which they can be run in the same way.
"""

import contextlib
import importlib.util
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from slmjax.config import near_names
from slmjax.data.config import DataConfig, Packing, Split
from slmjax.data.tokenizers import BpeTokenizer, CharTokenizer, FileTokenizer
from slmjax.models import zoo
from slmjax.training.experiment import EvalConfig, Experiment, FromModel, RunConfig
from slmjax.training.optim import OptimConfig, Optimizer, Schedule


def nano() -> Experiment:
    """The default: a small Qwen3-like decoder on Python's own standard library, minutes on a laptop."""
    return Experiment(
        model=zoo.nano(),
        data=DataConfig(sequence_length=256, batch_size=8, heldout_fraction=0.03),
        tokenizer=BpeTokenizer(vocab_size=4096),
        # Tuned by experiments/nano_tuning.py; experiments/LOG.md has the results.
        optim=OptimConfig(
            kind=Optimizer.MUON,
            muon_lr=0.01,
            muon_iterations=3,
            lr=2e-2,
            schedule=Schedule.LINEAR,
            min_lr_ratio=0.0,
            warmup_steps=20,
        ),
        eval=EvalConfig(every=130, max_documents=8),
        run=RunConfig(name="nano", steps=520, sample_prompts=("def main(", "import ")),
    )


def shakespeare_char() -> Experiment:
    """The well-known CPU setting of character models, for the text that `--data.path FILE` names."""
    return Experiment(
        model=zoo.shakespeare_char(),
        data=DataConfig(
            sequence_length=64,
            batch_size=12,
            split=Split.TAIL,
            heldout_fraction=0.1,
            # One text without documents: rows are cut anywhere, as in the original.
            packing=Packing.CONCATENATE,
        ),
        tokenizer=CharTokenizer(),
        optim=OptimConfig(lr=1e-3, min_lr_ratio=0.1, warmup_steps=100, schedule=Schedule.COSINE),
        eval=EvalConfig(every=250, overlap=0, max_documents=None),
        run=RunConfig(name="shakespeare-char", steps=2000),
    )


NO_MODEL = "MODEL"  # in the place of a model that is named later


def finetune() -> Experiment:
    """Continue a trained model on the text that `--data.path FILE` names; needs `--init-from MODEL`.

    `starting_from` puts the model to start from in the place of the one here.
    """
    return Experiment(
        model=zoo.smollm2_135m(),
        init=FromModel(path=NO_MODEL),
        data=DataConfig(sequence_length=512, batch_size=8),
        tokenizer=FileTokenizer(path=f"{NO_MODEL}/tokenizer"),
        # Rates that keep what a model has learnt, and a short warm-up as the moments begin at zero.
        optim=OptimConfig(
            lr=5e-5,
            schedule=Schedule.COSINE,
            min_lr_ratio=0.0,
            warmup_steps=0.05,
            betas=(0.9, 0.999),
            weight_decay=0.01,
        ),
        eval=EvalConfig(every=50),
        run=RunConfig(name="finetune", epochs=2, log_every=5),
    )


BUILT_IN: Mapping[str, Callable[[], Experiment]] = {
    "nano": nano,
    "shakespeare_char": shakespeare_char,
    "finetune": finetune,
}


def load_experiment(name: str) -> Experiment:
    """Return the experiment of a built-in name or of a Python file; the file's code is run.

    Raises:
      ValueError: there is no such name or file, or the file has no `experiment()` that returns an Experiment.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    path = Path(name)
    if path.suffix != ".py":
        raise ValueError(
            f"there is no built-in experiment {name!r}.{near_names(name, BUILT_IN)} Built in are "
            f"{', '.join(BUILT_IN)}; a file of your own ends in .py and has `def experiment() -> Experiment`"
        )
    build = getattr(run_file(path), "experiment", None)
    if not callable(build):
        raise ValueError(
            f"{path} needs a function `def experiment() -> Experiment` that returns the experiment, and has "
            "none"
        )
    with errors_named(path):
        experiment = build()
    if not isinstance(experiment, Experiment):
        raise ValueError(f"experiment() of {path} returned {described(experiment)}, not an Experiment")
    return experiment


def described(value: object) -> str:
    """Describe what a function of a user's file returned, for an error."""
    if value is None:
        return "None (is a `return` missing?)"
    if isinstance(value, type):
        return f"a class, {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


# Modules that experiment files import from their own folders, where they are copied to in a run directory.
MODULES = "experiment_modules"

# The entries of sys.path that the newest experiment file of this process needs, and all files' folders.
_added: list[str] = []
_folders: list[Path] = []


def run_file(path: Path) -> ModuleType:
    """Run a Python file and return its module; it can import the modules of its folder.

    Raises:
      ValueError: there is no such file, or its code fails.
    """
    if not path.is_file():
        near = near_names(path.name, (other.name for other in path.parent.glob("*.py")))
        raise ValueError(f"there is no Python file {path}.{near}")
    spec = importlib.util.spec_from_file_location(f"slmjax_experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    # Listed among the imported modules, because dataclasses look up their annotations there.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    _make_importable(path.resolve().parent)
    with errors_named(path):
        spec.loader.exec_module(module)
    return module


def _make_importable(folder: Path) -> None:
    """Let Python find modules in a folder first, as for a script there, instead of earlier files' folders."""
    folders = [each for each in (folder, folder / MODULES) if each.is_dir()]
    # Of all earlier files: those between may have had no module of this name.
    for other in _folders:
        if other in folders:
            continue
        # A module that has the same name in the new folder is another module.
        for name, _ in _modules_in(other):
            top = name.split(".")[0]
            if any((each / top).is_dir() or (each / f"{top}.py").is_file() for each in folders):
                del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry not in _added]
    _added[:] = [str(each) for each in folders if str(each) not in sys.path]
    sys.path[:0] = _added
    _folders.extend(each for each in folders if each not in _folders)


def _modules_in(folder: Path) -> list[tuple[str, Path]]:
    """Return the imported modules that are files of this folder, each under the name that it has there."""
    modules = []
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None)
        # Compared by name, so that packages which are installed below the folder are not among them.
        path = folder.joinpath(*name.split("."))
        files = (path.with_suffix(".py"), path / "__init__.py")
        if file and name.split(".")[0] != "slmjax" and Path(file) in files:
            modules.append((name, Path(file)))
    return modules


def copy_code(path: Path, run: Path, *, name: str = "experiment.py") -> None:
    """Copy an experiment file, and the modules that it imported from its folder, into a run directory.

    The copy of the file has the name `name`.
    """
    # On resuming, the file may be the copy itself, and a file cannot be copied onto itself.
    folder = path.resolve().parent
    if folder == run.resolve():
        return
    shutil.copyfile(path, run / name)
    for file in code_files(path)[1:]:
        copy = run / MODULES / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def code_files(path: Path) -> list[Path]:
    """Return an experiment file, and the modules that it imported from its folder, without links."""
    path = path.resolve()
    modules = {file for _, file in _modules_in(path.parent)} - {path}
    return [path, *sorted(modules)]


@contextlib.contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Raise errors of a file's own code as one message with its line."""
    try:
        yield
    except Exception as error:
        # The last line of the file itself: deeper frames are of libraries that it called.
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).absolute() == path.absolute()]
        location = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{path}{location}: {type(error).__name__}: {error}") from error
