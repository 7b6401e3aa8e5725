"""Mistakes on a command line that are found before jax is imported, which takes a second or more.

    check(command="train", argv=["nanoo"])     # ValueError: there is no built-in experiment 'nanoo'. ...

Only what is certainly wrong is refused here: names that no field has, and files that are not there. All else
is checked where it is used.
"""

import ast
import dataclasses
import difflib
import glob
from collections.abc import Sequence
from pathlib import Path

from slmjax.cli.fields import ALIASES
from slmjax.cli.options import asks_for_help, peek_option, split_experiment, split_positional
from slmjax.cli.source import built_in_experiments, field_kinds
from slmjax.config import near_names

_PRINTED = "the directory that the last line of `slmjax train` printed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directory:
    """A kind of directory that is read."""

    file: str  # that it has, if it is one
    name: str
    instead: str  # what to name instead of another directory


_RUN = Directory(file="config.json", name="not a run directory", instead=_PRINTED)
_MODEL = Directory(
    file="model.json",
    name="neither a run directory nor an imported model",
    instead=f"{_PRINTED}, or one that `slmjax import` wrote",
)
# What options name, and what the first argument of commands is.
_OPTIONS = {"resume": _RUN, "init-from": _MODEL, "teacher": _MODEL}
_REPORTED = Directory(
    file="config.json",
    name="neither a run directory nor the directory of a study",
    instead=f"{_PRINTED}, or the directory of a study",
)
_STUDY_FILES = ("findings.json", "report.json", "studies.json", "plan.json", "members.jsonl")
_COMMANDS = {"eval": _MODEL, "generate": _MODEL, "quantize": _MODEL, "export": _MODEL, "report": _REPORTED}
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json", ".toml", ".ini", ".cfg")
_CONFIG_OPTIONS = ("config", "config-file", "cfg", "yaml")


def _how_to_name() -> str:
    return (
        f"experiments are Python: name a built-in one ({', '.join(built_in_experiments())}) or a file.py "
        "with `def experiment() -> Experiment`, and change settings by options, as in `slmjax train nano "
        "--optim.lr 3e-4 --run.steps 300`"
    )


def check(command: str, argv: Sequence[str]) -> None:
    """Raise ValueError for what is certainly wrong on the command line of a command."""
    if asks_for_help(argv):
        return
    if command in _COMMANDS:
        _check_reading(command, argv)
    if command == "ablate":
        _check_study(argv)
    takes_experiment = command in ("train", "data", "formats", "coordinate-check")
    after_action = split_positional(argv)[1] if command in ("data", "formats") else argv
    name, options = split_experiment(after_action) if takes_experiment else (None, list(after_action))
    if name is not None and command != "formats":
        _check_experiment(name)
    # A file of the user's may define classes with other fields, and a run may name them.
    has_own_classes = (name or "").endswith(".py") or peek_option(options, "--code") is not None
    if not has_own_classes and command not in ("formats", "compare"):
        _check_names(command, options)
    _check_paths(options)


def _check_reading(command: str, argv: Sequence[str]) -> None:
    positionals = [argument for argument in argv if not argument.startswith("-")]
    kind = _COMMANDS[command]
    if not positionals:
        name = "RUN_OR_MODEL_DIR" if command in ("quantize", "export") else "RUN_DIR"
        raise ValueError(
            f"slmjax {command} needs {name}: {kind.instead}. `slmjax {command} --help` lists the options"
        )
    # Only where it stands first: elsewhere it may be the value of an option.
    if argv[0] != positionals[0]:
        return
    if command == "report" and any((Path(argv[0]) / name).is_file() for name in _STUDY_FILES):
        return
    _check_directory(argv[0], argv[0], kind)
    if command == "eval":
        _check_text(Path(argv[0]), argv)


_STUDY = "a Python file with `def study() -> Study`, or the directory of a study that was begun"


def _check_study(argv: Sequence[str]) -> None:
    """Raise ValueError for a command line of `slmjax ablate` that names no study."""
    if not argv:
        raise ValueError(f"slmjax ablate needs STUDY.py or STUDY_DIR: {_STUDY}")
    # Only where it stands first: elsewhere it may be the value of an option.
    if argv[0].startswith("-"):
        return
    path = Path(argv[0])
    if path.is_dir():
        if any((path / name).is_file() for name in ("plan.json", "studies.json")):
            return
        what = "a run directory" if (path / "config.json").is_file() else "not the directory of a study"
        raise ValueError(f"{path} is {what}: name {_STUDY}")
    if path.suffix != ".py":
        raise ValueError(f"{path} is no study: name {_STUDY}.{_near_entries(path)}")
    if not path.is_file():
        near = near_names(path.name, (other.name for other in path.parent.glob("*.py")))
        raise ValueError(f"there is no Python file {path}.{near}")
    names = _names_bound_in(path)
    if names is not None and not {"study", "*"} & names:
        is_experiment = "experiment" in names
        instead = f". It is an experiment: slmjax train {path}" if is_experiment else ""
        raise ValueError(
            f"{path} needs a function `def study() -> Study` that returns the study, and has none{instead}"
        )


