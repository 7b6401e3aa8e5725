"""The run directory: the files of a run besides its weights, and the seconds it spent on each activity.

    run = RunDirectory.create_in(Path("runs"), name="nano", fingerprint="1a2b3c")
    ledger = Ledger()
    with run.open_log() as log:
        with ledger.timed(Category.STEP):
            ...
        log.write("train", step=10, loss=3.2)
    run.write_json("result.json", {"session_seconds_by_category": ledger.seconds()})

Files of a run: config.json, model.json, data.json, environment.json, experiment.py (of a run from a file),
log.jsonl (log-{i}.jsonl of process i > 0), tokenizer/, checkpoints/, heldout_documents.npz (the loss of each
held-out document), result.json, and profile/ if steps were traced. Of a run that was resumed they describe
the newest session; config-1.json, data-1.json, environment-1.json and, where it was replaced, experiment-1.py
are those of the first one, and so on.

A run has one process per host on TPU pods and one per GPU under Slurm (docs/hosts.md). jax is imported only
where devices are queried.
"""

import contextlib
import dataclasses
import enum
import errno
import json
import logging
import math
import numbers
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from slmjax import faults
from slmjax.atomic_files import atomic_directory, write_text
from slmjax.config import ConfigError
from slmjax.ownership import require_ownership
from slmjax.stored_json import DamagedFile, check_object, parse_json, read_object

log = logging.getLogger(__name__)

# The directory ----------------------------------------------------------------------------------------------


def directory_name(name: str, fingerprint: str, *, when: str) -> str:
    """Return the name of the directory of a run that begins at this time."""
    # Only characters that are safe in a path and in a shell.
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
    return f"{slug}-{when}-{fingerprint[:6]}"


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """An existing run directory. Process 0 creates it, and other processes receive its path."""

    path: Path
    process_index: int = 0

    @classmethod
    def create_in(
        cls, root: Path, *, name: str, fingerprint: str, write: Callable[[Path], None] = lambda _: None
    ) -> "RunDirectory":
        """Create a directory in `root`, named after the experiment, the time and the config's fingerprint.

        It appears with all the files that `write(path)` writes to a hidden directory, or not at all: a run
        that is killed here leaves no run directory without settings.

        Raises:
          ConfigError: `root` is a file.
          OSError: the files cannot be written.
        """
        base = directory_name(name, fingerprint, when=time.strftime("%Y%m%d-%H%M%S"))
        # Otherwise mkdir would raise an error that does not name the option.
        if root.is_file():
            raise ConfigError(f"{root} is a file: name a directory for runs with --run.directory")
        root.mkdir(parents=True, exist_ok=True)
        _remove_remains(root)
        attempt = 1
        while True:
            path = root / (base if attempt == 1 else f"{base}-{attempt}")
            attempt += 1
            # Runs of one experiment may begin within a second, here or on another host.
            if path.exists():
                continue
            try:
                with atomic_directory(path) as temporary:
                    write(temporary)
                    faults.at("run.created")
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            else:
                return cls(path)

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The directory of the tokenizer."""
        return self.path / "tokenizer"

    @property
    def log_path(self) -> Path:
        """The log file of this process."""
        return self.path / ("log.jsonl" if self.process_index == 0 else f"log-{self.process_index}.jsonl")

    def open_log(self) -> "RunLog":
        """Open the log of this process for appending."""
        return RunLog(self.log_path)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file of the run, as `write_json` does, if it still belongs to this process."""
        require_ownership(now=True)
        return write_json(self.path / name, value)


_REMAINS = re.compile(r"\..+-\d{8}-\d{6}-[0-9a-f]{6}(-\d+)?-[0-9a-f]{12}\.tmp")
_DAY = 24 * 3600


