"""`slmjax verdict` as a user runs it."""

import json
from pathlib import Path

import pytest

from slmjax import cli
from slmjax.studies import read_findings

RESULTS = """\
optimizer,seed,val_loss,acc
adam,0,1.50,0.30
adam,1,1.52,0.31
adam,2,1.49,0.29
muon,0,1.40,0.40
muon,1,1.43,0.41
muon,2,1.395,0.40
sgd,0,nan,0.1
sgd,1,1.54,0.2
sgd,2,1.50,0.2
"""


def verdict(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verdict", *arguments])
    out, err = capsys.readouterr()
    assert isinstance(stopped.value.code, int) and "Traceback" not in err
    return stopped.value.code, out + err


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "results.csv"
    path.write_text(RESULTS)
    return path


def test_a_verdict_on_a_csv(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--arm", "optimizer", "--metric", "val_loss", "--baseline", "adam")
    status, out = verdict(capsys, results.name, *options, "--further-metrics", "acc")
    assert status == 0 and "columns: seed = seed (guessed)" in out
    assert "better" in out and "sgd, seed 0: diverged" in out and "acc" in out
    assert [path.name for path in results.parent.iterdir()] == ["results.csv"], "nothing is written unasked"
    status, out = verdict(capsys, results.name, *options, "--json", "--out", "answer")
    printed = json.loads(out)
    assert status == 0 and printed["columns"]["guessed"] == ["seed"]
    assert printed["written"] == ["answer/findings.json", "answer/report.html"]
    assert "muon" in Path("answer/report.md").read_text() and "muon" in Path("answer/report.csv").read_text()
    assert json.loads(Path(printed["written"][0]).read_text()) == printed["findings"]
    assert read_findings("answer").comparisons[0].arm == "muon"
    # A higher value is the better one: the same numbers come to the other verdict.
    status, out = verdict(capsys, results.name, *options, "--higher-is-better")
    assert status == 0 and "worse" in out and "higher is better" in out


def test_bad_input_has_status_2(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = verdict(capsys, results.name, "--arm", "optimiser", "--metric", "val_loss")
    assert status == 2 and "Did you mean 'optimizer'" in out
    status, out = verdict(capsys, results.name, "--arm", "optimizer", "--metric", "val_loss")
    assert status == 2 and "--baseline: one of adam, muon, sgd" in out
    status, out = verdict(capsys, results.name, "--confidence", "95")
    assert status == 2 and "confidence is 95" in out
    status, out = verdict(capsys, results.name, "--smallest-effect", "inf")
    assert status == 2 and "smallest_effect is inf" in out
    status, out = verdict(capsys, results.name, "--tolerance", "-1")
    assert status == 2 and "tolerance is -1" in out
    status, out = verdict(capsys, results.name, "--looks", "3", "five")
    assert status == 2 and "--looks is 'five', not an integer" in out
    status, out = verdict(capsys)
    assert status == 2 and "no results to read" in out


def test_a_campaign(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--arm", "optimizer", "--metric", "val_loss", "--baseline", "adam")
    for name in ("first", "second"):
        verdict(capsys, results.name, *options, "--out", f"studies/{name}")
    status, out = verdict(capsys, "--campaign", "studies")
    assert status == 0 and "4 tests" in out and "muon (first) is no new baseline yet" in out
    status, out = verdict(capsys, "--campaign", "studies", "--json", "--out", "answer", "--control", "e-bh")
    printed = json.loads(out)
    assert status == 0 and printed["campaign"]["control"] == "e-bh"
    assert json.loads(Path("answer/campaign.json").read_text()) == printed["campaign"]
    status, out = verdict(capsys, "--campaign", "studies", results.name)
    assert status == 2 and "not both" in out
    status, out = verdict(capsys, "--campaign", "studies", "--control", "ebh")
    assert status == 2 and "Did you mean 'e-bh'" in out
