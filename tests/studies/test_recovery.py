"""Members that are made of others, and the report on what training for a format recovers of what rounding to
it costs.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from slmjax import cli, config
from slmjax.checkpoints.loading import load_model
from slmjax.evaluation import EvalResult
from slmjax.studies import (
    Arm,
    Derivation,
    Derived,
    LearningRates,
    Member,
    OnChange,
    Recovered,
    Recovery,
    Study,
    analyze,
    at_rates,
    choose_rates,
    derived,
    member_experiment,
    read_members,
    recovered_fraction,
    recovery_markdown,
    recovery_table,
    report_recovery,
    run_study,
    tuning_study,
    write_recovery,
)
from slmjax.studies.findings import with_flops
from slmjax.studies.recovery import Measurement
from slmjax.studies.recovery_layout import quality_chart
from slmjax.training.experiment import Experiment
from tests.one_layer import one_layer
from tests.studies.stub import StubTrainer, experiment

FULL = (1.400, 1.431, 1.392)
QAT = (1.411, 1.440, 1.405)
COST = (0.031, 0.029, 0.034)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounded(Derivation):
    bits: int = 4

    def make(self, model: Path, out: Path) -> None:
        out.mkdir()
        (out / "made.json").write_text(json.dumps({"of": str(model), "bits": self.bits}))


def continued(seed: int) -> Experiment:
    """Another experiment for each seed, as runs that go on with the seed's own base are."""
    base = experiment(1e-3)
    return dataclasses.replace(base, optim=dataclasses.replace(base.optim, weight_decay=0.01 * (seed + 1)))


def asked(seeds: tuple[int, ...] = (0, 1, 2), *, bits: int = 4) -> Study:
    arms = (
        Arm(name="full", experiment=continued),
        Derived(name="rounded", source="full", derivation=Rounded(bits=bits)),
        Arm(name="QAT", experiment=experiment(2e-3)),
    )
    roles = Recovery(reference="full", rounded={"QAT": "rounded"})
    return Study(name="quantization", arms=arms, seeds=seeds, baseline="full", recovery=roles)


def trainer(**outcomes: Any) -> StubTrainer:
    bits = {(1e-3, seed): value for seed, value in enumerate(FULL)} | {
        (2e-3, seed): value for seed, value in enumerate(QAT)
    }
    return StubTrainer(bits=bits, **outcomes)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path]]:
    """Of what, and where members were made; models are not evaluated, their figures follow from their
    source's.
    """
    calls: list[tuple[Path, Path]] = []

    def evaluated(model: tuple[Path, Path], experiment: Experiment) -> EvalResult:
        calls.append(model)
        bits = FULL[experiment.run.seed] + COST[experiment.run.seed]
        return EvalResult(
            loss=bits,
            perplexity=1.0,
            bits_per_byte=bits,
            calibration_error=0.5,
            tokens=1,
            total_tokens=1,
            bytes=1,
            documents=3,
            sequence_length=8,
            overlap=0,
            seconds=0.0,
        )

    monkeypatch.setattr(
        derived, "load_model", lambda out: (Path(json.loads((out / "made.json").read_text())["of"]), out)
    )
    monkeypatch.setattr(derived, "evaluate_member", evaluated)
    return calls


# Members that are made --------------------------------------------------------------------------------------
def test_members_are_made_of_finished_ones_of_their_seed(tmp_path: Path, made: list) -> None:
    members = run_study(asked(), tmp_path, train=trainer())
    assert [(one.arm, one.seed) for one in members] == [
        (arm, seed) for seed in range(3) for arm in ("full", "rounded", "QAT")
    ]
    assert [(source.parent.name, out) for source, out in made] == [
        (f"seed-{seed}", tmp_path / "rounded" / f"seed-{seed}" / "model") for seed in range(3)
    ]
    for seed in range(3):
        full, rounded, _ = members[3 * seed : 3 * seed + 3]
        assert rounded.metric_value("bits_per_byte") == pytest.approx(FULL[seed] + COST[seed])
        assert (
            json.loads((Path(rounded.result["run_dir"]) / "made.json").read_text())["of"]
            == full.result["run_dir"]
        )
        assert member_experiment(asked(), "full", seed).optim.weight_decay == pytest.approx(0.01 * (seed + 1))
    train = trainer()
    assert run_study(asked(), tmp_path, train=train) == members and not train.asked and len(made) == 3
    findings = analyze(asked(), members)
    # A derived arm has the FLOPs of the training that it comes from.
    counted = with_flops(findings, asked(), {"full": 2e12, "QAT": 3e12})
    assert [arm.flops for arm in counted.arms] == [2e12, 2e12, 3e12]
    assert findings.is_matched and [one.arm for one in findings.comparisons] == ["rounded", "QAT"]


