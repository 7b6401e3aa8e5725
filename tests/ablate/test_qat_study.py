"""experiments/qat_study.py from its first member to its page, on a model of one narrow layer and a few steps."""

import json
from pathlib import Path

import pytest

from slmjax import recipes
from slmjax.ablate import read_members
from tests.one_layer import one_layer

FILE = Path(__file__).parents[2] / "experiments" / "qat_study.py"


def test_the_study_of_quantization(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = recipes.run_file(FILE)
    monkeypatch.setattr("slmjax.trainer._write_page", lambda run: None)
    tiny = one_layer(workplace, tmp_path, steps=4)
    monkeypatch.setattr(study, "experiment", lambda: tiny)
    for name, value in {
        "FURTHER_STEPS": 2,
        "SHARES": (0.0, 0.5),
        "FORMATS": {"q4_0": study.FORMATS["q4_0"], "1.58 bits": study.FORMATS["1.58 bits"]},
    }.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "FURTHER", (("QAD, q4_0", "QAT, q4_0"),))
    monkeypatch.setattr("sys.argv", ["qat_study.py", "--directory", str(tmp_path), "--seeds", "3"])
    study.main()
    first, second = study.when((3,)), study.what(study.bases(tmp_path / "when", (3,)), (3,))
    members = {one.arm: one for one in (*read_members(first, tmp_path / "when"), *read_members(second, tmp_path / "what"))}
    assert {one.status for one in members.values()} == {"finished"}, [one.error for one in members.values() if one.error]
    assert False, (
        json.dumps({n: (m.result["bits_per_byte"], m.result["run_dir"]) for n, m in members.items()}, indent=1)
        + (tmp_path / "recovery.md").read_text()
    )
