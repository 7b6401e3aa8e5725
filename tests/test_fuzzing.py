"""Damaged files of every kind: each reading function returns, or says which file it is and what is wrong."""

import collections
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import fuzzing
from tests.fuzzing import KINDS, Outcome
from tests.mutations import json_mutation

Result = dict[str, Any]  # "outcomes": their counts; "defects": texts; "ends": outcome and detail by name


def _in_process(parent: Path, seeds: range, *, families: int | None) -> Result:
    """Damage each kind of file by each of the seeds, and return how the attempts ended.

    A process of its own reads them: limits of CPU time and memory apply to whole processes, and the one that
    runs the tests has many threads and what earlier tests left.

    Args:
      families: how many of those whose config.json is read; None for all.
    """
    finished = subprocess.run(
        [sys.executable, "-m", "tests.test_fuzzing", parent, *map(str, (seeds.start, seeds.stop, families))],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    # A family's sample takes longer to write than damage to it to read.
    return _in_process(tmp_path_factory.mktemp("fuzzing"), range(6), families=2)


def test_damage_is_refused_by_name(result: Result) -> None:
    assert not result["defects"], "\n".join(result["defects"])
    outcomes = collections.Counter(result["outcomes"])
    assert outcomes.total() >= 300
    # Neither is all damage refused, nor none: the samples are read, and the damage reaches what is read.
    assert min(outcomes[Outcome.READ.value], outcomes[Outcome.REFUSED.value]) > outcomes.total() / 5


@pytest.mark.nightly
def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    result = _in_process(tmp_path, range(100, 150), families=None)
    assert not result["defects"], "\n".join(result["defects"])
    assert sum(result["outcomes"].values()) >= 3_000


def _raises(error: BaseException) -> None:
    raise error


def _loops() -> None:
    while True:
        pass


ENDS = {
    "another type": (lambda: _raises(KeyError("a")), Outcome.DEFECT, "KeyError"),
    "a panic": (lambda: _raises(BaseException("a panic")), Outcome.DEFECT, "a panic"),
    "without a name": (lambda: _raises(ValueError("no")), Outcome.DEFECT, "does not name a.json"),
    "time": (_loops, Outcome.DEFECT, "of CPU time"),
    "memory": (lambda: b"x" * (fuzzing.MEMORY + 2**26), Outcome.DEFECT, "MiB"),
    "refused": (lambda: _raises(ValueError("a.json is damaged")), Outcome.REFUSED, "a.json is damaged"),
    "read": (lambda: None, Outcome.READ, ""),
}


@pytest.mark.parametrize("name", ENDS)
def test_each_end_is_recognised(name: str, result: Result) -> None:
    _, outcome, detail = ENDS[name]
    actual, text = result["ends"][name]
    assert actual == outcome.value and detail in text


def test_damage_is_the_same_by_seed() -> None:
    content = b'{"a": [1, {"b": "text"}], "c": 2.5}'
    damaged = [json_mutation(content, random.Random(seed)) for seed in range(200)]
    assert damaged == [json_mutation(content, random.Random(seed)) for seed in range(200)]
    assert len(set(damaged)) > 150 and content not in damaged[:3]


# The process ------------------------------------------------------------------------------------------------
def _try_all(parent: str, start: str, stop: str, families: str) -> None:
    """Print the outcomes, the defects and the ends as JSON."""
    outcomes: collections.Counter[str] = collections.Counter()
    defects = []
    foreign = [kind for kind in KINDS if kind.name.startswith("config.json of Hugging Face")]
    tried = foreign if families == "None" else foreign[: int(families)]
    for kind in [*(kind for kind in KINDS if kind not in foreign), *tried]:
        directory = fuzzing.write_sample(kind, Path(parent))
        for seed in range(int(start), int(stop)):
            attempt = fuzzing.try_once(kind, directory, seed=seed)
            outcomes[attempt.outcome.value] += 1
            if attempt.outcome is Outcome.DEFECT:
                defects.append(f"{kind.name}, seed {seed}: {attempt.detail}")
    ends = {name: _end(name, Path(parent)) for name in ENDS}
    print(json.dumps({"outcomes": outcomes, "defects": defects, "ends": ends}))


def _end(name: str, parent: Path) -> tuple[str, str]:
    """Return the outcome and the detail of an attempt that ends in a certain way."""
    action = ENDS[name][0]
    kind = fuzzing.Kind(
        name=f"a kind: {name}",
        file="a.json",
        sample=lambda path: None if (path / "a.json").write_text("[1, 2, 3]") else None,
        # The sample itself must be read.
        read=lambda path: None if (path / "a.json").read_bytes() == b"[1, 2, 3]" else action(),
    )
    directory = fuzzing.write_sample(kind, parent)
    fuzzing.CPU_SECONDS = 0.2 if name == "time" else 10.0
    attempt = fuzzing.try_once(kind, directory, seed=3)
    assert (directory / "a.json").read_text() == "[1, 2, 3]"
    return attempt.outcome.value, attempt.detail


if __name__ == "__main__":
    _try_all(*sys.argv[1:])
