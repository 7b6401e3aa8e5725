"""Kind "disk": full and read-only file systems, by the hook, by a limit on file sizes, and by a small tmpfs.

Promises: a full disk does not end training; a run whose last state could not be saved does not end as
finished, says what was lost and how to get it, and keeps its older checkpoints; the log may lose lines.
"""

import contextlib
import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.injections.lab import Lab, contents, new_runs
from benchmarks.injections.sessions import End, Plan, session
from benchmarks.injections.stored import READING
from benchmarks.injections.verdicts import (
    Case,
    Defect,
    Outcome,
    refused,
    require_clean,
    require_refusal,
    survived,
    tail,
)

_MOST_LINES = 80  # of output: "220 lines of tracebacks of others" were the defect that this kind began with


def disk(lab: Lab, case: Case) -> Outcome:
    """Fill a disk, or make it read-only."""
    variants = (_by_hook, _on_tmpfs, _by_hook, _by_limit, _output, _by_hook, _cache, _read_only)
    return variants[case.number % len(variants)](lab, case)


# Training ---------------------------------------------------------------------------------------------------
def _by_hook(lab: Lab, case: Case) -> Outcome:
    action = case.rng.choice(("full", "readonly"))
    # A disk that is full stays so, or another program makes space again. Steps and evaluations write nothing.
    names = ("checkpoint.save", "checkpoint.committed", "checkpoint.verified", "log.write", "file.replace")
    name = case.rng.choice((*names, "data.part"))
    passed = [point for point in lab.points if point.startswith(name)]
    point = f"{name}:*" if case.rng.random() < 0.4 else case.rng.choice(passed)
    case.describe(f"{action} at {point}")
    with lab.scratch() as folder:
        environment = {"SLMJAX_CACHE": str(folder / "cache")} if name == "data.part" else {}
        if case.rng.random() < 0.5 and not environment:
            run = lab.copy("begun", folder)
            end = lab.resume(run, plan=Plan(fault=f"{point}={action}"))
        else:
            plan = Plan(fault=f"{point}={action}", environment=environment)
            end = session(("train", "tiny.py"), folder=folder, plan=plan)
            run = next(iter(new_runs(folder)), None)
        return _judge_training(lab, run, end, folder)


def _by_limit(lab: Lab, case: Case) -> Outcome:
    """Limit the size of files, which fails in the middle of a write."""
    largest = int(10 ** case.rng.uniform(3.3, 5))
    case.describe(f"no file may have more than {largest:,} bytes")
    with lab.scratch() as folder:
        end = session(("train", "tiny.py"), folder=folder, plan=Plan(largest_file=largest))
        return _judge_training(lab, next(iter(new_runs(folder)), None), end, folder)


def _on_tmpfs(lab: Lab, case: Case) -> Outcome:
    """Put the run on a file system that is too small for it."""
    size = int(10 ** case.rng.uniform(4.5, 6.2)) // 4096 * 4096
    case.describe(f"run directory on a file system of {size:,} bytes")
    with lab.scratch() as folder, tmpfs(folder / "small", size=size) as small:
        if small is None:
            case.describe("no permission to mount: a limit on file sizes instead")
            return _by_limit(lab, case)
        if case.number % 3 == 0:
            # As with a disk that fills while a run is under way.
            shutil.copytree(lab.run("begun"), small / "runs" / "tiny", dirs_exist_ok=True)
            end = session(("train", "--resume", "small/runs/tiny"), folder=folder)
        else:
            end = session(("train", "tiny.py", "--run.directory", "small/runs"), folder=folder)
        made = new_runs(small)
        # Space is made by moving the run to a larger disk.
        run = Path(shutil.copytree(made[0], folder / "moved")) if made else None
        return _judge_training(lab, run, end, folder)


def _read_only(lab: Lab, case: Case) -> Outcome:
    """Make the run's file system read-only before the start, or fill it while the run trains."""
    delay = None if case.rng.random() < 0.3 else case.rng.uniform(0.05, lab.seconds)
    state = "read-only before the start" if delay is None else f"filled {delay:.3f} s after the start"
    case.describe(f"file system of the run {state}")
    with lab.scratch() as folder, tmpfs(folder / "small", size=4 << 20) as small:
        if small is None:
            case.describe("no permission to mount: a limit on file sizes instead")
            return _by_limit(lab, case)
        run = Path(shutil.copytree(lab.run("begun"), small / "runs" / "tiny"))
        if delay is None:
            _remount(small, "ro")
        fill = functools.partial(_fill, small / "other-program")
        plan = Plan(meanwhile=None if delay is None else (delay, fill))
        end = session(("train", "--resume", str(run)), folder=folder, plan=plan)
        moved = Path(shutil.copytree(run, folder / "moved"))
        return _judge_training(lab, moved, end, folder)


