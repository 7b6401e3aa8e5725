"""experiments/qat_study.py: what its members are, and, on a model of one narrow layer and a few steps, the
study from end to end.
"""

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from slmjax import config
from slmjax.checkpoints.loading import load_model
from slmjax.studies import LearningRates, member_experiment, recovered_fraction
from slmjax.studies.ablation import Ablation, run_ablation
from slmjax.studies.recovery import stored_size
from slmjax.training import recipes
from slmjax.training.experiment import Experiment, FromModel, read_experiment
from slmjax.training.programs import resolved_model, resolved_phases
from tests.one_layer import one_layer

FILE = Path(__file__).parents[2] / "experiments" / "qat_study.py"


@pytest.fixture
def study() -> ModuleType:
    return recipes.run_file(FILE)


def test_members_differ_in_what_is_asked_alone(study: ModuleType) -> None:
    first = study.when()
    starts = {arm.name: arm.experiment.quant.start_step for arm in first.arms if arm.name.startswith("QAT")}
    assert starts == {"QAT after 0%": 0, "QAT after 50%": 150, "QAT after 90%": 270}
    second = study.what((0, 1))
    plain = member_experiment(second, "full precision", 1, run=Path("/one"))
    assert isinstance(plain.init, FromModel) and plain.init.path == "/one" and plain.quant is None
    assert (plain.run.seed, plain.data.seed, plain.run.steps) == (1, 1, study.FURTHER_STEPS)
    for arm in second.arms:
        one = member_experiment(second, arm.name, 1, run=Path("/one"))
        assert config.loads(Experiment, config.dumps(one)) == one
        for name in ("model", "init", "data", "tokenizer", "optim", "eval", "run"):
            assert getattr(one, name) == getattr(plain, name), (arm.name, name)
    assert second.source("rounded, q4_0", 1) == (second.earlier[0], "full precision", 1)
    taught = member_experiment(second, "QAD, q4_0", 1, run=Path("/one"))
    assert taught.objective.distill is not None and taught.objective.distill.teachers[0].path == "/one"
    assert taught.quant == member_experiment(second, "QAT, q4_0", 1).quant


def test_fewer_bits_are_fewer_bytes(study: ModuleType) -> None:
    def size_of(experiment: Experiment) -> tuple[int, int]:
        return stored_size(resolved_model(experiment, vocab_size=2048), resolved_phases(experiment))

    sizes = [size_of(study.trained_for(study.experiment(), spec)) for spec in study.FORMATS.values()]
    total, numbers = size_of(study.experiment())
    assert total == 4 * numbers
    assert [total for total, _ in sizes] == sorted((total for total, _ in sizes), reverse=True) and {
        each for _, each in sizes
    } == {numbers}
    # By hand: 2,048 x 128 and, in each of 2 layers, 3 x 128 x 320, 128 x (128 + 64 + 64) and 128 x 128 in 18
    # bytes a block of 32.
    rounded = 2048 * 128 + 2 * (3 * 128 * 320 + 2 * 128 * 128 + 2 * 128 * 64)
    assert sizes[1][0] == rounded * 18 // 32 + 4 * (numbers - rounded)


@pytest.mark.nightly
@pytest.mark.composes("distillation", "quantization", "studies")
def test_the_study_from_end_to_end(
    study: ModuleType, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two formats, two seeds, every kind of arm, each at its own best rate."""
    monkeypatch.setattr("slmjax.runner.trainer.write_page", lambda run: None)
    tiny = one_layer(workplace, tmp_path, steps=4, ema_decay=None)
    tiny = dataclasses.replace(tiny, eval=dataclasses.replace(tiny.eval, unrounded=True))
    formats = {name: study.FORMATS[name] for name in ("q4_0", "1.58 bits")}
    further = (("QAD, q4_0", "QAT, q4_0"),)
    changes = {
        "experiment": lambda: tiny,
        "FURTHER_STEPS": 2,
        "FRACTIONS": (0.0, 0.5),
        "FORMATS": formats,
        "FURTHER": further,
    }
    for name, value in changes.items():
        monkeypatch.setattr(study, name, value)
    rates = LearningRates(factors=(0.5, 1.0, 2.0))
    studies = (study.when((3, 4)), study.what((3, 4), tune=rates))
    ablation = Ablation(file=FILE, size="small", studies=studies, directory=tmp_path)
    when, what = run_ablation(ablation)
    assert not [one.error for one in (*when.members, *what.members) if one.status != "finished"]
    # Each member continues the run in full precision of its seed.
    for member in what.members:
        if member.arm.startswith("QAT") and "then" not in member.arm:
            init = read_experiment(Path(member.result["run_dir"])).init
            assert isinstance(init, FromModel)
            assert Path(init.path).parent == when.directory / "full-precision" / f"seed-{member.seed}"
    bits = {(one.arm, one.seed): one.result["bits_per_byte"] for one in what.members}
    report = json.loads((what.directory / "recovery.json").read_text())["reports"][0]
    arms = {one["arm"]: one for one in report["arms"]}
    own, full, rounded = (
        [bits[name, seed] for seed in (3, 4)]
        for name in ("QAT, 1.58 bits", "full precision", "rounded, 1.58 bits")
    )
    assert (
        arms["QAT, 1.58 bits"]["recoveries"][0]["recovered"]["share"]
        == recovered_fraction(own, full=full, rounded=rounded).fraction
    )
    assert (
        arms["rounded, 1.58 bits"]["kl"]["mean"]
        > arms["rounded, q4_0"]["kl"]["mean"]
        > 0
        == arms["full precision"]["kl"]["mean"]
    )
    assert [one["rounded"] for one in arms["QAT, 1.58 bits"]["recoveries"]] == [
        "rounded, 1.58 bits",
        "rounded with clip search, 1.58 bits",
    ]
    assert arms["QAT, 1.58 bits"]["unrounded"] is not None and arms["rounded, 1.58 bits"]["unrounded"] is None
    chosen = {name: one["tuned"]["rate"] for name, one in arms.items() if one["tuned"] is not None}
    assert len(chosen) == 6 and all(tiny.optim.lr / 4 <= rate <= tiny.optim.lr for rate in chosen.values())
    assert member_experiment(what.study, "QAD, q4_0", 3).optim.lr == chosen["QAD, q4_0"]
    assert arms["QAT, q4_0"]["stored_bytes"] == arms["rounded, q4_0"]["stored_bytes"]
    # Another grid's numbers do not survive q4_0, though both have 4 bits, groups of 32 and float16 scales;
    # q4_0's own do.
    models = {
        one.arm: load_model(one.result["run_dir"])
        for one in what.members
        if one.seed == 3 and "other grid" in one.arm
    }
    before, after = (
        models[name].params["embed/table"] for name in ("QAT, other grid", "QAT, other grid, then q4_0")
    )
    rows = min(len(before), len(after))  # what is written of a table has no padding
    assert np.mean(np.asarray(before)[:rows] != np.asarray(after)[:rows]) > 0.5
    assert bits["QAT, other grid", 3] != bits["QAT, other grid, then q4_0", 3]
