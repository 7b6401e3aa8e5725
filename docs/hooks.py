"""The generated parts of the pages, between a marker and its end: `<!-- NAME -->` ... `<!-- end of NAME -->`.

    python docs/hooks.py        # writes them into the pages, for readers of the repository

- `<!-- commands -->`: every command with its options;
- `<!-- configuration -->`: every dataclass that an experiment is made of;
- `<!-- source FILE NAME -->`: the source of one function, class or constant;
- `<!-- readme -->`: the text of README.md, with its links as the site has them;
- `<!-- api -->`: the public names, with signatures and docstrings.

The last two are on the site alone, where mkdocs calls `on_page_markdown`. In the repository their place has a
link to the text.
"""

import ast
import dataclasses
import enum
import functools
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

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "slmjax"


ON_SITE_ONLY = ("readme", "api")
_BLOCK = re.compile(r"(<!-- (\w+)((?: \S+)*) -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with its generated parts."""
    return _BLOCK.sub(_generated, markdown)


def for_repository(markdown: str) -> str:
    """Return a page as the repository has it: generated, except for what is on the site only."""
    return _BLOCK.sub(lambda match: match[0] if match[2] in ON_SITE_ONLY else _generated(match), markdown)


def _generated(match: re.Match[str]) -> str:
    generators = {
        "readme": readme,
        "commands": commands,
        "configuration": configuration,
        "api": api,
        "source": source,
    }
    begin, name, arguments, _, end = match.groups()
    return f"{begin}\n{generators[name](*arguments.split())}\n\n{end}"


def source(path: str, name: str) -> str:
    """Return the source of one name of a file as a block of code."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, ast.Assign):
            names = [ast.unparse(target) for target in node.targets]
        if name in names:
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
            lines = text.splitlines()[first - 1 : node.end_lineno]
            return "\n".join(["```python", *lines, "```"])
    raise ValueError(f"{path} has no {name}")


# README -----------------------------------------------------------------------------------------------------
def readme() -> str:
    """Return the text of README.md; a link to a file that the site does not have becomes the file's name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def link(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if re.match(r"https?:", target):
            return match[0]
        if target.startswith("docs/") and target != "docs/":
            return f"{mark}[{label}]({target.removeprefix('docs/')})"
        return label if label.rstrip("/") == target.rstrip("/") else f"{label} (`{target}`)"

    return re.sub(r"(!?)\[([^]]*)\]\(([^)]+)\)", link, text)


# Commands ---------------------------------------------------------------------------------------------------
def commands() -> str:
    """A section for each command: what it does, and the options that are its own."""
    from slmjax.cli import COMMANDS

    return "\n\n".join(_command(name, function) for name, function in COMMANDS.items())


def _command(name: str, function: Callable[..., int]) -> str:
    about, usage, *notes = inspect.cleandoc(function.__doc__ or "").split("\n\n")
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
    for node in (node for cls in classes for node in cls.body if isinstance(node, ast.AnnAssign)):
        field = ast.unparse(node.target)
        comment = _comment_above(lines, node.lineno)
        annotation = ast.unparse(node.annotation)
        default = "" if node.value is None else ast.unparse(node.value)
        if "Config" in annotation or "Experiment" in annotation or field in ("data", "tokenizer"):
            config = re.search(r"([A-Za-z]*(?:Config|Experiment))", annotation)
            trees.append(f"`{config[1] if config else annotation}`")
            continue
        shown = re.findall(r"positional\('(.*?)'\)", annotation)
        kind = re.sub(r"Annotated\[(.*), (\*positional|repeated).*", r"\1", annotation)
        option = shown[0] if shown else f"--{field.replace('_', '-')}"
        rows.append(
            f"| `{option}` | {_cell(kind)} | {_cell(default)} | {html.escape(comment, quote=False)} |"
        )
    parts = [f"## {name}", about, f"```\n{usage}\n```", *notes]
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


# Public names -----------------------------------------------------------------------------------------------
def api() -> str:
    """Return a section for each public module, with its functions, classes and enums."""
    modules = [importlib.import_module(name) for name in PUBLIC_MODULES]
    return "\n\n".join(_public_module(module) for module in modules)


PUBLIC_MODULES = ("slmjax", "slmjax.models", "slmjax.training", "slmjax.studies", "slmjax.testing")


def _public_module(module: types.ModuleType) -> str:
    parts = [f"## {module.__name__}", _markdown(module.__doc__ or "")]
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            parts.append(_public_name(module.__name__, name, value))
    return "\n\n".join(parts)


def _public_name(module: str, name: str, value: Any) -> str:
    anchor = f"{module}.{name}".lower().replace(".", "-")
    parts = [f"### {name} {{ #{anchor} }}"]
    if inspect.isfunction(value):
        parts.append(f"```python\n{_signature(name, value)}\n```")
    elif dataclasses.is_dataclass(value):
        fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(value))
        if fields:
            parts.append(f"Fields: {fields}.")
    elif issubclass(value, enum.Enum):
        parts.append("Values: " + ", ".join(f"`{member.name}`" for member in value) + ".")
    text = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    if text and not text.startswith(f"{name}("):  # the docstring that dataclass makes of the fields
        parts.insert(1, _markdown(text))
    return "\n\n".join(parts)


