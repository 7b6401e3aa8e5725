"""The structure that docs cannot keep: import order, lengths, every config field read and documented, nothing
that runs a file's data.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "slmjax"

# A folder (or a file beside them) imports only from those before it. A subfolder that is listed has a place
# of its own.
ORDER = (
    "startup ownership stop_signals stored_json faults config atomic_files parallel formats data telemetry "
    "kernels losses models quantization checkpoints quantization.ptq distill sampling evaluation convert "
    "training planning testing runner studies cli __main__"
).split()

LONGEST_FILE = 600
LONGEST_FUNCTION = 59

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    """slmjax/data/batch.py -> data.batch; slmjax/data/__init__.py -> data."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module_name(path): ast.parse(path.read_text(), filename=str(path))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


# Imports ----------------------------------------------------------------------------------------------------


def executed_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node`, without the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from itertools.chain([other], executed_nodes(other))
            continue
        yield child
        yield from executed_nodes(child)


def own_imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that are imported, at any depth, as in TREES; "" for the package itself."""
    for node in executed_nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "slmjax":
                inner = name.partition(".")[2]
                if inner == "__version__":
                    continue
                # What is imported is a module, or something in one.
                yield inner if inner in TREES else inner.rpartition(".")[0]


def unit(module: str) -> str:
    """The entry of ORDER that a module belongs to: the longest that it begins with."""
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in ORDER), parts[0])


def test_every_module_has_a_place_in_the_order() -> None:
    unknown = sorted({unit(name) for name in TREES if name} - set(ORDER))
    assert not unknown, f"add {unknown} to ORDER, where they belong"


def test_modules_import_from_those_before_them() -> None:
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        f"{module} imports {name or 'slmjax'}"
        for module, tree in TREES.items()
        for name in own_imports(tree)
        if module
        and unit(module) != unit(name)
        and (place.get(unit(name), -1) >= place.get(unit(module), -1) or (name == "" and module != "cli"))
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_have_no_cycles_inside() -> None:
    edges = {
        module: {name for name in own_imports(tree) if name != module and unit(name) == unit(module)}
        for module, tree in TREES.items()
    }
    while leaves := [module for module, imported in edges.items() if not imported & edges.keys()]:
        for leaf in leaves:
            del edges[leaf]
    assert not edges, f"these import each other in a circle: {sorted(edges)}"


def test_import_order_would_be_noticed() -> None:
    """The check sees nested imports, aliases and modules named as attributes, and passes over
    TYPE_CHECKING.
    """
    program = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from slmjax.cli import main
else:
    import slmjax.models.rope as s
def f():
    from slmjax import config, __version__
    from slmjax.telemetry.run_directory import Log
"""
    assert sorted(own_imports(ast.parse(program))) == ["config", "models.rope", "telemetry.run_directory"]


def test_no_module_has_a_public_functions_name() -> None:
    public = {
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, Function) and not node.name.startswith("_")
    }
    clashes = sorted(name for name in TREES if name.split(".")[-1] in public)
    assert not clashes, f"a function of the same name would hide the module: {clashes}"


def test_no_module_has_a_vague_name() -> None:
    assert not {
        name
        for name in TREES
        if name.split(".")[-1] in {"utils", "util", "helpers", "misc", "common", "tools"}
    }


# Size and documentation -------------------------------------------------------------------------------------


def test_files_are_short() -> None:
    """A warning sign, as the style guide has it: a file is split by idea, never by length."""
    folders = ("slmjax", "tests", "benchmarks", "experiments", "notebooks")
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*folders)}
    long = [
        f"{path.relative_to(ROOT)}: {length}" for path, length in lengths.items() if length > LONGEST_FILE
    ]
    assert not long, f"above {LONGEST_FILE} lines: {long}"


def body_length(node: Function, lines: list[str]) -> int:
    """Lines of code of a function, without its signature, docstring, blank lines and comments."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        return 0
    code = lines[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in code)


def test_functions_are_short() -> None:
    long = {}
    for path in sources("slmjax"):
        lines = path.read_text().splitlines()
        for node in functions(TREES[module_name(path)]):
            if (length := body_length(node, lines)) > LONGEST_FUNCTION:
                long[f"{module_name(path)}.{node.name}"] = length
    assert not long, f"too many lines: {long}"


def packed_assignments(tree: ast.AST) -> Iterator[int]:
    """The lines of tuple assignments of unrelated values; a swap reads its targets and is none."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
            continue
        for target in node.targets:
            if isinstance(target, ast.Tuple):
                written = {ast.unparse(element) for element in target.elts}
                read = {ast.unparse(inner) for inner in ast.walk(node.value)}
                if not written & read:
                    yield node.lineno


def test_one_statement_a_line() -> None:
    folders = ("slmjax", "tests", "benchmarks", "experiments", "notebooks", "docs")
    trees = {path: ast.parse(path.read_text()) for path in sources(*folders)}
    packed = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, tree in trees.items()
        for line in packed_assignments(tree)
    ]
    assert not packed, f"give each value a line of its own: {packed}"
    assert list(packed_assignments(ast.parse("a, b = 1, 2"))) == [1]
    assert not list(packed_assignments(ast.parse("a, b = b, a\nfirst, second = pair")))


def test_few_lines_are_exempt_from_formatting() -> None:
    marker = "# fmt: " + "skip"
    count = sum(
        path.read_text().count(marker) for path in sources("slmjax", "tests", "benchmarks", "experiments")
    )
    assert count < 30, f"{count} lines are exempt from formatting: several lines for one call read better"


def test_comments_give_reasons() -> None:
    """Full-line comments, without the rules between sections: what they say is for the reviewer to judge."""
    lines = [line.strip() for path in sources("slmjax") for line in path.read_text().splitlines()]
    comments = [line for line in lines if line.startswith("#") and not line.endswith("-----")]
    assert len(comments) > 0.04 * len(lines), f"{len(comments)} comments in {len(lines)} lines"


def test_modules_and_public_functions_are_documented() -> None:
    bare = [module or "slmjax" for module, tree in TREES.items() if not ast.get_docstring(tree)]
    for module, tree in TREES.items():
        public = [
            node
            for node in tree.body
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
        ]
        bare += [f"{module}.{node.name}" for node in public if not ast.get_docstring(node)]
    assert not bare, f"without a docstring: {bare}"


# Config fields ----------------------------------------------------------------------------------------------


def nested_classes(hint: object) -> Iterator[type]:
    """The dataclasses that a type names, anywhere inside."""
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        yield hint
    for inner in typing.get_args(hint):
        yield from nested_classes(inner)


def experiment_configs() -> list[type]:
    """Every dataclass that an Experiment can hold, the subclasses of abstract ones included."""
    if importlib.util.find_spec("slmjax.training.experiment") is None:
        pytest.skip("there is no Experiment yet")
    for module in TREES:
        importlib.import_module(f"slmjax.{module}" if module else "slmjax")
    pending: list[type] = [importlib.import_module("slmjax.training.experiment").Experiment]
    found: list[type] = []
    while pending:
        cls = pending.pop()
        if cls in found or not cls.__module__.startswith("slmjax."):
            continue
        found.append(cls)
        pending += cls.__subclasses__()
        if dataclasses.is_dataclass(cls):
            pending += [
                inner for hint in typing.get_type_hints(cls).values() for inner in nested_classes(hint)
            ]
    return [cls for cls in found if dataclasses.is_dataclass(cls)]


def names_read(tree: ast.AST) -> set[str]:
    """Attributes that are read by name, and strings where some attribute is read by a computed name."""
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"
    ]
    if any(not isinstance(call.args[1], ast.Constant) for call in calls):
        names |= {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    return names


def test_every_config_field_is_read() -> None:
    read = set().union(*(names_read(tree) for tree in TREES.values()))
    ignored = [
        f"{cls.__name__}.{field.name}"
        for cls in experiment_configs()
        for field in dataclasses.fields(cls)
        if field.name not in read
    ]
    assert not ignored, f"nothing reads these fields: {ignored}"


def test_configs_are_frozen_and_keyword_only() -> None:
    wrong = [
        cls.__name__
        for cls in experiment_configs()
        if not cls.__dataclass_params__.frozen or not all(field.kw_only for field in dataclasses.fields(cls))  # type: ignore[attr-defined]
    ]
    assert not wrong, f"give these frozen=True, kw_only=True: {wrong}"


def is_documented(node: ast.AnnAssign, following: ast.stmt | None, lines: list[str]) -> bool:
    """A comment on the field's lines or the line above it, or a docstring below it: tyro shows these as
    help.
    """
    own = lines[node.lineno - 2 : node.end_lineno]
    is_docstring = (
        isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    )
    return is_docstring or any("  # " in line for line in own[1:]) or own[0].lstrip().startswith("# ")


def test_every_config_field_has_help() -> None:
    """A field that is a config itself is a group of options, with the docstring of its class as help."""
    bare = []
    configs = experiment_configs()
    groups = {base for cls in configs for base in cls.__mro__ if base.__module__.startswith("slmjax.")}
    for cls in configs:
        hints = typing.get_type_hints(cls)
        lines = inspect.getsource(importlib.import_module(cls.__module__)).splitlines()
        definition = next(
            node
            for node in ast.walk(ast.parse("\n".join(lines)))
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__
        )
        for node, following in itertools.zip_longest(definition.body, definition.body[1:]):
            if (
                not isinstance(node, ast.AnnAssign)
                or set(nested_classes(hints[ast.unparse(node.target)])) & groups
            ):
                continue
            if not is_documented(node, following, lines):
                bare.append(f"{cls.__name__}.{ast.unparse(node.target)}")
    assert not bare, f"the command line has no help for these: {bare}"


# Safety -----------------------------------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
HEAVY_MODULES = {"torch", "transformers", "tensorflow"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "hasattr",
}  # hasattr: not unsafe, but a guess where a type is wanted
UNSAFE_KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}


def unsafe_places(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            yield from (
                f"line {node.lineno}: imports {name}"
                for name in names
                if name.split(".")[0] in UNSAFE_MODULES
            )
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                yield f"line {node.lineno}: calls {node.func.id}"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in UNSAFE_KEYWORDS and not is_false:
                    yield f"line {node.lineno}: passes {keyword.arg}"


def test_nothing_runs_what_a_file_says() -> None:
    paths = sources("slmjax", "experiments", "benchmarks", "notebooks")
    found = [
        f"{path.relative_to(ROOT)}: {place}"
        for path in paths
        for place in unsafe_places(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from yaml import load",
        "eval('1')",
        "np.load(p, allow_pickle=True)",
        "f(trust_remote_code=x)",
        "run(c, shell=True)",
    ],
)
def test_unsafe_lines_would_be_noticed(line: str) -> None:
    assert list(unsafe_places(ast.parse(line)))


def test_frame_files_name_no_host() -> None:
    for name in ("pyproject.toml", "Makefile", ".ci/run", ".pre-commit-config.yaml"):
        assert not re.search(r"https?://|index-url|find-links", (ROOT / name).read_text()), (
            f"{name}: leave the choice of registry to the user"
        )


# What is imported when --------------------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, json, sys
blocked, names = json.loads(sys.argv[1]), json.loads(sys.argv[2])
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
for name in names:
    importlib.import_module(name)
"""

IMPORT_NAMES = {
    "pyright[nodejs]": "pyright",
    "jax[tpu]": "libtpu",
    "jax[cuda13]": "jax_cuda13_plugin",
    "vl-convert-python": "vl_convert",
}


def optional_modules() -> list[str]:
    """The modules that only extras install, and those that the core must not need even where they are
    installed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        re.split(r"[<>=;]", entry)[0]
        for entries in project["optional-dependencies"].values()
        for entry in entries
    ]
    return sorted({IMPORT_NAMES.get(name, name.replace("-", "_")) for name in wanted} | HEAVY_MODULES)


# Modules that define a class of an extra's, which is needed to define it; nothing imports them at the top.
OF_AN_EXTRA = {"evaluation.lm_eval_adapter"}


@pytest.mark.smoke
def test_the_core_needs_no_extra() -> None:
    modules = [f"slmjax.{name}" if name else "slmjax" for name in TREES if name not in OF_AN_EXTRA]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(optional_modules()), json.dumps(modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_heavy_modules_are_never_imported_at_the_top() -> None:
    """Not even where a `try` guards it: an installed torch would then be loaded by `slmjax train`."""
    inside = {id(inner) for tree in TREES.values() for node in functions(tree) for inner in ast.walk(node)}
    for module, tree in TREES.items():
        for node in executed_nodes(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside:
                names = (
                    [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                assert not {name.split(".")[0] for name in names} & HEAVY_MODULES, (
                    f"{module}, line {node.lineno}"
                )


@pytest.mark.smoke
def test_import_is_fast_and_light() -> None:
    program = """
import time
started = time.perf_counter()
import slmjax
dir(slmjax)
print(time.perf_counter() - started)
import sys
print(*sys.modules)
"""
    seconds, modules = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert not {"jax", "numpy", "flax", "rich", "tyro"} & set(modules.split())
    assert float(seconds) < 0.2  # a few milliseconds where the machine is free


def test_public_names() -> None:
    import slmjax

    assert set(slmjax.__all__) == {*slmjax._MODULE_OF, *slmjax._MODULES, "__version__"}
    assert set(slmjax.__all__) <= set(dir(slmjax))
    for name, module in slmjax._MODULE_OF.items():
        if importlib.util.find_spec(module) is not None:
            assert getattr(slmjax, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        slmjax.trian  # noqa: B018


# The README -------------------------------------------------------------------------------------------------


def test_readme_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^\s*|`)make ([a-z-]+)", readme, flags=re.MULTILINE)) <= targets
    if importlib.util.find_spec("slmjax.cli") is None:
        pytest.skip("there is no command line yet")
    commands = set(re.findall(r"(?:^\s*|`)slmjax ([a-z][a-z-]*)", readme, flags=re.MULTILINE))
    assert "train" in commands
    assert commands <= set(importlib.import_module("slmjax.cli").COMMANDS)