def _remove_remains(root: Path) -> None:
    """Delete the hidden directories of runs that were killed as they were made, a day ago or more."""
    # Younger ones may be those of a run that is being made.
    for path in root.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process removes it, too
            if _REMAINS.fullmatch(path.name) and time.time() - path.stat().st_mtime > _DAY:
                shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file atomically. NaN and infinities become the strings "nan", "inf" and "-inf"."""
    return write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Return a value as strict JSON can hold it; scalars of numpy and jax become Python's."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    # Before floats, so that integers of numpy stay integers.
    if isinstance(value, numbers.Integral):
        return int(value)
    # Strict JSON has no NaN or infinity, and other programs refuse files that have them.
    number = float(value)
    return number if math.isfinite(number) else str(number)


# The result -------------------------------------------------------------------------------------------------

# Names in the results of earlier versions, which did not say what a value is of.
_FORMER_NAMES = {
    "tokens": "run_tokens",
    "seconds": "session_seconds",
    "tokens_per_second": "session_tokens_per_second",
    "data_wait_share": "session_data_wait_share",
    "seconds_by_category": "session_seconds_by_category",
}


def read_result(run: Path) -> dict[str, Any] | None:
    """Return the fields of a run's result.json (`trainer.Result`); None if it has none yet.

    Raises:
      DamagedFile: the file cannot be read, or has no status or step.
    """
    fields = {"status": str, "step": int}
    try:
        result = read_object(
            run / "result.json",
            fields,
            optional={"compressors": dict, "lost_text": float},
            remedy="delete it and resume the run",
        )
    except FileNotFoundError:
        return None
    return with_present_names(result)


def with_present_names(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a result, which earlier versions may have written, under their present names."""
    return {_FORMER_NAMES.get(name, name): value for name, value in result.items()}


# The log ----------------------------------------------------------------------------------------------------


class RunLog:
    """An append-only file of one JSON object per line: a kill loses at most one line.

    A full disk loses lines, and nothing else: they are counted in `lost`, and the first line after them says
    how many.
    """

    def __init__(self, path: Path) -> None:
        """Open a log for appending.

        Raises:
          OSError: the file cannot be opened.
        """
        self._path = path
        _cut_torn_line(path)
        # Unbuffered: every line is with the operating system at once, and a failed one is not tried again.
        self._stream = path.open("ab", buffering=0)
        self.lost = 0  # lines of this session
        self._noted = 0  # lost lines that a record tells of

    def write(self, kind: str, **values: Any) -> None:
        """Append a record: its kind ("train", "eval", ...), the seconds since 1970, and `values`.

        It is lost, with a warning for the first, if the disk is full or cannot be written to.
        """
        if self.lost > self._noted and self._append("lost", lines=self.lost - self._noted) is None:
            self._noted = self.lost
        if (error := self._append(kind, **values)) is None:
            return
        self.lost += 1
        # Once, since every further step would warn too. The count comes before it: the warning is itself
        # written to this log.
        if self.lost == 1:
            log.warning(
                "%s cannot be written (%s): training continues, and its lines are lost until it can",
                self._path,
                error.strerror or error,
            )

    def _append(self, kind: str, **values: Any) -> OSError | None:
        """Append a line as a whole, or return the error that kept it from being written."""
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        try:
            end = self._stream.seek(0, os.SEEK_END)
            faults.at("log.write", values.get("step", -1))
            # A disk that fills up may take a part of a line, and the next line would be appended to it.
            if self._stream.write(line) != len(line):
                self._stream.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Close the file; nothing is pending."""
        self._stream.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut_torn_line(path: Path) -> None:
    """Remove an unfinished last line, to which the next record would otherwise be appended."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        # Only what follows the last newline is cut, so that complete records stay.
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)


_REMOVE_LINE = "remove the line to read the rest"


# Fields that readers of a kind of record need.
_FIELDS: Mapping[str, Mapping[str, type]] = {
    "train": {"step": int},
    "eval": {"step": int},
    "sample": {"step": int, "prompt": str, "text": str},
    "message": {"level": str, "text": str},
    "member": {
        "arm": str,
        "seed": int,
        "fingerprint": str,
        "status": str,
        "result": dict,
        "evaluation": dict,
    },
    "measurement": {"fingerprint": str, "figures": dict},
}