def _signature(name: str, function: Callable[..., Any]) -> str:
    """Return the signature as the source has it, on one line or one parameter a line."""
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    assert isinstance(node, ast.FunctionDef), name
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({ast.unparse(node.args)}){returns}"
    if len(line) <= 90:
        return line
    arguments = ast.unparse(node.args)
    parameters = re.split(r", (?![^\[(]*[\])])", arguments)
    return f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){returns}"


def _markdown(docstring: str) -> str:
    """Return a docstring as Markdown: sections such as `Raises:` as lists, code between blank lines."""
    lines: list[str] = []
    is_section = False
    for line in inspect.cleandoc(docstring).splitlines():
        if re.fullmatch(r"(Args|Raises|Returns|Yields):", line):
            is_section = True
            lines += ["", f"**{line[:-1]}**", ""]
            continue
        is_section = is_section and (line.startswith(" ") or not line)
        if is_section:
            entry = re.match(r"  ([\w.]+): (.*)", line)
            lines.append(f"- `{entry[1]}`: {entry[2]}" if entry else line)
            continue
        if line.startswith("    ") and lines and lines[-1] and not lines[-1].startswith("    "):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


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
    classes: dict[type, None] = {}
    waiting = [root]
    while waiting:
        cls = waiting.pop(0)
        if cls in classes or not dataclasses.is_dataclass(cls):
            continue
        classes[cls] = None
        waiting += [inner for hint in typing.get_type_hints(cls).values() for inner in _classes(hint)]
        waiting += [kind for kind in cls.__subclasses__() if kind.__module__.startswith("slmjax")]
    return list(classes)


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
            f"[{kind.__name__}](#{kind.__name__.lower()})"
            for kind in named
            if kind.__module__.startswith("slmjax")
        )
        return f"{html.escape(comment or first, quote=False)} See {links}."
    return html.escape(comment, quote=False)


def _comments(cls: type) -> dict[str, str]:
    """Return field -> the comment on its lines or, where there is none, above them; inherited fields too."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        file = inspect.getsourcefile(base)
        assert file is not None, base
        lines, definitions = _classes_of_file(file)
        for node in ast.walk(definitions[base.__qualname__]):
            if isinstance(node, ast.AnnAssign):
                own = filter(None, (_comment(line) for line in lines[node.lineno - 1 : node.end_lineno]))
                comments[ast.unparse(node.target)] = " ".join(own) or _comment_above(lines, node.lineno)
    return comments


@functools.cache
def _classes_of_file(path: str) -> tuple[list[str], dict[str, ast.ClassDef]]:
    """Return the lines of a file and its classes by name."""
    text = Path(path).read_text(encoding="utf-8")
    return text.splitlines(), {
        node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)
    }


def _comment(line: str) -> str:
    comment = re.search(r"  # (.*)$", line)
    return re.sub(r"\s*# (noqa|fmt|pyright).*", "", comment[1]) if comment else ""


def _type(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " / ".join(str(member.value) for member in hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_type(arg) for arg in typing.get_args(hint)).replace("NoneType", "none")
    if typing.get_args(hint):
        inner = ", ".join("..." if arg is Ellipsis else _type(arg) for arg in typing.get_args(hint))
        return f"{getattr(hint, '__origin__', hint).__name__}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else "made for each"
    if isinstance(field.default, enum.Enum):
        return str(field.default.value)
    if dataclasses.is_dataclass(field.default):
        return f"{type(field.default).__name__}()"
    return "none" if field.default is None else repr(field.default)


def _cell(text: str) -> str:
    shown = text.replace("|", "or") if " | " in text else text
    return f"`{shown}`" if shown else ""


if __name__ == "__main__":
    for page in sorted((ROOT / "docs").glob("*.md")):
        page.write_text(for_repository(page.read_text(encoding="utf-8")), encoding="utf-8")
