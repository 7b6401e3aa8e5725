"""Findings and reports written by hand: tests of pages and texts need neither statistics nor runs.

findings = sample_findings()                       # five arms, three seeds, all four verdicts
report = sample_report(names=("base", "a & b"))    # everything that a page can show
"""

import math
from typing import Any

from slmjax.studies.findings import ArmSummary, Comparison, Divergence, Findings
from slmjax.studies.statistics.results_table import Rules
from slmjax.studies.statistics.samples import paired_difference, summarize
from slmjax.studies.statistics.verdicts import Judgement, Noise, Verdict

# Names that no format may take for markup.
ODD_NAMES = ("base", "a & b_c", "<script>alert(1)</script>", "50% | #1 ~ x^2 {y} \\z $", "名前 “é” `*`\n[x]")
SHIFTS = (0.0, -0.05, 0.04, -0.001, 0.012)
VERDICTS = (Verdict.BETTER, Verdict.WORSE, Verdict.EQUAL, Verdict.NOT_RESOLVED)


def sample_values(
    names: tuple[str, ...] = ODD_NAMES, seeds: tuple[int, ...] = (0, 1, 2)
) -> dict[str, list[float]]:
    """A metric of each arm by seed."""
    return {
        name: [
            1.7 + SHIFTS[i % len(SHIFTS)] + 0.003 * math.sin(7 * seed + i) + 0.002 * seed
            for seed in range(len(seeds))
        ]
        for i, name in enumerate(names)
    }


def sample_findings(
    names: tuple[str, ...] = ODD_NAMES, seeds: tuple[int, ...] = (0, 1, 2), **changes: Any
) -> Findings:
    """Findings of arms whose verdicts are better, worse, equal and not resolved, in turn."""
    values = sample_values(names, seeds)
    arms = tuple(
        ArmSummary(
            arm=name,
            seeds=seeds,
            values=tuple(values[name]),
            metric=summarize(values[name]),
            interval=(values[name][0] - 0.01, values[name][0] + 0.01) if len(seeds) > 1 else None,
            further_metrics={"calibration_error": summarize([0.01 * each for each in values[name]])},
            budget=summarize([614_400.0]),
            diverged=(),
            divergence=Divergence(num_runs=len(seeds), num_diverged=0, interval=(0.0, 0.7)),
        )
        for name in names
    )
    comparisons = tuple(
        Comparison(
            arm=name,
            against=names[0],
            judgement=_judgement(values, name, names[0], seeds, VERDICTS[i % 4]) if len(seeds) > 1 else None,
            differences=tuple(a - b for a, b in zip(values[name], values[names[0]], strict=True)),
            further_metrics={},
        )
        for i, name in enumerate(names[1:])
    )
    fields: dict[str, Any] = {
        "study": "shape & size",
        "question": "Does the shape of a model matter?",
        "metric": "bits_per_byte",
        "rules": Rules(equal_within=0.005),
        "baseline": names[0],
        "seeds": seeds,
        "arms": arms,
        "comparisons": comparisons,
        "noise": Noise(
            deviation=0.0034,
            degrees_of_freedom=8,
            own={name: 0.003 + 0.001 * i for i, name in enumerate(names)},
            noisy=names[-1:],
            equality_p=0.03,
        ),
        "level": 0.05,
        "look": None,
        "budget": "tokens",
        "is_matched": True,
        "notes": ("Members were trained by 2 commits of the code.",),
    }
    return Findings(**{**fields, **changes})


def _judgement(
    values: dict[str, list[float]], arm: str, against: str, seeds: tuple[int, ...], verdict: Verdict
) -> Judgement:
    difference = paired_difference(values[arm], values[against])
    return Judgement(
        arm=arm,
        against=against,
        seeds=seeds,
        imputed=(),
        difference=difference.mean,
        standard_error=difference.standard_error,
        degrees_of_freedom=8.0,
        variance="pooled",
        interval=difference.t_interval,
        bootstrap_interval=difference.bootstrap_interval,
        p_value=difference.p_value,
        adjusted_p=min(1.0, 4 * difference.p_value),
        equal_p=0.01 if verdict is Verdict.EQUAL else 0.4,
        verdict=verdict,
        seeds_needed=12 if verdict is Verdict.NOT_RESOLVED else None,
    )
