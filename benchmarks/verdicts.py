"""Power and false verdicts of the rules that judge comparisons, by simulation.

    python benchmarks/verdicts.py [--studies 4000] [--seeds 3 5 8] [--arms 9]

Each study has arms and a baseline, judged by `slmjax.studies.statistics.verdicts.assess`. Deviations are
those of one run; each seed also has an effect on all arms, which pairing removes. Columns of the first table:

- own: the variance of the pair's own differences
- pooled: the residual of the two-way table arms x seeds
- larger: the larger of both
- final: the larger of both, with arms apart that are noisier or may be, as `VarianceRule.LARGER` has it

The first three are computed without setting arms apart. The further tables are of the final rule: the power
that was planned, the coverage of intervals, equality, and fixed looks.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from slmjax.studies.statistics.power import (
    power_of_difference,
    power_of_equality,
    smallest_equal,
    smallest_resolved,
)
from slmjax.studies.statistics.results_table import Rules, Spending, Table
from slmjax.studies.statistics.verdicts import Assessed, Verdict, assess

LEVEL = 0.05
EFFECT = 3.0  # of the arm that differs, in deviations of a run
NAMES = ("own", "pooled", "larger", "final")


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of a study."""

    name: str
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]  # deviation 1
    scales: dict[int, float] = dataclasses.field(default_factory=dict)  # of arms that differ


