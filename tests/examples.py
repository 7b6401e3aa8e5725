"""Examples in docstrings and pages: their names are resolved and their calls compared with signatures.

An example is an indented block of a docstring, or a fenced block of a page, that begins with a line of
Python: an assignment, an import, a call. Its functions and classes must exist, and each call must fit the
signature. If it is made of configs alone, it is run.
"""

import ast
import builtins
import dataclasses
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "slmjax"
PUBLIC_MODULES = ("slmjax", "slmjax.models", "slmjax.studies", "slmjax.testing", "slmjax.training")
# How a line of Python begins: an assignment, a keyword, or a call of a name that a closing bracket ends.
ASSIGNMENT = r"\(?[\w.]+(?:\[[^]]*\])?(?:, [\w.]+)*,?\)? [+|]?= \S"
KEYWORD = r"(?:from|import|with|for|def|class) \w|@\w"
CALL = r"[\w.]+\(.*\)\s*(?:#.*)?$"
PYTHON_LINE = re.compile(f"(?:{ASSIGNMENT})|(?:{KEYWORD})|(?:{CALL})")
LIBRARIES = {
    "Path": "pathlib.Path",
    "dataclasses": "dataclasses",
    "functools": "functools",
    "jax": "jax",
    "jnp": "jax.numpy",
    "math": "math",
    "nnx": "flax.nnx",
    "np": "numpy",
    "slmjax": "slmjax",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """Python code that documentation shows, and the module whose names it may use."""

    where: str
    code: str
    module: str = "slmjax"


def indented_blocks(text: str) -> Iterator[str]:
    """The blocks of a docstring that are indented by four columns more than its text."""
    lines = text.splitlines()
    block: list[str] = []
    for line in [*lines, "end"]:
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line)
            continue
        if block:
            yield textwrap.dedent("\n".join(block)).strip() + "\n"
        block = []


def docstring_of(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """Return a docstring without the indentation of its definition; `cleandoc` may strip an example's too."""
    text = ast.get_docstring(node, clean=False) or ""
    return text.replace("\n" + " " * node.body[0].col_offset, "\n")


def flush_blocks(text: str) -> Iterator[str]:
    """Paragraphs that begin with a call: ruff unindents a docstring that has only code after its summary."""
    for paragraph in re.split(r"\n\s*\n", text):
        if re.match(r"(?:\w+(?:, \w+)* = )?[\w.]+\(.*\)(?:\s+#.*)?(?:\n|$)", paragraph):
            yield paragraph.strip() + "\n"


def is_python(block: str) -> bool:
    """Whether a block means to be Python: its first lines look so."""
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("#", " "))]
    return bool(lines) and PYTHON_LINE.match(lines[0]) is not None


def docstring_examples() -> list[Example]:
    """The examples of all docstrings of the package; sections such as `Args:` are none."""
    examples = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = docstring_of(node)
            text = re.sub(r"^(Args|Raises|Returns|Yields):\n(?:[ ]+.*\n?|\n)*", "", text, flags=re.MULTILINE)
            name = getattr(node, "name", "")
            for block in flush_blocks(text):
                examples.append(Example(where=f"{module}.{name}".rstrip("."), code=block, module=module))
            for block in indented_blocks(text):
                if is_python(block):
                    examples.append(Example(where=f"{module}.{name}".rstrip("."), code=block, module=module))
    return examples


def page_blocks(page: Path) -> list[str]:
    """The fenced Python blocks of a page, without those that a file fills."""
    text = re.sub(r"<!-- source .*?<!-- end of source -->", "", page.read_text("utf-8"), flags=re.DOTALL)
    return [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]


@functools.cache
def public_definitions() -> dict[str, str]:
    """Return the module of each public function and class whose name only one module of the package has."""
    modules: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                modules.setdefault(node.name, []).append(module)
    return {name: where[0] for name, where in modules.items() if len(where) == 1}


class Unresolved(Exception):
    """A name that is not known here: an input of the example."""


