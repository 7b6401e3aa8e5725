"""Kinds "kill" and "signal": processes that are killed, or asked to stop, at random and at chosen moments.

Promises: a killed run resumes to the bits of a run that was not; SIGTERM and Ctrl-C save within the time of
one step and one save (status 75), a second one ends at once; whatever the moment, no traceback.
"""

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.injections.lab import INTERRUPTED, Lab, is_complete, new_runs, records
from benchmarks.injections.sessions import End, Plan, session
from benchmarks.injections.verdicts import Case, Defect, Outcome, require_clean, survived, tail

TRAIN = ("train", "tiny.py")
# Grace between SIGTERM and SIGKILL is 30 s on most schedulers. Half of it, because a cold start imports for
# seconds, and the machine is busy.
GRACE = 15.0
AT_ONCE = 5.0  # after a second signal


# Killed -----------------------------------------------------------------------------------------------------
def kill(lab: Lab, case: Case) -> Outcome:
    """Inject a SIGKILL."""
    variants = (_kill_at_point, _kill_at_point, _kill_anywhere, _kill_resumed, _kill_often, _kill_command)
    return variants[case.number % len(variants)](lab, case)


def _kill_at_point(lab: Lab, case: Case) -> Outcome:
    """Kill a new run at a hook point; all points come in turn."""
    index = case.number // 6 * 2 + case.number % 6
    point = lab.points[index % len(lab.points)]
    case.describe(f"SIGKILL at {point} of a new run")
    with lab.scratch() as folder:
        end = session(
            TRAIN, folder=folder, plan=Plan(fault=f"{point}=kill", environment=_own_cache(folder, point))
        )
        if end.status == 0:
            raise Defect(f"the point {point} was not passed: nothing was injected")
        return _after_kill(lab, folder, end)


def _own_cache(folder: Path, point: str) -> dict[str, str]:
    # With the campaign's cache no data would be prepared.
    return {"SLMJAX_CACHE": str(folder / "cache")} if point.startswith("data.part") else {}


def _kill_anywhere(lab: Lab, case: Case) -> Outcome:
    """Kill a new run at a random moment; every eighth with a cold start, in imports and compilation too."""
    is_cold = case.number // 6 % 8 == 0
    delay = case.rng.uniform(0, 3 * lab.seconds if is_cold else lab.seconds)
    environment = {"JAX_COMPILATION_CACHE_DIR": ""} if is_cold else {}
    case.describe(f"SIGKILL {delay:.3f} s after a {'cold ' if is_cold else ''}start")
    plan = Plan(signals=((delay, signal.SIGKILL),), is_cold=is_cold, environment=environment)
    with lab.scratch() as folder:
        return _after_kill(lab, folder, session(TRAIN, folder=folder, plan=plan))


def _kill_resumed(lab: Lab, case: Case) -> Outcome:
    """Kill a resumed run at a random moment."""
    delay = case.rng.uniform(0, lab.seconds)
    name = case.rng.choice(("part", "begun"))
    case.describe(f"SIGKILL {delay:.3f} s after resuming the run {name!r}")
    with lab.scratch() as folder:
        run = lab.copy(name, folder)
        lab.resume(run, plan=Plan(signals=((delay, signal.SIGKILL),)))
        lab.require_resumable(run)
        return survived("resumed to the reference's bits")


def _kill_often(lab: Lab, case: Case) -> Outcome:
    """Kill a run and two of its resumptions at random hook points."""
    points = [case.rng.choice(lab.points) for _ in range(2)]
    case.describe(f"SIGKILL at {points[0]}, resumed, SIGKILL at {points[1]}, resumed")
    with lab.scratch() as folder:
        run = lab.copy("begun", folder)
        for point in points:
            lab.resume(run, plan=Plan(fault=f"{point}=kill"))
        lab.require_resumable(run)
        return survived("resumed to the reference's bits")


