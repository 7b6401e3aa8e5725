"""The site builds without a warning, needs no network and covers every command and setting.

What its pages, the README and docstrings state agrees with the code, and their examples work.
"""

import ast
import contextlib
import dataclasses
import functools
import html
import importlib
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import readme_verdicts
from slmjax import cli
from slmjax.cli import COMMANDS
from slmjax.cli.fields import full_names, options_of
from slmjax.convert.families import HF_FAMILIES
from slmjax.formats.presets import PRESETS
from slmjax.testing import check_mixer
from slmjax.training import Experiment, recipes
from tests import composition, examples

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EXAMPLE = DOCS / "examples" / "gated_convolution.py"


def run_file(path: Path) -> ModuleType:
    return recipes.run_file(path)


# The site ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


class Links(HTMLParser):
    """What a page loads, what it links to, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.anchors.add(attributes.get("id", ""))
        if tag == "a":
            self.links.append(attributes.get("href", ""))
        elif "src" in attributes or (tag == "link" and attributes.get("rel") != "canonical"):
            self.loaded.append(attributes.get("src", attributes.get("href", "")))


def test_pages_load_nothing_from_elsewhere_and_links_hold(site: Path) -> None:
    pages = {
        path: Links(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
        if path.name != "404.html"
    }
    assert len(pages) == len(list(DOCS.glob("*.md")))
    for path, page in pages.items():
        for address in page.loaded:
            assert not re.match(r"(https?:)?//", address), f"{path.name} loads {address}"
            assert (path.parent / address.partition("?")[0]).exists(), f"{path} loads {address}"
        for address in page.links:
            if re.match(r"(https?:)?//|mailto:", address):
                continue
            place, _, anchor = address.partition("#")
            target = (path.parent / place).resolve() if place else path
            target = target / "index.html" if target.is_dir() else target
            assert target in pages, f"{path} links to {address}"
            assert anchor in pages[target].anchors, f"{path} links to {address}"


def test_the_reference_covers_everything(site: Path) -> None:
    commands = (site / "commands" / "index.html").read_text()
    for name in COMMANDS:
        assert f'id="{name}"' in commands, name
    for option in ("--multiple-choice", "--resume", "RUN_DIR", "--logprobs", "--output"):
        assert option in commands
    settings = (site / "configuration" / "index.html").read_text()
    for name in (
        "Experiment",
        "AttentionConfig",
        "MoeConfig",
        "OptimConfig",
        "SamplingConfig",
        "MeshConfig",
        "BpeTokenizer",
        "TextSource",
    ):
        assert f'id="{name.lower()}"' in settings, name
    # A field, its type, its default and its comment.
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", settings))
    assert "muon_lr float 0.02 muon: peak learning rate of its matrices" in text
    assert re.search(r"kind adamw / adafactor / lion / muon adamw ", text)


def test_the_page_on_mixers_shows_the_example(site: Path) -> None:
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "add-a-mixer" / "index.html").read_text()))
    shown = [line for line in EXAMPLE.read_text().splitlines() if re.match(r" *(class|def) ", line)]
    assert len(shown) > 8 and not [line for line in shown if line not in page]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_of_pages_are_those_of_the_code(hooks: ModuleType) -> None:
    """A reader of the repository sees them too; nothing is left that only the site expands."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert text == hooks.for_repository(text), f"run `python docs/hooks.py`: {page.name} is out of date"
        markers = re.findall(r"<!-- (?!end of )(\w+).*? -->|--8<--", text)
        assert len(markers) == text.count("<!-- end of "), f"{page.name} has a marker without its end"


def test_every_field_that_is_met_has_a_comment(hooks: ModuleType) -> None:
    rows = [line for line in hooks.configuration().splitlines() if line.startswith("| `")]
    assert len(rows) > 100 and not [row for row in rows if re.search(r"\|\s*\|$", row)]


