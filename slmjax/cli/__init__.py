"""The `slmjax` command: one thin function per command word over the package's Python surface.

The word is looked up before anything heavy is imported, so that `slmjax --help` answers at once. Options are
the fields of dataclasses, parsed and documented by tyro.
"""

import os
import sys
from collections.abc import Callable, Sequence

from slmjax import startup
from slmjax.cli.converting import export_command, import_command
from slmjax.cli.evaluating import eval_command
from slmjax.cli.generating import generate_command
from slmjax.cli.inspecting import data_command, models_command
from slmjax.cli.quant_table import quant_command
from slmjax.cli.quantizing import quantize_command, verify_export_command
from slmjax.cli.reporting import compare_command, report_command, runs_command
from slmjax.cli.training import INTERRUPTED_STATUS, train_command

__all__ = ["COMMANDS", "INTERRUPTED_STATUS", "main"]

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "eval": eval_command,
    "generate": generate_command,
    "import": import_command,
    "export": export_command,
    "quant": quant_command,
    "quantize": quantize_command,
    "verify-export": verify_export_command,
    "report": report_command,
    "runs": runs_command,
    "compare": compare_command,
    "models": models_command,
    "data": data_command,
}


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

        print(
            f"error: there is no command {words[0]!r}.{near_names(words[0], COMMANDS)}\n\n{_overview()}",
            file=sys.stderr,
        )
        sys.exit(2)
    startup.keep_memory()
    startup.keep_compiled()
    try:
        sys.exit(COMMANDS[words[0]](words[1:]))
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        message = _message_for_people(error)
        if message is None or os.environ.get("SLMJAX_TRACEBACK"):
            raise
        print(f"error: {message}\n(SLMJAX_TRACEBACK=1 shows where it arose)", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            (
                "stopped at once: of a run, what was saved before is in its directory (slmjax train --resume "
                "RUN_DIR)"
            ),
            file=sys.stderr,
        )
        sys.exit(130)


_OUT_OF_MEMORY = (
    "out of memory ({error}).\nWhat takes less, in training: the same batch in parts "
    "(--optim.accumulation-steps), recomputing "
    "activations (--model.remat full), shorter rows (--data.sequence-length), fewer rows "
    "(--data.batch-size), parameters divided over "
    "devices (--mesh.fsdp). In `generate`, and in multiple choice and lm-eval: --batch-size; in `eval` of "
    "text: --data.batch-size"
)


def _message_for_people(error: Exception) -> str | None:
    """What to say instead of a traceback; None for an error of ours, which needs one."""
    text = str(error)
    if not isinstance(error, RuntimeError | MemoryError):
        return text
    from slmjax.planning import memory

    if isinstance(error, memory.OutOfMemory):
        return text
    return (
        _OUT_OF_MEMORY.format(error=(text.splitlines() or ["the machine's is used up"])[0])
        if memory.is_exhausted(error)
        else None
    )


def _overview() -> str:
    lines = [
        "usage: slmjax COMMAND [OPTIONS]",
        "",
        "Train, evaluate, sample, import and export small language models.",
        "",
    ]
    lines += [
        f"  {name:<15}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()
    ]
    return "\n".join([*lines, "", "slmjax COMMAND --help tells the options of a command."])