def _kill_command(lab: Lab, case: Case) -> Outcome:
    """Kill an export, a quantization or a report, which a second call must then complete."""
    delay = case.rng.uniform(0, 0.8 * lab.seconds)
    argv = case.rng.choice(
        (
            ("export", "run", "exported", "--to", "hf"),
            ("quantize", "run", "quantized", "--format", "q8_0"),
            ("report", "run"),
            ("data", "prepare", "--data.path", "text.txt", "--data.split", "tail"),
        )
    )
    case.describe(f"SIGKILL {delay:.3f} s after the start of `slmjax {argv[0]}`")
    with lab.scratch() as folder:
        lab.copy("done", folder)
        environment = {"SLMJAX_CACHE": str(folder / "cache")}
        session(argv, folder=folder, plan=Plan(signals=((delay, signal.SIGKILL),), environment=environment))
        end = session(argv, folder=folder, plan=Plan(environment=environment))
        require_clean(end, activity=f"second `slmjax {argv[0]}`")
        # A directory that was complete before the kill is not written over.
        if end.status != 0 and "exists already" not in end.output:
            raise Defect(f"second `slmjax {argv[0]}`: status {end.status}: {tail(end)}")
        return survived("a second call completed it")


def _after_kill(lab: Lab, folder: Path, end: End) -> Outcome:
    """Judge what a killed new run left: nothing, a run without files, or a run that resumes."""
    # The fault may lie behind the end of the run.
    if end.status not in (-signal.SIGKILL, 0):
        raise Defect(f"status {end.status}: {tail(end)}")
    runs = new_runs(folder)
    listing = session(["runs", "runs"], folder=folder) if runs else None
    if listing is not None:
        require_clean(listing, activity="`slmjax runs` after the kill")
    if not runs or not (runs[0] / "config.json").exists():
        # Nothing was trained: a new run is the way.
        if runs:
            refusal = lab.resume(runs[0])
            require_clean(refusal, activity="resuming a run without config.json")
            if refusal.status == 0:
                raise Defect("a run without config.json was resumed")
        return survived("killed before there was a run to resume")
    lab.require_resumable(runs[0])
    return survived("resumed to the reference's bits")


# Signalled --------------------------------------------------------------------------------------------------
def interrupt(lab: Lab, case: Case) -> Outcome:
    """Inject SIGTERM or SIGINT, single or doubled."""
    variants: tuple[Callable[[Lab, Case], Outcome], ...] = (
        _signal_anywhere,
        _signal_at_point,
        functools.partial(_signal_anywhere, is_doubled=True),
        _signal_at_point,
        functools.partial(_signal_anywhere, is_resumed=True),
        _signal_cold,
        _signal_reading,
    )
    return variants[case.number % len(variants)](lab, case)


def _pick(case: Case) -> signal.Signals:
    return case.rng.choice((signal.SIGTERM, signal.SIGINT))


def _signal_anywhere(lab: Lab, case: Case, *, is_doubled: bool = False, is_resumed: bool = False) -> Outcome:
    number = _pick(case)
    # The command begins some milliseconds after the fork.
    delay = case.rng.uniform(0.03, lab.seconds)
    signals = [(delay, number)]
    if is_doubled:
        signals.append((delay + case.rng.choice((0.0, 0.01, 0.1, 0.3)), _pick(case)))
    sent = " and ".join(f"{name.name} at {at:.3f} s" for at, name in signals)
    case.describe(f"{sent} of a {'resumed' if is_resumed else 'new'} run")
    plan = Plan(signals=tuple(signals))
    with lab.scratch() as folder:
        if is_resumed:
            run = lab.copy("part", folder)
            before = len(records(run))
            end = lab.resume(run, plan=plan)
            return _after_signal(lab, run, end, is_doubled=is_doubled, before=before)
        end = session(TRAIN, folder=folder, plan=plan)
        return _after_signal(lab, next(iter(new_runs(folder)), None), end, is_doubled=is_doubled)


