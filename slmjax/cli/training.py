"""`slmjax train`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.fields import Option, full_names, options_of
from slmjax.cli.options import (
    asks_for_help,
    load_code,
    parse,
    peek_option,
    print_json,
    split_experiment,
    without_prefix,
)
from slmjax.stop_signals import INTERRUPTED_STATUS, StopSignals

# Options that decide the defaults of the experiment's fields.
START_OPTIONS = ("resume", "init_from", "teacher", "divergence", "quant")
# What people set first: the text, the length, the size, the rate, and where a run begins.
FIRST_OPTIONS = (
    "data.path",
    "run.steps",
    "run.epochs",
    "optim.lr",
    "data.batch-size",
    "data.sequence-length",
    "model.embed-dim",
    "model.stack.0.repeats",
    "init-from",
    "resume",
    "run.name",
    "dry-run",
)


def train_command(argv: Sequence[str]) -> int:
    """Train a model, or resume a run.

    slmjax train [EXPERIMENT] [--optim.lr 3e-4 ...]
    slmjax train [EXPERIMENT] [--init-from DIR] [--teacher DIR]
    slmjax train --resume RUN_DIR
    slmjax train [EXPERIMENT] --dry-run

    EXPERIMENT is the name of a built-in one (`slmjax experiments` lists them; none: nano), or a Python file.
    """
    from slmjax.parallel import hosts
    from slmjax.parallel.processes import share_signals

    # Before an experiment file, or anything else, can ask jax for a device.
    is_joined = not asks_for_help(argv) and hosts.join() is not None
    with StopSignals() as signals, signals.together():
        # A job that is preempted before its first step is worth another try.
        signals.sigterm_status = INTERRUPTED_STATUS
        share_signals(signals)
        return _train(argv, is_joined=is_joined)


def _train(argv: Sequence[str], *, is_joined: bool) -> int:
    """Train, with signals handled."""
    import jax
    from rich.console import Console

    from slmjax.parallel.agreement import in_all_processes
    from slmjax.runner import trainer
    from slmjax.runner.session import resume_command

    if is_joined:
        # An option that one process refuses ends all of them: they would wait for it.
        args, code = in_all_processes(lambda: _read_arguments(argv), activity="reading the options")
    else:
        args, code = _read_arguments(argv)
    if args.dry_run:
        return _dry_run(args)
    console = Console(stderr=args.json, highlight=False)
    result = trainer.train(
        args.experiment,
        resume=args.resume,
        code=code,
        profile=args.profile,
        console=console,
        restart=args.restart,
    )
    # Every process trains; one reports.
    if jax.process_index() == 0:
        if args.json:
            print_json(dataclasses.asdict(result))
        else:
            is_fresh = args.experiment.init.source() is None
            command = resume_command(Path(result.run_dir), args.experiment)
            _print_result(result, command, is_fresh=is_fresh)
    return {"finished": 0, "interrupted": INTERRUPTED_STATUS}.get(result.status, 1)


def _read_arguments(argv: Sequence[str]) -> tuple[Any, str | None]:
    """Return the options of the command, and the experiment file if there is one."""
    from slmjax.training import recipes

    name, options = split_experiment(argv)
    load_code(options)
    start_options = {key: peek_option(options, f"--{key.replace('_', '-')}") for key in START_OPTIONS}
    command = f"train {name or ''}".strip()
    further = _further_options()
    if asks_for_help(options):
        start = recipes.load_experiment(name or "nano")
    else:
        start = _start(name, **start_options)
        arguments_class = _train_arguments(start)
        own = options_of(arguments_class, arguments_class())
        options = full_names(options, own, command=command, further=further)
        start = _with_one_length(start, options)
    arguments_class = _train_arguments(start)
    args = parse(
        arguments_class,
        options,
        default=arguments_class(),
        command=command,
        description=train_command.__doc__,
        first=FIRST_OPTIONS,
        further=further,
    )
    # The defaults came from peek_option: tyro must have parsed the same values.
    assert all(getattr(args, key) == value for key, value in start_options.items())
    return args, name if name is not None and name.endswith(".py") else args.code


def _dry_run(args: Any) -> int:
    """Print what the run would be."""
    import jax

    from slmjax.runner.dry_run import plan_run

    if args.resume is not None:
        raise ValueError(f"--dry-run describes a new run: leave out --resume {args.resume}")
    plan = plan_run(args.experiment)
    if jax.process_index() == 0:
        print_json(dataclasses.asdict(plan)) if args.json else print(plan.text())
    return 0


def _further_options() -> list[Option]:
    """Return the options of settings that an experiment has only with a teacher or a number format."""
    from slmjax.distill.config import DistillConfig, TeacherConfig
    from slmjax.quantization.rules import quant_of

    distill = DistillConfig(teachers=(TeacherConfig(path="DIR"),))
    quant = quant_of("q4_0")
    configs = {"objective.distill": (distill, "--teacher"), "quant": (quant, "--quant")}
    return [
        dataclasses.replace(
            option,
            name=f"{path}.{option.name}",
            group=f"{path}.{option.group}".removesuffix("."),
            needs=needs,
        )
        for path, (config, needs) in configs.items()
        for option in options_of(type(config), config)
    ]


def _train_arguments(start: Any) -> type:
    from slmjax.training import experiment as experiments

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        # run directory to resume, from its newest intact checkpoint
        resume: str | None = None
        # with --resume: begin again at step 0 if no checkpoint of the run is left
        restart: bool = False
        # run or imported model to start from: its parameters and tokenizer, and a run's experiment; the
        # experiment `finetune` has rates for it
        init_from: str | None = None
        # run or imported model to distill from, as --objective.distill.* describes; its tokenizer is used
        teacher: str | None = None
        # divergence from the teacher: forward_kl, reverse_kl, jsd, taid, top_k, sampled, ... (none: the
        # experiment's)
        divergence: str | None = None
        # number formats to train in: WEIGHTS[+INPUTS[+CACHE]], such as q4_0 or q4_0+q8_0; they apply
        # from step --quant.start-step
        quant: str | None = None
        # steps to profile, after the first two of this session, into RUN_DIR/profile
        profile: int | None = None
        # Python file that defines your own classes, if the run's config names any
        code: str | None = None
        # train nothing: show parameters, memory, tokens, FLOPs, the time of two steps, and where the run
        # would be
        dry_run: bool = False
        # print the result as JSON, and progress to standard error
        json: bool = False
        experiment: Annotated[experiments.Experiment, without_prefix()] = start

    return Arguments


def _start(
    name: str | None,
    *,
    resume: str | None,
    init_from: str | None,
    teacher: str | None,
    divergence: str | None,
    quant: str | None,
) -> Any:
    """Return the experiment that the remaining options change."""
    from slmjax.distill.config import divergence_of
    from slmjax.quantization.rules import quant_of
    from slmjax.training import experiment as experiments
    from slmjax.training import recipes

    if resume is not None:
        options = {"--init-from": init_from, "--teacher": teacher, "--divergence": divergence}
        options["--quant"] = quant
        if other := name or next((option for option, value in options.items() if value), None):
            raise ValueError(f"--resume {resume} continues that run's own experiment: leave out {other}")
        return experiments.read_experiment(Path(resume))
    if init_from is not None:
        experiment = None if name is None else recipes.load_experiment(name)
        # A built-in experiment fits any model; a file of the user's describes its own.
        start = experiments.starting_from(Path(init_from), experiment, takes_model=name in recipes.BUILT_IN)
    else:
        start = recipes.load_experiment(name or "nano")
    if start.init == experiments.FromModel(path=recipes.NO_MODEL):
        raise ValueError(
            f"{name} continues a trained model: name a run or an imported model with --init-from DIR"
        )
    if teacher is not None:
        start = experiments.taught_by(Path(teacher), start)
    if divergence is not None:
        start = experiments.with_divergence(start, divergence_of(divergence))
    return start if quant is None else dataclasses.replace(start, quant=quant_of(quant))


def _with_one_length(experiment: Any, options: Sequence[str]) -> Any:
    """Return the experiment without its number of epochs where the command line gives a number of steps."""
    steps, epochs = (peek_option(options, name) for name in ("--run.steps", "--run.epochs"))
    if steps is None or epochs == "None":
        return experiment
    if epochs is not None:
        raise ValueError(f"--run.steps {steps} and --run.epochs {epochs} are two lengths: leave one out")
    return dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, epochs=None))


def _print_result(result: Any, resume_command: str, *, is_fresh: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if result.samples:
        console.print("\n[bold]sample[/bold]")
        for sample in result.samples:
            console.print(sample, markup=False)
    speed = "speed not measured in so few steps"
    if result.session_tokens_per_second:
        speed = f"{result.session_tokens_per_second:,.0f} tokens/s"
    table = Table(title=f"{result.status} after step {result.step:,}", title_justify="left")
    table.add_column(f"on {result.measured_on}" if not result.compressors else result.measured_on)
    table.add_column("bits per byte", justify="right")
    table.add_row("this model", f"{result.bits_per_byte:.3f}")
    for name, bits in result.compressors.items():
        table.add_row(name, f"{bits:.3f}")
    console.print()
    console.print(table)
    # A model that was trained before has seen more than this run shows.
    if is_fresh and (hint := _short_run(result)):
        console.print(hint)
    skipped = f", {result.skipped:,} steps skipped" if result.skipped else ""
    console.print(f"loss {result.loss:.4f}, {result.parameters:,} parameters{skipped}")
    if result.best_step not in (None, result.step):
        console.print(best_note(result))
    # Both spans, where they differ: the counts of a resumed run are not those of its last session.
    if result.run_tokens != result.session_tokens:
        seconds = "" if result.run_seconds is None else f", {result.run_seconds:,.0f} s"
        console.print(f"all sessions of the run: {result.run_tokens:,} tokens{seconds}")
    console.print(
        f"this session: {result.session_tokens:,} tokens, {result.session_seconds:,.0f} s, {speed}, "
        f"{result.session_data_wait_share:.1%} of the training time spent waiting for data"
    )
    if result.status == "interrupted":
        console.print(f"resume with: {resume_command}")
    if result.status == "not_saved":
        console.print(
            f"this model is NOT on disk, see the error above: free disk space, then {resume_command}"
        )
    if result.status == "diverged":
        console.print(
            "too many steps in a row were not finite: lower --optim.lr (and --optim.muon-lr, with muon), or "
            "lengthen --optim.warmup-steps"
        )
    console.print(f"run directory: {result.run_dir}")


def best_note(result: Any) -> str:
    """Describe an earlier step that was better than the last one, on the text of both."""
    text = result.best_measured_on or "the text of the evaluations"
    last = result.loss if result.best_measured_on == result.measured_on else result.part_loss
    compared = "" if last is None else f", instead of {last:.4f} now"
    return (
        f"lower at step {result.best_step:,}: loss {result.best_loss:.4f} on {text}{compared}; "
        f"`--step {result.best_step}` of the other commands uses its checkpoint"
    )


# Tokens per parameter for which the loss is lowest at a fixed amount of computation (Hoffmann et al. 2022).
OPTIMAL_TOKENS = 20


def _short_run(result: Any) -> str | None:
    """Return a hint that the model was trained on little, where a compressor beats it."""
    if not result.compressors or result.bits_per_byte <= min(result.compressors.values()):
        return None
    tokens = result.run_tokens / result.parameters
    if tokens >= OPTIMAL_TOKENS:
        return None
    return (
        f"a short run: it has seen {tokens:.2g} tokens per parameter, and models are usually trained on "
        f"{OPTIMAL_TOKENS} or more. More of --run.steps lowers its bits per byte"
    )
