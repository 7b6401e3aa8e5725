"""What the site says of commands and settings is read from the code each time it is built: mkdocs calls
`on_page_markdown`.
"""

import ast
import dataclasses
import enum
import html
import importlib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "slmjax"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the markers of a page by what is generated."""
    for marker, generate in {"<!-- commands -->": commands, "<!-- configuration -->": configuration}.items():
        if marker in markdown:
            markdown = markdown.replace(marker, generate())
    return markdown


# Commands ---------------------------------------------------------------------------------------------------
def commands() -> str:
    """A section for each command: what it does, and the options that are its own."""
    from slmjax.cli import COMMANDS

    return "\n\n".join(_command(name, function) for name, function in COMMANDS.items())


def _command(name: str, function: Callable[..., int]) -> str:
    about, _, usage = inspect.cleandoc(function.__doc__ or "").partition("\n\n")
    module = inspect.getmodule(function)
    assert module is not None
    lines = inspect.getsource(module).splitlines()
    # The options of a command are the class Arguments in NAME_command, or in _NAME_arguments.
    homes = (function.__name__, f"_{name.replace('-', '_')}_arguments")
    functions = (node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.FunctionDef))
    classes = [
        node
        for home in functions
        if home.name in homes
        for node in ast.walk(home)
        if isinstance(node, ast.ClassDef)
    ]
    rows = []
    trees = []
    for node in (node for one in classes for node in one.body if isinstance(node, ast.AnnAssign)):
        field = ast.unparse(node.target)
        comment = _comment_above(lines, node.lineno)
        annotation = ast.unparse(node.annotation)
        default = "" if node.value is None else ast.unparse(node.value)
        if "Config" in annotation or "Experiment" in annotation or field in ("data", "tokenizer"):
            found = re.search(r"([A-Za-z]*(?:Config|Experiment))", annotation)
            trees.append(f"`{found[1] if found else annotation}`")
            continue
        shown = re.findall(r"positional\('(.*?)'\)", annotation)
        kind = re.sub(r"Annotated\[(.*), (\*positional|repeated).*", r"\1", annotation)
        option = shown[0] if shown else f"--{field.replace('_', '-')}"
        rows.append(f"| `{option}` | {_cell(kind)} | {_cell(default)} | {html.escape(comment)} |")
    parts = [f"## {name}", about, f"```\n{usage}\n```"]
    if trees:
        parts.append(
            f"Fields of {' and '.join(trees)} are options too: see [configuration](configuration.md)."
        )
    if rows:
        parts.append("\n".join(["| option | type | default | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _comment_above(lines: list[str], lineno: int) -> str:
    """The full-line comments that end above a line (counted from 1), joined."""
    comments: list[str] = []
    for line in reversed(lines[: lineno - 1]):
        if not line.lstrip().startswith("# "):
            break
        comments.insert(0, line.strip().removeprefix("# "))
    return " ".join(comments)


# Configuration ----------------------------------------------------------------------------------------------
def configuration() -> str:
    """A section for each dataclass that an experiment is made of, in the order in which they are met."""
    from slmjax.training.experiment import Experiment

    return "\n\n".join(_config(cls) for cls in config_classes(Experiment))


def config_classes(root: type) -> list[type]:
    """The dataclasses that can be part of a config: fields' types, and the kinds of what is abstract."""
    for path in sorted(PACKAGE.rglob("*.py")):  # a kind is known once its module is imported
        if "Config" in path.read_text() and path.stem not in ("__main__", "lm_eval_adapter"):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            importlib.import_module(".".join(part for part in parts if part != "__init__"))
    found: dict[type, None] = {}
    waiting = [root]
    while waiting:
        cls = waiting.pop(0)
        if cls in found or not dataclasses.is_dataclass(cls):
            continue
        found[cls] = None
        waiting += [inner for hint in typing.get_type_hints(cls).values() for inner in _classes(hint)]
        waiting += [kind for kind in cls.__subclasses__() if kind.__module__.startswith("slmjax")]
    return list(found)


def _classes(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and not typing.get_args(hint):
        yield hint
        yield from (
            kind
            for kind in hint.__subclasses__()
            if dataclasses.is_dataclass(kind) and kind.__module__.startswith("slmjax")
        )
    for inner in typing.get_args(hint):
        yield from _classes(inner)


def _config(cls: type) -> str:
    comments = _comments(cls)
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        comment = comments.get(field.name, "")
        rows.append(
            f"| `{field.name}` | {_cell(_type(hint))} | {_cell(_default(field))} | {_about(comment, hint)} |"
        )
    parts = [f"## {cls.__name__}", f"`{cls.__module__}`. {inspect.cleandoc(cls.__doc__ or '')}"]
    if rows:
        parts.append("\n".join(["| field | type | default | |", "|---|---|---|---|", *rows]))
    kinds = [
        kind.__name__
        for kind in cls.__subclasses__()
        if dataclasses.is_dataclass(kind) and kind.__module__.startswith("slmjax")
    ]
    if kinds:
        parts.append("Kinds: " + ", ".join(f"[{kind}](#{kind.lower()})" for kind in kinds) + ".")
    return "\n\n".join(parts)


def _about(comment: str, hint: Any) -> str:
    """The comment; for a field that is settings itself, what they are, with a link."""
    if (
        isinstance(hint, type)
        and hint.__module__.startswith("slmjax")
        and (not comment or dataclasses.is_dataclass(hint))
    ):
        first = (inspect.getdoc(hint) or "").split("\n")[0]
        named = [hint] if dataclasses.is_dataclass(hint) else hint.__subclasses__()
        links = ", ".join(
            f"[{one.__name__}](#{one.__name__.lower()})"
            for one in named
            if one.__module__.startswith("slmjax")
        )
        return f"{html.escape(comment or first)} See {links}."
    return html.escape(comment)


def _comments(cls: type) -> dict[str, str]:
    """Field -> the comment beside it or, where there is none, on the line above it; those of base classes
    included.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        lines = inspect.getsource(base).splitlines()
        for node in ast.walk(ast.parse(textwrap.dedent("\n".join(lines)))):
            if isinstance(node, ast.AnnAssign):
                beside = [_comment(line) for line in lines[node.lineno - 1 : node.end_lineno]]
                above = _comment_above(lines, node.lineno)
                found[ast.unparse(node.target)] = next(filter(None, [*beside, above]), "")
    return found


def _comment(line: str) -> str:
    found = re.search(r"  # (.*)$", line)
    return re.sub(r"\s*# (noqa|fmt|pyright).*", "", found[1]) if found else ""


def _type(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " / ".join(str(one.value) for one in hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_type(one) for one in typing.get_args(hint)).replace("NoneType", "none")
    if typing.get_args(hint):
        inner = ", ".join("..." if one is Ellipsis else _type(one) for one in typing.get_args(hint))
        return f"{getattr(hint, '__origin__', hint).__name__}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else "made anew"
    if isinstance(field.default, enum.Enum):
        return str(field.default.value)
    if dataclasses.is_dataclass(field.default):
        return f"{type(field.default).__name__}()"
    return "none" if field.default is None else repr(field.default)


def _cell(text: str) -> str:
    shown = text.replace("|", "or") if " | " in text else text
    return f"`{shown}`" if shown else ""
