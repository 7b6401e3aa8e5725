"""Kinds "checkpoint" and "small file": damage to what a run has stored.

Promises: a damaged checkpoint is not restored, an older good one is, and the run ends with the same bits;
commands that only read a run change nothing in it; a damaged small file is refused with its name and a way
out, or does no harm.
"""

import dataclasses
import functools
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.injections.damage import damage_bytes, damage_tree, mutate_json
from benchmarks.injections.lab import STEPS, Lab, contents, in_fork, is_complete
from benchmarks.injections.sessions import Plan, session
from benchmarks.injections.verdicts import (
    Case,
    Defect,
    Outcome,
    Verdict,
    refused,
    require_clean,
    require_refusal,
    survived,
)

READING = (
    ("eval", "run", "--json"),
    ("generate", "run", "--prompt", "the"),
    ("export", "run", "exported", "--to", "hf"),
    ("quantize", "run", "quantized", "--format", "q8_0"),
)
REPORTING = (
    ("report", "run"),
    ("runs", "."),
    ("compare", "run", "run2", "--output", "compared.html"),
)
_MEMORY = 12 << 30  # bytes of address space: a damaged size must not take the machine's memory


# Checkpoints ------------------------------------------------------------------------------------------------
def checkpoint(lab: Lab, case: Case) -> Outcome:
    """Damage files inside checkpoints."""
    variants = (_newest_resumed, _newest_read, _newest_resumed, _all_resumed, _newest_read)
    return variants[case.number % len(variants)](lab, case)


def _newest_resumed(lab: Lab, case: Case) -> Outcome:
    """Damage the newest checkpoint; the run has older ones, so it must resume."""
    with lab.scratch() as folder:
        run = lab.copy("part", folder)
        newest = max(_steps(run))
        way = damage_tree(run / "checkpoints" / str(newest), case.rng)
        case.describe(f"checkpoint {newest}, resumed: {way}")
        lab.require_resumable(run)
        return survived("resumed to the reference's bits")


def _all_resumed(lab: Lab, case: Case) -> Outcome:
    """Damage every checkpoint; the run must refuse to resume, and never begin again unasked."""
    with lab.scratch() as folder:
        run = lab.copy("part", folder)
        for step in _steps(run):
            way = damage_bytes(_some_array_file(run / "checkpoints" / str(step), case), case.rng)
            case.describe(f"checkpoint {step}: {way}")
        end = lab.resume(run)
        outcome = lab.judge_resume(run, end, activity="resuming without a good checkpoint", names=[str(run)])
        if outcome.verdict is Verdict.REFUSED:
            again = lab.resume(run)
            require_refusal(again, activity="resuming a second time", names=[str(run)])
        return outcome