def test_a_changed_recipe_is_a_changed_member(tmp_path: Path, made: list) -> None:
    run_study(asked(), tmp_path, train=trainer())
    with pytest.raises(ValueError, match="members of rounded were trained with another experiment"):
        read_members(asked(bits=3), tmp_path)
    train = trainer()
    run_study(asked(bits=3), tmp_path, on_change=OnChange.REDO, train=train)
    assert not train.asked and len(made) == 6


def test_of_what_did_not_finish_nothing_is_made(tmp_path: Path, made: list) -> None:
    members = run_study(asked(), tmp_path, train=trainer(statuses={(1e-3, 1): "diverged"}))
    full, rounded = [one for one in members if one.status == "diverged"]
    assert (full.arm, rounded.arm, rounded.seed, len(made)) == ("full", "rounded", 1, 2)
    assert rounded.error == "full diverged with seed 1, so that there is nothing to build on"
    # An outcome: it is not tried again, and the seed is not left out of the comparison.
    assert run_study(asked(), tmp_path, train=trainer()) == members
    findings = analyze(asked(), members)
    assert findings.arm("rounded").diverged == (1,)
    text = "rounded, seed 1: diverged (full diverged with seed 1, so that there is nothing to build on), and"
    assert any(note.startswith(text) for note in findings.notes)
    report = report_recovery(asked(), members)
    assert report.arms[2].recoveries[0].pairs == (0, 2)
    assert "QAT: only 2 seeds have finished in all three arms: train 3 or more." in report.notes
    assert "full, seed 1: diverged, and left out." in report.notes


def test_a_failure_in_the_making_is_recorded(
    tmp_path: Path, made: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Rounded, model: Path, out: Path) -> None:
        raise ValueError("groups of 32 do not fit")

    monkeypatch.setattr(Rounded, "make", fail)
    members = run_study(asked((0, 1)), tmp_path, train=trainer())
    assert [one.error for one in members if one.arm == "rounded"] == [
        "ValueError: groups of 32 do not fit"
    ] * 2


def test_what_is_made_of_nothing_is_refused() -> None:
    arm = Arm(name="full", experiment=experiment())
    late = Derived(name="rounded", source="full", derivation=Rounded())
    with pytest.raises(ValueError, match="'rounded' is derived from 'full', which is not an arm before it"):
        Study(name="s", arms=(late, arm), seeds=(0,), baseline="full")
    with pytest.raises(ValueError, match="give it a name that can be seen"):
        Derived(name=" ", source="full", derivation=Rounded())


# The report -------------------------------------------------------------------------------------------------
def members() -> list[Member]:
    found = []
    for seed in range(3):
        for arm, bits in (("full", FULL[seed]), ("rounded", FULL[seed] + COST[seed]), ("QAT", QAT[seed])):
            result = {
                "bits_per_byte": bits,
                "run_dir": "",
                **({"session_tokens_per_second": 1000.0} if arm != "rounded" else {}),
            }
            found.append(
                Member(arm=arm, seed=seed, fingerprint="", status="finished", result=result, evaluation={})
            )
    return found


def measurements() -> list[Measurement]:
    sizes = {"full": 4_000_000.0, "rounded": 600_000.0, "QAT": 600_000.0}
    return [
        Measurement(
            arm=one.arm,
            seed=one.seed,
            fingerprint="",
            metrics={
                "kl": 0.0 if one.arm == "full" else 0.01,
                "agreement": 0.9,
                "bytes": sizes[one.arm],
                "bits_per_number": 4.5,
            },
        )
        for one in members()
    ]


def test_recovery_is_that_of_the_arms_of_each_seed() -> None:
    report = report_recovery(asked(), members(), measurements())
    full, rounded, qat = report.arms
    expected = recovered_fraction(QAT, full=FULL, rounded=list(np.add(FULL, COST)))
    (over,) = qat.recoveries
    assert (
        over.rounded == "rounded"
        and over.recovered == expected
        and expected.fraction == pytest.approx(1 - (0.011 + 0.009 + 0.013) / sum(COST))
    )
    assert (
        over.verdict is Recovered.ABOVE_ZERO
        and over.adjusted_p == expected.gain.p_value
        and over.pairs == (0, 1, 2)
    )
    assert full.recoveries == rounded.recoveries == () and not report.notes and qat.unrounded is None
    assert (
        rounded.tokens_per_second is None
        and qat.tokens_per_second is not None
        and qat.tokens_per_second.mean == 1000
    )
    assert qat.stored_bytes is not None and qat.stored_bytes.mean == 600_000 and qat.kl is not None


