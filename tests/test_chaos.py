"""A small campaign of injected faults, and the parts of `benchmarks/chaos.py` that no campaign shows."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.injections import damage, verdicts
from benchmarks.injections.sessions import End

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.nightly
def test_a_small_campaign_has_no_defects(tmp_path: Path) -> None:
    out = tmp_path / "chaos.jsonl"
    # Not this process: its jax has a backend and threads, which a fork would lose.
    argv = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--injections", "20", "--out", str(out)]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "SLMJAX_"))
    }
    ended = subprocess.run(
        argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, f"{ended.stdout[-4000:]}\n{ended.stderr[-2000:]}"
    records = chaos.read(out)
    assert len(records) == 20
    assert {record["kind"] for record in records} == set(chaos.SHARES)


def test_plan_has_every_kind_and_the_number_of_injections() -> None:
    assert set(chaos.SHARES) == set(chaos.KINDS)
    for injections in (9, 20, 100, 2000):
        cases = chaos.plan(chaos.SHARES, injections)
        assert len(cases) == len(set(cases)) == injections
        assert {kind for kind, _ in cases} == set(chaos.SHARES)
    assert chaos.plan(["kill"], 3) == [("kill", 0), ("kill", 1), ("kill", 2)]


def test_table(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    verdict = {"seed": 0, "number": 0}
    lines = [
        {"kind": "kill", "verdict": "survived", **verdict},
        {"kind": "disk", "verdict": "refused", **verdict},
    ]
    lines.append({"kind": "disk", "verdict": "defect", **verdict})
    # The last line is of a campaign that was killed while it wrote.
    out.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "ki')
    assert chaos.table(chaos.read(out)).splitlines()[2:] == [
        "| kill | 1 | 1 | 0 | 0 |",
        "| disk | 2 | 0 | 1 | 1 |",
        "| all | 3 | 1 | 1 | 1 |",
    ]


def end(status: int | None, output: str) -> End:
    return End(status=status, output=output, seconds=1.0)


def test_what_a_clean_refusal_is() -> None:
    message = "error: run/best.json is damaged: delete it, and it is written again\n(set SLMJAX_TRACEBACK=1)"
    verdicts.require_refusal(end(2, message), activity="x", names=["best.json"])
    wrong = {
        "hangs": end(None, message),
        "Traceback": end(2, "Traceback (most recent call last)\n" + message),
        "instead of an error": end(0, message),
        "without an error message": end(2, "no"),
        "does not name": end(2, "error: it is damaged: delete it"),
        # `run` is a verb, but not in a path.
        "no way out": end(2, "error: run/best.json is damaged"),
    }
    for reason, ended in wrong.items():
        with pytest.raises(verdicts.Defect, match=reason):
            verdicts.require_refusal(ended, activity="x", names=["best.json"])


def test_damage_follows_from_the_seed(tmp_path: Path) -> None:
    value = {"step": 3, "losses": [1.0, 2.0], "best": {"step": 1}}
    path = tmp_path / "file.json"
    results = []
    for seed in (*range(40), *range(40)):
        path.write_text(json.dumps(value))
        way = damage.mutate_json(path, random.Random(seed))
        results.append((way, path.read_bytes() if path.is_file() else None))
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert results[:40] == results[40:]
    changed = [content for _, content in results if content != json.dumps(value).encode()]
    assert len(changed) > 76, "damage changes the file, but for a flip that meets its own value"


def test_tests_that_the_page_names_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 10
    for path, function in named:
        assert f"def {function}" in (ROOT / path).read_text(), f"{path} has no {function}"
