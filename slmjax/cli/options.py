"""How every command reads its words and prints its results."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse(
    arguments_class: type, words: Sequence[str], *, default: Any = None, command: str, description: str | None
) -> Any:
    """The options of a command, parsed and documented by tyro from the fields of a dataclass; `default` is an
    instance, if there is one.
    """
    import tyro

    return tyro.cli(
        arguments_class,
        args=list(words),
        prog=f"slmjax {command}",
        description=description,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues),
        **({} if default is None else {"default": default}),
    )


def by_place(metavar: str) -> tuple[Any, ...]:
    """For a field that is given by its place, not by its name: options may come before or after it."""
    import tyro

    return tyro.conf.Positional, tyro.conf.arg(metavar=metavar)


def repeated() -> Any:
    """For a tuple whose option is given once for each of its items."""
    import tyro

    return tyro.conf.UseAppendAction


def without_prefix() -> Any:
    """For a field whose own fields are options without its name before them."""
    import tyro

    return tyro.conf.arg(name="")


def positional(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """A leading word that is no option, and the rest."""
    return (words[0], list(words[1:])) if words and not words[0].startswith("-") else (None, list(words))


def experiment_name(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The experiment that a command line names, wherever it stands among the options, and the other words.

    The first word is one if it is no option; further on, only what looks like one is: a built-in name or a
    Python file which is not the value of an option.
    """
    from slmjax.training.recipes import BUILT_IN

    for index, word in enumerate(words):
        if word.startswith("-"):
            continue
        before = words[index - 1] if index else ""
        is_value = before.startswith("-") and "=" not in before and before not in ("--json", "--no-json")
        if index == 0 or (not is_value and (word in BUILT_IN or word.endswith(".py"))):
            return word, [*words[:index], *words[index + 1 :]]
    return None, list(words)


def option(words: Sequence[str], name: str) -> str | None:
    """The value of an option that decides what the others default to, before tyro parses them all."""
    found = None
    for index, word in enumerate(words):
        name_given, equals, value = word.partition("=")
        if name_given.replace("_", "-") == name:  # tyro takes either, and of several the last
            follows = (
                words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("--") else None
            )
            found = value if equals else follows
    return found


def load_code(options: Sequence[str]) -> None:
    """Runs the file that `--code` names, so that JSON may name the classes it defines."""
    if (path := option(options, "--code")) is not None:
        from slmjax.training.recipes import run_file

        run_file(Path(path))


def print_aside(text: str) -> None:
    """To standard error: standard output is for results."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """To standard output, as strict JSON."""
    from slmjax.telemetry.run_directory import plain

    print(json.dumps(plain(value), indent=2))