def test_the_report_for_people_and_programs(tmp_path: Path) -> None:
    report = report_recovery(asked(), members(), measurements())
    text = recovery_markdown(report)
    found = report.arms[2].recoveries[0].recovered
    assert (
        found is not None
        and found.fraction is not None
        and found.standard_error is not None
        and found.fieller_interval is not None
    )
    assert "| full | 3 | 1.408 ± 0.021 |  | 0.000000 ± 0.000000 | 90.0% | 4,000,000 | 4.50 | 1,000 |" in text
    assert "| rounded | 3 | 1.439 ± 0.018 | +0.0313 ± 0.0015 |" in text and "| 4.50 | — |" in text
    row = next(line for line in text.splitlines() if line.startswith("| QAT | rounded | 3 |"))
    assert (
        "+0.0313 ± 0.0015" in row
        and f"| {100 * found.fraction:.1f}% ± {100 * found.standard_error:.1f} |" in row
    )
    assert (
        f"[+{100 * found.fieller_interval[0]:.1f}, +{100 * found.fieller_interval[1]:.1f}]%" in row
        and row.endswith("above zero |")
    )
    console = Console(width=220, record=True, file=(tmp_path / "shown.txt").open("w"))
    console.print(recovery_table(report))
    assert "above zero" in console.export_text()
    console.file.close()
    page = write_recovery([report], tmp_path)
    assert (
        page.name == "recovery.html"
        and "above zero" in page.read_text()
        and (tmp_path / "quality-0.png").is_file()
    )
    read = json.loads((tmp_path / "recovery.json").read_text())["reports"][0]
    assert read["arms"][2]["recoveries"][0]["recovered"]["share"] == found.fraction
    assert read["arms"][2]["recoveries"][0]["verdict"] == "above zero"
    assert (tmp_path / "recovery.md").read_text() == text


def test_the_chart_shows_quality_against_bytes() -> None:
    chart = quality_chart(report_recovery(asked(), members(), measurements()))
    assert chart is not None
    rows = chart.spec["data"]["values"]
    assert [(row["label"], row["series"], row["x"]) for row in rows] == [
        ("full", "reference", 4e6),
        ("rounded", "rounded", 6e5),
        ("QAT", "trained", 6e5),
    ]
    assert rows[0]["y"] == pytest.approx(np.mean(FULL))
    assert [row["high"] - row["y"] for row in rows[:2]] == pytest.approx(
        [0.0, np.std(COST, ddof=1) / np.sqrt(3)]
    )
    assert quality_chart(report_recovery(asked(), members())) is None  # nothing was measured


def test_what_weakens_a_report_is_noted() -> None:
    two = [one for one in members() if one.seed < 2]
    assert any(
        "only 2 seeds have finished in all three arms" in note for note in report_recovery(asked(), two).notes
    )
    one = report_recovery(asked(), [each for each in two if each.seed == 0])
    assert (
        one.arms[2].recoveries[0].recovered is None
        and one.arms[2].recoveries[0].verdict is Recovered.NOT_RESOLVED
        and "| QAT | rounded | 1 | — |" in recovery_markdown(one)
    )
    by_arm = {"full": FULL, "rounded": [1.390, 1.433, 1.395], "QAT": QAT}

    def with_bits(figures: dict[str, Any]) -> list[Member]:
        return [
            dataclasses.replace(each, result={"bits_per_byte": figures[each.arm][each.seed]})
            for each in members()
        ]

    (note,) = report_recovery(asked(), with_bits(by_arm)).notes
    assert note == "QAT: rounded is no worse than full, so there is nothing to recover."
    (note,) = report_recovery(asked(), with_bits({**by_arm, "rounded": [1.410, 1.433, 1.395]})).notes
    assert note.startswith(
        "QAT: the cost of rounded does not differ from zero significantly with these seeds"
    )
    (note,) = report_recovery(
        asked(), with_bits({**by_arm, "rounded": np.add(FULL, 0.1), "QAT": np.add(FULL, 0.05)})
    ).notes
    assert "the noise is unknown" in note


