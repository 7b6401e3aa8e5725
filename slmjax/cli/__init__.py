"""The `slmjax` command: a thin function for each command over the package's Python API.

The command is looked up before anything heavy is imported, so that `slmjax --help` is fast. Options are the
fields of dataclasses, parsed and documented by tyro.

Files in reading order:

- source.py: names of settings and experiments, without importing them
- fields.py: options of a command as a list, and short names
- help.py: `--help`
- options.py: parsing and printing that commands share
- early.py: mistakes that are found before jax is imported
- training.py: `slmjax train`
- experiments.py: `slmjax experiments`
- ablating.py: `slmjax ablate`
- evaluating.py: `slmjax eval`
- generating.py: `slmjax generate`
- converting.py: `slmjax import`, `slmjax export` and `slmjax slice`
- quantizing.py: `slmjax quantize` and `slmjax verify-export`
- recovery_report.py: `slmjax formats report`
- format_table.py: `slmjax formats table`
- reporting.py: `slmjax runs`, `slmjax report` and `slmjax compare`
- verdicts.py: `slmjax verdict`
- inspecting.py: `slmjax models` and `slmjax data`
- coordinates.py: `slmjax coordinate-check`
"""

import os
import sys
from collections.abc import Callable, Sequence

from slmjax import startup
from slmjax.atomic_files import disk_problem
from slmjax.cli.ablating import ablate_command
from slmjax.cli.converting import export_command, import_command, slice_command
from slmjax.cli.coordinates import coordinate_check_command
from slmjax.cli.early import check
from slmjax.cli.evaluating import eval_command
from slmjax.cli.experiments import experiments_command
from slmjax.cli.format_table import formats_command
from slmjax.cli.generating import generate_command
from slmjax.cli.inspecting import data_command, models_command
from slmjax.cli.options import checked_output, print_stderr
from slmjax.cli.quantizing import quantize_command, verify_export_command
from slmjax.cli.reporting import compare_command, report_command, runs_command
from slmjax.cli.training import train_command
from slmjax.cli.verdicts import verdict_command
from slmjax.stop_signals import INTERRUPTED_STATUS, Stopped, StopSignals
from slmjax.telemetry.messages import MessageHandler

__all__ = ["COMMANDS", "COMMAND_GROUPS", "INTERRUPTED_STATUS", "main"]

Command = Callable[[Sequence[str]], int]

COMMAND_GROUPS: dict[str, dict[str, Command]] = {
    "Train": {"train": train_command, "experiments": experiments_command, "data": data_command},
    "Studies": {"ablate": ablate_command},
    "Evaluate and sample": {"eval": eval_command, "generate": generate_command},
    "Import, export and quantize": {
        "import": import_command,
        "export": export_command,
        "slice": slice_command,
        "quantize": quantize_command,
        "verify-export": verify_export_command,
    },
    "Inspect and compare": {
        "runs": runs_command,
        "report": report_command,
        "compare": compare_command,
        "verdict": verdict_command,
        "models": models_command,
        "formats": formats_command,
        "coordinate-check": coordinate_check_command,
    },
}

COMMANDS: dict[str, Command] = {
    name: function for group in COMMAND_GROUPS.values() for name, function in group.items()
}

# Commands that were renamed: the old name still works, with a note.
FORMER_COMMANDS = {"quant": "formats"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `slmjax` command and exit with its status."""
    with checked_output():
        _main(list(sys.argv[1:] if argv is None else argv) or ["--help"])


def _main(argv: Sequence[str]) -> None:
    name, *arguments = argv
    if name in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if name == "--version":
        from slmjax import __version__

        print(__version__)
        sys.exit(0)
    if name in FORMER_COMMANDS:
        print_stderr(f"note: `slmjax {name}` was renamed to `slmjax {FORMER_COMMANDS[name]}`")
        name = FORMER_COMMANDS[name]
    if name not in COMMANDS:
        from slmjax.config import near_names

        print_stderr(f"error: there is no command {name!r}.{near_names(name, COMMANDS)}\n\n{_overview()}")
        sys.exit(2)
    startup.keep_memory()
    try:
        with StopSignals(is_command=True), MessageHandler(print_stderr), checked_output():
            check(name, arguments)
            sys.exit(COMMANDS[name](arguments))
    except Exception as error:
        message = _user_message(error)
        if message is None or os.environ.get("SLMJAX_TRACEBACK"):
            raise
        print_stderr(f"error: {message}\n(set SLMJAX_TRACEBACK=1 for the traceback)")
        sys.exit(2)
    except Stopped as stopped:
        print_stderr(str(stopped))
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        print_stderr("stopped by SIGINT")
        sys.exit(130)


_OUT_OF_MEMORY = (
    "out of memory ({error}).\n"
    "To use less in training: split the batch into microbatches (--optim.accumulation-steps), recompute "
    "activations (--model.remat full), shorten the sequences (--data.sequence-length), use fewer of them "
    "(--data.batch-size), or shard the parameters over devices (--mesh.fsdp).\n"
    "In `generate`, multiple choice and lm-eval, lower --batch-size; in `eval` of text, --data.batch-size"
)


def _user_message(error: Exception) -> str | None:
    """Return the message to print instead of a traceback; None for an internal error, which needs one."""
    text = str(error)
    if disk_problem(error) is not None:
        line = next(iter(text.splitlines()), "")
        return f"{line}. Free space, or write to another disk (runs: --run.directory, caches: SLMJAX_CACHE)"
    if isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
        return f"{text}. A file is where a directory should be, or the reverse: move it away"
    if isinstance(error, ValueError | OSError | ImportError):
        return text
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    from slmjax.planning import memory

    if isinstance(error, memory.OutOfMemory):
        return text
    if not memory.is_out_of_memory(error):
        return None
    # A MemoryError has no text of its own.
    return _OUT_OF_MEMORY.format(error=(text.splitlines() or ["the host has none left"])[0])


def _overview() -> str:
    lines = [
        "usage: slmjax COMMAND [OPTIONS]",
        "",
        "Train, evaluate, sample, import, quantize and export small language models.",
    ]
    for title, commands in COMMAND_GROUPS.items():
        lines += ["", f"{title}:"]
        for name, function in commands.items():
            summary = (function.__doc__ or "").splitlines()[0].removesuffix(".")
            lines.append(f"  {name:<14} {summary}")
    return "\n".join([*lines, "", "Run slmjax COMMAND --help for the options of a command."])
