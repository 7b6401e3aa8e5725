"""Options of a command as a list: what its help prints, and what short names are looked up in.

    options = options_of(cls, default)        # one for each field, nested ones by their path
    full_names(["--learning-rate", "3e-4"], options, command="train")       # -> ["--optim.lr", "3e-4"]

tyro parses the command line; the names here are those that it gives to the same fields.
"""

import dataclasses
import difflib
import enum
import functools
import inspect
import itertools
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a command, or a positional argument of it."""

    name: str  # without dashes before it: "optim.lr", "model.embed-dim"
    kind: str  # of its value, as help shows it; empty for a flag
    default: str  # as help shows it; empty for none
    about: str  # the comment of its field
    group: str = ""  # path of the config that the field belongs to
    group_about: str = ""
    needs: str = ""  # the option without which it is none: "--quant"
    is_flag: bool = False
    is_positional: bool = False
    choices: tuple[str, ...] = ()  # its only values, where they are few
    is_optional: bool = False  # "None" is a value, too

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return self.name if self.is_positional else f"--{self.name}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """Names that are accepted: a flag can be denied, too."""
        path, dot, last = self.name.rpartition(".")
        return (self.name, f"{path}{dot}no-{last}") if self.is_flag else (self.name,)


def options_of(cls: type, default: Any = None) -> list[Option]:
    """Return the options that the fields of a dataclass are parsed from.

    Args:
      cls: the dataclass of a command's arguments.
      default: an instance with the defaults, if there is one. Fields that hold configs need one: their own
        fields are options.
    """
    return list(_options(cls, default, path="", about=_summary(cls)))


def _options(cls: type, value: Any, *, path: str, about: str) -> Iterator[Option]:
    comments = _comments(cls)
    for field in dataclasses.fields(cls):
        default = getattr(value, field.name) if value is not None else field.default
        hint, marks = _hint(field.type, cls, field.name)
        name = field.name.replace("_", "-")
        comment = comments.get(field.name, "")
        below = path if _is_unnamed(marks) else f"{path}.{name}" if path else name
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            yield from _options(type(default), default, path=below, about=comment or _summary(type(default)))
        elif isinstance(default, tuple) and default and all(map(dataclasses.is_dataclass, default)):
            for index, item in enumerate(default):
                yield from _options(type(item), item, path=f"{below}.{index}", about=_summary(type(item)))
        elif not _holds_configs(hint):
            metavar = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), None)
            is_flag = bool in _members(hint) and len(_members(hint)) == 1
            yield Option(
                name=metavar or below,
                kind="" if is_flag or metavar else _kind(hint),
                default="" if default in (dataclasses.MISSING, None, False) else _shown(default),
                about=comment,
                group=path,
                group_about=about,
                is_flag=is_flag,
                is_positional=metavar is not None,
                choices=_choices(hint),
                is_optional=type(None) in _members(hint),
            )


def _hint(annotation: Any, cls: type, name: str) -> tuple[Any, tuple[Any, ...]]:
    """Return the type of a field and what Annotated adds to it."""
    if isinstance(annotation, str):
        annotation = typing.get_type_hints(cls, include_extras=True)[name]
    if typing.get_origin(annotation) is typing.Annotated:
        hint, *marks = typing.get_args(annotation)
        return hint, tuple(marks)
    return annotation, ()


def _is_unnamed(marks: tuple[Any, ...]) -> bool:
    """Return whether the fields of a config are options without the name of the field that holds it."""
    return any(getattr(mark, "name", None) == "" for mark in marks)


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _holds_configs(hint: Any) -> bool:
    """Return whether a type is of configs, which are chosen in the experiment file where there are none."""
    inner = [item for member in _members(hint) for item in (member, *typing.get_args(member))]
    return any(
        isinstance(item, type) and (dataclasses.is_dataclass(item) or inspect.isabstract(item))
        for item in inner
    )


_KINDS = {int: "N", float: "X", str: "TEXT"}


def _kind(hint: Any) -> str:
    """Return the kind of values of a type as help shows it: N, X, TEXT, one of some names, or several."""
    kinds = []
    for member in _members(hint):
        if typing.get_origin(member) is tuple:
            items = [item for item in typing.get_args(member) if item is not Ellipsis]
            is_open = Ellipsis in typing.get_args(member)
            kinds.append(" ".join(map(_kind, items)) + (" ..." if is_open else ""))
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            kinds.append("|".join(str(item.value) for item in member))
        elif member is not type(None):
            kinds.append(_KINDS.get(member, getattr(member, "__name__", str(member)).upper()))
    return "|".join(dict.fromkeys(kinds))


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the values of an option that takes members of one Enum; empty for others."""
    items = [
        item
        for member in _members(hint)
        for item in (typing.get_args(member) if typing.get_origin(member) is tuple else (member,))
        if item not in (type(None), Ellipsis)
    ]
    if len(items) != 1 or not (isinstance(items[0], type) and issubclass(items[0], enum.Enum)):
        return ()
    return tuple(str(choice.value) for choice in items[0])