def test_several_recoveries_are_one_family() -> None:
    """Alone its interval lies above zero; among five, the test is no longer resolved, and a note says so."""
    names = [f"QAT {i}" for i in range(5)]
    study = Study(
        name="s",
        seeds=(0, 1, 2),
        baseline="full",
        arms=(*asked().arms[:2], *(Arm(name=name, experiment=experiment()) for name in names)),
        recovery=Recovery(reference="full", rounded=dict.fromkeys(names, "rounded")),
    )
    found = [
        *members(),
        *(dataclasses.replace(one, arm=name) for one in members() if one.arm == "QAT" for name in names),
    ]
    report = report_recovery(study, found)
    alone = recovered_fraction(QAT, full=FULL, rounded=list(np.add(FULL, COST))).gain.p_value
    found = [over for one in report.arms[2:] for over in one.recoveries]
    assert all(
        one.adjusted_p == pytest.approx(5 * alone) and one.verdict is Recovered.ABOVE_ZERO for one in found
    )
    assert (5 * alone > 0.05) == any("corrected for all 5 comparisons" in note for note in report.notes)


def test_an_arm_is_measured_against_each_way_of_rounding() -> None:
    """Rounding with searched scales costs less, so that the same arm recovers a smaller share of it; the
    family is both.
    """
    study = asked()
    searched = Derived(name="searched", source="full", derivation=Rounded(bits=4))
    roles = Recovery(reference="full", rounded={"QAT": ("rounded", "searched")})
    study = dataclasses.replace(study, arms=(*study.arms, searched), recovery=roles)
    lower = np.add(FULL, np.multiply(0.7, COST))
    found = [*members()]
    for one in members():
        if one.arm == "rounded":
            found.append(
                dataclasses.replace(one, arm="searched", result={"bits_per_byte": float(lower[one.seed])})
            )
    found = [
        dataclasses.replace(one, evaluation={"unrounded_bits_per_byte": FULL[one.seed] + 0.005})
        if one.arm == "QAT"
        else one
        for one in found
    ]
    report = report_recovery(study, found)
    plain, best = report.arms[2].recoveries
    expected = recovered_fraction(QAT, full=FULL, rounded=list(lower))
    assert (plain.rounded, best.rounded) == ("rounded", "searched") and best.recovered == expected
    assert best.adjusted_p == pytest.approx(2 * expected.gain.p_value) or best.adjusted_p == plain.adjusted_p
    unrounded = report.arms[2].unrounded
    assert (
        unrounded is not None
        and unrounded.mean == pytest.approx(np.mean(FULL) + 0.005)
        and report.arms[0].unrounded is None
    )
    text = recovery_markdown(report)
    assert (
        "| bits per byte before rounding |" in text
        and "| QAT | searched | 3 |" in text
        and "| QAT | rounded | 3 |" in text
    )


def test_each_arm_is_trained_at_its_own_best_rate(tmp_path: Path) -> None:
    rates = LearningRates(rates=(2e-3, 5e-4, 1e-3), seeds=(9,))
    study = dataclasses.replace(asked(), tune=rates)
    bits = {(rate, 9): value for rate, value in ((5e-4, 1.5), (1e-3, 1.4), (2e-3, 1.45))}
    ran = run_study(tuning_study(study), tmp_path, train=StubTrainer(bits=bits))
    worse = [dataclasses.replace(one, status="diverged") if one.arm == "QAT at 0.001" else one for one in ran]
    tuned = choose_rates(study, worse)
    full, qat = (choice for choice in tuned if choice.arm in ("full", "QAT"))
    assert full.is_resolved and 1e-3 < full.rate < 2e-3
    assert (qat.rate, qat.is_resolved) == (2e-3, False)
    study = at_rates(study, tuned)
    assert member_experiment(study, "QAT", 1).optim.lr == 2e-3
    report = report_recovery(study, members(), tuned=tuned)
    tried = "0.0005 (1.5000), 0.001 (diverged), 0.002 (1.4500)"
    notes = [note for note in report.notes if note.startswith("QAT:")]
    assert f"the best of the grid, bits_per_byte with seed 9 of {tried}" in notes[0]
    assert notes[1] == (
        "QAT: its best learning rate is not resolved: 0.002 is the highest that was tried: widen the grid to "
        "higher rates. Its verdicts are not resolved."
    )
    text = recovery_markdown(report)
    assert "| best learning rate |" in text and "| 0.002 |" in text
    with pytest.raises(ValueError, match="'QAT' is trained at optim.lr=0.002, but 0.004 was chosen for it"):
        report_recovery(study, members(), tuned=(dataclasses.replace(qat, rate=4e-3),))
    with pytest.raises(ValueError, match=r"seeds \[1\] chose the learning rate of 'QAT' and are seeds of"):
        report_recovery(study, members(), tuned=(dataclasses.replace(qat, seeds=(1,)),))


