"""`slmjax train`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.cli.options import experiment_name, load_code, option, parse, print_json, without_prefix

INTERRUPTED_STATUS = 75  # "try again later": a supervisor tells it from success and from failure


def train_command(words: Sequence[str]) -> int:
    """train a model: slmjax train [EXPERIMENT] [--optim.lr 3e-4 ...], --resume RUN_DIR, --init-from DIR,
    --teacher DIR
    """
    import jax
    from rich.console import Console

    from slmjax.parallel import hosts
    from slmjax.runner import trainer
    from slmjax.training import experiment as experiments

    if not {"-h", "--help"} & set(words):
        hosts.join()  # before an experiment file, or anything else, can ask jax for a device
    name, options = experiment_name(words)
    load_code(options)
    chosen = {
        key: option(options, f"--{key.replace('_', '-')}")
        for key in ("resume", "init_from", "teacher", "divergence", "quant")
    }
    start = _start(name, **chosen)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        resume: str | None = None  # run directory to go on with, from its newest intact checkpoint
        init_from: str | None = (
            # run or imported model to start from: its parameters and tokenizer; of a run, its experiment
            None
        )
        teacher: str | None = (
            # run or imported model to learn from: --objective.distill.* says how; its tokenizer is taken
            None
        )
        # from the teacher: forward_kl, reverse_kl, jsd, taid, top_k, sampled, ... (none: as set)
        divergence: str | None = None
        quant: str | None = (
            # train in these formats: WEIGHTS[+INPUTS[+CACHE]], such as q4_0 or q4_0+q8_0;
            # --quant.start-step 500 when
            None
        )
        # trace so many steps, after the first two of this session, into RUN_DIR/profile
        profile: int | None = None
        # Python file that defines the classes of your own which the run's settings name
        code: str | None = None
        json: bool = False  # print the result as JSON, and progress on standard error
        experiment: Annotated[experiments.Experiment, without_prefix()] = start

    given = parse(
        Arguments,
        options,
        default=Arguments(),
        command=f"train {name or ''}".strip(),
        description=train_command.__doc__,
    )
    assert all(getattr(given, key) == value for key, value in chosen.items()), (
        "what the defaults were chosen by is what was parsed"
    )
    code = name if name is not None and name.endswith(".py") else given.code
    console = Console(stderr=given.json, highlight=False)
    result = trainer.train(
        given.experiment, resume=given.resume, code=code, profile=given.profile, console=console
    )
    if jax.process_index() == 0:
        print_json(dataclasses.asdict(result)) if given.json else _show_result(result)
    return {"finished": 0, "interrupted": INTERRUPTED_STATUS}.get(result.status, 1)


def _start(
    name: str | None,
    *,
    resume: str | None,
    init_from: str | None,
    teacher: str | None,
    divergence: str | None,
    quant: str | None,
) -> Any:
    """The experiment whose fields the other options change."""
    from slmjax.distill.config import divergence_of
    from slmjax.quantization.rules import quant_of
    from slmjax.training import experiment as experiments
    from slmjax.training import recipes

    if resume is not None:
        given = {"--init-from": init_from, "--teacher": teacher, "--divergence": divergence, "--quant": quant}
        if other := name or next((option for option, value in given.items() if value), None):
            raise ValueError(f"--resume {resume} goes on with that run's own experiment: leave out {other}")
        return experiments.read_experiment(Path(resume))
    if init_from is not None:
        start = experiments.starting_from(Path(init_from), recipes.load_experiment(name) if name else None)
    else:
        start = recipes.load_experiment(name or "nano")
    if teacher is not None:
        start = experiments.taught_by(Path(teacher), start)
    if divergence is not None:
        start = experiments.with_divergence(start, divergence_of(divergence))
    return start if quant is None else dataclasses.replace(start, quant=quant_of(quant))


def _show_result(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if result.samples:
        console.print("\n[bold]sample[/bold]")
        for sample in result.samples:
            console.print(sample, markup=False)
    speed = (
        f"{result.tokens_per_second:,.0f} tokens/s"
        if result.tokens_per_second
        else "speed not measured in so few steps"
    )
    table = Table(title=f"{result.status} after step {result.step:,}", title_justify="left")
    table.add_column(f"on {result.measured_on}" if not result.compressors else result.measured_on)
    table.add_column("bits per byte", justify="right")
    table.add_row("this model", f"{result.bits_per_byte:.3f}")
    for name, bits in result.compressors.items():
        table.add_row(name, f"{bits:.3f}")
    console.print()
    console.print(table)
    console.print(
        f"loss {result.loss:.4f}, {result.tokens:,} tokens, {result.seconds:,.0f} s, {speed}, "
        f"{result.parameters:,} parameters, {result.data_wait_share:.1%} of the training time spent waiting "
        "for data" + (f", {result.skipped:,} steps undone" if result.skipped else "")
    )
    if result.status == "interrupted":
        code = Path(result.run_dir) / "experiment.py"
        console.print(
            f"go on with: slmjax train --resume {result.run_dir}"
            + (f" --code {code}" if code.exists() else "")
        )
    if result.status == "diverged":
        console.print(
            "too many steps in a row were not finite: lower --optim.lr (and --optim.muon-lr, with muon), or "
            "lengthen --optim.warmup-steps"
        )
    console.print(f"run directory: {result.run_dir}")