def _newest_read(lab: Lab, case: Case) -> Outcome:
    """Damage the newest checkpoint, and read the run: nothing may change, and no wrong number may appear."""
    argv = READING[case.number // 5 % len(READING)] if case.number % 2 else READING[0]
    with lab.scratch() as folder:
        run = lab.copy("done", folder)
        way = damage_tree(run / "checkpoints" / str(STEPS), case.rng)
        case.describe(f"checkpoint {STEPS}, `slmjax {argv[0]}`: {way}")
        before = contents(run)
        end = session(argv, folder=folder)
        require_clean(end, activity=f"`slmjax {argv[0]}`")
        if changed := _changes(before, contents(run)):
            raise Defect(f"`slmjax {argv[0]}` changed the run: {changed}")
        if end.status != 0:
            require_refusal(end, activity=f"`slmjax {argv[0]}`", names=[str(run), "run/", str(STEPS)])
            return refused(end)
        if argv[0] == "eval":
            _require_known_loss(lab, end.output)
        return survived("read without the damage, and left as it was")


def _require_known_loss(lab: Lab, output: str) -> None:
    """Raise Defect unless `slmjax eval` printed the loss of an undamaged checkpoint."""
    known = _known_losses(lab.work)
    if (loss := _printed_loss(output)) not in known:
        raise Defect(f"`slmjax eval` printed the loss {loss}, and checkpoints have {known}")


@functools.cache
def _known_losses(work: Path) -> list[float]:
    """Return the held-out losses of the finished run's checkpoints."""
    run = work / "pool" / "done"
    losses = []
    for step in _steps(run):
        end = session(["eval", "done", "--json", "--step", str(step)], folder=run.parent)
        assert end.status == 0, end.output
        losses.append(_printed_loss(end.output))
    return losses


def _printed_loss(output: str) -> float:
    return json.loads(output[output.index("{") : output.rindex("}") + 1])["text"]["loss"]


def _steps(run: Path) -> list[int]:
    names = (path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def _some_array_file(checkpoint: Path, case: Case) -> Path:
    return case.rng.choice(sorted(path for path in checkpoint.rglob("d/*") if path.is_file()))


def _changes(before: dict[str, str], after: dict[str, str]) -> str:
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    # A report belongs to the run.
    names = [name for name in names if not name.startswith(("report.html", "plots/"))]
    return ", ".join(names[:5])


# Small files ------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A file to damage, and commands that read it."""

    file: str
    run: str  # of the pool
    commands: tuple[tuple[str, ...], ...]
    # other settings may follow from the damage, so that the bits need not be the reference's
    decides: bool = False
    is_log: bool = False


RESUME = ("train", "--resume", "run")
TARGETS = (
    Target(file="config.json", run="part", commands=(RESUME, *REPORTING), decides=True),
    Target(file="config.json", run="done", commands=(READING[0], *REPORTING), decides=True),
    Target(file="checkpoints/best.json", run="part", commands=(RESUME, RESUME, ("runs", "."))),
    Target(file="checkpoints/best.json", run="done", commands=(READING[0],)),
    Target(file="checkpoints/8/MANIFEST.json", run="part", commands=(RESUME,)),
    Target(file="checkpoints/12/MANIFEST.json", run="done", commands=READING),
    Target(file="log.jsonl", run="part", commands=(RESUME,), is_log=True),
    Target(file="log.jsonl", run="done", commands=REPORTING, is_log=True),
    Target(file="result.json", run="done", commands=(*REPORTING, RESUME)),
    Target(file="model.json", run="done", commands=READING, decides=True),
    Target(file="model.json", run="part", commands=(RESUME,)),
    Target(file="data.json", run="part", commands=(RESUME, ("report", "run"))),
    Target(file="environment.json", run="part", commands=(RESUME, ("report", "run"))),
    Target(file="tokenizer/tokenizer.json", run="done", commands=READING, decides=True),
    Target(file="tokenizer/tokenizer_config.json", run="done", commands=READING, decides=True),
    Target(file="tokenizer/tokenizer.json", run="part", commands=(RESUME,), decides=True),
)


def small_file(lab: Lab, case: Case) -> Outcome:
    """Mutate a small file, and run a command or a function that reads it."""
    return _fuzzed(lab, case) if case.number % 3 == 2 else _commanded(lab, case)


def _commanded(lab: Lab, case: Case) -> Outcome:
    index = case.number // 3 * 2 + case.number % 3
    target = TARGETS[index % len(TARGETS)]
    argv = target.commands[index // len(TARGETS) % len(target.commands)]
    with lab.scratch() as folder:
        run = lab.copy(target.run, folder)
        if "run2" in argv:
            shutil.copytree(lab.run("done"), folder / "run2")
        path = run / target.file
        way = damage_bytes(path, case.rng) if not path.suffix else mutate_json(path, case.rng)
        case.describe(f"{target.file}, `slmjax {' '.join(argv[:2])}`: {way}")
        # Damaged settings may say a long training, which is no hang.
        plan = Plan(in_child=_limit_memory, limit=45.0 if target.decides else 120.0)
        end = lab.resume(run, plan=plan) if argv is RESUME else session(argv, folder=folder, plan=plan)
        activity = f"`slmjax {argv[0]}`"
        if end.status is None and target.decides and argv is RESUME and "step " in end.output:
            return survived("trains with the settings that the file now has")
        require_clean(end, activity=activity)
        if end.status == 0:
            if argv is RESUME and not target.decides:
                lab.require_reference(run, partly=target.is_log)
            return survived("read without harm")
        if argv is RESUME and is_complete(run) and "already" in end.output:
            return survived("it was finished, and says so")
        # The configuration of a diverging run is no damage that a reader could see.
        if target.decides and end.status == 1 and "diverged" in end.output:
            return survived("trains with the settings that the file now has, and diverges")
        # `runs` looks for runs in a folder, and a directory without a config.json is none.
        names = [Path(target.file).name, str(run), "run/", *([str(folder)] if argv[0] == "runs" else [])]
        require_refusal(end, activity=activity, names=names)
        return refused(end)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _fuzzed(lab: Lab, case: Case) -> Outcome:
    """Let one of the package's reading functions read a mutated file of its kind."""
    name, attempt = _fuzz(lab, case.number // 3)
    case.describe(f"{name}, read by its function, seed {case.number // 3}")
    if attempt["outcome"] == "defect":
        raise Defect(attempt["detail"])
    if attempt["outcome"] == "refused":
        return Outcome(verdict=Verdict.REFUSED, reason=attempt["detail"][:600])
    return survived("read without harm")


def _fuzz(lab: Lab, number: int) -> tuple[str, dict[str, Any]]:
    from tests import fuzzing

    kinds = fuzzing.KINDS
    kind = kinds[number % len(kinds)]

    def attempt() -> dict[str, Any]:
        with lab.scratch() as folder:
            directory = fuzzing.write_sample(kind, folder)
            attempt = fuzzing.try_once(kind, directory, seed=number // len(kinds))
            return {"outcome": attempt.outcome.value, "detail": attempt.detail}

    return kind.name, in_fork(attempt, folder=lab.work)


KINDS: dict[str, Callable[[Lab, Case], Outcome]] = {"checkpoint": checkpoint, "small file": small_file}