def test_users_import_from_four_modules() -> None:
    """Experiments, notebooks and pages show the public surface only."""
    files = [*ROOT.glob("experiments/*.py"), *ROOT.glob("notebooks/*.py"), *DOCS.glob("examples/*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        texts |= {f"{page.name}, block {i}": block for i, block in enumerate(examples.page_blocks(page))}
    imports = [
        (name, node)
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert len(imports) > 50
    for name, node in imports:
        if isinstance(node, ast.Import):
            own = [alias.name for alias in node.names if alias.name.split(".")[0] == "slmjax"]
            assert set(own) <= set(examples.PUBLIC_MODULES), f"{name} imports {own}"
        elif node.module is not None and node.module.split(".")[0] == "slmjax":
            assert node.module in examples.PUBLIC_MODULES, f"{name} imports from {node.module}"
            missing = {alias.name for alias in node.names} - set(importlib.import_module(node.module).__all__)
            assert not missing, f"{name} imports {missing} from {node.module}"


# Statements that code can check -----------------------------------------------------------------------------
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
# Words in backticks with these forms are checked, wherever a page or the README has them.
SECTIONS = "model|init|data|tokenizer|optim|objective|quant|mesh|eval|checkpoint|run"
FOLDERS = "slmjax|tests|docs|experiments|benchmarks|notebooks|tpu_scripts"


def page_texts() -> dict[str, str]:
    return {page.name: page.read_text(encoding="utf-8") for page in PAGES}


def in_backticks() -> Iterator[tuple[str, str]]:
    """Page and text of everything that a page shows as code within a line."""
    for name, text in page_texts().items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", prose):
            yield name, code


def shell_lines() -> list[list[str]]:
    """The words of each `slmjax` command line: of fenced and indented blocks, and in backticks."""
    blocks: list[str] = []
    for text in page_texts().values():
        blocks += re.findall(r"```(?:bash)?\n(.*?)```", text, flags=re.DOTALL)
        blocks += re.findall(r"^ {4}(.*)$", text, flags=re.MULTILINE)
    blocks += [code for _, code in in_backticks()]
    commands = []
    for line in "\n".join(blocks).splitlines():
        match = re.search(r"(?:^|\||/|\d )\s*(?:[A-Z_]+=\S+ )*(slmjax [a-z-]+.*)$", line.split("#")[0])
        if match is None or "..." in match[1].split()[:2]:
            continue
        try:
            commands.append(shlex.split(match[1].replace("`", "")))
        except ValueError:
            pytest.fail(f"not a command line: {line}")
    return commands


@functools.cache
def help_of(*command: str) -> str:
    """Return what `slmjax COMMAND --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0, command
    return printed.getvalue()


def subcommands(name: str) -> tuple[str, ...]:
    """Return the words that follow a command which has several parts, such as `data prepare`."""
    return {"data": ("prepare", "inspect"), "formats": ("table", "report")}.get(name, ())


def test_commands_on_the_pages_are_commands() -> None:
    """Each word after slmjax is a command, each option one of its own."""
    lines = shell_lines()
    assert len(lines) > 60 and {line[1] for line in lines} >= {*COMMANDS}
    for line in lines:
        assert line[1] in COMMANDS, line
        command = line[1:3] if len(line) > 2 and line[2] in subcommands(line[1]) else line[1:2]
        for option in (word.partition("=")[0] for word in line if word.startswith("--")):
            is_known = option == "--help" or option in help_of(*command) or is_setting(option)
            assert is_known, f"{option} in {' '.join(line)}"


def test_commands_in_docstrings_are_commands() -> None:
    """Lines of docstrings that begin with `slmjax` or `python FILE`, with their options."""
    number = 0
    for folder in ("slmjax", "experiments", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
            for line in "\n".join(texts).splitlines():
                if match := re.match(r"\s*python ([\w/]+\.py)", line):
                    number += 1
                    assert (ROOT / match[1]).is_file(), f"{path.name}: there is no {match[1]}"
                if match := re.match(r"\s*slmjax ([a-z-]+)(?: ([a-z]+))?(.*)", line.split("  #")[0]):
                    number += 1
                    name, part, rest = match.groups()
                    assert name in COMMANDS, f"{path.name}: {line}"
                    command = (name, part) if part in subcommands(name) else (name,)
                    for option in re.findall(r"(?<![\w-])--[a-z][\w.-]+", rest):
                        is_known = option in help_of(*command) or is_setting(option)
                        assert is_known, f"{path.name}: {line}"
    assert number > 40


def test_options_in_the_text_are_options() -> None:
    """An option that is named alone belongs to some command; those of other programs are listed."""
    others = {"--xla_force_host_platform_device_count", "--port"}  # of XLA and of xprof
    texts = "".join(help_of(name) for name in COMMANDS if not subcommands(name))
    texts += "".join(help_of(name, part) for name in COMMANDS for part in subcommands(name))
    texts += "".join(path.read_text() for path in (ROOT / "tpu_scripts").rglob("*") if path.is_file())
    texts += "".join(path.read_text() for path in (ROOT / "experiments").glob("*.py"))
    for name, code in in_backticks():
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]+", code):
            is_known = option in texts or option in others or is_setting(option)
            assert is_known, f"{name}: there is no option {option}"


def is_setting(option: str) -> bool:
    """Whether an option is the path of a field of an experiment, or a short name of a field of `nano`.

    The kinds of abstract configs have more fields.
    """
    nano = recipes.load_experiment("nano")
    with contextlib.suppress(ValueError):
        return bool(full_names([option], options_of(Experiment, nano), command="train"))
    path = option.removeprefix("--").replace("-", "_").split(".")
    # A number is the index of a layer group or a block.
    return has_field(Experiment, [name for name in path if not name.isdigit()])


def has_field(cls: type, path: list[str]) -> bool:
    """Whether a config or one of its kinds has a field of this path."""
    if not path:
        return True
    kinds = [cls, *cls.__subclasses__()]
    for kind in kinds:
        if not dataclasses.is_dataclass(kind):
            continue
        hints = typing.get_type_hints(kind)
        if path[0] in hints:
            inner = [
                leaf
                for leaf in structure_classes(hints[path[0]])
                if dataclasses.is_dataclass(leaf) or leaf.__subclasses__()
            ]
            if len(path) == 1 or any(has_field(leaf, path[1:]) for leaf in inner):
                return True
    return False


def structure_classes(hint: object) -> Iterator[type]:
    """The classes that a type names, anywhere inside."""
    if isinstance(hint, type) and not typing.get_args(hint):
        yield hint
    for inner in typing.get_args(hint):
        yield from structure_classes(inner)


def test_settings_in_the_text_are_fields() -> None:
    """`optim.lr` and `--optim.lr`: fields of an Experiment; `x.y=value` as well."""
    number = 0
    for name, code in in_backticks():
        for path in re.findall(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z_][a-z_.]*[a-z_])(?![\w(/*])", code):
            if path.rpartition(".")[2] in ("json", "py", "md", "html", "sh", "jsonl", "gguf"):
                continue
            number += 1
            assert has_field(Experiment, path.split(".")), f"{name}: an experiment has no {path}"
        for option in re.findall(rf"--((?:{SECTIONS})\.[a-z][a-z0-9.-]*)", code):
            number += 1
            assert is_setting(option), f"{name}: an experiment has no {option}"
    assert number > 40


def test_files_in_the_text_exist() -> None:
    number = 0
    for name, code in in_backticks():
        for path in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*-]*)", code):
            if re.search(r"[A-Z]{3,}|\.\.\.", path.removesuffix("RESULTS.md").removesuffix("LOG.md")):
                continue  # a placeholder, such as slmjax/models/mixers/NAME.py
            number += 1
            assert list(ROOT.glob(path.rstrip("/"))), f"{name}: there is no {path}"
    assert number > 40


def test_names_in_the_text_exist() -> None:
    """Modules (`slmjax.models.zoo`) and classes (`QuantRule(...)`) are those of the package."""
    for path in sorted((ROOT / "slmjax").rglob("*.py")):
        if path.stem not in ("__main__", "lm_eval_adapter"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            importlib.import_module(".".join(part for part in parts if part != "__init__"))
    own = [module for name, module in sys.modules.items() if name.split(".")[0] == "slmjax"]
    classes = {key for module in own for key, value in vars(module).items() if isinstance(value, type)}
    others = {"MatMulNBits", "ValueError", "AutoTokenizer", "AutoModelForCausalLM"}
    others |= {family.architecture for family in HF_FAMILIES}
    for name, code in in_backticks():
        for dotted in re.findall(r"(?<![\w./-])(slmjax(?:\.[A-Za-z_]\w*)+)", code):
            if dotted.endswith((".py", ".md")):
                continue
            parts = dotted.split(".")
            resolved: Any = importlib.import_module("slmjax")
            for number, part in enumerate(parts[1:], start=2):
                if ".".join(parts[:number]) in sys.modules and not hasattr(resolved, part):
                    resolved = sys.modules[".".join(parts[:number])]
                    continue
                assert hasattr(resolved, part), f"{name}: there is no {dotted}"
                resolved = getattr(resolved, part)
        for word in re.findall(
            r"(?<![\w./-])([A-Z][a-z]+[A-Za-z]*[A-Z][a-z][A-Za-z]*)(?=$|\(|\.[A-Z])", code
        ):
            assert word in classes | others, f"{name}: there is no class {word}"


def test_formats_in_the_text_exist() -> None:
    page = (DOCS / "quantization.md").read_text()
    rows = re.findall(
        r"^\| (`.*?) \|", page.partition("## Formats")[2].partition("## Rules")[0], flags=re.MULTILINE
    )
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(PRESETS)


def test_the_fields_of_an_experiment_are_listed() -> None:
    page = (DOCS / "concepts.md").read_text()
    sentence = page.partition("tree of frozen dataclasses")[2].partition("\n\n")[0].partition(".")[0]
    assert re.findall(r"`(\w+)`", sentence) == [field.name for field in dataclasses.fields(Experiment)]


def test_code_on_the_pages_runs() -> None:
    """The blocks of a page follow each other; what would train, import or export is looked at only."""
    number = 0
    for page in PAGES:
        if code := "\n".join(examples.page_blocks(page)):
            number += 1
            problems = examples.check(examples.Example(where=page.name, code=code))
            assert not problems, "\n".join(problems)
    assert number >= 5


def test_examples_in_docstrings_fit_the_code() -> None:
    shown = examples.docstring_examples()
    assert len(shown) > 40
    problems = [problem for example in shown for problem in examples.check(example)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("config = QuantConfig(phases=(), phase=1)", "unexpected keyword argument 'phase'"),
        ("config = QuantConfigs(phases=())", "there is no QuantConfigs"),
        ("model = zoo.nanoo()", "zoo.nanoo does not exist"),
        ("from slmjax.training import Nothing", "slmjax.training has no Nothing"),
        ("optim = OptimConfig(lr=-1.0)", "ValueError"),
        ("loss = (", "was never closed"),
    ],
)
def test_a_wrong_example_is_noticed(code: str, problem: str) -> None:
    (message,) = examples.check(examples.Example(where="here", code=code + "\n"))
    assert problem in message


def test_folders_list_their_files() -> None:
    """The docstring of each folder names its files and folders; a list of them is in the order of imports."""
    for folder in sorted({path.parent for path in (ROOT / "slmjax").rglob("*.py")}):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        names = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
        names |= {path.parent.name for path in folder.glob("*/__init__.py")}
        if folder.name == "families":
            continue  # one file for each family, in the order of an export
        missing = {name for name in names if not re.search(rf"(?<![\w/]){re.escape(name)}(?!\w)", text)}
        assert not missing, f"{folder.name}/__init__.py does not list {sorted(missing)}"
        listed = [
            name for line in re.findall(r"^- ([\w., ]+):", text, re.MULTILINE) for name in line.split(", ")
        ]
        assert set(listed) <= names, f"{folder.name}/__init__.py lists {set(listed) - names}"
        for number, name in enumerate(listed):
            path = folder / name
            if path.suffix != ".py":
                continue
            prefix = ".".join(folder.relative_to(ROOT).parts)
            later = {f"{prefix}.{other.removesuffix('.py')}" for other in listed[number + 1 :]}
            imported = {
                module
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and node.module
                for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            }
            assert not later & imported, f"{folder.name}/__init__.py: {name} imports from {later & imported}"


# README -----------------------------------------------------------------------------------------------------
def test_the_readme_shows_what_was_recorded() -> None:
    """Verdicts are those of committed reports, metrics are in RESULTS.md."""
    text = (ROOT / "README.md").read_text()
    assert readme_verdicts.replaced(text) == text
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert composition.replaced(page) == page
    assert len(text.splitlines()) < 90 and text.index("docs/limits.md") < 500
    results = re.sub(r"\s+", " ", (ROOT / "benchmarks" / "RESULTS.md").read_text()).replace(" %", "%")
    measured = text.partition("## Measured")[2].partition("\n## ")[0]
    rows = [
        line.strip("|").split("|") for line in measured.splitlines() if re.search(r"\d{4}-\d\d-\d\d", line)
    ]
    assert len(rows) == 3
    for what, figure, _, date in rows:
        for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-\d+)?", figure):
            assert number in results, f"{what}: {number} is not in RESULTS.md"
        assert date.strip() in results


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    version = importlib.import_module("slmjax").__version__
    assert f"\nversion: {version}\n" in text and "\nlicense: Apache-2.0\n" in text


def test_the_front_page_is_the_readme(site: Path) -> None:
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "index.html").read_text()))
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("## "):
            assert line.removeprefix("## ") in page
    assert "study-verdicts.svg" in (site / "index.html").read_text()


def test_public_names_are_in_the_reference(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    for module in examples.PUBLIC_MODULES:
        for name in importlib.import_module(module).__all__:
            value = getattr(importlib.import_module(module), name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert f'id="{module}.{name}"'.lower().replace(".", "-") in page, f"{module}.{name}"


# The example ------------------------------------------------------------------------------------------------
def test_the_example_has_the_properties_of_a_mixer() -> None:
    check_mixer(run_file(EXAMPLE).GatedConvolutionConfig(width=3))


def test_the_example_trains(user_environment, workplace: Path) -> None:
    options = (
        "--data.path text.txt --data.split tail --data.sequence-length 32 --tokenizer.vocab-size 300 "
        "--run.steps 4 --optim.warmup-steps 1 "
        "--run.name gated --run.sample.max-tokens 4 --eval.max-documents 1 --json"
    )
    command = [sys.executable, "-m", "slmjax", "train", str(EXAMPLE), *options.split()]
    done = subprocess.run(
        command, cwd=workplace, env=user_environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert '"status": "finished"' in done.stdout
