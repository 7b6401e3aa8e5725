"""Shared parsing and printing of the commands.

`argv` is what follows `slmjax COMMAND`; a command parses it into `args`, an instance of its dataclass of
options. Comments above the fields of these dataclasses are the help texts.
"""

import contextlib
import json
import os
import select
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn


def parse(
    arguments_class: type, argv: Sequence[str], *, default: Any = None, command: str, description: str | None
) -> Any:
    """Parse the options of a command into a dataclass, whose fields and comments also make its help.

    Args:
      arguments_class: the dataclass.
      argv: the command line after the command's name.
      default: an instance of the dataclass whose fields are the defaults, if there is one.
      command: name of the command, shown in usage and errors.
      description: docstring of the command: a summary and, after a blank line, usage lines.
    """
    import inspect
    import textwrap

    import tyro

    summary, _, usage = inspect.cleandoc(description or "").partition("\n\n")
    # tyro joins lines that are not indented.
    text = f"{summary}\n\n{textwrap.indent(usage, '  ')}"
    return tyro.cli(
        arguments_class,
        args=list(argv),
        prog=f"slmjax {command}",
        description=text if usage else summary,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues),
        **({} if default is None else {"default": default}),
    )


def positional(metavar: str) -> tuple[Any, ...]:
    """Annotations of a positional field; options may come before or after it."""
    import tyro

    return tyro.conf.Positional, tyro.conf.arg(metavar=metavar)


def repeated() -> Any:
    """Annotation of a tuple whose option is repeated, once for each item."""
    import tyro

    return tyro.conf.UseAppendAction


def without_prefix() -> Any:
    """Annotation of a nested dataclass whose fields are options without the name of the field before them."""
    import tyro

    return tyro.conf.arg(name="")


def split_positional(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return a leading positional argument (None if there is none) and the rest."""
    return (argv[0], list(argv[1:])) if argv and not argv[0].startswith("-") else (None, list(argv))


def split_experiment(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the experiment named anywhere on a command line (None if there is none) and the other arguments.

    The first argument is an experiment if it is not an option. Later ones are only if they look like it: a
    built-in name or a Python file that is not the value of an option.
    """
    from slmjax.training.recipes import BUILT_IN

    for index, argument in enumerate(argv):
        if argument.startswith("-"):
            continue
        before = argv[index - 1] if index else ""
        # Boolean flags take no value. Only --json is known here: after another one, such as
        # --eval.unrounded, an experiment is taken for its value.
        is_value = before.startswith("-") and "=" not in before and before not in ("--json", "--no-json")
        if index == 0 or (not is_value and (argument in BUILT_IN or argument.endswith(".py"))):
            return argument, [*argv[:index], *argv[index + 1 :]]
    return None, list(argv)


def peek_option(argv: Sequence[str], name: str) -> str | None:
    """Return the value of an option before tyro parses the command line, or None.

    For options that decide the defaults of others, such as `--resume`.
    """
    last = None
    for index, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        # As tyro does, accept underscores for dashes, and take the last of several.
        if option.replace("_", "-") == name:
            next_argument = argv[index + 1] if index + 1 < len(argv) else "--"
            last = value if equals else None if next_argument.startswith("--") else next_argument
    return last


def load_code(argv: Sequence[str]) -> None:
    """Run the file named by `--code`, so that a stored config can name the classes it defines."""
    if (path := peek_option(argv, "--code")) is not None:
        from slmjax.training.recipes import run_file

        run_file(Path(path))


# Status of a process that SIGPIPE ends, as shells report it: 128 and the number of the signal.
CLOSED_PIPE_STATUS = 141


@contextlib.contextmanager
def checked_output() -> Iterator[None]:
    """Write all that is printed within, and end the command if it cannot be written.

    A reader that has closed its pipe, as `head` does, ends the command without a message. A full disk is an
    error.

    Raises:
      SystemExit: with `CLOSED_PIPE_STATUS`, or with 2 for a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        # Pipes to other programs break, too.
        if not any(map(_has_no_reader, (sys.stdout, sys.stderr))):
            raise
        _end_without_output(CLOSED_PIPE_STATUS)
    finally:
        # Here and not as Python exits, which would print a traceback of its own.
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            _end_without_output(CLOSED_PIPE_STATUS)
        except OSError as error:
            print_stderr(f"error: standard output cannot be written ({error.strerror or error})")
            _end_without_output(2)


def _has_no_reader(stream: Any) -> bool:
    """Return whether a stream is a pipe that its reader has closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # closed, or replaced by an object without a descriptor
        return False


def _end_without_output(status: int) -> NoReturn:
    """Exit, and let what is still in the buffers of the standard streams go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    sys.exit(status)


def print_stderr(text: str) -> None:
    """Print progress or a note to standard error; standard output is for results."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """Print a value to standard output as strict JSON."""
    from slmjax.telemetry.run_directory import plain

    print(json.dumps(plain(value), indent=2))
