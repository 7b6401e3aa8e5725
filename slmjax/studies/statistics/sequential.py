"""Fixed looks at a study whose seeds are added: the error is spent over looks that were chosen beforehand.

    nominal_levels((3, 5, 8), level=0.05)                  # of the test at each look
    sequential_p_value([0.03, 0.01], looks=(3, 5, 8))      # after two looks, comparable with 0.05

Lan and DeMets (1983): of the probability of a false rejection, a function of the information fraction (seeds
over those of the last look) has been spent by each look. The boundary of a look is such that what is spent
there is exactly the increase of this function. Statistics of two looks have the correlation sqrt(n1 / n2).
Boundaries are computed for normal statistics, expressed as levels of a single test, and applied to the p
values of t tests ("significance level approach", Jennison and Turnbull, 2000, section 3.8): the overall error
with 3, 5 and 8 seeds then is within a tenth of the level.

All levels and p values are two-sided. Each side is treated alone, so that the same levels are twice those of
one-sided tests.

K: looks, L: levels, Q: nodes of quadratures.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

from slmjax.studies.statistics.results_table import Spending

NODES = 80
FARTHEST = 8.0  # standard deviations below which nothing of a normal distribution counts
LOWEST_LEVEL = 1e-12  # two-sided; smaller p values are as good as this one


def spent(fraction: float, *, level: float, spending: Spending = Spending.OBRIEN_FLEMING) -> float:
    """Return the two-sided level that has been spent at an information fraction.

    With a the level of one side, O'Brien-Fleming-like spending is 2 (1 - Phi(z(1 - a / 2) / sqrt(t))) for
    each side, which leaves almost all to the last look; Pocock-like is a log(1 + (e - 1) t), whose looks have
    about the same level.

    Raises:
      ValueError: the fraction is not above 0, or the level not between 0 and 1.
    """
    if not fraction > 0:
        raise ValueError(f"an information fraction is {fraction}: give one above 0")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a probability between 0 and 1, such as 0.05")
    # More seeds than planned spend no more than the level.
    fraction = min(fraction, 1.0)
    if spending is Spending.POCOCK:
        return level * math.log1p((math.e - 1) * fraction)
    return 4 * float(stats.norm.sf(stats.norm.isf(level / 4) / math.sqrt(fraction)))


@functools.cache
def nominal_levels(
    looks: tuple[int, ...], *, level: float = 0.05, spending: Spending = Spending.OBRIEN_FLEMING
) -> tuple[float, ...]:
    """Return the two-sided level of the test at each look, given by its number of seeds.

    Raises:
      ValueError: looks are not rising numbers of seeds, or the level is not between 0 and 1.
    """
    _check_looks(looks)
    fractions = [look / looks[-1] for look in looks]
    totals = [spent(fraction, level=level, spending=spending) for fraction in fractions]
    levels = []
    density = None
    for i, fraction in enumerate(fractions):
        # What one side spends at this look; early increases may round to 0.
        share = max(totals[i] - (totals[i - 1] if i else 0.0), 1e-300) / 2
        step = fraction - (fractions[i - 1] if i else 0.0)
        boundary = _boundary(density, fraction, step, share)
        levels.append(2 * float(stats.norm.sf(boundary / math.sqrt(fraction))))
        density = _continued(density, fraction, step, boundary)
    return tuple(levels)


def sequential_p_value(
    p_values: Sequence[float],
    looks: tuple[int, ...],
    *,
    spending: Spending = Spending.OBRIEN_FLEMING,
) -> float:
    """Return the smallest level at which one of the looks so far rejects.

    It is a p value of the whole design, for Holm's correction as others are (Liu and Anderson, 2008; Maurer
    and Bretz, 2013): once a hypothesis has been rejected, later looks do not change that. It is read from a
    table of nominal levels, within 0.1 % of itself, and is at least 1e-12.

    Args:
      p_values: two-sided, of the looks so far, in order.
      looks: numbers of seeds of all looks that were planned.
      spending: as planned.

    Raises:
      ValueError: there are more p values than looks, or one is not between 0 and 1.
    """
    if len(p_values) > len(looks):
        raise ValueError(f"{len(p_values)} p values for {len(looks)} looks: give one for each look so far")
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is not a p value: it must be between 0 and 1")
    levels, nominal = _table(looks, spending)
    smallest = 1.0
    for i, value in enumerate(p_values):
        # A p value above all that is spent at this look rejects at no level.
        if value > nominal[-1, i]:
            continue
        log_level = np.interp(math.log(max(value, 1e-300)), np.log(nominal[:, i]), np.log(levels))
        smallest = min(smallest, float(np.exp(log_level)))
    return smallest


# Boundaries -------------------------------------------------------------------------------------------------
# The sum of the observations, in units in which the whole study has variance 1: at an information fraction t
# its variance is t. Its density is kept at nodes, for sums that have not crossed the boundary before.
Density = tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]  # nodes, and density times weight


def _boundary(density: Density | None, fraction: float, step: float, share: float) -> float:
    """Return the sum above which the probability of a study without effect that gets here is `share`."""
    if density is None:
        return math.sqrt(fraction) * float(stats.norm.isf(share))

    def excess(boundary: float) -> float:
        # In logarithms, for the smallest of shares.
        return math.log(max(_crossing(density, boundary, step), 1e-320)) - math.log(share)

    high = 40.0 * math.sqrt(fraction)
    low = -FARTHEST * math.sqrt(fraction)
    # Less is left than this look may spend: every study that gets here is rejected.
    if excess(low) < 0:
        return low
    return optimize.root_scalar(excess, bracket=(low, high), xtol=1e-10).root


def _crossing(density: Density, boundary: float, step: float) -> float:
    """Return the probability of a sum above the boundary after one more step."""
    nodes, mass = density
    return float(mass @ special.ndtr((nodes - boundary) / math.sqrt(step)))


def _continued(density: Density | None, fraction: float, step: float, boundary: float) -> Density:
    """Return the density of the sums at a look that have not crossed its boundary."""
    low = -FARTHEST * math.sqrt(fraction)
    high = min(boundary, FARTHEST * math.sqrt(fraction))
    points, weights = _quadrature()
    nodes = low + (high - low) * points
    if density is None:
        values = stats.norm.pdf(nodes, scale=math.sqrt(fraction))
    else:
        before, mass = density
        values = stats.norm.pdf(nodes[:, None] - before, scale=math.sqrt(step)) @ mass
    return nodes, values * weights * (high - low)


@functools.cache
def _quadrature() -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return (nodes + 1) / 2, weights / 2


@functools.cache
def _table(
    looks: tuple[int, ...], spending: Spending
) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, "L K"]]:
    """Return levels of a whole design, and the nominal levels of its looks."""
    # Close to 1, both sides of a test together exceed it: what is not rejected at 0.99 counts as 1.
    levels = np.concatenate([np.geomspace(LOWEST_LEVEL, 0.1, 60), np.linspace(0.12, 0.99, 30)])
    nominal = [nominal_levels(looks, level=float(level), spending=spending) for level in levels]
    return levels, np.array(nominal)


def _check_looks(looks: Sequence[int]) -> None:
    if not looks or min(looks) < 1 or list(looks) != sorted(set(looks)):
        raise ValueError(f"looks are {tuple(looks)}: give rising numbers of seeds, such as 3, 5, 8")
