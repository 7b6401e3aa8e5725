"""Run `slmjax` commands in forked processes, so that an injection does not pay for imports.

`prepare` imports the package and jax into the campaign's process and starts no backend of jax, which has no
threads that a fork would lose. `session` then forks: the child runs one command as `python -m slmjax` would,
with its own environment, limits and faults, and ends without returning.
"""

import atexit
import contextlib
import dataclasses
import functools
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120.0  # seconds after which a session counts as hanging; machines are slow when they are busy
# A measurement of the processor and drawings in the report's page take most of a short session, and have
# nothing to lose in a fault.
_COSTLY = ("slmjax.telemetry.report.charts", "slmjax.planning.device_peaks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """The end of a session."""

    status: int | None  # negative: the number of a signal; None: it hung and was killed
    output: str  # standard output and error
    seconds: float
    answer_seconds: float = 0.0  # from the last signal to the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Circumstances of a session."""

    fault: str = ""  # SLMJAX_FAULT
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # seconds after the start, and what is then sent
    signals: tuple[tuple[float, signal.Signals], ...] = ()
    meanwhile: tuple[float, Callable[[], None]] | None = None  # done by the campaign after so many seconds
    largest_file: int | None = None  # RLIMIT_FSIZE
    in_child: Callable[[], None] | None = None  # called in the child before the command
    at_end: Callable[[], None] | None = None  # called in the child after it, if it has ended with status 0
    limit: float = LIMIT
    is_cold: bool = False  # a real `python -m slmjax`, imports included


def settings(work: Path) -> dict[str, str]:
    """Return the environment variables of all sessions."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "SLMJAX_CACHE": str(work / "cache"),
        "XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TPU_SKIP_MDS_QUERY": "1",
        "SLMJAX_JOIN_SECONDS": "60",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "SLMJAX_FAULT": "",
        "SLMJAX_TRACEBACK": "",
    }


def prepare(work: Path) -> None:
    """Import everything that a session needs, without starting a backend."""
    os.environ.update(settings(work))
    warnings.filterwarnings("ignore", message="Sharding info not provided")
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    import gc
    import importlib

    modules = (
        "slmjax.cli",
        "slmjax.__main__",
        "slmjax.checkpoints.loading",
        "slmjax.convert.import_export",
        "slmjax.parallel.hosts",
        "slmjax.planning.device_peaks",
        "slmjax.runner.trainer",
        "slmjax.sampling",
        "slmjax.telemetry.report.charts",
        "slmjax.training.recipes",
        "rich.console",
        "rich.progress",
        "rich.table",
        "tyro",
    )
    imported = {name: importlib.import_module(name) for name in modules}
    charts, peaks = (imported[name] for name in _COSTLY)
    for module, name, value in (
        (charts, "png", b""),
        (charts, "drawing_code", ""),
        (peaks, "_measured", 1e11),
    ):
        assert name in vars(module), f"{module.__name__}.{name} is gone: change prepare"
        setattr(module, name, functools.partial(_constant, value))
    # Objects that all sessions share are then not copied because a collection touches them.
    gc.freeze()


def _constant(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def session(argv: Sequence[str], *, folder: Path, plan: Plan | None = None) -> End:
    """Run a command to its end and return it. `folder` is its working directory."""
    (end,) = sessions([(argv, plan or Plan())], folder=folder)
    return end


def sessions(commands: Sequence[tuple[Sequence[str], Plan]], *, folder: Path) -> list[End]:
    """Run several commands at a time."""
    started = [_Running(argv, plan, folder=folder) for argv, plan in commands]
    try:
        _follow(started)
    finally:
        for running in started:
            running.kill()
    return [running.end() for running in started]


class _Running:
    """A command that runs in a process group of its own."""

    def __init__(self, argv: Sequence[str], plan: Plan, *, folder: Path) -> None:
        self.plan = plan
        self.output = folder / f".output-{time.monotonic_ns()}-{random.randrange(10**6)}"
        environment = {**plan.environment, "SLMJAX_FAULT": plan.fault}
        if plan.is_cold:
            self.pid = _start_cold(argv, environment, folder=folder, output=self.output)
        else:
            self.pid = _fork(argv, plan, environment, folder=folder, output=self.output)
        self.started = time.monotonic()
        self.descriptor = os.pidfd_open(self.pid)
        self.status: int | None = None
        self.is_over = False
        self.ended = 0.0
        self.signalled = 0.0
        self.to_send = sorted(plan.signals)
        self.meanwhile = plan.meanwhile

    def next_time(self) -> float:
        """Return when something is to be done next, in seconds of the monotonic clock."""
        times = [self.started + self.plan.limit, *(self.started + at for at, _ in self.to_send[:1])]
        if self.meanwhile is not None:
            times.append(self.started + self.meanwhile[0])
        return min(times)

    def act(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        while self.to_send and now >= self.started + self.to_send[0][0]:
            _, number = self.to_send.pop(0)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            self.signalled = now
        if self.meanwhile is not None and now >= self.started + self.meanwhile[0]:
            action = self.meanwhile[1]
            self.meanwhile = None
            action()
        if now >= self.started + self.plan.limit:
            self.finish(hung=True)

    def finish(self, *, hung: bool = False) -> None:
        """Note the end of the process, which is killed if it hangs."""
        if hung:
            self.kill()
        _, status = os.waitpid(self.pid, 0)
        self.status = None if hung else os.waitstatus_to_exitcode(status)
        self.ended = time.monotonic()
        self.is_over = True
        os.close(self.descriptor)

    def kill(self) -> None:
        """Kill the whole group: the process may have started others."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> End:
        """Return how it ended."""
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        self.output.unlink(missing_ok=True)
        answer = self.ended - self.signalled if self.signalled else 0.0
        return End(status=self.status, output=text, seconds=self.ended - self.started, answer_seconds=answer)


def _follow(started: list[_Running]) -> None:
    while pending := [running for running in started if not running.is_over]:
        timeout = min(running.next_time() for running in pending) - time.monotonic()
        ready, _, _ = select.select([running.descriptor for running in pending], [], [], max(timeout, 0))
        for running in pending:
            if running.descriptor in ready:
                running.finish()
            else:
                running.act()


def _start_cold(argv: Sequence[str], environment: Mapping[str, str], *, folder: Path, output: Path) -> int:
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "slmjax", *argv],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            restore_signals=True,
            preexec_fn=_default_signals,
        )
    # Waited for by its number, as forked processes are.
    process.returncode = 0
    return process.pid


