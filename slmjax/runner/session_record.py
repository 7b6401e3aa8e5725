"""The history of a run: a record of each session, and the files that a later session replaces.

    begin_session(run, run_log, experiment, step=100, seconds=12.0, code=None, is_resumed=True)
    ...                                                       # then launch.py writes the new session's files

The record comes first: a session that is killed between the two has trained nothing, and the files are still
those of the steps so far. `telemetry.run_directory.sessions` reads the records.
"""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from slmjax import config as config_io
from slmjax.atomic_files import atomic_file
from slmjax.stored_json import DamagedFile, read_object
from slmjax.telemetry.recorded_environment import environment
from slmjax.telemetry.run_directory import RunDirectory, RunLog, plain, sessions
from slmjax.training.experiment import Experiment, read_experiment
from slmjax.training.recipes import MODULES

log = logging.getLogger(__name__)

# Replaced by each session.
_FILES = ("config.json", "data.json", "environment.json")
# The command always differs: it is kept in the environment of each session, but is no change.
_NO_CHANGE = "command"


def begin_session(
    run: RunDirectory,
    run_log: RunLog,
    experiment: Experiment,
    *,
    step: int,
    seconds: float,
    code: str | Path | None,
    is_resumed: bool,
) -> None:
    """Record a session that begins after `step`, and keep the files of the one before it.

    Args:
      run: the run, with the files of the earlier session, if there is one.
      run_log: the log of process 0, which alone calls this.
      experiment: the settings of the session.
      step: steps that were trained so far.
      seconds: wall time of the session so far.
      code: an experiment file that replaces the run's own.
      is_resumed: whether there was a session before.

    Raises:
      DamagedFile: the log of the earlier sessions cannot be read.
    """
    number = 1
    changes: dict[str, tuple[Any, Any]] = {}
    environment_changes: dict[str, tuple[Any, Any]] = {}
    if is_resumed:
        number = _newest_number(run.path) + 1
        before = config_io.to_json(read_experiment(run.path))
        changes = dict(config_io.differences(before, config_io.to_json(experiment)))
        environment_changes = _environment_changes(run.path)
        _keep_files(run.path, number=number - 1, code=code)
    run_log.write(
        "session",
        number=number,
        first_step=step + 1,
        seconds=round(seconds, 3),
        changes=changes,
        environment=environment_changes,
    )
    # Of the optimizer's settings there is a warning (`changed_schedules`).
    others = [
        f"{path}={after} instead of {before}"
        for path, (before, after) in changes.items()
        if not path.startswith("optim.")
    ]
    if others:
        log.info("session %d has other settings: %s", number, ", ".join(others))
    if environment_changes:
        log.info("session %d has another environment: %s", number, ", ".join(environment_changes))


def run_seconds(run: RunDirectory, session_seconds: float, *, first_step: int) -> float | None:
    """Return the wall time of all sessions of a run; None if the log does not have all of them.

    Args:
      run: the run.
      session_seconds: wall time of the present session.
      first_step: the first step that it trained.
    """
    try:
        recorded = sessions(run.path)
    except DamagedFile:
        return None
    # Numbers are missing if earlier sessions were those of a version without records, or the disk was full.
    numbers = [session.number for session in recorded]
    if numbers != list(range(1, len(numbers) + 1)) or not numbers or recorded[-1].first_step != first_step:
        return None
    return sum(session.seconds for session in recorded[:-1]) + session_seconds


def _newest_number(path: Path) -> int:
    """Return the number of the newest session of a run that has a config.json."""
    # Both, since the log may have lost lines on a full disk. Earlier versions kept neither.
    files = [re.fullmatch(r"config-(\d+)\.json", file.name) for file in path.glob("config-*.json")]
    kept = [int(match[1]) for match in files if match is not None]
    return max([session.number for session in sessions(path)] + [number + 1 for number in kept], default=1)


def _environment_changes(path: Path) -> dict[str, tuple[Any, Any]]:
    try:
        before = read_object(path / "environment.json", remedy="")
    # It is information alone: a run does not stop because it is lost.
    except (FileNotFoundError, DamagedFile):
        log.warning("%s has no readable environment.json: changes of the environment are unknown", path)
        return {}
    changes = config_io.differences(before, plain(environment()))
    return {name: pair for name, pair in changes if name.partition("[")[0] != _NO_CHANGE}


def _keep_files(path: Path, *, number: int, code: str | Path | None) -> None:
    """Copy the files of a session, which the next one replaces, to names with its number."""
    for name in _FILES:
        if (path / name).is_file():
            _copy(path / name, number)
    # The run's own copy replaces nothing.
    if code is not None and Path(code).resolve().parent != path.resolve():
        if (path / "experiment.py").is_file():
            _copy(path / "experiment.py", number)
        if (path / MODULES).is_dir():
            shutil.copytree(path / MODULES, path / f"{MODULES}-{number}", dirs_exist_ok=True)


def _copy(file: Path, number: int) -> None:
    with atomic_file(file.with_stem(f"{file.stem}-{number}")) as temporary:
        shutil.copyfile(file, temporary)
