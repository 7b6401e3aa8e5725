"""Kind "processes": a run of two processes on one machine, one of them killed, stopped, stuck or different.

Promises: processes that differ are refused before the first step, with the field and the rank; a signal to
one stops both after the same step, saved; if one is gone, the other ends, and the run resumes.
"""

import dataclasses
import functools
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from benchmarks.injections.lab import INTERRUPTED, Lab, is_complete, new_runs, records
from benchmarks.injections.sessions import End, Plan, sessions
from benchmarks.injections.verdicts import (
    Case,
    Defect,
    Outcome,
    Verdict,
    error_line,
    require_clean,
    survived,
    tail,
)

# The heartbeat of jax finds a dead process within 100 s.
_LIMIT = 180.0
# Of a process whose partner was killed, jax's own coordination service ends some with a fatal message of C++.
_FATAL = ("JAX distributed service", "coordination service", "Terminating process")


def processes(lab: Lab, case: Case) -> Outcome:
    """Disturb one of two processes, or both."""
    variants = (_different, _signalled, _killed, _different, _paused, _signalled, _killed_at_point, _stuck)
    return variants[case.number % len(variants)](lab, case)


def _pair(
    folder: Path, argv: list[str], plans: tuple[Plan, Plan], *, extra: tuple[list[str], list[str]] = ([], [])
) -> list[End]:
    """Run a command in two processes that know each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    commands = []
    for rank, plan in enumerate(plans):
        environment = {**plan.environment, "COORDINATOR": address, "RANK": str(rank), "WORLD": "2"}
        commands.append(
            ([*argv, *extra[rank]], dataclasses.replace(plan, environment=environment, limit=_LIMIT))
        )
    return sessions(commands, folder=folder)


@functools.cache
def _undisturbed(work: Path) -> dict[int, object]:
    """Return the losses of two processes that nothing disturbs."""
    lab = Lab(work=work)
    with lab.scratch() as folder:
        ends = _pair(folder, ["train", "tiny.py"], (Plan(), Plan()))
        assert [end.status for end in ends] == [0, 0], f"{ends[0].output}\n{ends[1].output}"
        return _losses(new_runs(folder)[0])


def _losses(run: Path) -> dict[int, object]:
    losses: dict[int, object] = {}
    for record in records(run):
        if record.get("kind") == "train":
            if losses.setdefault(record["step"], record["loss"]) != record["loss"]:
                raise Defect(f"step {record['step']} was repeated with another loss")
    return losses


def _different(lab: Lab, case: Case) -> Outcome:
    """Start process 1 with another setting."""
    option, value = case.rng.choice(
        (
            ("--optim.lr", "3e-3"),
            ("--checkpoint.every", "7"),
            ("--run.steps", "13"),
            ("--data.batch-size", "8"),
            ("--data.seed", "1"),
            ("--run.seed", "1"),
            ("--eval.every", "5"),
            ("--optim.weight-decay", "0.5"),
            ("--model.embed-dim", "32"),
            ("--data.sequence-length", "16"),
        )
    )
    case.describe(f"process 1 with {option} {value}")
    with lab.scratch() as folder:
        ends = _pair(folder, ["train", "tiny.py"], (Plan(), Plan()), extra=([], [option, value]))
        for rank, end in enumerate(ends):
            require_clean(end, activity=f"process {rank}")
            if end.status == 0:
                raise Defect(f"process {rank} ended with status 0: {tail(end)}")
        field = option.removeprefix("--").replace("-", "_")
        if not any(field in error_line(end) for end in ends):
            raise Defect(f"no message names {field}: {[error_line(end) or tail(end) for end in ends]}")
        return Outcome(verdict=Verdict.REFUSED, reason=error_line(ends[0]) or error_line(ends[1]))


def _signalled(lab: Lab, case: Case) -> Outcome:
    """Signal one process, or both."""
    number = case.rng.choice((signal.SIGTERM, signal.SIGINT))
    which = case.rng.choice(((0,), (1,), (0, 1)))
    delay = case.rng.uniform(0.1, 1.5 * lab.seconds)
    case.describe(f"{number.name} to {' and '.join(map(str, which))} after {delay:.3f} s")
    plans = [Plan(signals=((delay, number),) if rank in which else ()) for rank in range(2)]
    with lab.scratch() as folder:
        ends = _pair(folder, ["train", "tiny.py"], (plans[0], plans[1]))
        return _judge(lab, folder, ends, is_signalled=True)


def _killed(lab: Lab, case: Case) -> Outcome:
    """Kill one process at a random moment."""
    rank = case.rng.randrange(2)
    delay = case.rng.uniform(0.1, 1.5 * lab.seconds)
    case.describe(f"SIGKILL to process {rank} after {delay:.3f} s")
    plans = [Plan(signals=((delay, signal.SIGKILL),) if rank == other else ()) for other in range(2)]
    with lab.scratch() as folder:
        return _judge(lab, folder, _pair(folder, ["train", "tiny.py"], (plans[0], plans[1])))


def _killed_at_point(lab: Lab, case: Case) -> Outcome:
    """Kill one process at a hook point."""
    rank = case.rng.randrange(2)
    point = case.rng.choice(("step:5", "checkpoint.save:8", "checkpoint.committed:4", "evaluation.batch:1"))
    case.describe(f"SIGKILL to process {rank} at {point}")
    fault = f"{point}@{rank}=kill"
    with lab.scratch() as folder:
        return _judge(
            lab, folder, _pair(folder, ["train", "tiny.py"], (Plan(fault=fault), Plan(fault=fault)))
        )


def _paused(lab: Lab, case: Case) -> Outcome:
    """Stop one process for some seconds, as a busy host does."""
    rank = case.rng.randrange(2)
    delay = case.rng.uniform(0.1, 1.5 * lab.seconds)
    pause = case.rng.uniform(0.5, 6.0)
    case.describe(f"process {rank} stopped for {pause:.1f} s after {delay:.3f} s")
    signals = ((delay, signal.SIGSTOP), (delay + pause, signal.SIGCONT))
    plans = [Plan(signals=signals if rank == other else ()) for other in range(2)]
    with lab.scratch() as folder:
        ends = _pair(folder, ["train", "tiny.py"], (plans[0], plans[1]))
        for end in ends:
            require_clean(end, activity="paused")
        if [end.status for end in ends] != [0, 0]:
            raise Defect(f"statuses {[end.status for end in ends]}: {tail(ends[0])} / {tail(ends[1])}")
        _require_losses(lab, new_runs(folder)[0])
        return survived("trained on to the bits of an undisturbed pair")


def _stuck(lab: Lab, case: Case) -> Outcome:
    """Stop one process for good: the heartbeat finds it, and the other ends."""
    rank = case.rng.randrange(2)
    delay = case.rng.uniform(0.5, 1.5) * lab.seconds
    case.describe(f"process {rank} stopped for good after {delay:.3f} s")
    # Killed at last, as a person would, which must not be what ends the other.
    signals = ((delay, signal.SIGSTOP), (delay + 3 * _HEARTBEAT, signal.SIGKILL))
    plans = [Plan(signals=signals if rank == other else (), in_child=_short_heartbeat) for other in range(2)]
    with lab.scratch() as folder:
        ends = _pair(folder, ["train", "tiny.py"], (plans[0], plans[1]))
        waited = ends[1 - rank].seconds - delay
        if waited > 2.9 * _HEARTBEAT:
            raise Defect(f"process {1 - rank} waited {waited:.0f} s for the process that is stuck")
        return _judge(lab, folder, ends)


_HEARTBEAT = 10  # seconds


def _short_heartbeat() -> None:
    import jax

    # The default of 100 s would be most of a campaign.
    jax.distributed.initialize = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=_HEARTBEAT
    )


def _require_losses(lab: Lab, run: Path) -> None:
    expected = _undisturbed(lab.work)
    if (losses := _losses(run)) != expected:
        steps = [step for step in expected if losses.get(step) != expected[step]]
        raise Defect(f"other losses than of an undisturbed pair, at steps {steps}")


def _judge(lab: Lab, folder: Path, ends: list[End], *, is_signalled: bool = False) -> Outcome:
    """Judge a disturbed pair: its ends, and the losses after both have resumed."""
    statuses = [end.status for end in ends]
    for rank, end in enumerate(ends):
        if end.status is None:
            raise Defect(f"process {rank} hangs: {statuses}: {tail(end)}")
        # The survivor of a killed process is ended by jax's C++ code, whose message no program can change.
        if is_signalled or not any(mark in end.output for mark in _FATAL):
            require_clean(end, activity=f"process {rank}")
    runs = new_runs(folder)
    if not runs or not (runs[0] / "config.json").exists():
        return survived(f"statuses {statuses}, before there was a run")
    if is_signalled and INTERRUPTED in statuses and statuses != [INTERRUPTED, INTERRUPTED]:
        raise Defect(f"statuses {statuses}: {tail(ends[0])} / {tail(ends[1])}")
    run = runs[0]
    if not is_complete(run):
        if 0 in statuses:
            raise Defect(f"statuses {statuses}, and the run is not complete")
        again = _pair(folder, ["train", "--resume", str(run)], (Plan(), Plan()))
        for rank, end in enumerate(again):
            require_clean(end, activity=f"resuming, process {rank}")
        if [end.status for end in again] != [0, 0]:
            raise Defect(f"resuming: {[end.status for end in again]}: {tail(again[0])} / {tail(again[1])}")
    _require_losses(lab, run)
    return survived(f"statuses {statuses}, then the bits of an undisturbed pair")


KINDS: dict[str, Callable[[Lab, Case], Outcome]] = {"processes": processes}
