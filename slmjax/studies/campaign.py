"""A campaign: all studies below a directory, whose verdicts are many, and of whose winners some won by luck.

    campaign = read_campaign("runs/studies")                    # from findings.json of each study
    judged = judge_campaign(campaign)                           # false discoveries over all of them
    [item for item in judged.comparisons if item.survives]

The verdicts of one study have a false one at most once in 20 studies. Of 40 studies two have one, which is a
large part of the verdicts if few arms are any better. Here the expected fraction of false ones among those
that survive is at most `rate`, whatever the studies have in common (Benjamini and Yekutieli, 2001).

A winner is selected among many, so that its difference is overestimated. It is promoted to a new baseline
after another study has confirmed it with fresh seeds: those that no earlier study of the campaign has used.
"""

import dataclasses
import enum
from collections.abc import Sequence
from pathlib import Path

from slmjax.studies.caveats import counted
from slmjax.studies.findings import FINDINGS, ArmSummary, Comparison, Findings, read_findings
from slmjax.studies.statistics.campaigns import benjamini_yekutieli, e_bh, mixed_e_value
from slmjax.studies.statistics.verdicts import Verdict
from slmjax.studies.text_tables import ABSENT, TextTable, markdown_tables, print_tables

CAMPAIGN = "campaign.json"


class Control(enum.Enum):
    """How false discoveries are controlled; both hold for any dependence between the tests."""

    BENJAMINI_YEKUTIELI = "benjamini-yekutieli"  # of p values
    E_BH = "e-bh"  # of e values that are calibrated from p values


