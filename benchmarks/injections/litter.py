"""Kind "litter": misplaced, foreign and missing entries of a run directory.

Promises: a run resumes from a checkpoint of its own, whose step is the one that its name says; retention
deletes checkpoints of this run alone; a run whose checkpoints are gone does not begin again unasked.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.injections.lab import STEPS, Lab, contents, is_complete
from benchmarks.injections.sessions import Plan, session
from benchmarks.injections.stored import READING, REPORTING
from benchmarks.injections.verdicts import Case, Defect, Outcome, require_clean, require_refusal, survived

# Names that a person, a tool or an incomplete copy leaves.
_NAMES = (
    *("5000", "999", "0999", "13", "²", "٣", "-1", "1e3", "+9", "8 (copy)", "8.bad", "8.bak", "latest"),
    *("best", "10.orbax-checkpoint-tmp", "8.orbax-checkpoint-tmp-17", ".snapshot", "lost+found", "9" * 30),
)


def litter(lab: Lab, case: Case) -> Outcome:
    """Put something into a run directory, or take something out, and resume or read the run."""
    # Numbers that are multiples of three read a finished run, the others resume one.
    if case.number % 3 == 0:
        return _read(lab, case)
    with lab.scratch() as folder:
        run = lab.copy("part", folder)
        actions: list[Callable[[Path, Case], list[Path]]] = [_copy, _empty, _rename, _foreign, _copy, _link]
        if case.number % 7 == 0:
            return _without_checkpoints(lab, run, case)
        left_alone = actions[case.number % len(actions)](run, case)
        if case.rng.random() < 0.3:
            further = actions[case.rng.randrange(len(actions))](run, case)
            # The second may have renamed what the first has made.
            left_alone = [path for path in left_alone if path.is_symlink() or path.exists()] + further
        keep = case.rng.choice(("1", "2"))
        case.describe(f"resumed with checkpoint.keep={keep}")
        end = lab.resume(run, "--checkpoint.keep", keep)
        outcome = lab.judge_resume(run, end, activity="resuming", names=[str(run)])
        _require_left_alone(left_alone)
        if is_complete(run) and not (run / "checkpoints" / str(STEPS)).is_dir():
            raise Defect(f"the last checkpoint is gone: {sorted(os.listdir(run / 'checkpoints'))}")
        return outcome


def _require_left_alone(paths: list[Path]) -> None:
    for path in paths:
        # What has the name of an unfinished save is the run's own to remove.
        if "orbax-checkpoint-tmp" in path.name:
            continue
        if not path.is_symlink() and not path.exists():
            raise Defect(f"{path.name}, which is no checkpoint of this run, was deleted or renamed")


def _checkpoints(run: Path) -> list[Path]:
    return sorted((path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()), key=_number)


def _number(path: Path) -> int:
    return int(path.name)


def _copy(run: Path, case: Case) -> list[Path]:
    """Copy a checkpoint to another name."""
    source = case.rng.choice(_checkpoints(run))
    target = source.with_name(case.rng.choice(_NAMES))
    if target.exists():
        return []
    shutil.copytree(source, target)
    case.describe(f"checkpoint {source.name} copied to {target.name}")
    return [target]


def _empty(run: Path, case: Case) -> list[Path]:
    """Make an empty or nearly empty directory."""
    target = run / "checkpoints" / case.rng.choice(_NAMES)
    if target.exists():
        return []
    target.mkdir()
    if case.rng.random() < 0.5:
        (target / case.rng.choice(("model", "meta", "MANIFEST.json"))).mkdir()
    case.describe(f"directory {target.name} made")
    return [target]


def _rename(run: Path, case: Case) -> list[Path]:
    """Rename the newest checkpoint; older ones keep their names."""
    source = _checkpoints(run)[-1]
    target = source.with_name(case.rng.choice(_NAMES))
    if target.exists():
        return []
    source.rename(target)
    case.describe(f"checkpoint {source.name} renamed to {target.name}")
    return [target]


def _foreign(run: Path, case: Case) -> list[Path]:
    """Put files there that slmjax did not write."""
    folder = case.rng.choice((run, run / "checkpoints", _checkpoints(run)[-1]))
    target = folder / case.rng.choice(
        ("notes.txt", ".DS_Store", "9", "12", "core.1234", "result.json.bak", "log.jsonl~", "wandb", "events")
    )
    if target.exists():
        return []
    target.write_bytes(case.rng.randbytes(100))
    case.describe(f"file {target.relative_to(run)} written")
    # A file in the place of a checkpoint directory or inside a checkpoint goes with it.
    return [] if folder.name.isdecimal() else [target]


def _link(run: Path, case: Case) -> list[Path]:
    """Make a symbolic link: to a checkpoint, to nothing, or of the whole directory."""
    newest = _checkpoints(run)[-1]
    choice = case.rng.randrange(3)
    if choice == 2:
        elsewhere = run.parent / "elsewhere"
        if elsewhere.exists():
            return []
        (run / "checkpoints").rename(elsewhere)
        (run / "checkpoints").symlink_to(elsewhere)
        case.describe("checkpoints is a link")
        return [run / "checkpoints"]
    target = run / "checkpoints" / case.rng.choice(("9", "latest", "7000"))
    if target.exists() or target.is_symlink():
        return []
    target.symlink_to(newest.name if choice == 0 else "nowhere")
    case.describe(f"{target.name} links to {newest.name if choice == 0 else 'nowhere'}")
    return [target]


def _without_checkpoints(lab: Lab, run: Path, case: Case) -> Outcome:
    """Delete or replace `checkpoints`: the run must not begin again in the same log."""
    choice = case.rng.randrange(4)
    if choice == 0:
        shutil.rmtree(run)
        shutil.copytree(lab.run("done"), run)
    shutil.rmtree(run / "checkpoints")
    if choice == 2:
        (run / "checkpoints").write_text("")
    if choice == 3:
        (run / "checkpoints").mkdir()
    case.describe(
        ("checkpoints/ of a finished run deleted", "deleted", "replaced by a file", "emptied")[choice]
    )
    end = lab.resume(run)
    outcome = lab.judge_resume(run, end, activity="resuming without checkpoints/", names=[str(run)])
    if end.status == 0:
        raise Defect("a run without its checkpoints began again unasked")
    return outcome


def _read(lab: Lab, case: Case) -> Outcome:
    """Read a finished run with litter in it."""
    argv = case.rng.choice((*READING, *REPORTING[:2]))
    with lab.scratch() as folder:
        run = lab.copy("done", folder)
        actions = (_copy, _empty, _foreign, _link)
        left_alone = case.rng.choice(actions)(run, case)
        case.describe(f"`slmjax {argv[0]}`")
        before = contents(run / "checkpoints")
        end = session(argv, folder=folder, plan=Plan())
        require_clean(end, activity=f"`slmjax {argv[0]}`")
        if end.status != 0:
            require_refusal(end, activity=f"`slmjax {argv[0]}`", names=["run"])
        _require_left_alone(left_alone)
        if before != contents(run / "checkpoints"):
            raise Defect(f"`slmjax {argv[0]}` changed the run's checkpoints")
        return survived("read as without it" if end.status == 0 else "refused, and left as it was")


KINDS: dict[str, Callable[[Lab, Case], Outcome]] = {"litter": litter}
