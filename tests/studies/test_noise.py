"""The ledger of noise: one line for each arm whatever is repeated, pooled by size."""

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from slmjax.stored_json import DamagedFile
from slmjax.studies import analyze, run_study
from slmjax.studies.noise import NoiseRecord, expected_deviation, ledger_of, read_ledger, record_noise
from slmjax.studies.study import Member, Study
from tests.studies.stub import StubTrainer, study

BITS = {(1e-3, 0): 1.50, (1e-3, 1): 1.52, (1e-3, 2): 1.49, (2e-3, 0): 1.40, (2e-3, 1): 1.43, (2e-3, 2): 1.395}


def trained(directory: Path, **changes) -> tuple[Study, tuple[Member, ...]]:
    asked = study(**changes)
    return asked, run_study(asked, directory, train=StubTrainer(bits=BITS))


def test_each_arm_has_one_line_whatever_is_repeated(tmp_path: Path) -> None:
    asked, members = trained(tmp_path / "width")
    ledger = ledger_of(tmp_path / "width")
    assert ledger == tmp_path / "noise.jsonl" and read_ledger(ledger) == []
    findings = analyze(asked, members)
    assert record_noise(ledger, findings, members) == 3
    assert record_noise(ledger, findings, members) == 0
    records = read_ledger(ledger)
    assert [record.arm for record in records] == ["slow", "fast & loose", "third"]
    assert [record.deviation for record in records] == [findings.noise.own[record.arm] for record in records]
    assert sum(record.degrees_of_freedom for record in records) == pytest.approx(4)
    assert {record.parameters for record in records} == {1} and {record.tokens for record in records} == {
        1064778
    }
    # With fewer seeds the lines are others, which take the place of the former.
    fewer, members = trained(tmp_path / "width", seeds=(0, 1))
    assert record_noise(ledger, analyze(fewer, members), members) == 3
    assert len(ledger.read_text().splitlines()) == 6 and len(read_ledger(ledger)) == 3
    # What the pool says of all arms is what the study said of them.
    assert record_noise(ledger, findings, members) == 3
    expected = expected_deviation(ledger, metric="bits_per_byte", parameters=1, tokens=1_000_000)
    assert expected is not None and findings.noise.deviation is not None
    usual = [record for record in read_ledger(ledger) if not record.noisy]
    degrees = [record.degrees_of_freedom for record in usual]
    variance = np.average([record.deviation**2 for record in usual], weights=degrees)
    assert expected.deviation == pytest.approx(math.sqrt(variance))
    assert expected.degrees_of_freedom == pytest.approx(sum(degrees))
    assert expected.is_near and expected.studies == ("pace",) and "from 1 study" in expected.text


def test_one_arm_alone_is_a_study_of_noise(tmp_path: Path) -> None:
    asked = study()
    asked = dataclasses.replace(asked, arms=asked.arms[:1])
    members = run_study(asked, tmp_path / "alone", train=StubTrainer(bits=BITS))
    record_noise(tmp_path / "noise.jsonl", analyze(asked, members), members)
    (record,) = read_ledger(tmp_path / "noise.jsonl")
    assert record.deviation == pytest.approx(np.std((1.50, 1.52, 1.49), ddof=1))
    assert record.degrees_of_freedom == 2


def write(path: Path, *records: NoiseRecord) -> None:
    lines = [json.dumps({"kind": "noise", **dataclasses.asdict(record)}) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))


def record(key: str, deviation: float, **changes) -> NoiseRecord:
    fields = {"study": key, "arm": "a", "metric": "loss", "degrees_of_freedom": 2.0, "noisy": False}
    return NoiseRecord(key=key, deviation=deviation, **fields | {"parameters": 1e6, "tokens": 1e7} | changes)


def test_only_runs_of_about_the_same_size_count(tmp_path: Path) -> None:
    path = tmp_path / "noise.jsonl"
    write(
        path,
        record("a", 0.3),
        record("b", 0.4, parameters=2e6, degrees_of_freedom=4.0),
        record("large", 0.01, parameters=1e8),
        record("wild", 9.0, noisy=True),
        record("other metric", 9.0, metric="accuracy"),
    )
    near = expected_deviation(path, metric="loss", parameters=1e6, tokens=2e7)
    assert near is not None and near.studies == ("a", "b") and near.degrees_of_freedom == 6
    assert near.deviation == pytest.approx(math.sqrt((2 * 0.09 + 4 * 0.16) / 6))
    far = expected_deviation(path, metric="loss", parameters=1e10, tokens=1e7)
    assert far is not None and far.studies == ("large",) and not far.is_near and "another size" in far.text
    assert expected_deviation(path, metric="loss") is not None
    assert expected_deviation(path, metric="bits_per_byte") is None
    assert expected_deviation(tmp_path / "none.jsonl", metric="loss") is None


def test_a_damaged_line_is_named_and_a_torn_one_is_left(tmp_path: Path) -> None:
    path = tmp_path / "noise.jsonl"
    write(path, record("a", 0.3))
    path.write_text(path.read_text() + '{"kind": "noise", "ke')
    assert [each.key for each in read_ledger(path)] == ["a"]
    asked, members = trained(tmp_path / "width")
    assert record_noise(path, analyze(asked, members), members) == 3 and len(read_ledger(path)) == 4
    path.write_text('{"kind": "noise", "key": "a"}\n')
    with pytest.raises(DamagedFile, match="has no field 'study': remove the line"):
        read_ledger(path)


def test_workers_that_end_together_write_each_line_once(tmp_path: Path) -> None:
    asked, members = trained(tmp_path / "width")
    findings = analyze(asked, members)
    path = tmp_path / "noise.jsonl"
    # A lock of one open file excludes others of the same process, too.
    with ThreadPoolExecutor(4) as workers:
        counts = workers.map(lambda _: record_noise(path, findings, members), range(12))
    assert sorted(counts) == [0] * 11 + [3]
    assert len(path.read_text().splitlines()) == 3 and not list(tmp_path.glob("*.lock"))