def _fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


def _cache(lab: Lab, case: Case) -> Outcome:
    """Put the cache of prepared data, or that of compiled programs, on a full file system."""
    size = case.rng.choice((4096, 8192, 16384, 65536))
    is_compiled = case.rng.random() < 0.5
    case.describe(f"cache of {'compiled programs' if is_compiled else 'data'} on {size:,} bytes")
    with lab.scratch() as folder, tmpfs(folder / "small", size=size) as small:
        if small is None:
            case.describe("no permission to mount: a limit on file sizes instead")
            return _by_limit(lab, case)
        plan = Plan(environment={"SLMJAX_CACHE": str(small)})
        if is_compiled:
            plan = Plan(in_child=functools.partial(_compile_into, small))
        end = session(("train", "tiny.py"), folder=folder, plan=plan)
        return _judge_training(lab, next(iter(new_runs(folder)), None), end, folder)


def _compile_into(directory: Path) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(directory))


def _judge_training(lab: Lab, run: Path | None, end: End, folder: Path) -> Outcome:
    """Judge a training on a bad disk: its end, and what it left, on a good one."""
    require_clean(end, activity="training")
    lines = [line for line in end.output.splitlines() if line.strip() and not line.startswith("step ")]
    if len(lines) > _MOST_LINES:
        raise Defect(f"{len(lines)} lines of output: {tail(end)}")
    if end.status not in (0, 1, 2):
        raise Defect(f"status {end.status}: {tail(end)}")
    if run is None or not (run / "config.json").exists():
        if end.status == 0:
            raise Defect(f"status 0 without a run: {tail(end)}")
        require_refusal(end, activity="training")
        return refused(end)
    if end.status == 0:
        _require_last(run)
    elif end.status == 1:
        _require_explained(run, end)
    else:
        require_refusal(end, activity="training")
    # Without a single checkpoint there is nothing to resume, and the run begins again only if asked to.
    options = () if end.status == 0 or _has_checkpoint(run) else ("--restart",)
    lab.require_resumable(run, *options, lost_lines=True)
    if end.status == 0:
        return survived("finished, with the reference's bits")
    return survived(f"status {end.status}; with space again it resumed to the reference's bits")


def _has_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("[0-9]*/MANIFEST.json"))


def _require_last(run: Path) -> None:
    if not (run / "checkpoints" / "12" / "MANIFEST.json").exists():
        raise Defect("status 0, and the last step is not saved")


def _require_explained(run: Path, end: End) -> None:
    """Raise Defect unless status 1 comes with what was lost and how to get it."""
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((run / "result.json").read_text())["status"]
        if status == "finished":
            raise Defect(f"status 1, and result.json says finished: {tail(end)}")
    if "--resume" not in end.output:
        raise Defect(f"status 1 without the command that resumes: {tail(end)}")


# Other commands ---------------------------------------------------------------------------------------------
def _output(lab: Lab, case: Case) -> Outcome:
    """Let a command write to a full file system: it is refused, and the run is as it was."""
    argv = case.rng.choice((*READING[2:], ("report", "run", "--output", "small/report.html")))
    argv = tuple(f"small/{part}" if part in ("exported", "quantized") else part for part in argv)
    size = case.rng.choice((4096, 8192, 16384))
    is_read_only = case.rng.random() < 0.3
    case.describe(f"`slmjax {argv[0]}` to {'a read-only' if is_read_only else f'{size:,} bytes of'} disk")
    with lab.scratch() as folder, tmpfs(folder / "small", size=size) as small:
        if small is None:
            case.describe("no permission to mount: a limit on file sizes instead")
            return _by_limit(lab, case)
        run = lab.copy("done", folder)
        before = contents(run)
        if is_read_only:
            _remount(small, "ro")
        end = session(argv, folder=folder)
        if contents(run) != before and argv[0] != "report":
            raise Defect(f"`slmjax {argv[0]}` changed the run")
        require_clean(end, activity=f"`slmjax {argv[0]}`")
        if end.status == 0:
            return survived("there was enough space")
        require_refusal(end, activity=f"`slmjax {argv[0]}`")
        if not is_read_only and (rest := [path.name for path in small.rglob("*.tmp")]):
            raise Defect(f"`slmjax {argv[0]}` left {rest}")
        return refused(end)


# File systems -----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def tmpfs(path: Path, *, size: int) -> Iterator[Path | None]:
    """Mount a file system of so many bytes; None where this user may not."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        yield None
        return
    try:
        yield path
    finally:
        # Lazily, since a process that was killed may not have closed its files yet.
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


def _remount(path: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(path)], capture_output=True, check=False)


KINDS: dict[str, Callable[[Lab, Case], Outcome]] = {"disk": disk}
