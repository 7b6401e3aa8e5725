"""The `slmjax` command: one thin function per command word over the package's Python surface.

The word is looked up before anything heavy is imported, so that `slmjax --help` answers at once. Options are the fields of
dataclasses, parsed and documented by tyro.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from slmjax.startup import keep_memory

INTERRUPTED_STATUS = 75  # "try again later": a supervisor tells it from success and from failure


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `slmjax` command; exits with a status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if words[0] == "--version":
        from slmjax import __version__

        print(__version__)
        sys.exit(0)
    if words[0] not in COMMANDS:
        from slmjax.config import near_names

        print(f"error: there is no command {words[0]!r}.{near_names(words[0], COMMANDS)}\n\n{_overview()}", file=sys.stderr)
        sys.exit(2)
    keep_memory()
    try:
        sys.exit(COMMANDS[words[0]](words[1:]))
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("SLMJAX_TRACEBACK"):
            raise
        print(f"error: {error}\n(SLMJAX_TRACEBACK=1 shows where it arose)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped before there was anything to save", file=sys.stderr)
        sys.exit(130)


def _overview() -> str:
    lines = ["usage: slmjax COMMAND [OPTIONS]", "", "Train, evaluate and sample small language models.", ""]
    lines += [f"  {name:<10}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join([*lines, "", "slmjax COMMAND --help tells the options of a command."])


def _parse(arguments_class: type, words: Sequence[str], *, default: Any, command: str, description: str | None) -> Any:
    import tyro

    return tyro.cli(
        arguments_class, args=list(words), default=default, prog=f"slmjax {command}", description=description,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues),
    )  # fmt: skip


def _without_prefix() -> Any:
    import tyro

    return tyro.conf.arg(name="")


def _positional(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """A leading word that is no option, and the rest."""
    return (words[0], list(words[1:])) if words and not words[0].startswith("-") else (None, list(words))


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of an option that decides what the others default to, before tyro parses them all."""
    found = None
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == name:  # tyro takes either, and of several the last
            follows = words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("--") else None
            found = value if equals else follows
    return found


def _load_code(options: Sequence[str]) -> None:
    """Runs the file that `--code` names, so that JSON may name the classes it defines."""
    if (path := _option(options, "--code")) is not None:
        from slmjax.recipes import run_file

        run_file(Path(path))


def _print_aside(text: str) -> None:
    """To standard error: standard output is for results."""
    print(text, file=sys.stderr)


def _print_json(value: Any) -> None:
    from slmjax.runlog import plain

    print(json.dumps(plain(value), indent=2))


# Commands -------------------------------------------------------------------------------------------------------------
def train_command(words: Sequence[str]) -> int:
    """train a model: slmjax train [EXPERIMENT] [--optim.lr 3e-4 ...], --resume RUN_DIR, --init-from DIR"""
    import jax
    from rich.console import Console

    from slmjax import experiment as experiments
    from slmjax import recipes, trainer

    name, options = _positional(words)
    _load_code(options)
    resume, source = _option(options, "--resume"), _option(options, "--init-from")
    if resume is not None and (name or source):
        raise ValueError(f"--resume {resume} goes on with that run's own experiment: leave out {name or '--init-from'}")
    if resume is not None:
        start = experiments.read_experiment(Path(resume))
    elif source is not None:
        start = experiments.starting_from(Path(source), recipes.load_experiment(name) if name else None)
    else:
        start = recipes.load_experiment(name or "nano")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        resume: str | None = None  # run directory to go on with, from its newest intact checkpoint
        init_from: str | None = None  # run directory whose parameters and tokenizer (and experiment, if none is named) this run starts from
        code: str | None = None  # Python file that defines the classes of your own which the run's settings name
        json: bool = False  # print the result as JSON, and progress on standard error
        experiment: Annotated[experiments.Experiment, _without_prefix()] = start

    given = _parse(Arguments, options, default=Arguments(), command=f"train {name or ''}".strip(), description=train_command.__doc__)
    assert (given.resume, given.init_from) == (resume, source), "what the defaults were chosen by is what was parsed"
    code = name if name is not None and name.endswith(".py") else given.code
    result = trainer.train(given.experiment, resume=given.resume, code=code, console=Console(stderr=given.json, highlight=False))
    if jax.process_index() == 0:
        _print_json(dataclasses.asdict(result)) if given.json else _show_result(result)
    return {"finished": 0, "interrupted": INTERRUPTED_STATUS}.get(result.status, 1)