@dataclasses.dataclass(frozen=True, kw_only=True)
class CampaignStudy:
    """One study of a campaign."""

    path: str  # of its directory, relative to that of the campaign
    findings: Findings

    @property
    def seeds(self) -> frozenset[int]:
        """The seeds that the study has used, those that tuned its arms included."""
        return frozenset((*self.findings.seeds, *self.findings.tuning_seeds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Campaign:
    """Studies in the order in which they began."""

    directory: str
    studies: tuple[CampaignStudy, ...]
    problems: tuple[str, ...] = ()  # files that could not be read


class PromotionStatus(enum.Enum):
    """Whether a winner may be the baseline of the studies that follow."""

    CONFIRMED = "confirmed"
    NEEDS_SEEDS = "needs fresh seeds"  # no later study has tried it with fresh ones
    NOT_CONFIRMED = "not confirmed"  # a later study with fresh seeds does not find it better


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promotion:
    """What is known of a winner besides the study that found it."""

    status: PromotionStatus
    confirmed_by: str | None  # path of the study with fresh seeds, if there is one
    first_fresh_seed: int  # no study of the campaign has used this seed or a larger one

    @property
    def text(self) -> str:
        """The status in words."""
        if self.status is PromotionStatus.NEEDS_SEEDS:
            return f"run it again with seeds from {self.first_fresh_seed} on"
        return f"{self.status.value} by {self.confirmed_by}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CampaignComparison:
    """A comparison of one study, judged within the campaign."""

    study: str  # path of its directory
    arm: str
    against: str
    difference: float | None
    verdict: Verdict  # within its study
    p_value: float  # of what the verdict says; of the difference if it is not resolved
    adjusted: float  # p value, or e value on the scale of p values, over the campaign
    survives: bool  # whether the verdict holds in the campaign; never if it is not resolved
    promotion: Promotion | None  # of an arm that is better


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedCampaign:
    """All comparisons of a campaign."""

    directory: str
    rate: float  # largest expected fraction of false verdicts among those that survive
    control: Control
    num_tests: int  # of differences, one for each comparison, and of equality, for those with a margin
    num_equality_tests: int  # of these
    comparisons: tuple[CampaignComparison, ...]
    problems: tuple[str, ...] = ()
    version: int = 1


# Reading ----------------------------------------------------------------------------------------------------
def read_campaign(directory: str | Path) -> Campaign:
    """Read the findings of all studies below a directory.

    Raises:
      ValueError: it is no directory, or has no findings that can be read.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{root} is no directory: name the one that has the directories of studies")
    studies = []
    problems = []
    for path in sorted(root.rglob(FINDINGS)):
        try:
            findings = read_findings(path)
        # One damaged file should not hide the other studies, and is not passed over in silence.
        except ValueError as error:
            problems.append(str(error))
            continue
        name = str(path.parent.relative_to(root))
        began = path.stat().st_mtime if findings.began is None else findings.began
        studies.append((began, CampaignStudy(path=name, findings=findings)))
    if not studies:
        reason = f": {problems[0]}" if problems else ""
        raise ValueError(f"{root} has no study with a {FINDINGS} that can be read{reason}. Run one first")
    ordered = sorted(studies, key=lambda pair: (pair[0], pair[1].path))
    return Campaign(
        directory=str(root), studies=tuple(study for _, study in ordered), problems=tuple(problems)
    )


# Judging ----------------------------------------------------------------------------------------------------
def judge_campaign(
    campaign: Campaign, *, rate: float = 0.05, control: Control = Control.BENJAMINI_YEKUTIELI
) -> JudgedCampaign:
    """Judge all comparisons of a campaign together.

    Every comparison is one test, of a difference; with a margin it is two, of a difference and of equality.
    Those that could not be made count with p = 1.

    Args:
      campaign: the studies.
      rate: largest expected fraction of false verdicts among those that survive.
      control: the procedure.

    Raises:
      ValueError: the rate is not between 0 and 1.
    """
    items = [(study, comparison) for study in campaign.studies for comparison in study.findings.comparisons]
    if not 0 < rate < 1:
        raise ValueError(f"the rate of false discoveries is {rate}: give one between 0 and 1, such as 0.05")
    tests: list[tuple[int, Verdict | None, float]] = []
    for index, (study, comparison) in enumerate(items):
        tests.append((index, None, _difference_p(study, comparison)))
        if study.findings.rules.equal_within is not None:
            tests.append((index, Verdict.EQUAL, _equal_p(study, comparison)))
    p_values = [p for _, _, p in tests]
    if control is Control.BENJAMINI_YEKUTIELI:
        adjusted = benjamini_yekutieli(p_values)
    else:
        adjusted = e_bh([mixed_e_value(p) for p in p_values])
    adjusted_of = {(index, kind): value for (index, kind, _), value in zip(tests, adjusted, strict=True)}
    by_test = {(index, kind): p for index, kind, p in tests}
    comparisons = []
    for index, (study, comparison) in enumerate(items):
        kind = Verdict.EQUAL if comparison.verdict is Verdict.EQUAL else None
        comparisons.append(
            CampaignComparison(
                study=study.path,
                arm=comparison.arm,
                against=comparison.against,
                difference=None if comparison.judgement is None else comparison.judgement.difference,
                verdict=comparison.verdict,
                p_value=by_test[index, kind],
                adjusted=adjusted_of[index, kind],
                survives=comparison.verdict is not Verdict.NOT_RESOLVED and adjusted_of[index, kind] <= rate,
                promotion=promotion(campaign, study, comparison),
            )
        )
    return JudgedCampaign(
        directory=campaign.directory,
        rate=rate,
        control=control,
        num_tests=len(tests),
        num_equality_tests=len(tests) - len(items),
        comparisons=tuple(comparisons),
        problems=campaign.problems,
    )


def _difference_p(study: CampaignStudy, comparison: Comparison) -> float:
    judgement = comparison.judgement
    if judgement is None:
        return 1.0
    # After several looks the p value of the last one alone is too small.
    return judgement.p_value if study.findings.look is None else judgement.adjusted_p


def _equal_p(study: CampaignStudy, comparison: Comparison) -> float:
    judgement = comparison.judgement
    if judgement is None:
        return 1.0
    p = judgement.equal_p if study.findings.look is None else judgement.adjusted_equal_p
    return 1.0 if p is None else p


# Promotion --------------------------------------------------------------------------------------------------
def promotion(campaign: Campaign, study: CampaignStudy, comparison: Comparison) -> Promotion | None:
    """Return whether a winner may be the baseline of further studies; None for an arm that is not better.

    It may if a later study finds the same arm better than the same other arm, with seeds that no study before
    that one has used. Arms are the same if their experiments are, or, where these are not known, their names.
    """
    if comparison.verdict is not Verdict.BETTER:
        return None
    used = frozenset().union(*(each.seeds for each in campaign.studies))
    first_fresh = max(used) + 1
    arms = [study.findings.arm(name) for name in (comparison.arm, comparison.against)]
    attempts = []
    for later in campaign.studies[campaign.studies.index(study) + 1 :]:
        for other in later.findings.comparisons:
            others = [later.findings.arm(name) for name in (other.arm, other.against)]
            is_same = later.findings.metric == study.findings.metric and _are_same(arms, others)
            if is_same and not later.seeds & seeds_before(campaign, later):
                attempts.append((later.path, other.verdict))
    confirming = [path for path, verdict in attempts if verdict is Verdict.BETTER]
    if confirming:
        return Promotion(
            status=PromotionStatus.CONFIRMED, confirmed_by=confirming[0], first_fresh_seed=first_fresh
        )
    return Promotion(
        status=PromotionStatus.NOT_CONFIRMED if attempts else PromotionStatus.NEEDS_SEEDS,
        confirmed_by=attempts[-1][0] if attempts else None,
        first_fresh_seed=first_fresh,
    )


def seeds_before(campaign: Campaign, study: CampaignStudy) -> frozenset[int]:
    """Return the seeds that the studies before one have used."""
    before = campaign.studies[: campaign.studies.index(study)]
    return frozenset().union(*(each.seeds for each in before))


def _are_same(arms: Sequence[ArmSummary], others: Sequence[ArmSummary]) -> bool:
    return all(
        arm.experiment == other.experiment
        if arm.experiment is not None and other.experiment is not None
        else arm.arm == other.arm
        for arm, other in zip(arms, others, strict=True)
    )


# Tables -----------------------------------------------------------------------------------------------------
def print_campaign(judged: JudgedCampaign) -> None:
    """Print all comparisons of a campaign to standard output, those that survive first."""
    print_tables([_table(judged)], _lines(judged))


def campaign_markdown(judged: JudgedCampaign) -> str:
    """Return all comparisons of a campaign as Markdown."""
    return markdown_tables([_table(judged)], _lines(judged))


def _table(judged: JudgedCampaign) -> TextTable:
    ordered = sorted(judged.comparisons, key=lambda item: (not item.survives, item.p_value))
    rows = tuple(
        (
            item.study,
            f"{item.arm} − {item.against}",
            ABSENT if item.difference is None else f"{item.difference:+.4g}".replace("-", "−"),
            f"{item.adjusted:.2g}",
            item.verdict.value,
            "yes" if item.survives else "no" if item.verdict is not Verdict.NOT_RESOLVED else ABSENT,
        )
        for item in ordered
    )
    return TextTable(
        title=f"Campaign {judged.directory}: {counted(judged.num_tests, 'test')}, {judged.control.value}, at "
        f"most {100 * judged.rate:g} % false discoveries",
        head=("study", "arms", "difference", "adjusted p", "verdict", "survives"),
        rows=rows,
    )


def _lines(judged: JudgedCampaign) -> list[str]:
    num = len(judged.comparisons)
    lines = [f"Tests: one of the difference for each of {counted(num, 'comparison')}."]
    # Every test counts, those whose p value is not shown, too.
    if judged.num_equality_tests:
        lines = [
            f"Tests: one of the difference for each of {counted(num, 'comparison')}, and one of equality for "
            f"each of {judged.num_equality_tests:,} of them, whose studies state a margin."
        ]
    for item in judged.comparisons:
        if item.promotion is None:
            continue
        # A winner of its study alone is no candidate yet.
        text = item.promotion.text if item.survives else "it does not survive in the campaign"
        is_confirmed = item.survives and item.promotion.status is PromotionStatus.CONFIRMED
        state = "may be the new baseline" if is_confirmed else "is no new baseline yet"
        lines.append(f"{item.arm} ({item.study}) {state}: {text}.")
    return [*lines, *(f"Left out: {problem}" for problem in judged.problems)]
