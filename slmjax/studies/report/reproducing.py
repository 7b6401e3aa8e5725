"""The commands that train a study again, complete and from a fresh place.

reproducing_commands("studies/width", runs, size="small")
# ("git checkout c0ffee", "slmjax ablate experiments/width_study.py --seeds 5")
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from slmjax.studies.report.records import SEVERAL
from slmjax.studies.study_directory import STUDY_FILE
from slmjax.telemetry.report.reading import RunRecords


def reproducing_commands(
    directory: str | Path, runs: Sequence[RunRecords], *, size: str | None
) -> tuple[str, ...]:
    """Return the commands that train the study of a directory again.

    The study's file is named by its path in its repository where that has it unchanged. Otherwise it is the
    copy in the directory, with the modules that it imports.

    Args:
      directory: of the study, or of one of several that a file asks for.
      runs: its runs, which recorded the commit and the command that began them.
      size: that the file was asked for; None if it is not known.
    """
    directory = Path(directory).resolve()
    root = directory.parent if (directory.parent / SEVERAL).is_file() else directory
    commits = [str((run.result or {}).get("commit") or "")[:12] for run in runs]
    checkout = [f"git checkout {commit}  # of slmjax" for commit in dict.fromkeys(commits) if commit][:1]
    # Findings without a study file, such as those of results from elsewhere, are only shown again.
    if not (root / STUDY_FILE).is_file():
        return (*checkout, f"slmjax report {shlex.quote(directory.name)}")
    recorded = [arguments for run in runs if (arguments := _arguments(run.environment.get("command")))]
    arguments = recorded[0] if recorded else []
    options = [] if size in (None, "small") else ["--budget", str(size)]
    if "--seeds" in arguments[:-1]:
        options += ["--seeds", arguments[arguments.index("--seeds") + 1]]
    if (file := _file_in_repository(arguments, root / STUDY_FILE)) is not None:
        return (*checkout, shlex.join(["slmjax", "ablate", file, *options]))
    where = f"# where the directory {root.name} is, which has a copy of the study file"
    options += ["--directory", f"{root.name}-again"]
    return (*checkout, where, shlex.join(["slmjax", "ablate", f"{root.name}/{STUDY_FILE}", *options]))


def _arguments(command: object) -> list[str]:
    """Return the words of a recorded command, "--seeds=5" as two."""
    if not isinstance(command, list):
        return []
    return [part for argument in command for part in str(argument).split("=", 1)]


def _file_in_repository(arguments: Sequence[str], copy: Path) -> str | None:
    """Return the path in its repository of the file that a command named, if it still is what was copied."""
    for argument in arguments:
        file = Path(argument)
        # The program itself is a Python file, too.
        if file.suffix != ".py" or not file.is_file() or file.read_bytes() != copy.read_bytes():
            continue
        file = file.resolve()
        root = next((parent for parent in file.parents if (parent / ".git").exists()), None)
        if root is not None:
            return file.relative_to(root).as_posix()
    return None
