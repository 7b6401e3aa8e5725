"""Campaigns: verdicts of many studies together, and winners that are confirmed with fresh seeds."""

import dataclasses
from pathlib import Path

import pytest

from slmjax.studies import (
    Arm,
    Study,
    Verdict,
    analyze,
    judge_campaign,
    read_campaign,
    run_study,
    write_findings,
)
from slmjax.studies.campaign import Control, JudgedCampaign, PromotionStatus, campaign_markdown
from slmjax.studies.statistics.campaigns import benjamini_yekutieli
from tests.studies.stub import StubTrainer, experiment, study

RATES = {"slow": 1e-3, "fast": 2e-3, "other": 3e-3}
NOISE = (0.0, 0.02, -0.01, 0.012, -0.007, 0.004)


def add_study(
    root: Path, name: str, *, seeds: tuple[int, ...] = (0, 1, 2), gain: float = 0.1, began: float, **changes
) -> Study:
    """A study of two faster arms, of which "fast" is better by `gain` and "other" by hardly anything."""
    gains = {"slow": 0.0, "fast": gain, "other": 0.001}
    asked = study(
        seeds=seeds,
        name=name,
        **{"arms": tuple(Arm(name=arm, experiment=experiment(rate)) for arm, rate in RATES.items())}
        | changes,
    )
    bits = {
        (rate, seed): 1.5 - gains[arm] + NOISE[seed % 6] + 0.001 * ((seed * (i + 2)) % 5)
        for i, (arm, rate) in enumerate(RATES.items())
        for seed in seeds
    }
    members = run_study(asked, root / name, train=StubTrainer(bits=bits))
    findings = analyze(asked, members)
    assert findings.began is not None
    write_findings(dataclasses.replace(findings, began=began), root / name)
    return asked


def judged(root: Path, **options) -> JudgedCampaign:
    return judge_campaign(read_campaign(root), **options)


def test_a_winner_needs_fresh_seeds(tmp_path: Path) -> None:
    add_study(tmp_path, "first", began=1.0)
    first = judged(tmp_path)
    fast, other = first.comparisons
    assert fast.verdict is Verdict.BETTER and fast.survives
    assert fast.promotion is not None and fast.promotion.status is PromotionStatus.NEEDS_SEEDS
    assert fast.promotion.text == "run it again with seeds from 3 on"
    assert other.promotion is None and not other.survives
    # The same seeds again confirm nothing, and neither do those of some other study.
    add_study(tmp_path, "again", began=2.0)
    add_study(tmp_path, "overlapping", seeds=(2, 3, 4), began=3.0)
    fast = judged(tmp_path).comparisons[0]
    assert fast.promotion is not None and fast.promotion.status is PromotionStatus.NEEDS_SEEDS
    assert fast.promotion.first_fresh_seed == 5
    add_study(tmp_path, "fresh", seeds=(5, 6, 7), began=4.0)
    fast = judged(tmp_path).comparisons[0]
    assert fast.promotion is not None and fast.promotion.status is PromotionStatus.CONFIRMED
    assert fast.promotion.text == "confirmed by fresh"


def test_a_winner_by_luck_is_not_confirmed(tmp_path: Path) -> None:
    add_study(tmp_path, "first", began=1.0)
    add_study(tmp_path, "fresh", seeds=(10, 11, 12), gain=0.002, began=2.0)
    fast = judged(tmp_path).comparisons[0]
    assert fast.promotion is not None and fast.promotion.status is PromotionStatus.NOT_CONFIRMED
    assert fast.promotion.text == "not confirmed by fresh"


def test_another_arm_of_the_same_name_confirms_nothing(tmp_path: Path) -> None:
    add_study(tmp_path, "first", began=1.0)
    arms = tuple(
        Arm(name=name, experiment=experiment(rate), changes={"data.sequence_length": 128})
        for name, rate in RATES.items()
    )
    add_study(tmp_path, "fresh", seeds=(10, 11, 12), began=2.0, arms=arms)
    fast = judged(tmp_path).comparisons[0]
    assert fast.promotion is not None and fast.promotion.status is PromotionStatus.NEEDS_SEEDS


def test_verdicts_are_judged_over_all_studies(tmp_path: Path) -> None:
    for i in range(3):
        add_study(tmp_path, f"study-{i}", began=float(i), equal_within=0.05, gain=(0.1, 0.0, 0.03)[i])
    campaign = read_campaign(tmp_path)
    assert [each.path for each in campaign.studies] == ["study-0", "study-1", "study-2"]
    result = judge_campaign(campaign)
    # Each comparison is two tests where there is a margin.
    assert len(result.comparisons) == 6 and result.num_tests == 12
    tests = []
    for each in campaign.studies:
        for comparison in each.findings.comparisons:
            assert comparison.judgement is not None and comparison.judgement.equal_p is not None
            tests += [comparison.judgement.p_value, comparison.judgement.equal_p]
    adjusted = benjamini_yekutieli(tests)
    for i, item in enumerate(result.comparisons):
        expected = adjusted[2 * i + (item.verdict is Verdict.EQUAL)]
        assert item.adjusted == expected
        assert item.survives == (expected <= 0.05 and item.verdict is not Verdict.NOT_RESOLVED)
    assert {item.verdict for item in result.comparisons} >= {Verdict.BETTER, Verdict.EQUAL}
    strict = judge_campaign(campaign, rate=1e-9)
    assert not any(item.survives for item in strict.comparisons)
    text = campaign_markdown(result)
    assert "| study-0 | fast − slow | −0.1" in text and "12 tests, benjamini-yekutieli" in text
    assert (
        "Tests: one of the difference for each of 6 comparisons, and one of equality for each of 6 of" in text
    )
    without = dataclasses.replace(result, num_tests=6, num_equality_tests=0)
    assert "Tests: one of the difference for each of 6 comparisons.\n" in campaign_markdown(without)
    assert "fast (study-0) is no new baseline yet: run it again with seeds from 3 on." in text
    by_e_values = judge_campaign(campaign, control=Control.E_BH)
    assert all(
        not b.survives or a.survives for a, b in zip(result.comparisons, by_e_values.comparisons, strict=True)
    )


def test_damaged_and_missing_findings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no directory"):
        read_campaign(tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"has no study with a findings.json that can be read. Run one first"
    ):
        read_campaign(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "findings.json").write_text("{")
    with pytest.raises(ValueError, match="can be read: .*bad/findings.json"):
        read_campaign(tmp_path)
    add_study(tmp_path, "first", began=1.0)
    campaign = read_campaign(tmp_path)
    assert len(campaign.studies) == 1 and "bad/findings.json" in campaign.problems[0]
    with pytest.raises(ValueError, match="rate of false discoveries is 5"):
        judge_campaign(campaign, rate=5)
