"""Names of settings and experiments, read from the package's source without running it.

Importing the settings imports jax, which takes a second or more. A mistyped name is answered before that.
"""

import ast
import functools
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
# Folders with the dataclasses of experiments and of the commands' own options.
_WITH_SETTINGS = (
    "checkpoints",
    "cli",
    "data",
    "distill",
    "formats",
    "losses",
    "models",
    "parallel",
    "quantization",
    "sampling",
    "training",
)


@functools.cache
def built_in_experiments() -> dict[str, str]:
    """Return the names of the built-in experiments, each with the first line of its docstring."""
    tree = ast.parse((_PACKAGE / "training" / "recipes.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    tables = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and _is_table(node))
    table = next(tables)
    assert isinstance(table, ast.Dict)
    names = {
        key.value: value.id
        for key, value in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Name)
    }
    return {
        str(name): (ast.get_docstring(functions[function]) or "").partition("\n")[0]
        for name, function in names.items()
    }


def _is_table(node: ast.AnnAssign) -> bool:
    return isinstance(node.target, ast.Name) and node.target.id == "BUILT_IN"


@functools.cache
def field_kinds() -> dict[str, frozenset[str]]:
    """Return the fields of all dataclasses with settings, each with the first words of its annotations."""
    kinds_of: dict[str, set[str]] = {}
    paths = (path for folder in _WITH_SETTINGS for path in (_PACKAGE / folder).rglob("*.py"))
    for path in paths:
        indent = None  # of the dataclass that the lines belong to
        for line in path.read_text(encoding="utf-8").splitlines():
            depth = len(line) - len(line.lstrip())
            if line.lstrip().startswith("@dataclasses.dataclass"):
                indent = depth
            elif indent is not None and line.strip():
                if depth <= indent and not line.lstrip().startswith(("class ", "@", ")")):
                    indent = None
                elif match := re.match(rf" {{{indent + 4}}}(\w+): (\w+)", line):
                    kinds_of.setdefault(match[1], set()).add(match[2])
    return {name: frozenset(kinds) for name, kinds in kinds_of.items()}


def is_flag(option: str) -> bool:
    """Return whether an option is of a boolean and takes no value: `--json`, `--eval.no-unrounded`."""
    name = option.rpartition(".")[2].lstrip("-").replace("-", "_")
    kinds = [field_kinds().get(spelling) for spelling in (name, name.removeprefix("no_"))]
    return name in ("help", "h") or frozenset({"bool"}) in kinds