def _default_signals() -> None:
    # A shell without job control starts background commands with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fork(
    argv: Sequence[str], plan: Plan, environment: Mapping[str, str], *, folder: Path, output: Path
) -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(argv, plan, environment, folder=folder, output=output, ready=writing)
    os.close(writing)
    # Signals are timed from the moment at which the command begins.
    os.read(reading, 1)
    os.close(reading)
    return pid


def _child(
    argv: Sequence[str],
    plan: Plan,
    environment: Mapping[str, str],
    *,
    folder: Path,
    output: Path,
    ready: int,
) -> None:
    """Run the command as the interpreter would, and exit."""
    status = 70
    try:
        os.setsid()
        _redirect(output)
        os.chdir(folder)
        os.environ.update(environment)
        sys.argv = ["slmjax", *argv]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if plan.largest_file is not None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (plan.largest_file, hard))
        if plan.in_child is not None:
            plan.in_child()
        os.write(ready, b".")
        os.close(ready)
        status = _run(argv, plan.at_end)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _redirect(output: Path) -> None:
    # As into a pipe or a file, whose reader sees every line in time.
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _run(argv: Sequence[str], at_end: Callable[[], None] | None) -> int:
    from slmjax.__main__ import main

    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        # The interpreter prints this and ends as the signal would.
        traceback.print_exc()
        status = 130
    except BaseException:
        traceback.print_exc()
        status = 1
    if status == 0 and at_end is not None:
        at_end()
    # The end of the interpreter: other threads end first, then functions that libraries have registered.
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter calls, by no public name
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    return status
