"""The site builds without a warning, needs no network, tells of every command and setting, and its example
works.
"""

import ast
import functools
import html
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import losses
from slmjax.cli import COMMANDS
from slmjax.formats.presets import PRESETS
from slmjax.models import architecture, zoo
from slmjax.models.decoder import logits
from slmjax.models.definition import Definition, define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings
from slmjax.training import recipes

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
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag == "a":
            self.links.append(given.get("href", ""))
        elif "src" in given or (tag == "link" and given.get("rel") != "canonical"):
            self.loaded.append(given.get("src", given.get("href", "")))


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


def test_the_reference_tells_of_everything(site: Path) -> None:
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


def test_the_page_on_quantization_names_every_format() -> None:
    page = (DOCS / "quantization.md").read_text()
    assert not [name for name in PRESETS if f"`{name}`" not in page]


def test_every_field_that_is_met_has_a_comment() -> None:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    rows = [line for line in hooks.configuration().splitlines() if line.startswith("| `")]
    assert len(rows) > 100 and not [row for row in rows if re.search(r"\|\s*\|$", row)]


PUBLIC_MODULES = ("slmjax", "slmjax.models", "slmjax.studies", "slmjax.training")


def python_blocks(page: Path) -> list[str]:
    """The Python code of a page: fenced blocks, without those that a snippet fills."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [textwrap.dedent(block) for block in blocks if "--8<--" not in block]


def test_users_import_from_four_modules() -> None:
    """Experiments, notebooks and pages show the public surface only."""
    files = [*ROOT.glob("experiments/*.py"), *ROOT.glob("notebooks/*.py"), *DOCS.glob("examples/*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        texts |= {f"{page.name}, block {i}": block for i, block in enumerate(python_blocks(page))}
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
            assert set(own) <= set(PUBLIC_MODULES), f"{name} imports {own}"
        elif node.module is not None and node.module.split(".")[0] == "slmjax":
            assert node.module in PUBLIC_MODULES, f"{name} imports from {node.module}"
            missing = {alias.name for alias in node.names} - set(importlib.import_module(node.module).__all__)
            assert not missing, f"{name} imports {missing} from {node.module}"


def shell_lines() -> list[list[str]]:
    found = []
    for page in sorted(DOCS.glob("*.md")):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = (line.split("| ")[-1] for line in block.splitlines())
            words = [
                [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)] for line in lines
            ]
            found += [line for line in words if line and line[0] == "slmjax"]
    return found


@functools.cache
def help_of(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "slmjax", *command.split(), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    return done.stdout


def test_commands_on_the_pages_are_commands() -> None:
    """Each word after slmjax is a command, each option one of its own."""
    lines = shell_lines()
    assert len(lines) > 20 and {line[1] for line in lines} >= {
        "train",
        "eval",
        "generate",
        "report",
        "runs",
        "compare",
        "data",
    }
    for line in lines:
        assert line[1] in COMMANDS, line
        command = " ".join(line[1:3]) if line[1] in ("data", "quant") else line[1]
        for option in (word.partition("=")[0] for word in line if word.startswith("--")):
            assert option in help_of(command), line


# The example ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def gated() -> Definition:
    example = run_file(EXAMPLE)
    convolution = architecture.BlockConfig(
        mixer=example.GatedConvolutionConfig(width=3), ffn=MlpConfig(hidden_dim=24)
    )
    attention = zoo.nano().stack[0].pattern[0]
    stack = (architecture.LayerGroup(pattern=(convolution, attention), repeats=2),)
    return define(architecture.ModelConfig(embed_dim=16, stack=stack, context_length=16, vocab_size=29))


@pytest.fixture(scope="module")
def weights(gated: Definition) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Large, so that what a token sees changes its logits."""
    params, buffers = gated.init(jax.random.key(0))
    return {path: value if path.endswith("scale") else 10 * value for path, value in params.items()}, buffers


def logits_of(
    gated: Definition, weights: tuple, tokens: jax.Array, segments: jax.Array, positions: jax.Array
) -> np.ndarray:
    output = gated.merge(*weights)(tokens, segment_ids=segments, positions=positions)
    return np.asarray(losses.logits(output.hidden, output.head))


TOKENS = jax.random.randint(jax.random.key(1), (4, 12), 0, 29)
POSITIONS = jnp.broadcast_to(jnp.arange(12), (4, 12))


def test_the_example_is_causal_and_keeps_documents_apart(gated, weights) -> None:
    whole = logits_of(gated, weights, TOKENS, jnp.ones_like(TOKENS), POSITIONS)
    changed = logits_of(gated, weights, TOKENS.at[:, 7].set(3), jnp.ones_like(TOKENS), POSITIONS)
    np.testing.assert_array_equal(whole[:, :7], changed[:, :7])
    assert np.abs(whole[:, 7:9] - changed[:, 7:9]).max() > 0.1
    segments = jnp.where(POSITIONS < 5, 1, 2)
    packed = logits_of(gated, weights, TOKENS, segments, jnp.where(POSITIONS < 5, POSITIONS, POSITIONS - 5))
    np.testing.assert_allclose(packed[:, :5], whole[:, :5], atol=1e-4)
    alone = logits_of(gated, weights, TOKENS[:, 5:], jnp.ones_like(TOKENS[:, 5:]), POSITIONS[:, :7])
    np.testing.assert_allclose(packed[:, 5:], alone, atol=1e-4)


def test_the_example_decodes_as_it_was_trained(gated, weights) -> None:
    whole = logits_of(gated, weights, TOKENS, jnp.ones_like(TOKENS), POSITIONS)
    lengths = jnp.asarray([1, 7, 2, 5])
    decoder = gated.merge(*weights)
    state = decoder.init_state(4, max_length=12)
    output = decoder(
        TOKENS[:, :8],
        segment_ids=(POSITIONS < lengths[:, None])[:, :8].astype(int),
        positions=POSITIONS[:, :8],
        state=state,
    )
    step = jax.jit(
        lambda newest, at, state: decoder(
            newest, segment_ids=(at < 12).astype(int), positions=at, state=state
        )
    )
    state = output.state
    for _ in range(5):
        at = jnp.minimum(lengths, 12)[:, None]
        output = step(jnp.take_along_axis(TOKENS, jnp.minimum(at, 11), axis=1), at, state)
        state = output.state
        found = np.asarray(losses.logits(output.hidden, output.head))[:, 0]
        for row in range(4):
            np.testing.assert_allclose(found[row], whole[row, int(lengths[row])], atol=1e-3)
        lengths += 1


def test_the_example_on_a_mesh(gated, weights) -> None:
    expected = logits_of(gated, weights, TOKENS, jnp.ones_like(TOKENS), POSITIONS)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(weights[0], parameter_shardings(weights[0], mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda params, tokens: logits_on(gated, params, weights[1], tokens))(placed, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def logits_on(gated, params, buffers, tokens):
    return logits(gated.merge(params, buffers), tokens)[..., :29]


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
