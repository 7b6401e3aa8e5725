"""Words that the project has retired, in identifiers and in text, each with the term that replaced it."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Identifiers that must not come back: variables, functions, classes, attributes, arguments.
NAMES = {
    "spelled_out": "unroll",
    "said": "teacher_outputs, message",
    "amounts": "weights (DistillWeights)",
    "amounts_at": "distill_weights_at",
    "Amounts": "DistillWeights",
    "Easing": "QuantSchedule",
    "easing": "quant_schedule",
    "eased": "fake-quantized during warm-up",
    "held": "freeze_updates, masked updates",
    "pull": "vjp_fn",
    "Numbers": "TensorQuant",
    "Entry": "Assignment",
    "cover": "assign_formats",
    "RoundedInput": "ActivationQuantizer",
    "hidden_input": "hidden_quantizer",
    "head_input": "head_quantizer",
    "is_observed": "is_calibrating",
    "effective": "fake_quantized",
    "merge_effective": "merge",
    "effective_weight": "astype",
    "is_beside_a_weight": "is_weight_quantizer_param",
    "is_of_input": "is_activation_quantizer_param",
    "Shape": "ModelDims",
    "Pass": "LayerInputs, DivergenceContext",
    "passes": "num_loops",
    "Segment": "LayerGroup",
    "Recipe": "Derivation",
    "Own": "LocalModel",
    "Found": "ForeignModel",
    "Bound": "BoundRule",
    "Expressed": "FamilyExport",
    "Matching": "DistillLossConfig",
    "matching": "the name of what it is",
    "alike": "match_varying",
    "is_divided": "is_sharded",
    "reach": "clipping range",
    "room": "cache_length, max_length",
    "undone": "skipped",
    "evaluated": "eval_params",
    "figures": "metrics",
    "Figures": "Throughput, metrics",
    "form": "implementation",
    "anew": "again",
    "tell": "print, report, log",
    "_tell": "print, report, log",
    "told": "reported",
    "say": "report",
    "announce": "log_choice, print_banner",
    "words": "argv, tokenizer",
    "by_place": "positional",
    "found": "the name of what was found",
    "given": "the name of what was given",
    "wanted": "expected",
    "one": "the name of the thing",
    "wide": "x32, linear_kwargs",
}

# These are plain words elsewhere, but not for formats, weights and shardings.
NAMES_IN_MODELS = {
    "decoded": "dequantized, fake_quantized",
    "places": "shardings, positions",
    "Measured": "CalibratedScale",
}
FOLDERS_OF_MODELS = (
    "parallel",
    "formats",
    "models",
    "quantization",
    "training",
    "runner",
    "planning",
    "distill",
)

# Phrases that must not come back in documentation, messages and comments.
PHRASES = {
    r"\bbeside\b": "next to, with, in addition to",
    r"\bspel(led|t|ls) out\b": "unrolled, written out",
    r"\beases? into\b|\beased\b": "warm-up",
    r"\bwhat becomes of\b": "outcome, how it handles",
    r"\b(comes|came) to\b": "outcome, result, is",
    r"\bgo(es|ing)? on\b": "resumes, continues",
    r"\banew\b": "again, from scratch",
    r"\bmended\b": "repaired",
    r"\b(is|are|was|were|be|been) told\b|\btold (of|that|no)\b": "reported, logged",
    r"\bteachers? says?\b": "teacher outputs",
    r"\bdivided over\b": "sharded over",
    r"\b(held|kept) whole\b": "replicated, not quantized",
    r"\bfree head\b": "untied head",
    r"\bdecoded weights?\b": "dequantized, fake-quantized weights",
    r"\bround(ed|ing of) inputs?\b": "activation quantization",
    r"\bout of (the \w+'s )?reach\b": "outside the clipping range",
    r"\bundone\b": "skipped",
    r"\bplain form\b": "reference implementation",
    r"\bwhat (makes|is made) of\b": "say what it does",
}


def python_files() -> list[Path]:
    return sorted(
        path for folder in ("slmjax", "experiments", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    )


def pages() -> list[Path]:
    names = ("README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md", "experiments/LOG.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").rglob("*.md"))]


def retired_names(source: str, *, is_of_models: bool = False) -> Iterator[str]:
    """Retired identifiers of a program: names, attributes, arguments, functions and classes."""
    retired = {**NAMES, **NAMES_IN_MODELS} if is_of_models else NAMES
    for node in ast.walk(ast.parse(source)):
        for name in [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]:
            # The keyword of a record is a file format, which keeps its names.
            if isinstance(name, str) and name in retired and not isinstance(node, ast.keyword):
                yield f"line {getattr(node, 'lineno', 0)}: {name} ({retired[name]})"


def retired_phrases(text: str) -> Iterator[str]:
    for pattern in PHRASES:
        for match in re.finditer(pattern, text, flags=re.IGNORECASE):
            yield match.group(0)


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Comments and strings of a program, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield token.start[0], re.sub(r"\s+", " ", token.string)


def test_retired_names_do_not_return() -> None:
    retired = []
    for path in python_files():
        relative = path.relative_to(ROOT)
        is_of_models = relative.parts[1] in FOLDERS_OF_MODELS
        retired += [
            f"{relative}, {name}" for name in retired_names(path.read_text(), is_of_models=is_of_models)
        ]
    assert not retired, "\n".join(retired)


def test_retired_phrases_do_not_return() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{line}: {phrase}"
        for path in python_files()
        for line, text in prose(path.read_text())
        for phrase in retired_phrases(text)
    ]
    lines += [
        f"{path.relative_to(ROOT)}: {phrase}"
        for path in pages()
        for phrase in retired_phrases(path.read_text())
    ]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("source", ["said = 1", "def f(amounts): ...", "x.places", "from a import Segment"])
def test_retired_names_would_be_noticed(source: str) -> None:
    assert list(retired_names(source, is_of_models=True))


def test_retired_phrases_would_be_noticed() -> None:
    assert list(retired_phrases("the head beside it goes on anew")) == ["beside", "goes on", "anew"]
