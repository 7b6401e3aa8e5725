"""The run directory: what a run writes beside its weights, and where its seconds went.

    run = RunDirectory.create_in(Path("runs"), name="nano", fingerprint=fingerprint(experiment))
    run.write_json("environment.json", environment())
    ledger = Ledger()
    with run.open_log() as log:
        with ledger.timed(Category.STEP):
            ...
        log.write("train", step=10, loss=3.2)
    run.write_json("result.json", {"seconds": ledger.seconds()})

Files of a run: config.json, model.json, data.json, environment.json, experiment.py (of a run from a file),
log.jsonl (log-{i}.jsonl of process i > 0), tokenizer/, checkpoints/, result.json, profile/ where steps were
traced. A run has one process per host. jax is imported where it is asked about devices, no sooner.
"""

import contextlib
import dataclasses
import enum
import json
import math
import numbers
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from slmjax.atomic_files import write_text
from slmjax.config import ConfigError

# The directory ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """A run directory that exists. Process 0 creates it; another process is given its path."""

    path: Path
    process_index: int = 0

    @classmethod
    def create_in(cls, root: Path, *, name: str, fingerprint: str) -> "RunDirectory":
        """Makes a new directory in `root`, named for the experiment, the time and the fingerprint of its
        config.
        """
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
        base = f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}-{fingerprint[:6]}"
        if root.is_file():
            raise ConfigError(f"{root} is a file: name a directory for runs with --run.directory")
        root.mkdir(parents=True, exist_ok=True)
        attempt = 1
        while True:
            path = root / (base if attempt == 1 else f"{base}-{attempt}")
            try:
                path.mkdir()
            except FileExistsError:  # two runs of one experiment within a second
                attempt += 1
            else:
                return cls(path)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is kept."""
        return self.path / "tokenizer"

    @property
    def log_path(self) -> Path:
        """The log of this process."""
        return self.path / ("log.jsonl" if self.process_index == 0 else f"log-{self.process_index}.jsonl")

    def open_log(self) -> "RunLog":
        """The log of this process, to be added to."""
        return RunLog(self.log_path)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file of the run, as `write_json` does."""
        return write_json(self.path / name, value)


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file atomically. NaN and infinities become the strings "nan", "inf" and "-inf"."""
    return write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """What strict JSON can hold of `value`; scalars of numpy and jax become Python's."""
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
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)


# The log ----------------------------------------------------------------------------------------------------


class RunLog:
    """An append-only file of one JSON object per line, flushed line by line: a kill loses at most the line
    being written.
    """

    def __init__(self, path: Path) -> None:
        _cut_torn_line(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Adds a record: its kind ("train", "eval", ...), the time in seconds since 1970, and `values`."""
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        self._stream.write(json.dumps(plain(record), allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file; nothing is pending."""
        self._stream.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut_torn_line(path: Path) -> None:
    """Removes what a kill left of an unfinished last line, which the next record would else be glued to."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)


def read_log(path: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a log in the order written, of one kind or all; a torn last line is passed over.

    Steps that were run again after a resume are there twice.

    Raises:
        ValueError: a line before the last is not a record.
    """
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not a record, the file was damaged ({error}); remove the line to "
                "read the rest"
            ) from error
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records


# The environment --------------------------------------------------------------------------------------------

_PACKAGES = ("slmjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
# Only variables that may change what a run computes are kept, so that a secret of any name stays out.
_VARIABLES = re.compile(
    r"(JAX|XLA|SLMJAX|TPU|LIBTPU|CUDA|NVIDIA|NCCL|TF|OMP|MKL|OPENBLAS|MALLOC|GLIBC|PYTHON)(_|$)|PYTHON"
)
_SECRET = re.compile(r"key|token(?!iz)|secret|passw|credential|auth", re.IGNORECASE)
_SECRET_OPTION = re.compile(r"--?[\w.-]*(key|token|secret|password|credentials?)", re.IGNORECASE)
REDACTED = "<redacted>"


def environment() -> dict[str, Any]:
    """What a result depends on beside its config: versions, devices, machine, commit, command line, without
    secrets.
    """
    import jax

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "backend": jax.default_backend(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "num_processes": jax.process_count(),
        **commit(),
        "command": redact_command(sys.argv),
        "variables": redact_variables(os.environ),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return None


def commit() -> dict[str, Any]:
    """The commit of the checkout that slmjax is imported from and whether files differ from it; None outside
    of one.
    """
    here = Path(__file__).resolve()
    if (
        _git(here.parent, "ls-files", "--error-unmatch", here.name) is None
    ):  # in site-packages of another project, say
        return {"commit": None, "dirty": None}
    status = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(here.parent, "rev-parse", "HEAD"), "dirty": status != ""}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def redact_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that bear on a run, sorted; the value of one whose name speaks of a secret is hidden."""
    kept = sorted(name for name in variables if _VARIABLES.match(name))
    return {name: REDACTED if _SECRET.search(name) else variables[name] for name in kept}


def redact_command(arguments: list[str]) -> list[str]:
    """A command line, in which the value of an option whose name ends in key, token, secret or password is
    hidden.
    """
    shown: list[str] = []
    hide = False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        is_secret = _SECRET_OPTION.fullmatch(option) is not None
        shown.append(REDACTED if hide else f"{option}={REDACTED}" if is_secret and equals else argument)
        hide = is_secret and not equals
    return shown


# Where the seconds went -------------------------------------------------------------------------------------


class Category(enum.Enum):
    """What a second of a run was spent on."""

    INIT = "init"
    COMPILE = "compile"
    DATA = "data"
    STEP = "step"
    EVAL = "eval"
    CHECKPOINT = "checkpoint"
    OTHER = "other"


class Ledger:
    """Seconds by category. Every moment counts in exactly one, the innermost that is open, so that the sum is
    the wall time.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._current = Category.OTHER
        self._seconds = dict.fromkeys(Category, 0.0)

    @contextlib.contextmanager
    def timed(self, category: Category) -> Iterator[None]:
        """Counts what happens inside for `category`; the category outside pauses meanwhile."""
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
        """Category -> seconds up to now."""
        self._switch(self._current)
        return {category.value: spent for category, spent in self._seconds.items()}
