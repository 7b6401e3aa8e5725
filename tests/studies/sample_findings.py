"""Findings and reports written by hand: tests of pages and texts need neither statistics nor runs.

findings = sample_findings()                       # five arms, three seeds, all four verdicts
report = sample_report(names=("base", "a & b"))    # everything that a page can show
"""

import dataclasses
import math
from typing import Any

from slmjax.studies.findings import ArmSummary, Comparison, Divergence, Findings
from slmjax.studies.report import StudyReport, report_of
from slmjax.studies.report.data import (
    ArmReport,
    Curve,
    CurveChart,
    DivergedCurve,
    LadderReport,
    LadderRow,
    MatchReport,
    SettingReport,
    TextNoise,
    TunedReport,
)
from slmjax.studies.statistics.results_table import Rules, VarianceSource
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
        variance=VarianceSource.POOLED,
        interval=difference.t_interval,
        bootstrap_interval=difference.bootstrap_interval,
        p_value=difference.p_value,
        adjusted_p=min(1.0, 4 * difference.p_value),
        equal_p=0.01 if verdict is Verdict.EQUAL else 0.4,
        adjusted_equal_p=0.02 if verdict is Verdict.EQUAL else 0.8,
        verdict=verdict,
        seeds_needed=12 if verdict is Verdict.NOT_RESOLVED else None,
    )


# A report with every part -----------------------------------------------------------------------------------
def sample_report(
    names: tuple[str, ...] = ODD_NAMES, seeds: tuple[int, ...] = (0, 1, 2), **changes: Any
) -> StudyReport:
    """A report with everything that a page can show: the last arm has a run that diverged."""
    report = report_of(sample_findings(names, seeds))
    arms = tuple(_with_costs(arm, i) for i, arm in enumerate(report.arms))
    last = dataclasses.replace(
        arms[-1], ended=len(seeds), diverged=1, failed=1, seeds=seeds[:-1], diverged_interval=(0.01, 0.9)
    )
    tried = (5e-4, 1e-3, 2e-3, 4e-3)
    fields: dict[str, Any] = {
        "arms": (*arms[:-1], last),
        "smallest_effect": 0.01,
        "look": "Look at 3 seeds of those planned (3, 5, 8): verdicts at level 0.012.",
        "noise": dataclasses.replace(
            report.noise,
            smallest_resolved=0.012,
            notes=("The ledger has 0.0031 for models of this size, from 12 pairs of equal runs.",),
        ),
        "text": tuple(
            TextNoise(
                arm=item.arm,
                against=item.against,
                seeds_error=0.002,
                text_error=0.0011,
                documents=312,
                advice="seeds",
            )
            for item in report.comparisons
        ),
        "matched": tuple(
            MatchReport(
                arm=name,
                quantity="flops",
                target=1.234e13,
                before=1.5e13,
                after=1.231e13 + i * 1e10,
                changed=f"steps 300 to {250 - i}",
                is_met=i < 3,
                text="" if i < 3 else f"{name}: no number of steps reaches the target.",
            )
            for i, name in enumerate(names[1:])
        ),
        "tuned": tuple(
            TunedReport(
                arm=name,
                rate=1.4e-3 if i % 3 else 2e-3,
                tried=tuple(
                    (rate, 1.7 + 0.02 * (math.log2(rate / 1.4e-3)) ** 2 + 0.01 * i) for rate in tried
                ),
                seeds=(1000,),
                is_resolved=i != 1,
                sensitivity=0.03,
                text="the optimum is at the edge of the range." if i == 1 else "",
            )
            for i, name in enumerate(names)
        ),
        "curves": (
            _curves("held-out", "Held-out bits per byte", names),
            _curves("training", "Training loss", names),
        ),
        "settings_of": names,
        "settings": tuple(
            SettingReport(path=path, values=tuple(f"{10 * (i + 1)}" for i in range(len(names))))
            for path in ("model.stack.0.repeats", "model.d_model", "optim.lr", "run.steps")
        ),
        "ladder": LadderReport(
            name="width",
            rows=tuple(
                LadderRow(
                    arm=name,
                    against=names[0],
                    size=size,
                    flops=flops,
                    verdict="worse",
                    difference=0.02,
                    error=0.003,
                    interval=(0.014, 0.026),
                    speedup="0.8 times",
                )
                for name in names[1:]
                for size, flops in (("1M", 1e12), ("4M", 1.6e13))
            ),
            trends=(f"{names[-1]} − {names[0]}: The gap shrinks: −0.01 for ten times the FLOPs.",),
            notes=("The baseline's loss falls as FLOPs to the power −0.2.",),
        ),
        "changes": ("2026-12-01: optim.lr of wide was 0.001 when the study was fixed, and is 0.002.",),
        "environment": (("commit", "c0ffee"), ("jax", "0.10.2"), ("devices", "1 x cpu")),
        "commands": ("git checkout c0ffee", "slmjax ablate study.py", "slmjax report shape"),
    }
    return dataclasses.replace(report, **{**fields, **changes})


def _with_costs(arm: ArmReport, index: int) -> ArmReport:
    costs = {
        "parameters": 610_304.0 * (1 + index % 3),
        "flops": 1.23e13 * (1 + 0.4 * index),
        "tokens": 614_400.0,
        "training_seconds": 48.0 + 18 * index,
        "seconds": 61.0 + 20 * index,
        "tokens_per_second": 10_000.0 - 900 * index,
        "memory_bytes": 212e6 + 1e7 * index,
        "deployed_bytes": 1.2e6 * (1 + index % 3),
        "cache_bytes": 65_536.0,
    }
    return dataclasses.replace(arm, costs=costs)


def _curves(name: str, title: str, names: tuple[str, ...]) -> CurveChart:
    steps = tuple(range(10, 310, 10))

    def value(step: int, index: int, shift: float = 0.0) -> float:
        return 1.6 + 6 / (1 + step / 15) + SHIFTS[index % len(SHIFTS)] + shift

    return CurveChart(
        name=name,
        title=title,
        about="evaluations during training",
        curves=tuple(
            Curve(
                arm=arm,
                steps=steps,
                mean=tuple(value(step, i) for step in steps),
                low=tuple(value(step, i, -0.02) for step in steps),
                high=tuple(value(step, i, 0.02) for step in steps),
                num_runs=3,
            )
            for i, arm in enumerate(names)
        ),
        diverged=(
            DivergedCurve(
                arm=names[-1],
                seed=2,
                steps=steps[:12],
                values=tuple(value(step, 0, step**2 / 40_000) for step in steps[:12]),
            ),
        ),
    )
