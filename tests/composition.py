"""The table of features that are tested together, in docs/reliability.md, from `@pytest.mark.composes(...)`.

    python -m tests.composition     # rewrites the table

A pair is tested where one test uses both features.
"""

import ast
import itertools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN = "<!-- composition: python -m tests.composition -->\n"
END = "<!-- end of composition -->"

FEATURES = (
    "mesh",
    "experts",
    "accumulation",
    "distillation",
    "quantization",
    "resume",
    "import or export",
    "studies",
)
TESTED = "✓"
NIGHTLY = "nightly"
UNTESTED = "–"


def marked_tests() -> list[tuple[str, tuple[str, ...], bool]]:
    """Return test name, features and whether only `make test-all` runs it, for each marked test."""
    marked = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            is_nightly = "pytest.mark.nightly" in decorators
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.composes":
                    features = tuple(ast.literal_eval(argument) for argument in decorator.args)
                    unknown = set(features) - set(FEATURES)
                    assert not unknown, f"{path.name}, {node.name}: {unknown} are not in FEATURES"
                    marked.append((f"{path.name}::{node.name}", features, is_nightly))
    return marked


def tested_pairs() -> dict[frozenset[str], str]:
    """Return TESTED or NIGHTLY for each pair of features that some test uses together."""
    pairs: dict[frozenset[str], str] = {}
    for _, features, is_nightly in marked_tests():
        for pair in itertools.combinations(features, 2):
            if not is_nightly:
                pairs[frozenset(pair)] = TESTED
            else:
                pairs.setdefault(frozenset(pair), NIGHTLY)
    return pairs


def table() -> str:
    """Return the table in Markdown: the first features as columns, the later ones as rows."""
    pairs = tested_pairs()
    columns = FEATURES[:-1]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + ":-:|" * len(columns)]
    for number, row in enumerate(FEATURES[1:], start=1):
        cells = [pairs.get(frozenset((row, column)), UNTESTED) for column in FEATURES[:number]]
        padding = [""] * (len(columns) - number)
        lines.append(f"| {row} | " + " | ".join([*cells, *padding]) + " |")
    return "\n".join(lines) + "\n"


def replaced(text: str) -> str:
    """Return the text of the page with the table as the tests have it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