def _show_result(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if result.samples:
        console.print("\n[bold]sample[/bold]")
        for sample in result.samples:
            console.print(sample, markup=False)
    speed = f"{result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else "speed not measured in so few steps"
    table = Table(title=f"{result.status} after step {result.step:,}", title_justify="left")
    table.add_column("held-out text" if result.compressors else "last step")
    table.add_column("bits per byte", justify="right")
    table.add_row("this model", f"{result.bits_per_byte:.3f}")
    for name, bits in result.compressors.items():
        table.add_row(name, f"{bits:.3f}")
    console.print()
    console.print(table)
    console.print(
        f"loss {result.loss:.4f}, {result.tokens:,} tokens, {result.seconds:,.0f} s, {speed}, "
        f"{result.parameters:,} parameters, {result.data_wait_share:.1%} of the training time spent waiting for data"
        + (f", {result.skipped:,} steps undone" if result.skipped else "")
    )
    if result.status == "interrupted":
        code = Path(result.run_dir) / "experiment.py"
        console.print(f"go on with: slmjax train --resume {result.run_dir}" + (f" --code {code}" if code.exists() else ""))
    if result.status == "diverged":
        console.print(
            "too many steps in a row were not finite: lower --optim.lr (and --optim.muon-lr, with muon), or lengthen --optim.warmup-steps"
        )
    console.print(f"run directory: {result.run_dir}")


def eval_command(words: Sequence[str]) -> int:
    """evaluate a model on held-out text: slmjax eval RUN_DIR [--data.path FILE]"""
    from slmjax import checkpoint, evaluation
    from slmjax.data.config import DataConfig
    from slmjax.experiment import read_experiment

    path, options = _positional(words)
    _load_code(options)
    of_run = read_experiment(Path(path)).data if path and (Path(path) / "config.json").is_file() else DataConfig()
    if _option(options, "--data.path") is not None:
        of_run = dataclasses.replace(of_run, heldout_fraction=0.0)  # another text is evaluated whole, unless a fraction is given

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        step: int | None = None  # checkpoint to evaluate (none: the newest)
        max_documents: int | None = None  # evaluate the first held-out documents only (none: all)
        overlap: int | None = None  # tokens of context that each further window of a long document repeats (none: as in the run)
        code: str | None = None  # Python file that defines the classes of your own which the run's settings name
        json: bool = False  # print the result as JSON
        data: DataConfig = of_run

    given = _parse(Arguments, options, default=Arguments(), command="eval RUN_DIR", description=eval_command.__doc__)
    loaded = checkpoint.load_model(_needed(path, "eval RUN_DIR"), step=given.step)
    # None: the held-out text of the run, and an error if it has none.
    data = given.data if any(word.startswith("--data.") for word in options) else None
    result = evaluation.evaluate(loaded, data=data, max_documents=given.max_documents, overlap=given.overlap, log=_print_aside)
    if given.json:
        _print_json(dataclasses.asdict(result))
        return 0
    print(f"{result.documents:,} documents, {result.tokens:,} tokens, {result.bytes:,} bytes, in {result.seconds:.1f} s")
    print(f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte")
    return 0


def _needed(path: str | None, usage: str) -> Path:
    if path is None:
        raise ValueError(f"name the run directory: slmjax {usage}")
    return Path(path)


def generate_command(words: Sequence[str]) -> int:
    """continue prompts: slmjax generate RUN_DIR --prompt "def main(" """
    from slmjax import checkpoint
    from slmjax.sampling import SamplingConfig, generate

    path, options = _positional(words)
    _load_code(options)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        prompt: tuple[str, ...] = ("",)  # texts to continue; an empty one starts a document
        step: int | None = None  # checkpoint to sample from (none: the newest)
        code: str | None = None  # Python file that defines the classes of your own which the run's settings name
        json: bool = False  # print texts, tokens and reasons as JSON
        settings: Annotated[SamplingConfig, _without_prefix()] = SamplingConfig()

    given = _parse(Arguments, options, default=Arguments(), command="generate RUN_DIR", description=generate_command.__doc__)
    loaded = checkpoint.load_model(_needed(path, "generate RUN_DIR"), step=given.step)
    found = generate(loaded, given.prompt, config=given.settings)
    if given.json:
        _print_json([{"prompt": prompt, **dataclasses.asdict(one)} for prompt, one in zip(given.prompt, found, strict=True)])
        return 0
    for prompt, one in zip(given.prompt, found, strict=True):
        print(prompt + one.text, end="\n\n" if len(found) > 1 else "\n")
    return 0


def models_command(words: Sequence[str]) -> int:
    """list the named architectures with their sizes and costs"""
    from slmjax import zoo

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        json: bool = False  # print the table as JSON

    given = _parse(Arguments, words, default=Arguments(), command="models", description=models_command.__doc__)
    summaries = {name: zoo.describe(build()) for name, build in zoo.ARCHITECTURES.items()}
    if given.json:
        _print_json({name: dataclasses.asdict(summary) for name, summary in summaries.items()})
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "parameters", "active", "embedding", "FLOPs/token", "bf16 bytes", "cache B/token"):
        table.add_column(heading, justify="left" if heading == "name" else "right")
    for name, one in summaries.items():
        figures = (one.parameters, one.active_parameters, one.embedding_parameters)
        table.add_row(name, *(f"{n:,}" for n in figures), f"{one.training_flops_per_token:.3g}", f"{one.bytes_bf16:,}",
                      f"{one.cache_bytes_per_token:,.0f}")  # fmt: skip
    Console(width=max(120, Console().width), highlight=False).print(table)
    return 0


def data_command(words: Sequence[str]) -> int:
    """prepare or look at data: slmjax data prepare|inspect [EXPERIMENT] [--data.path FILE ...]"""
    from slmjax import recipes
    from slmjax.data.config import DataConfig
    from slmjax.data.preparation import inspect, prepare
    from slmjax.data.tokenizers import TokenizerConfig

    action, rest = _positional(words)
    if action not in ("prepare", "inspect") and not {"-h", "--help"} & set(words):
        raise ValueError(f"{action or 'data'}: say `slmjax data prepare` or `slmjax data inspect`")
    name, options = _positional(rest)
    start = recipes.load_experiment(name or "nano")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Arguments:
        samples: int = 3  # decoded samples that `inspect` shows
        json: bool = False  # print statistics as JSON
        data: DataConfig = start.data
        tokenizer: TokenizerConfig = start.tokenizer

    given = _parse(Arguments, options, default=Arguments(), command=f"data {action or 'prepare|inspect'}", description=data_command.__doc__)
    if action == "prepare":
        prepared = prepare(given.data, given.tokenizer, log=_print_aside)
        every = [("train", shards) for shards, _ in prepared.train] + [("heldout", shards) for shards in prepared.heldout]
        if given.json:
            _print_json([dataclasses.asdict(shards.manifest) for _, shards in every])
            return 0
        for side, shards in every:
            counts = (
                f"{shards.manifest.num_documents:,} documents, {shards.manifest.num_bytes:,} bytes, {shards.manifest.num_tokens:,} tokens"
            )
            print(f"{shards.manifest.source_name}, {side}: {counts}, in {shards.directory}")
        return 0
    found = inspect(given.data, given.tokenizer, num_samples=given.samples, log=_print_aside)
    if given.json:
        _print_json(found)
        return 0
    for key, value in found.items():
        if key != "samples":
            print(f"{key}: {value}")
    for sample in found["samples"]:
        print(f"--- {sample}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "eval": eval_command,
    "generate": generate_command,
    "models": models_command,
    "data": data_command,
}
