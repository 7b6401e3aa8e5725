"""What a study reports: whole pairs, one family of tests, budgets, and a note on everything that is not as it
should be.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from slmjax.evaluation import DocumentSums, write_document_sums
from slmjax.studies import (
    Arm,
    Budget,
    Findings,
    Study,
    Verdict,
    analyze,
    findings_markdown,
    findings_table,
    load_study,
    read_findings,
    run_study,
    write_findings,
)
from slmjax.studies.findings import with_flops
from slmjax.studies.statistics.documents import Advice, difference_sources
from slmjax.studies.statistics.power import seeds_needed, smallest_resolved
from slmjax.studies.statistics.results_table import Correction, Table
from slmjax.studies.statistics.sequential import nominal_levels
from slmjax.studies.statistics.verdicts import judge
from tests.studies.stub import StubTrainer, experiment, study

BITS = {"slow": (1.50, 1.52, 1.49), "fast & loose": (1.40, 1.43, 1.395), "third": (1.49, 1.54, 1.50)}
LR = {"slow": 1e-3, "fast & loose": 2e-3, "third": 3e-3}


def three_arms(**changes) -> Study:
    arms = tuple(Arm(name=name, experiment=experiment(lr)) for name, lr in LR.items())
    return study(arms=arms, **changes)


def test_an_arm_whose_tokenizer_loses_text_has_no_verdict(tmp_path: Path) -> None:
    asked = three_arms()
    bits = {(LR[name], seed): value for name, values in BITS.items() for seed, value in enumerate(values)}
    members = run_study(asked, tmp_path, train=StubTrainer(bits=bits))
    losing = [
        dataclasses.replace(one, result={**one.result, "lost_text": 0.92})
        if one.arm == "fast & loose"
        else one
        for one in members
    ]
    findings = analyze(asked, losing)
    assert [one.verdict for one in findings.comparisons] == [Verdict.NOT_RESOLVED] * 2
    fast = findings.comparisons[0]
    assert fast.reason == "the tokenizers of the arms lose different parts of the text"
    # More seeds would not help.
    assert fast.judgement is not None and fast.judgement.seeds_needed is None
    assert analyze(asked, members).comparisons[0].verdict is Verdict.BETTER
    (note,) = (note for note in findings.notes if "loses" in note)
    assert note.startswith("fast & loose: the tokenizer loses 92.00% of the text's bytes: not comparable")
    everywhere = analyze(
        asked, [dataclasses.replace(one, result={**one.result, "lost_text": 0.92}) for one in members]
    )
    assert everywhere.comparisons[0].verdict is Verdict.BETTER, "all arms lose the same"


def found(directory: Path, asked: Study, *, further=(), **outcomes: Any) -> Findings:
    outcomes.setdefault(
        "bits",
        {(LR[name], seed): value for name, values in BITS.items() for seed, value in enumerate(values)},
    )
    members = run_study(asked, directory, train=StubTrainer(**outcomes))
    return analyze(asked, members, further=further)


def test_comparisons_are_judged_as_one_family(tmp_path: Path) -> None:
    asked = three_arms(comparisons=(("fast & loose", "third"),), smallest_effect=0.1)
    findings = found(tmp_path, asked)
    pairs = [("fast & loose", "slow"), ("third", "slow"), ("fast & loose", "third")]
    assert [(item.arm, item.against) for item in findings.comparisons] == pairs
    values = np.array([BITS[arm] for arm in LR])
    table = Table(arms=tuple(LR), seeds=(0, 1, 2), values=values, diverged=np.zeros((3, 3), bool))
    expected = judge(table, pairs, asked.rules)
    assert tuple(item.judgement for item in findings.comparisons) == expected.comparisons
    assert findings.noise == expected.noise and findings.rules == asked.rules
    assert [item.verdict for item in findings.comparisons] == [
        Verdict.BETTER,
        Verdict.NOT_RESOLVED,
        Verdict.BETTER,
    ]
    slow = findings.arm("slow")
    assert slow.metric is not None and slow.metric.mean == pytest.approx(np.mean(BITS["slow"]))
    assert slow.interval == pytest.approx(
        stats.t.interval(0.95, 2, loc=np.mean(BITS["slow"]), scale=stats.sem(BITS["slow"]))
    )
    assert findings.comparisons[0].differences == pytest.approx(values[1] - values[0])
    deviation = math.sqrt(2) * (expected.noise.deviation or math.nan)
    assert findings.smallest_resolved == pytest.approx(smallest_resolved(deviation, 3, 3, 4))
    assert findings.comparisons[0].reason == "" and findings.comparisons[1].reason.startswith(
        "the difference is not distinguished from noise: these seeds resolve 0.0"
    )
    shown = findings_markdown(findings)
    assert "These seeds resolve a difference of" in shown and "Seeds that would resolve it" in shown


def test_a_study_that_could_not_have_answered_its_question_says_so(tmp_path: Path) -> None:
    findings = found(tmp_path, three_arms(smallest_effect=0.01))
    power = findings.power
    assert power is not None and power.could_answer is False and power.seeds == 3
    assert power.smallest_resolved == findings.smallest_resolved and power.smallest_resolved > 0.01
    assert power.power is not None and 0 < power.power < 0.8
    deviation = math.sqrt(2) * (findings.noise.deviation or math.nan)
    assert power.seeds_needed == seeds_needed(0.01, deviation, comparisons=2, arms=3)
    (note,) = (note for note in findings.notes if note.startswith("This study could not have answered"))
    assert f"3 seeds resolve a difference of {power.smallest_resolved:.2g} bits per byte" in note
    assert f"About {power.seeds_needed:,} seeds would." in note
    enough = found(tmp_path, three_arms(smallest_effect=0.5))
    assert enough.power is not None and enough.power.could_answer
    assert not any("could not have" in note for note in enough.notes)
    unknown = found(tmp_path, three_arms())
    assert unknown.power is not None and unknown.power.could_answer is None
    # With fixed looks the level is that of the look, which is stricter.
    look = found(tmp_path, three_arms(looks=(3, 8), smallest_effect=0.04))
    assert look.power is not None and look.power.smallest_resolved > power.smallest_resolved
    level = nominal_levels((3, 8), level=0.025)[0]
    assert look.power.smallest_resolved == pytest.approx(smallest_resolved(deviation, 3, 1, 4, level))
    assert look.power.seeds_needed == 8 and read_findings(write_findings(look, tmp_path)) == look


def test_findings_of_earlier_versions_are_read(tmp_path: Path) -> None:
    findings = found(tmp_path, three_arms(equal_within=0.01))
    assert findings.correction is Correction.CLOSED
    stored = json.loads(write_findings(findings, tmp_path).read_text())
    for name in ("correction", "power"):
        del stored[name]
    for comparison in stored["comparisons"]:
        del comparison["reason"], comparison["judgement"]["smallest_resolved"]
        comparison["judgement"]["variance"] = "own"
    (tmp_path / "findings.json").write_text(json.dumps(stored))
    read = read_findings(tmp_path)
    assert read.correction is Correction.CLOSED and read.power is None and read.comparisons[0].reason == ""


def test_higher_can_be_better(tmp_path: Path) -> None:
    findings = found(tmp_path, three_arms(lower_is_better=False))
    assert findings.comparisons[0].verdict is Verdict.WORSE
    assert "higher is better" in findings_markdown(findings)


def test_divergence_is_an_outcome_and_failure_is_none(tmp_path: Path) -> None:
    findings = found(
        tmp_path,
        three_arms(),
        statuses={(LR["third"], 1): "diverged"},
        errors={(LR["fast & loose"], 2): ValueError("too wide")},
    )
    fast, third = findings.comparisons
    assert fast.judgement is not None and third.judgement is not None
    assert (fast.judgement.seeds, third.judgement.seeds) == ((0, 1), (0, 1, 2))
    assert fast.judgement.difference == pytest.approx((1.40 - 1.50 + 1.43 - 1.52) / 2)
    # The worst of both arms stands for the run that diverged.
    assert third.judgement.imputed == (1,)
    assert third.judgement.difference == pytest.approx((1.49 - 1.50 + 1.52 - 1.52 + 1.50 - 1.49) / 3)
    assert fast.differences == (pytest.approx(-0.1), pytest.approx(-0.09), None)
    assert third.differences[1] is None
    summary = findings.arm("third")
    assert summary.values == (1.49, None, 1.50) and summary.diverged == (1,)
    assert [len(arm.seeds) for arm in findings.arms] == [3, 2, 2]
    # Exact, by hand: both ends of a beta distribution.
    ends = (stats.beta.ppf(0.025, 1, 3), stats.beta.ppf(0.975, 2, 2))
    assert summary.divergence is not None and summary.divergence.interval == pytest.approx(ends)
    text = "third, seed 1: diverged after 10 steps, and counts with the worst value of each pair."
    assert text in findings.notes
    assert "fast & loose, seed 2: failed (ValueError: too wide), and left out of its pairs." in findings.notes
    assert "| third | 2 | 1.4950 ± 0.0071 | [1.4315, 1.5585] | 1 of 3 [1%, 91%] |" in findings_markdown(
        findings
    )


def test_arms_have_the_memory_of_their_runs(tmp_path: Path) -> None:
    asked = three_arms()
    members = [
        dataclasses.replace(
            member, result={**member.result, "session_peak_memory_bytes": 100 * (1 + member.seed)}
        )
        if member.arm == "third"
        else member
        for member in run_study(asked, tmp_path, train=StubTrainer())
    ]
    findings = analyze(asked, members)
    assert findings.arm("third").peak_memory_bytes == 200 and findings.arm("slow").peak_memory_bytes is None
    counted = with_flops(findings, asked, {"third": 3e12})
    assert [arm.flops for arm in counted.arms] == [None, None, 3e12]
    assert read_findings(write_findings(counted, tmp_path)) == counted


def test_too_few_pairs_are_not_resolved_and_stay_in_the_family(tmp_path: Path) -> None:
    failed = {(LR["third"], seed): ValueError("too wide") for seed in (0, 1)}
    findings = found(tmp_path, three_arms(), errors=failed)
    fast, third = findings.comparisons
    assert third.judgement is None and third.verdict is Verdict.NOT_RESOLVED
    assert third.reason == "1 seed in common, and a comparison needs 2"
    assert fast.judgement is not None
    assert fast.judgement.adjusted_p == pytest.approx(2 * fast.judgement.p_value)
    assert "third and slow have 1 seed in common: a comparison needs 2." in findings.notes
    text = findings_markdown(findings)
    assert "| third | — | — | — | not resolved |" in text and "| third | 1 | 1.5000 | — |" in text


def test_equal_arms_and_noisy_arms_are_named(tmp_path: Path) -> None:
    bits = {"slow": (1.50, 1.52, 1.49, 1.51), "fast & loose": (1.501, 1.519, 1.491, 1.511)}
    bits["third"] = (1.2, 1.9, 1.4, 1.6)
    by_rate = {(LR[name], seed): value for name, values in bits.items() for seed, value in enumerate(values)}
    findings = found(tmp_path, three_arms(seeds=(0, 1, 2, 3), equal_within=0.01), bits=by_rate)
    assert [item.verdict for item in findings.comparisons] == [Verdict.EQUAL, Verdict.NOT_RESOLVED]
    assert findings.noise.noisy == ("third",)
    (note,) = (note for note in findings.notes if "noisier" in note)
    assert note.startswith("third is noisier than the other arms, apart from what seeds do")
    text = findings_markdown(findings)
    assert "Equal within 0.01: fast & loose." in text
    assert "| p (closed test) | p of equality (closed test) | verdict |" in text
    equal = findings.comparisons[0].judgement
    assert equal is not None and equal.adjusted_equal_p is not None
    assert f" {equal.adjusted_p:.3f} | {equal.adjusted_equal_p:.3f} | equal |" in text


def test_a_study_under_way(tmp_path: Path) -> None:
    asked = three_arms()
    members = run_study(three_arms(seeds=(0,)), tmp_path, train=StubTrainer())
    findings = analyze(asked, members)
    assert "slow, seeds 1, 2: no result yet, and left out of its pairs." in findings.notes
    assert all(one.verdict is Verdict.NOT_RESOLVED for one in findings.comparisons)
    assert {one.reason for one in findings.comparisons} == {"1 seed in common, and a comparison needs 2"}
    assert findings.power is None
    empty = analyze(asked, ())
    assert empty.is_matched is None and empty.arms[0].metric is None
    assert "cannot be compared yet" in findings_markdown(empty)


def test_unequal_budgets_are_said(tmp_path: Path) -> None:
    matched = found(tmp_path / "matched", three_arms())
    assert (
        matched.is_matched
        and "Budget: matched, 1,064,778 tokens per run on average." in findings_markdown(matched)
    )
    unequal = {"tokens": {LR["third"]: 1_064_779}}
    findings = found(tmp_path / "apart", three_arms(), **unequal)
    assert findings.is_matched is False
    (note,) = [note for note in findings.notes if "same tokens" in note]
    assert "seed 0: 1,064,778 (slow) to 1,064,779 (third); seed 1:" in note
    assert "Budget: NOT matched, 1,064,778 to 1,064,779 tokens" in findings_markdown(findings)
    assert found(tmp_path / "near", three_arms(budget=Budget(tolerance=1e-6)), **unequal).is_matched
    assert found(tmp_path / "seconds", three_arms(budget=Budget(metric="seconds")), **unequal).is_matched


def test_further_metrics_have_no_verdict(tmp_path: Path) -> None:
    findings = found(tmp_path, three_arms(further_metrics=("calibration_error", "parameters")))
    calibration = findings.comparisons[0].further_metrics["calibration_error"]
    assert calibration is not None and calibration.mean == pytest.approx(1e-3 * 1.0001)
    text = findings_markdown(findings)
    assert "| arm | calibration error | difference | parameters | difference |" in text
    assert "| slow | 0.001000100 ± 0.000000100 |  | 1.0000 ± 0.0000 |  |" in text
    with pytest.raises(
        ValueError, match="no run of the study has a metric 'calibration'. Did you mean 'calibration_error'"
    ):
        found(tmp_path, three_arms(further_metrics=("calibration",)))
    with pytest.raises(ValueError, match="no run of the study has a metric 'bits'"):
        found(tmp_path, three_arms(metric="bits"))


def test_pairs_must_be_arms_and_new(tmp_path: Path) -> None:
    for pair, message in (
        (("third", "fourth"), "'fourth' is not an arm"),
        (("third", "third"), "with itself"),
        (("slow", "third"), "already"),
        (("third", "slow"), "already"),
    ):
        with pytest.raises(ValueError, match=message):
            analyze(three_arms(), (), further=(pair,))
    with pytest.raises(ValueError, match="already"):
        analyze(three_arms(), (), further=(("third", "fast & loose"), ("fast & loose", "third")))


def test_no_noise_is_no_evidence(tmp_path: Path) -> None:
    bits = {(lr, seed): 1 + lr for lr in LR.values() for seed in range(3)}
    findings = found(tmp_path, three_arms(), bits=bits)
    assert all(one.verdict is Verdict.NOT_RESOLVED for one in findings.comparisons)
    assert any(
        note.startswith("fast & loose and slow differ by the same bits_per_byte with every seed")
        for note in findings.notes
    )
    assert findings.comparisons[0].reason.endswith("so that the noise is not known")
    text = findings_markdown(findings)
    assert "| fast & loose | +0.0010000 | — | 1.000 | not resolved |" in text
    assert "| fast & loose | 3 | 1.0020 ± 0.0000 | — |" in text


def test_members_with_other_text_are_named(tmp_path: Path) -> None:
    members = list(run_study(three_arms(), tmp_path, train=StubTrainer()))
    entry = {
        "source": "corpus.jsonl",
        "documents": 55,
        "bytes": 900,
        "tokens": 300,
        "hash": "a",
        "heldout": None,
        "tokenizer": "t",
        "fingerprint": "f",
    }
    for i, member in enumerate(members):
        run_dir = tmp_path / str(i)
        run_dir.mkdir()
        changed = {"documents": 56, "bytes": 910, "hash": "b", "fingerprint": "g"} if i == 4 else {}
        (run_dir / "data.json").write_text(json.dumps([entry | changed]))
        members[i] = dataclasses.replace(member, result=member.result | {"run_dir": str(run_dir)})
    notes = [note for note in analyze(three_arms(), members).notes if "other text" in note]
    assert len(notes) == 1 and notes[0].startswith(
        f"{members[4].arm}, seed {members[4].seed} has other text than"
    )
    assert (
        "corpus.jsonl had 55 documents (900 bytes) to train on, and has 56 documents (910 bytes) to train on"
        in notes[0]
    )


def test_what_weakens_a_comparison_is_noted(tmp_path: Path) -> None:
    arms = three_arms().arms
    third = experiment(LR["third"])
    longer = dataclasses.replace(third.data, sequence_length=128)
    arms = (*arms[:2], Arm(name="third", experiment=dataclasses.replace(third, data=longer)))
    members = run_study(study(arms=arms), tmp_path, train=StubTrainer())
    first = dataclasses.replace(
        members[0], result=members[0].result | {"commit": "f" * 40, "measured_on": "the last training batch"}
    )
    notes = "\n".join(analyze(study(arms=arms), (first, *members[1:])).notes)
    assert "Data or tokenizer differ between slow, fast & loose | third" in notes
    assert "slow: loss and bits per byte were measured on the last training batch" in notes
    assert "trained by 2 commits of the code: c0ffee, ffffffffffff." in notes
    assert "Bootstrap intervals of 3 pairs are only indicative" in notes
    usual = "\n".join(found(tmp_path / "usual", three_arms()).notes)
    assert "commits" not in usual and "Data" not in usual and "measured on" not in usual


def test_findings_for_people_and_programs(tmp_path: Path) -> None:
    findings = found(tmp_path, three_arms(), further=(("fast & loose", "third"),))
    text = findings_markdown(findings)
    judgement = findings.comparisons[0].judgement
    assert judgement is not None
    # Two digits of the standard error are four decimals.
    assert math.floor(math.log10(judgement.standard_error)) == -3
    low, high = judgement.interval
    assert f"| fast & loose | −0.0950 | [−{-low:.4f}, −{-high:.4f}] | < 0.001 | better |" in text
    assert "| fast & loose | 3 | 1.4083 ± 0.0189 | [1.361, 1.455] |" in text
    assert "| fast & loose − third | " in text and text.count("better |") == 2
    console = Console(width=200, record=True, file=(tmp_path / "shown.txt").open("w"))
    console.print(findings_table(findings))
    shown = console.export_text()
    assert "not resolved" in shown and "Budget: matched" in shown
    console.file.close()
    read = json.loads(write_findings(findings, tmp_path).read_text())
    assert read["comparisons"][0]["judgement"]["interval"] == list(judgement.interval)
    assert read["comparisons"][0]["judgement"]["verdict"] == "better"
    assert read["arms"][1]["seeds"] == [0, 1, 2]
    assert read_findings(tmp_path) == findings


def test_the_study_file_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    file = tmp_path / "warm_up.py"
    file.write_text(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0])
    train = StubTrainer()
    loaded = load_study(file)
    members = run_study(loaded, tmp_path / "runs", train=train)
    assert [one.optim.warmup_steps for one in train.asked] == [20, 50, 100] * 5
    findings = analyze(loaded, members)
    assert [(each.arm, each.against) for each in findings.comparisons] == [
        ("50 steps", "20 steps"),
        ("100 steps", "20 steps"),
    ]


def test_completions_are_not_compared_with_all_text(tmp_path: Path) -> None:
    members = run_study(three_arms(), tmp_path, train=StubTrainer())
    completions = [
        dataclasses.replace(one, result=one.result | {"measured_on": "the completions of held-out text"})
        for one in members
    ]
    for others, num_notes in ((members, 0), (completions, 0), ([*completions[:2], *members[2:]], 1)):
        notes = analyze(three_arms(), others).notes
        assert (
            sum("and those of others of its completions: they do not compare" in note for note in notes)
            == num_notes
        )
        assert not any("not on all held-out text" in note for note in notes)


def test_uncertainty_of_the_heldout_text_beside_that_of_seeds(tmp_path: Path) -> None:
    members = run_study(three_arms(), tmp_path, train=StubTrainer())
    assert analyze(three_arms(), members).text == ()
    draws = np.random.default_rng(0)
    num_bytes = np.array([50, 80, 30, 60])
    # Documents differ much more than seeds do: more text is worth more.
    effects = {"slow": 0.0, "fast & loose": np.array([-9.0, 4.0, -6.0, 2.0]), "third": 0.1}
    nats = {}
    for member in members:
        nats[member.arm, member.seed] = 60.0 + effects[member.arm] + 0.01 * draws.normal(size=4)
        sums = DocumentSums(
            nats=nats[member.arm, member.seed], tokens=num_bytes, bytes=num_bytes, num_documents=4
        )
        write_document_sums(sums, member.result["run_dir"])
    findings = analyze(three_arms(), members)
    assert [item.arm for item in findings.text] == ["fast & loose", "third"]
    sources = findings.text[0].sources
    bits = [np.stack([nats[arm, seed] for seed in (0, 1, 2)]) / math.log(2) for arm in LR]
    expected = difference_sources(bits[1], bits[0], num_bytes.astype(float))
    assert dataclasses.astuple(sources)[:-1] == pytest.approx(dataclasses.astuple(expected)[:-1])
    assert sources.text_error > 10 * sources.seed_error and sources.advice is Advice.MORE_TEXT
    text = findings_markdown(findings)
    assert "| arm | by seeds | by held-out text | documents | worth buying |" in text
    assert "| 4 | more text |" in text
    assert read_findings(write_findings(findings, tmp_path)) == findings
    # Other text does not compare, and a damaged file costs this table alone.
    path = write_document_sums(
        DocumentSums(nats=num_bytes * 1.0, tokens=num_bytes, bytes=num_bytes + 1, num_documents=4),
        members[1].result["run_dir"],
    )
    assert [item.arm for item in analyze(three_arms(), members).text] == ["third"]
    path.write_bytes(b"damaged")
    assert analyze(three_arms(), members).text[0].seeds == (1, 2)


def test_looks_are_said(tmp_path: Path) -> None:
    asked = three_arms(looks=(3, 5))
    findings = found(tmp_path, asked)
    assert findings.look == 3 and findings.level < 0.05
    assert "Look at 3 seeds of those planned (3, 5), at level 0.0" in findings_markdown(findings)
    early = analyze(asked, run_study(three_arms(seeds=(0, 1)), tmp_path / "early", train=StubTrainer()))
    assert all(item.verdict is Verdict.NOT_RESOLVED for item in early.comparisons)
    assert "No look yet: the first is at 3 seeds of every arm (3, 5)." in findings_markdown(early)