def test_parts_must_be_arms() -> None:
    roles = asked().recovery
    assert roles is not None
    for changes, message in (
        ({"reference": "ful"}, "'ful' is not an arm of the study. Did you mean 'full'"),
        ({"rounded": {"QAT": "round"}}, "'round' is not an arm"),
        ({"rounded": {"QAT": "full"}}, "needs three different arms"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(asked(), recovery=dataclasses.replace(roles, **changes))


def test_derivations_are_distinguished_by_their_fields() -> None:
    assert config.fingerprint(Rounded(bits=4)) != config.fingerprint(Rounded(bits=3))


# A study that is trained ------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied(Derivation):
    def make(self, model: Path, out: Path) -> None:
        shutil.copytree(model, out)


def toy(workplace: Path) -> Study:
    """One seed, two trainings of two steps, and a copy of the first."""
    fast, slow = (one_layer(workplace, workplace, steps=2, lr=lr) for lr in (1e-2, 1e-3))
    arms = (
        Arm(name="full", experiment=fast),
        Derived(name="copied", source="full", derivation=Copied()),
        Arm(name="slow", experiment=slow),
    )
    roles = Recovery(reference="full", rounded={"slow": "copied"})
    return Study(name="toy", arms=arms, seeds=(3,), baseline="full", recovery=roles)


def toy_file(workplace: Path, directory: Path) -> str:
    file = directory / "toy_study.py"
    file.write_text(
        "from tests.studies.test_recovery import Path, toy\n\n\ndef study():\n    return "
        f"toy(Path({str(workplace)!r}))\n"
    )
    return str(file)


def test_a_study_from_training_to_its_page(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slmjax.runner.trainer.write_page", lambda run: None)  # takes as long as the steps
    file = toy_file(workplace, tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["ablate", file, "--directory", str(tmp_path), "--json"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    full, copied, slow = read_members(toy(workplace), tmp_path)
    # A copy is evaluated as the run itself was: on the same text, in the same windows.
    for name in ("bits_per_byte", "loss", "calibration_error", "tokens", "parameters"):
        assert copied.metric_value(name) == pytest.approx(full.metric_value(name), rel=1e-5)
    assert copied.metric_value("bits_per_byte") != pytest.approx(slow.metric_value("bits_per_byte"), rel=1e-5)
    assert (
        copied.metric_value("session_tokens_per_second") is None
        and copied.evaluation["documents"] == full.evaluation["documents"]
    )
    (outcome,) = json.loads(out)["studies"]
    assert outcome["failed"] == [] and outcome["findings"]["study"] == "toy"
    arms = {one["arm"]: one for one in outcome["recovery"]["arms"]}
    assert (
        arms["copied"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
        and arms["copied"]["agreement"]["mean"] == 1
    )
    assert arms["slow"]["kl"]["mean"] > 1e-4 and arms["slow"]["recoveries"][0]["verdict"] == "not resolved"
    params = load_model(full.result["run_dir"]).params
    assert (
        arms["full"]["stored_bytes"]["mean"] == 4 * sum(leaf.size for leaf in params.values())
        and arms["full"]["kl"]["mean"] == 0
    )
    assert (tmp_path / "recovery.md").is_file() and "comparing slow, seed 3, with full" in err
    # What was trained and measured is not trained and measured again.
    with pytest.raises(SystemExit):
        cli.main(["formats", "report", file, str(tmp_path), "--no-page"])
    out, err = capsys.readouterr()
    assert "comparing" not in err and "not resolved" in out and "have finished in all three arms" in out


def test_a_report_that_cannot_be_made(
    tmp_path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = toy_file(workplace, tmp_path)
    none = tmp_path / "none.py"
    none.write_text("def study():\n    from tests.studies.stub import study\n\n    return study()\n")
    for argv, message in (
        (("report", str(none)), "has no study with a recovery"),
        (("report", file, str(tmp_path / "nowhere")), "has no member of the study toy"),
        (("reprot",), "use `slmjax formats table` or `slmjax formats report`"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["formats", *argv])
        assert ended.value.code == 2 and message in capsys.readouterr().err