def read_log(path: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of a log in order, of one kind or all; an unfinished last line is ignored.

    Steps that were run again after a resume appear twice.

    Raises:
      FileNotFoundError: there is no such file.
      DamagedFile: the file cannot be read, or another line is not a record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(
            f"{path} cannot be read ({error.strerror or error}): move it out of the run directory to read "
            "the rest of the run"
        ) from error
    records = []
    # What follows the last newline is empty or unfinished.
    for number, line in enumerate(lines[:-1], start=1):
        name = f"line {number} of {path}"
        value = parse_json(line, name=name, remedy=_REMOVE_LINE)
        record = check_object(value, {"kind": str}, name=name, remedy=_REMOVE_LINE)
        check_object(record, _FIELDS.get(record["kind"]), name=name, remedy=_REMOVE_LINE)
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


# Sessions ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """A session of a run: what it changed, and the steps of it that count.

    A session that is killed repeats steps in the next one, which resumes from a checkpoint. Of steps that
    were trained twice only those of the later session are in the model.
    """

    number: int  # from 1
    first_step: int  # that it trains: 1 in a new run
    last_step: int  # of those that no later session repeated; before `first_step` if there are none
    seconds: float  # wall time from its start to its last record in the log
    changes: dict[str, tuple[Any, Any]]  # settings by their path: before, after
    environment: dict[str, tuple[Any, Any]]  # versions, devices, variables, ... that changed

    @property
    def num_steps(self) -> int:
        """The number of its steps that count."""
        return max(self.last_step - self.first_step + 1, 0)


def sessions(run: Path) -> list[Session]:
    """Return the sessions that a run directory's log has; earlier versions of slmjax recorded none.

    Raises:
      DamagedFile: the log cannot be read.
    """
    path = run / "log.jsonl"
    return sessions_of(read_log(path), name=str(path)) if path.is_file() else []


def sessions_of(records: Iterable[Mapping[str, Any]], *, name: str = "log.jsonl") -> list[Session]:
    """Return the sessions in the records of a log, in order; `name` is that of the file, for errors.

    Raises:
      DamagedFile: a record of a session is not one.
    """
    begun: list[dict[str, Any]] = []
    # Of each session: the time of its last record, and the last step that it logged.
    ends: list[float] = []
    last_steps: list[int] = []
    for record in records:
        if record["kind"] == "session":
            begun.append(_session_record(record, name))
            ends.append(record["time"])
            last_steps.append(record["first_step"] - 1)
        # The messages before the record of a session may be those of the session that is about to begin.
        elif begun and record["kind"] != "message":
            written = record.get("time")
            step = record.get("step")
            ends[-1] = written if isinstance(written, int | float) else ends[-1]
            last_steps[-1] = max(last_steps[-1], step if isinstance(step, int) else 0)
    result = []
    for i, record in enumerate(begun):
        repeated = [later["first_step"] - 1 for later in begun[i + 1 :]]
        result.append(
            Session(
                number=record["number"],
                first_step=record["first_step"],
                last_step=min(repeated, default=last_steps[i]),
                seconds=record["seconds"] + max(ends[i] - record["time"], 0.0),
                changes=_pairs(record["changes"], name),
                environment=_pairs(record["environment"], name),
            )
        )
    return result


def _session_record(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    fields = {"time": float, "number": int, "first_step": int, "seconds": float}
    fields |= {"changes": dict, "environment": dict}
    return check_object(dict(record), fields, name=f"{name}, a record of a session,", remedy=_REMOVE_LINE)


def _pairs(changes: Mapping[str, Any], name: str) -> dict[str, tuple[Any, Any]]:
    for path, pair in changes.items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise DamagedFile(f"{name}, a record of a session, has no two values of {path}: {_REMOVE_LINE}")
    return {path: (before, after) for path, (before, after) in changes.items()}


# Time -------------------------------------------------------------------------------------------------------


class Category(enum.Enum):
    """An activity of a run."""

    INIT = "init"
    COMPILE = "compile"
    DATA = "data"
    STEP = "step"
    EVAL = "eval"
    CHECKPOINT = "checkpoint"
    OTHER = "other"


class Ledger:
    """Seconds of a run by category.

    Every moment counts for exactly one category, the innermost open one, so that the sum is the wall time.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._current = Category.OTHER
        self._seconds = dict.fromkeys(Category, 0.0)

    @contextlib.contextmanager
    def timed(self, category: Category) -> Iterator[None]:
        """Count the time of the block for `category`; the category outside pauses meanwhile."""
        outer = self._switch(category)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, category: Category) -> Category:
        now = self._clock()
        self._seconds[self._current] += now - self._since
        previous = self._current
        self._current = category
        self._since = now
        return previous

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each category up to now."""
        # Closes the open interval, so that the sum is the time up to now.
        self._switch(self._current)
        return {category.value: spent for category, spent in self._seconds.items()}

    def total(self) -> float:
        """Return the seconds up to now."""
        return sum(self.seconds().values())
