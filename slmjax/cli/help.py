"""`--help` of a command: short, of a group or a field, or of all options.

    print(help_text(options, command="train", description=doc, topic=None))       # first options, then groups
    print(help_text(options, command="train", description=doc, topic="optim"))    # or "num-heads", or "all"

A command has tens of options, and `slmjax train` more than a hundred: those that people use first come first.
"""

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from slmjax.cli.fields import ALIASES, Option, unknown_option

ALL = "all"
_INDENT = 30  # columns before the text of an option
_WIDEST = 100


def help_text(
    options: Sequence[Option],
    *,
    command: str,
    description: str | None,
    topic: str | None = None,
    first: Sequence[str] = (),
    further: Sequence[Option] = (),
) -> str:
    """Return the help of a command.

    Args:
      options: all that it accepts.
      command: its name.
      description: docstring of the command: a summary and, after a blank line, usage lines.
      topic: a group or a field to explain; "all" for everything, None for an overview.
      first: names of the options that people use first; none for those that belong to no group.
      further: options that it has only with another one, such as --quant.

    Raises:
      ValueError: there is no such group or field.
    """
    summary, usage, *notes = [*inspect.cleandoc(description or "").split("\n\n"), "", ""][:3]
    # Settings that the experiment has already need nothing else.
    names = {option.name for option in options}
    every = [*options, *(option for option in further if option.name not in names)]
    if topic not in (None, ALL):
        return "\n".join(_topic(topic, every, command))
    indent = " " * len("usage: ")
    lines = textwrap.indent(inspect.cleandoc(usage), indent).replace(indent, "usage: ", 1).splitlines()
    for text in (summary, *filter(None, notes)):
        lines += ["", *textwrap.wrap(text, _width())]
    if topic == ALL:
        return "\n".join([*lines, *_groups(every)])
    by_name = {option.name: option for option in options}
    chosen = [_with_alias(by_name[name]) for name in first if name in by_name]
    others = [option for option in options if not option.group and option.name not in first]
    if chosen:
        lines += ["", "options to begin with:", *_lines(chosen)]
    if others:
        lines += ["", "other options of the command:" if chosen else "options:", *_lines(others)]
    if groups := list(_group_lines(every)):
        lines += ["", "groups of settings:", *groups, ""]
        lines += textwrap.wrap(
            f"`slmjax {command} --help GROUP` or `--help FIELD` explains one, `--help all` everything. Every "
            "field is an option by its path, or by the last part of the path where only one field has it: "
            "--optim.weight-decay or --weight-decay.",
            _width(),
        )
    return "\n".join(lines)


def _with_alias(option: Option) -> Option:
    """Return an option whose text has its everyday name, if there is one."""
    for alias, name in ALIASES.items():
        if f".{option.name}".endswith(f".{name}"):
            return dataclasses.replace(option, about=f"{option.about}; also --{alias}")
    return option


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)


def _lines(options: Sequence[Option]) -> Iterator[str]:
    """Yield the lines of some options: name, kind, what it is for, default."""
    for option in options:
        default = f" (default: {option.default})" if option.default else ""
        if option.is_flag and option.default:
            default = f" (the default; --{option.spellings[-1]} turns it off)"
        yield from _entry(f"{option.flag} {option.kind}".rstrip(), f"{option.about}{default}")


def _entry(head: str, about: str) -> Iterator[str]:
    """Yield the lines of a list's entry: its head, and the text in a column of its own."""
    text = textwrap.wrap(about, max(_width() - _INDENT, 20), break_on_hyphens=False)
    if len(head) < _INDENT - 3 and text:
        yield f"  {head}".ljust(_INDENT) + text.pop(0)
    else:
        yield from textwrap.wrap(f"  {head}", _width(), subsequent_indent=" " * 6, break_on_hyphens=False)
    yield from (" " * _INDENT + line for line in text)


def _groups(options: Sequence[Option]) -> Iterator[str]:
    """Yield all options, by the config that they belong to."""
    for group in dict.fromkeys(option.group for option in options):
        members = [option for option in options if option.group == group]
        yield ""
        yield from _heading(members[0]) if group else ["options of the command:"]
        yield from _lines(members)


def _heading(option: Option) -> list[str]:
    needs = f" (with {option.needs})" if option.needs else ""
    return textwrap.wrap(f"{option.group}{needs}: {option.group_about}", _width(), break_on_hyphens=False)


def _group_lines(options: Sequence[Option]) -> Iterator[str]:
    """Yield a line for each top group: its name, the number of its fields, what it is."""
    tops: dict[str, list[Option]] = {}
    for option in options:
        if option.group:
            tops.setdefault(_top(option), []).append(option)
    for name, members in tops.items():
        about = next((item.group_about for item in members if item.group == name), members[0].group_about)
        needs = f", with {members[0].needs}" if members[0].needs else ""
        yield from _entry(f"{name} ({len(members)}{needs})", about)


def _top(option: Option) -> str:
    """Return the group of the overview that an option is counted in."""
    # Distillation is part of the objective, with many fields of its own.
    parts = option.group.split(".")
    return ".".join(parts[:2]) if parts[1:] == ["distill"] or parts[1:2] == ["distill"] else parts[0]


def _topic(topic: str, options: Sequence[Option], command: str) -> Iterator[str]:
    """Yield the help of a group or of the fields with a name."""
    name = topic.removeprefix("--").replace("_", "-")
    inside = [option for option in options if f"{option.group}.".startswith(f"{name}.")]
    if inside:
        yield from list(_groups(inside))[1:]
        return
    last = ALIASES.get(name, name)
    fields = [
        option for option in options for full in option.spellings if full == last or full.endswith(f".{last}")
    ]
    if not fields:
        names = [option.name for option in options if not option.is_positional]
        groups = sorted({option.group for option in options if option.group})
        raise ValueError(unknown_option(name, [*groups, *names], command=command))
    for option in fields:
        if option.group:
            yield from _heading(option)
        yield from _lines([option])
