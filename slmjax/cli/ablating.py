"""`slmjax ablate`."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Annotated, Any

from slmjax.cli.options import asks_for_help, parse, positional, print_json, print_stderr
from slmjax.stop_signals import INTERRUPTED_STATUS, Stopped, StopSignals

# What people set first.
FIRST_OPTIONS = ("plan", "budget", "seeds", "only", "directory")


class Size(enum.Enum):
    """Sizes of a study."""

    SMALL = "small"  # hours on a CPU
    LARGE = "large"  # on an accelerator


class Together(enum.Enum):
    """Training of members that share a program: `Populations`, without what it imports."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


def ablate_command(argv: Sequence[str]) -> int:
    """Run a study: train arms with several seeds, and compare them.

    slmjax ablate STUDY.py [--plan] [--budget large] [--seeds 5]
    slmjax ablate STUDY_DIR

    STUDY.py has `def study() -> Study`. Started again, with the file or with the directory of results, the
    study resumes where it was stopped.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # Python file that defines study(), or the directory of a study that was begun
        study: Annotated[str, *positional("STUDY.py|STUDY_DIR")]
        # train nothing: print every run with its cost, and the differences that the study can resolve
        plan: bool = False
        # with --plan: compile the step of each arm, and time a few steps on this device
        measure: bool = True
        # size of the study, passed to `def study(size)` (none: small)
        budget: Size | None = None
        # number of seeds (none: those of the file, or as many as STUDY_DIR had last); those of the file come
        # first
        seeds: int | None = None
        # be one of several processes that train the members of this study, on any hosts; it ends once the
        # others train all that is left
        worker: bool = False
        # as a worker, wait until the others have ended, too
        wait: bool = False
        # seconds after which a member is taken over from a worker that gives no sign of life
        lease: float = 300.0
        # names of the arms to train now (none: all)
        only: tuple[str, ...] = ()
        # train members that differ in seeds and numbers alone in one program: on, off, or auto, where a short
        # measurement shows that it is faster (not in workers)
        populations: Together = Together.AUTO
        # directory of results (none: runs/studies/ and the file's name)
        directory: str | None = None
        # train members again whose arm has changed since; the old runs stay
        redo: bool = False
        # show the progress of each run, not only its result
        verbose: bool = False
        # print one JSON object, and progress to standard error
        json: bool = False

    args = parse(Arguments, argv, command="ablate", description=ablate_command.__doc__, first=FIRST_OPTIONS)
    assert not asks_for_help(argv)
    if "--only" in argv and not args.only:
        raise ValueError("--only needs the name of an arm: name one, or leave out --only to train all arms")
    with StopSignals() as signals:
        # A job that is preempted is worth another try.
        signals.sigterm_status = INTERRUPTED_STATUS
        return _ablate(args, signals)


def _ablate(args: Any, signals: StopSignals) -> int:
    from slmjax.studies.ablation import open_ablation

    ablation = open_ablation(
        args.study,
        directory=args.directory,
        size=None if args.budget is None else args.budget.value,
        num_seeds=args.seeds,
    )
    if args.plan:
        if args.only:
            raise ValueError("--plan is about the whole study: leave out --only")
        return _plan(args, ablation)
    command = f"slmjax ablate {ablation.directory}{' --worker' if args.worker else ''}"
    signals.note = f"resume with: {command}"
    outcomes: list[Any] = []
    try:
        _run(args, ablation, outcomes)
    except (RuntimeError, Stopped) as stopped:
        from slmjax.studies.running import Interrupted
        from slmjax.studies.tuning import TuningUnfinished

        # All that ended is recorded: the study can be resumed from any point.
        if not isinstance(stopped, Interrupted | TuningUnfinished | Stopped):
            raise
        print_stderr(str(stopped) if isinstance(stopped, Stopped) else f"{stopped}\nresume with: {command}")
        if args.json:
            print_json(_summary(ablation, outcomes, status="interrupted", command=command))
        return INTERRUPTED_STATUS
    failed = sum(len(outcome.failed) for outcome in outcomes)
    status = "failed" if failed else "finished"
    if args.json:
        print_json(_summary(ablation, outcomes, status=status, command=command))
    if failed:
        members = (
            "1 member failed, with the error" if failed == 1 else f"{failed} members failed, with the errors"
        )
        print_stderr(f"{members} above. To try again: {command}")
    return 1 if failed else 0


def _run(args: Any, ablation: Any, outcomes: list[Any]) -> None:
    """Run the studies, show the findings of each, and append its outcome."""
    import functools

    from rich.console import Console

    from slmjax.studies.ablation import run_ablation
    from slmjax.studies.claims import Lease
    from slmjax.studies.groups import Populations
    from slmjax.studies.running import run_study

    # A line for each member, unless each step is asked for.
    console = Console(stderr=True, highlight=False, quiet=not args.verbose)
    lease = Lease(seconds=args.lease, heartbeat=args.lease / 10)
    populations = Populations(args.populations.value)
    run = functools.partial(run_study, console=console, lease=lease, populations=populations)
    settings = {"redo": args.redo, "only": args.only, "worker": args.worker, "wait": args.wait}
    for outcome in run_ablation(ablation, **settings, run=run):
        outcomes.append(outcome)
        if outcome.num_left:
            print_stderr(f"{outcome.study.name}: {outcome.num_left} members have not ended yet")
        if not args.json:
            _print(outcome)


def _print(outcome: Any) -> None:
    from slmjax.studies.layout import print_findings
    from slmjax.studies.recovery_layout import print_recovery

    # A study of one arm has nothing to compare; others build on it.
    if len(outcome.study.arms) > 1:
        print(f"\n{outcome.study.question}\n" if outcome.study.question else "")
        print_findings(outcome.findings)
    if outcome.recovery is not None:
        print()
        print_recovery(outcome.recovery)
    print(f"\n{outcome.report}")


def _plan(args: Any, ablation: Any) -> int:
    """Print what the studies would train, what that takes, and what they can find."""
    from slmjax.studies.ablation import plan_ablation

    plans = plan_ablation(ablation, measured=args.measure)
    if args.json:
        studies = [dataclasses.asdict(plan) for plan in plans]
        print_json({"status": "planned", "directory": str(ablation.directory), "studies": studies})
        return 0
    print("\n\n".join(plan.text for plan in plans))
    return 0


def _summary(ablation: Any, outcomes: Sequence[Any], *, status: str, command: str) -> dict[str, Any]:
    """Return what `--json` prints."""
    from slmjax.studies.layout import findings_json
    from slmjax.studies.recovery_layout import recovery_json

    return {
        "status": status,
        "directory": str(ablation.directory),
        "command": command,
        "studies": [
            {
                "study": outcome.study.name,
                "directory": str(outcome.directory),
                "findings": findings_json(outcome.findings),
                "recovery": None if outcome.recovery is None else recovery_json(outcome.recovery),
                "report": str(outcome.report),
                "members_left": outcome.num_left,
                "failed": [
                    {"arm": member.arm, "seed": member.seed, "error": member.error}
                    for member in outcome.failed
                ],
            }
            for outcome in outcomes
        ],
    }
