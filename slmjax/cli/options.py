"""Shared parsing and printing of the commands.

`argv` is what follows `slmjax COMMAND`; a command parses it into `args`, an instance of its dataclass of
options. Comments above the fields of these dataclasses are the help texts.
"""

import contextlib
import io
import json
import os
import select
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from slmjax.cli.fields import Option, check_values, full_names, options_of
from slmjax.cli.help import help_text
from slmjax.cli.source import built_in_experiments, is_flag


def parse(
    arguments_class: type,
    argv: Sequence[str],
    *,
    default: Any = None,
    command: str,
    description: str | None,
    first: Sequence[str] = (),
    further: Sequence[Option] = (),
) -> Any:
    """Parse the options of a command into a dataclass, whose fields and comments also make its help.

    Options may have short names (`full_names`). `--help`, with a group, a field or `all` after it, prints and
    exits.

    Args:
      arguments_class: the dataclass.
      argv: the command line after the command's name.
      default: an instance of the dataclass whose fields are the defaults, if there is one.
      command: name of the command, shown in usage and errors.
      description: docstring of the command: a summary and, after a blank line, usage lines.
      first: names of the options that its help shows first.
      further: options that it has only with another one.
    """
    import tyro

    options = options_of(arguments_class, default)
    if asks_for_help(argv):
        texts = {"command": command, "description": description, "topic": help_topic(argv)}
        print(help_text(options, first=first, further=further, **texts))
        sys.exit(0)
    args = full_names(argv, options, command=command, further=further)
    check_values(args, options)
    return tyro.cli(
        arguments_class,
        args=args,
        prog=f"slmjax {command}",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues),
        **({} if default is None else {"default": default}),
    )


def asks_for_help(argv: Sequence[str]) -> bool:
    """Return whether a command line asks for help."""
    return bool({"-h", "--help"} & set(argv))


def help_topic(argv: Sequence[str]) -> str | None:
    """Return what follows `--help` on a command line: a group, a field or "all"; None for an overview."""
    index = min(argv.index(option) for option in ("-h", "--help") if option in argv)
    after = argv[index + 1 : index + 2]
    return after[0] if after and not after[0].startswith("-") else None


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
    for index, argument in enumerate(argv):
        if argument.startswith("-"):
            continue
        before = argv[index - 1] if index else ""
        is_value = before.startswith("-") and "=" not in before and not is_flag(before)
        is_experiment = argument in built_in_experiments() or argument.endswith(".py")
        if index == 0 or (not is_value and is_experiment):
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
    error. Characters that the output's encoding lacks are escaped.

    Raises:
      SystemExit: with `CLOSED_PIPE_STATUS`, or with 2 for a full disk.
    """
    # As Python does for standard error: a name of a file or a dash must not end a command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
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