def _names_bound_in(path: Path) -> set[str] | None:
    """Return the names that a Python file defines or imports at its top level; None if it is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None  # reported where the file is run, with the line
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names


def _check_text(model: Path, argv: Sequence[str]) -> None:
    """Raise ValueError for an evaluation on text of a model that has no text of its own."""
    others = ("--multiple-choice", "--lm-eval", "--efficiency", "--energy", "--data.", "--path")
    if (model / "config.json").is_file():
        return
    if not any(argument.replace("_", "-").startswith(others) for argument in argv):
        raise ValueError(
            f"{model} is no run, so it has no held-out text of its own: name a text with --data.path FILE, "
            "or measure something else (--multiple-choice FILE, --lm-eval TASK, --efficiency)"
        )


def _check_experiment(name: str) -> None:
    path = Path(name)
    how = _how_to_name()
    if path.suffix == ".py":
        if not path.is_file():
            near = near_names(path.name, (other.name for other in path.parent.glob("*.py")))
            raise ValueError(f"there is no Python file {path}.{near}")
    elif name not in built_in_experiments():
        if path.suffix in _CONFIG_SUFFIXES:
            raise ValueError(f"{name} is no experiment: {how}")
        if (path / "config.json").is_file() or (path / "model.json").is_file():
            raise ValueError(
                f"{name} is a run or a model: continue a run with --resume {name}, or start from its "
                f"parameters with --init-from {name}"
            )
        if path.exists():
            raise ValueError(f"{name} is no experiment: {how}. A text is named with --data.path {name}")
        near = near_names(name, built_in_experiments())
        raise ValueError(f"there is no built-in experiment {name!r}.{near} {how[0].upper()}{how[1:]}")


def _check_names(command: str, options: Sequence[str]) -> None:
    """Raise ValueError for an option with a part that no field has."""
    for argument in options:
        name = argument.removeprefix("--").partition("=")[0].replace("_", "-")
        if not argument.startswith("--") or not name:
            continue
        if name in _CONFIG_OPTIONS:
            raise ValueError(f"slmjax {command} has no option --{name}: {_how_to_name()}")
        parts = name.split(".")
        for index, part in enumerate(parts):
            if _is_known(part):
                continue
            # Names of fields, with the rest of the path as it is.
            known = [*ALIASES, *(field.replace("_", "-") for field in field_kinds())]
            near = difflib.get_close_matches(part, known, n=2, cutoff=0.6)
            paths = [".".join([*parts[:index], other, *parts[index + 1 :]]) for other in near]
            hint = f" Did you mean {' or '.join(f'--{path}' for path in paths)}?" if paths else ""
            raise ValueError(
                f"slmjax {command} has no option --{name}.{hint} `slmjax {command} --help all` lists them"
            )


def _is_known(part: str) -> bool:
    name = part.replace("-", "_")
    return (
        part.isdigit()
        or part in ALIASES
        or name in field_kinds()
        or name.removeprefix("no_") in field_kinds()
    )


def _check_paths(options: Sequence[str]) -> None:
    for option, kind in _OPTIONS.items():
        path = peek_option(options, f"--{option}")
        if path is not None and path != "None":
            _check_directory(f"--{option} {path}", path, kind)
    for option in ("--data.path", "--code"):
        text = peek_option(options, option)
        if text is None or text == "None" or glob.has_magic(text):
            continue
        path = Path(text).expanduser()
        if not path.exists():
            place = path.parent.absolute()
            raise ValueError(f"{option} {text} does not exist (looked in {place}).{_near_entries(path)}")


def _check_directory(what: str, text: str, kind: Directory) -> None:
    """Raise ValueError for a path that is no directory of this kind."""
    path = Path(text)
    if not path.is_dir():
        if path.is_file():
            raise ValueError(f"{what} is a file. Name {kind.instead}")
        raise ValueError(f"{what} is no directory that exists.{_near_entries(path)} Name {kind.instead}")
    if not (path / kind.file).is_file():
        raise ValueError(f"{what} is {kind.name}: it has no {kind.file}. Name {kind.instead}")


def _near_entries(path: Path) -> str:
    """Return a hint with the names in the path's directory that are like its own."""
    entries = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return near_names(path.name, entries)