def _signal_at_point(lab: Lab, case: Case) -> Outcome:
    number = case.rng.choice(("term", "int"))
    index = case.number // 7 * 2 + (case.number % 7 == 3)
    point = lab.points[index % len(lab.points)]
    case.describe(f"{number} at {point} of a new run")
    with lab.scratch() as folder:
        plan = Plan(fault=f"{point}={number}", environment=_own_cache(folder, point))
        end = session(TRAIN, folder=folder, plan=plan)
        return _after_signal(lab, next(iter(new_runs(folder)), None), end)


def _signal_cold(lab: Lab, case: Case) -> Outcome:
    """Signal a real `python -m slmjax` while it imports, prepares and compiles."""
    number = _pick(case)
    delay = case.rng.uniform(0.05, 3 * lab.seconds + 1.0)
    signals = [(delay, number)]
    if case.number % 2:
        signals.append((delay + 0.2, number))
    case.describe(f"{number.name} {delay:.3f} s after a cold start{', twice' if len(signals) > 1 else ''}")
    plan = Plan(signals=tuple(signals), is_cold=True, environment={"JAX_COMPILATION_CACHE_DIR": ""})
    with lab.scratch() as folder:
        end = session(TRAIN, folder=folder, plan=plan)
        return _after_signal(
            lab, next(iter(new_runs(folder)), None), end, is_doubled=len(signals) > 1, is_cold=True
        )


def _signal_reading(lab: Lab, case: Case) -> Outcome:
    """Signal a command that reads a run: it ends, and the run is as it was."""
    number = _pick(case)
    delay = case.rng.uniform(0.03, 0.8)
    argv = case.rng.choice(
        (("eval", "run"), ("generate", "run", "--prompt", "the"), ("report", "run"), ("runs", "."))
    )
    case.describe(f"{number.name} {delay:.3f} s after the start of `slmjax {argv[0]}`")
    with lab.scratch() as folder:
        lab.copy("done", folder)
        end = session(argv, folder=folder, plan=Plan(signals=((delay, number),)))
        require_clean(end, activity=f"`slmjax {argv[0]}`")
        return survived(f"ended with status {end.status}")


_ENDS = {0, 1, INTERRUPTED, 130, 143, -signal.SIGINT, -signal.SIGTERM}


def _after_signal(
    lab: Lab,
    run: Path | None,
    end: End,
    *,
    is_doubled: bool = False,
    is_cold: bool = False,
    before: int = 0,
) -> Outcome:
    """Judge the end of a signalled run and what resuming it gives.

    Args:
      before: records of the log that earlier sessions wrote.
    """
    require_clean(end, activity="signalled")
    if end.status not in _ENDS or end.status == 1:
        raise Defect(f"signalled: status {end.status}: {tail(end)}")
    # Imports cannot be interrupted everywhere, and take seconds.
    limit = (AT_ONCE if is_doubled else GRACE) + (GRACE if is_cold else 0)
    if end.answer_seconds > limit:
        raise Defect(f"ended {end.answer_seconds:.0f} s after the signal, not within {limit:.0f} s")
    if run is None or not (run / "config.json").exists():
        return survived(f"ended with status {end.status} before there was a run")
    if end.status == 0 and not is_complete(run):
        raise Defect(f"status 0, and the run is not complete: {tail(end)}")
    if end.status == INTERRUPTED and not is_doubled:
        _require_saved(run, before)
    lab.require_resumable(run)
    return survived(f"ended with status {end.status}, resumed to the reference's bits")


def _require_saved(run: Path, before: int) -> None:
    """Raise Defect unless an interrupted session has saved the last step of its log."""
    # Not those of a session that was killed, which may have come further.
    steps = [record["step"] for record in records(run)[before:] if record.get("kind") == "train"]
    if steps and not (run / "checkpoints" / str(steps[-1]) / "MANIFEST.json").exists():
        raise Defect(f"status {INTERRUPTED}, and step {steps[-1]}, the last of the log, is not saved")


KINDS: dict[str, Any] = {"kill": kill, "signal": interrupt}