def normal(draws: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw normal noise."""
    return draws.normal(size=shape)


def heavy(draws: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw noise of Student's t with three degrees of freedom."""
    return draws.standard_t(3, size=shape) / math.sqrt(3)


SCENARIOS = (
    Noise("equal noise", normal),
    Noise("one arm 2 times noisier", normal, {1: 2.0}),
    Noise("one arm 4 times noisier", normal, {1: 4.0}),
    Noise("one arm 10 times noisier", normal, {1: 10.0}),
    Noise("two arms 4 times noisier", normal, {1: 4.0, 2: 4.0}),
    Noise("the baseline 2 times noisier", normal, {0: 2.0}),
    Noise("the baseline 4 times noisier", normal, {0: 4.0}),
    Noise("heavy tails (t, 3 degrees of freedom)", heavy),
)


def studies(noise: Noise, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Return values of studies, arms and seeds, without an effect."""
    draws = np.random.default_rng(seed)
    values = noise.draw(draws, shape)
    for arm, scale in noise.scales.items():
        values[:, arm] *= scale
    return values + draws.normal(size=(shape[0], 1, shape[2]))


def assessed(values: np.ndarray, rules: Rules) -> Assessed:
    """Assess all arms of a study against the first; values of runs that diverged are NaN."""
    arms = tuple(str(i) for i in range(len(values)))
    table = Table(
        arms=arms,
        seeds=tuple(range(values.shape[1])),
        values=values,
        diverged=np.isnan(values),
    )
    return assess(table, [(arm, arms[0]) for arm in arms[1:]], rules)


def p_values_by_rule(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return p of each study and comparison by the rules that set no arm apart."""
    _, arms, seeds = values.shape
    differences = values[:, 1:] - values[:, :1]
    own = differences.var(axis=-1, ddof=1)
    means = values.mean(axis=-1, keepdims=True)
    residuals = values - means - values.mean(axis=1, keepdims=True) + means.mean(axis=1, keepdims=True)
    degrees = (arms - 1) * (seeds - 1)
    pooled = 2 * np.square(residuals).sum(axis=(1, 2))[:, None] / degrees
    t = np.abs(differences.mean(axis=-1)) * math.sqrt(seeds)
    return {
        "own": 2 * stats.t.sf(t / np.sqrt(own), seeds - 1),
        "pooled": 2 * stats.t.sf(t / np.sqrt(pooled), degrees),
        "larger": 2 * stats.t.sf(t / np.sqrt(np.maximum(own, pooled)), degrees),
    }


def shares_resolved(values: np.ndarray, comparison: int | None) -> list[float]:
    """Return the share of studies with a verdict by rule: on one comparison, or on any."""
    shares = []
    for p_values in p_values_by_rule(values).values():
        # The first step of Holm's correction: any verdict at all is one on the smallest p value.
        chosen = p_values.min(axis=1) if comparison is None else p_values[:, comparison]
        shares.append(float(np.mean(chosen <= LEVEL / p_values.shape[1])))
    verdicts = [assessed(study, Rules()).verdicts for study in values]
    resolved = np.array([[verdict is not Verdict.NOT_RESOLVED for verdict in study] for study in verdicts])
    shares.append(float(np.mean(resolved.any(axis=1) if comparison is None else resolved[:, comparison])))
    return shares


def share_with_any_verdict(values: np.ndarray) -> float:
    """Return the share of studies with any verdict by the final rule."""
    verdicts = [assessed(study, Rules()).verdicts for study in values]
    return float(
        np.mean([any(verdict is not Verdict.NOT_RESOLVED for verdict in study) for study in verdicts])
    )


def print_row(name: str, cells: Sequence[str]) -> None:
    """Print a row of a Markdown table."""
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def percent(share: float) -> str:
    """Format a share."""
    return f"{100 * share:.1f} %"


def print_rules(args: argparse.Namespace) -> None:
    """Print false verdicts and power by rule."""
    print(f"\n{args.arms} arms, {args.arms - 1} comparisons with a baseline, {args.studies} studies each")
    print(f"| | {' | '.join(f'{seeds} seeds: {name}' for seeds in args.seeds for name in NAMES)} |")
    print("|---|" + "---|" * (len(args.seeds) * len(NAMES)))
    for noise in SCENARIOS:
        cells = []
        for seeds in args.seeds:
            values = studies(noise, (args.studies, args.arms, seeds), args.seed)
            cells += [percent(share) for share in shares_resolved(values, None)]
        print_row(f"any false verdict, {noise.name}", cells)
    cells = []
    for seeds in args.seeds:
        values = studies(SCENARIOS[0], (args.studies, args.arms, seeds), args.seed + 5)
        # The seed's own effect, which all arms share, does not make runs diverge.
        excess = values - values.mean(axis=1, keepdims=True)
        values[excess > np.quantile(excess, 0.9)] = np.nan
        cells += ["", "", "", percent(share_with_any_verdict(values))]
    print_row("any false verdict, the worst tenth of runs diverge", cells)
    for noise, name in ((SCENARIOS[0], "equal noise"), (SCENARIOS[2], "another arm 4 times noisier")):
        cells = []
        for seeds in args.seeds:
            values = studies(noise, (args.studies, args.arms, seeds), args.seed + 1)
            values[:, 3] += EFFECT
            cells += [percent(share) for share in shares_resolved(values, 2)]
        print_row(f"an effect of {EFFECT:g} deviations resolved, {name}", cells)


def print_plans(args: argparse.Namespace) -> None:
    """Print planned and simulated power, coverage of intervals, and equality."""
    print("\n| | " + " | ".join(f"{seeds} seeds" for seeds in args.seeds) + " |")
    print("|---|" + "---|" * len(args.seeds))
    rows: dict[str, list[str]] = {}
    comparisons = args.arms - 1
    for seeds in args.seeds:
        degrees = comparisons * (seeds - 1)
        pair = math.sqrt(2)
        effect = smallest_resolved(pair, seeds, comparisons, degrees)
        values = studies(SCENARIOS[0], (args.studies, args.arms, seeds), args.seed + 2)
        values[:, 3] += effect
        outcomes = [assessed(study, Rules()) for study in values]
        resolved = np.mean([outcome.verdicts[2] is Verdict.WORSE for outcome in outcomes])
        covered = [
            abs(estimate.mean - truth) <= stats.t.isf(LEVEL / 2, estimate.degrees) * estimate.error
            for outcome in outcomes[: args.studies // 4]
            for estimate, truth in ((outcome.estimates[2], effect), (outcome.estimates[0], 0.0))
            if estimate is not None
        ]
        margin = smallest_equal(pair, seeds, comparisons, degrees)
        values = studies(SCENARIOS[0], (args.studies, args.arms, seeds), args.seed + 3)
        rules = Rules(equal_within=margin)
        equal = np.mean([assessed(study, rules).verdicts[2] is Verdict.EQUAL for study in values])
        # Half of the arms differ by a hair less than the margin allows, half not at all.
        values[:, 1 : 1 + comparisons // 2] += margin
        false = [
            any(verdict is Verdict.EQUAL for verdict in outcome.verdicts[: comparisons // 2])
            or any(
                verdict in (Verdict.BETTER, Verdict.WORSE) for verdict in outcome.verdicts[comparisons // 2 :]
            )
            for outcome in (assessed(study, rules) for study in values)
        ]
        for name, cell in (
            ("smallest effect resolved 4 times in 5, in deviations of a run", f"{effect:.2f}"),
            ("planned power", percent(power_of_difference(effect, pair, seeds, comparisons, degrees))),
            ("simulated power", percent(resolved)),
            ("coverage of 95 % intervals", percent(np.mean(covered))),
            ("smallest margin of equality found 4 times in 5", f"{margin:.2f}"),
            ("planned power", percent(power_of_equality(margin, pair, seeds, comparisons, degrees))),
            ("simulated power of equality", percent(equal)),
            ("any false verdict, half of the arms at the margin", percent(np.mean(false))),
        ):
            rows.setdefault(name if name != "planned power" else f"{name} ", []).append(cell)
    for name, cells in rows.items():
        print_row(name, cells[: len(args.seeds)])


def print_looks(args: argparse.Namespace) -> None:
    """Print false verdicts and power with fixed looks."""
    looks = tuple(args.seeds)
    print(f"\n| looks at {', '.join(map(str, looks))} seeds | any false verdict | the effect resolved |")
    print("|---|---|---|")
    for name, rules in (
        ("once, at the end", Rules()),
        *((spending.value, Rules(looks=looks, spending=spending)) for spending in Spending),
    ):
        values = studies(SCENARIOS[0], (args.studies // 2, args.arms, looks[-1]), args.seed + 4)
        false = [
            any(verdict is not Verdict.NOT_RESOLVED for verdict in assessed(study, rules).verdicts)
            for study in values
        ]
        values[:, 3] += EFFECT / 2
        resolved = [assessed(study, rules).verdicts[2] is Verdict.WORSE for study in values]
        print_row(
            f"{name}, an effect of {EFFECT / 2:g}", [percent(np.mean(false)), percent(np.mean(resolved))]
        )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--arms", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    args = parser.parse_args()
    print_rules(args)
    print_plans(args)
    print_looks(args)


if __name__ == "__main__":
    main()