def _shown(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return " ".join(repr(item) if isinstance(item, str) else _shown(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if value == "" else str(value)


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass: above it, or at the end of its line."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= _own_comments(inspect.getsource(base))
    return comments


def _own_comments(source: str) -> dict[str, str]:
    comments = {}
    above: list[str] = []
    for line in inspect.cleandoc(source).splitlines():
        text = line.strip()
        if text.startswith("# "):
            above.append(text.removeprefix("# "))
            continue
        name, colon, rest = text.partition(":")
        if colon and name.isidentifier():
            # The first that says something: docstrings and methods have lines of this form, too.
            comments[name] = comments.get(name) or rest.partition("  # ")[2] or " ".join(above)
        elif text.startswith(")  # "):  # a default of several lines
            last = next(reversed(comments), None)
            if last is not None and not comments[last]:
                comments[last] = text.partition("  # ")[2]
        above = []
    return comments


def _summary(cls: type) -> str:
    text = inspect.getdoc(cls) or ""
    # A dataclass without a docstring has its signature as one.
    return "" if text.startswith(f"{cls.__name__}(") else text.partition("\n")[0]


# Short names ------------------------------------------------------------------------------------------------
# Everyday names of fields. The last part of a path is accepted, too, where it is unique.
ALIASES = {
    "batch-size": "data.batch-size",
    "dtype": "model.precision",
    "epochs": "run.epochs",
    "gradient-accumulation-steps": "optim.accumulation-steps",
    "heads": "num-heads",
    "kv-heads": "num-kv-heads",
    "layers": "repeats",
    "learning-rate": "optim.lr",
    "max-steps": "run.steps",
    "num-layers": "repeats",
    "optimizer": "optim.kind",
    "output-dir": "run.directory",
    "seed": "run.seed",
    "seq-len": "data.sequence-length",
    "warmup": "optim.warmup-steps",
    "width": "embed-dim",
    "hidden-size": "embed-dim",
}


def full_names(
    argv: Sequence[str], options: Sequence[Option], *, command: str, further: Sequence[Option] = ()
) -> list[str]:
    """Return a command line with the full name of each option.

    Args:
      argv: the command line.
      options: those of the command.
      command: its name, for errors.
      further: options that it has only with another one.

    Raises:
      ValueError: a name is of no option, or of several.
    """
    names = [name for option in options for name in option.spellings if not option.is_positional]
    result = []
    for index, argument in enumerate(argv):
        # After a lone "--" all arguments are positional.
        if argument == "--":
            return [*result, *argv[index:]]
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            result.append(argument)
        elif (name := name.replace("_", "-")) in (*names, "help"):
            result.append(f"--{name}{equals}{value}")
        else:
            result.append(f"--{_full_name(name, names, command=command, further=further)}{equals}{value}")
    return result


def _full_name(name: str, names: Sequence[str], *, command: str, further: Sequence[Option]) -> str:
    """Return the name of the option that a short or everyday name stands for."""
    path, _, last = name.rpartition(".")
    everyday = ALIASES.get(last, "")
    # Of `optim.learning-rate`, only the last part is an everyday name.
    tried = [name, everyday if not path else f"{path}.{everyday.rpartition('.')[2]}"] if everyday else [name]
    ambiguous: list[str] = []
    for short in tried:
        matches = [full for full in names if _is_short_for(short, full)]
        if len(matches) == 1 and not (short.endswith("repeats") and _has_patterns(names)):
            return matches[0]
        ambiguous += matches
    if ambiguous:
        listed = ", ".join(f"--{match}" for match in dict.fromkeys(ambiguous))
        raise ValueError(f"--{name} may be one of several options: {listed}. Write one of them in full")
    for option in further:
        if _is_short_for(name, option.name):
            raise ValueError(f"--{name} has a meaning only with {option.needs}: give that too")
    raise ValueError(unknown_option(name, names, command=command))


def unknown_option(name: str, names: Sequence[str], *, command: str) -> str:
    """Return the message for a name that is of no option, with near ones."""
    # The last part says most: of `model.number-heads` and `num-head` alike.
    last_parts = {full: full.rpartition(".")[2] for full in names}
    near_parts = difflib.get_close_matches(name.rpartition(".")[2], set(last_parts.values()), n=2, cutoff=0.6)
    near = [full for part in near_parts for full in names if last_parts[full] == part][:3]
    near = near or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(f'--{full}' for full in near)}?" if near else ""
    return f"slmjax {command} has no option --{name}.{hint} `slmjax {command} --help all` lists them"


def _is_short_for(short: str, full: str) -> bool:
    """Return whether the parts of a short name are parts of the full one, in order, the last as its last."""
    parts = full.split(".")
    asked = short.split(".")
    if parts[-1] != asked[-1]:
        return False
    remaining = iter(parts)
    return all(part in remaining for part in asked)


def _has_patterns(names: Sequence[str]) -> bool:
    """Return whether a repeat is of several layers, so that their number is no number of repeats."""
    return any(".pattern.1." in name for name in names)


# Values -----------------------------------------------------------------------------------------------------
_NUMBERS = {"N": (int, "an integer"), "X": (float, "a number")}


def check_values(argv: Sequence[str], options: Sequence[Option]) -> None:
    """Check the values of options that take numbers or one of a few words.

    Args:
      argv: a command line with full names.
      options: those of the command.

    Raises:
      ValueError: a value is none that its option takes, or there is none.
    """
    by_name = {f"--{name}": option for option in options for name in option.spellings}
    for index, argument in enumerate(argv):
        if argument == "--":
            return
        name, equals, value = argument.partition("=")
        option = by_name.get(name)
        if option is None or option.is_positional:
            continue
        following = itertools.takewhile(lambda text: not text.startswith("--"), argv[index + 1 :])
        values = [value] if equals else list(following)
        if option.is_flag:
            if equals:
                raise ValueError(f"{name} takes no value, such as {value!r}: give {name} or leave it out")
            continue
        is_open = option.kind.endswith(" ...")  # and may be empty
        if not values and not is_open:
            raise ValueError(f"{name} needs a value: {option.about or option.kind}")
        for text in values if is_open else values[:1]:
            _check_value(name, text, option)


def _check_value(name: str, text: str, option: Option) -> None:
    if option.is_optional and text == "None":
        return
    if option.choices:
        if text not in option.choices:
            near = difflib.get_close_matches(text.lower(), option.choices, n=1, cutoff=0.6)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} is {text!r}, not one of {', '.join(option.choices)}.{hint}")
        return
    read, noun = _NUMBERS.get(option.kind.removesuffix(" ..."), (None, ""))
    if read is None:
        return
    try:
        read(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, not {noun}: {option.about}") from None