class Checker:
    """Resolves the names of one example and compares its calls with signatures."""

    def __init__(self, example: Example) -> None:
        self.example = example
        try:
            self.tree = ast.parse(example.code)
        except SyntaxError:  # `f(a, b=1, ...)` leaves further arguments to the reader
            self.tree = ast.parse(re.sub(r", \.\.\.\)", ", **further)", example.code))
        self.names: dict[str, Any] = {}
        self.inputs: set[str] = set()
        self.problems: list[str] = []
        for name in reversed(PUBLIC_MODULES):
            module = importlib.import_module(name)
            self.names |= {public: getattr(module, public) for public in module.__all__}
        for name, place in LIBRARIES.items():
            parent, _, attribute = place.rpartition(".")
            try:
                self.names[name] = importlib.import_module(place)
            except ModuleNotFoundError:
                self.names[name] = getattr(importlib.import_module(parent), attribute)
        used = {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}
        for name, module in public_definitions().items():
            if name in used and name not in self.names:
                self.names[name] = getattr(importlib.import_module(module), name)
        self.names |= vars(importlib.import_module(example.module))
        for name in PUBLIC_MODULES[1:]:
            self.names[name.rpartition(".")[2]] = importlib.import_module(name)
        self.local = {
            node.id
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self.local |= {node.arg for node in ast.walk(self.tree) if isinstance(node, ast.arg)}
        self.local |= {
            node.name for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }

    def problems_found(self) -> list[str]:
        """Return what is wrong with the example; empty if nothing is."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.names[(alias.asname or alias.name).split(".")[0]] = importlib.import_module(
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lm_eval"):
                self.local |= {alias.name for alias in node.names}  # slow to import
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        self.problems.append(f"{node.module} has no {alias.name}")
                    else:
                        self.names[alias.asname or alias.name] = getattr(module, alias.name)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self.check_name(node)
            if isinstance(node, ast.Call):
                self.check_call(node)
        return self.problems

    def check_name(self, node: ast.Name) -> None:
        known = node.id in self.names or node.id in self.local or hasattr(builtins, node.id)
        if known:
            return
        self.inputs.add(node.id)
        is_called = any(isinstance(call, ast.Call) and call.func is node for call in ast.walk(self.tree))
        if node.id[0].isupper() or is_called:  # a lower-case name stands for an input
            self.problems.append(f"there is no {node.id}")

    def resolve(self, node: ast.expr) -> Any:
        """Return the object that a name or a chain of attributes of modules and classes stands for."""
        if isinstance(node, ast.Name):
            if node.id in self.local or node.id not in self.names:
                raise Unresolved
            return self.names[node.id]
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            if not (inspect.ismodule(owner) or inspect.isclass(owner)):
                raise Unresolved
            if not hasattr(owner, node.attr):
                self.problems.append(f"{ast.unparse(node)} does not exist")
                raise Unresolved
            return getattr(owner, node.attr)
        raise Unresolved

    def check_call(self, node: ast.Call) -> None:
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return
        if any(isinstance(argument, ast.Constant) and argument.value is ... for argument in node.args):
            return  # `Study(...)`: the arguments are left to the reader
        keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
        is_complete = len(keywords) == len(node.keywords)
        try:
            function = self.resolve(node.func)
            signature = inspect.signature(function)
        except (Unresolved, ValueError, TypeError):
            return
        try:
            bind = signature.bind if is_complete else signature.bind_partial
            bind(*node.args, **keywords)
        except TypeError as error:
            self.problems.append(f"{ast.unparse(node)}: {error}")

    def is_made_of_configs(self) -> bool:
        """Whether the example can be run at no cost: every call makes a dataclass, and it has no inputs."""
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        if (
            self.inputs
            or not calls
            or any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(self.tree))
        ):
            return False
        for call in calls:
            try:
                function = self.resolve(call.func)
            except Unresolved:
                return False
            is_config = inspect.isclass(function) and dataclasses.is_dataclass(function)
            if not (is_config or function in (dataclasses.replace, self.names.get("preset"))):
                return False
        return True


def check(example: Example) -> list[str]:
    """Return the problems of an example."""
    try:
        checker = Checker(example)
    except SyntaxError as error:
        return [f"{example.where}: {error.msg}: {(error.text or '').strip()}"]
    problems = checker.problems_found()
    if not problems and checker.is_made_of_configs():
        try:
            exec(compile(checker.tree, example.where, "exec"), {**checker.names})  # noqa: S102
        except Exception as error:
            problems = [f"{type(error).__name__}: {error}"]
    return [f"{example.where}: {problem}" for problem in problems]
