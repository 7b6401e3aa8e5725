"""Properties with their errors and bounds, and the report of all of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


class MixerError(AssertionError):
    """A mixer lacks properties that every mixer must have; the message lists them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A property of a mixer, how far it is off, and how far it may be."""

    name: str
    error: float  # NaN fails
    bound: float
    detail: str = ""  # where the error is largest, or what was compared

    @property
    def is_passed(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound

    def __str__(self) -> str:
        """Return the property with its numbers, on one line."""
        state = "ok" if self.is_passed else "FAILED"
        where = f" ({self.detail})" if self.detail else ""
        return f"{state}: {self.name}: {self.error:.2g}, at most {self.bound:.2g}{where}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The checks of one mixer."""

    mixer: str
    checks: tuple[Check, ...]
    skipped: tuple[str, ...] = ()  # what was not checked, with the reason

    @property
    def failed(self) -> tuple[Check, ...]:
        """The properties that the mixer lacks."""
        return tuple(check for check in self.checks if not check.is_passed)

    def __str__(self) -> str:
        """Return one line for each check, and one for each that was left out."""
        lines = [*map(str, self.checks), *(f"not checked: {text}" for text in self.skipped)]
        return "\n".join([f"{self.mixer}: {len(self.checks)} properties", *(f"  {line}" for line in lines)])


def largest_error(
    actual: Any, expected: Any, *, where: Any = None, scale: float | None = None
) -> tuple[float, str]:
    """Return the largest difference of two arrays over the largest number of the second, and its indices.

    Args:
      actual: array.
      expected: array of the same shape.
      where: leading dims of what counts, as a mask; None for all.
      scale: divisor of the difference; None for the largest number of `expected`.
    """
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    mask = np.ones(actual.shape, bool)
    if where is not None:
        mask &= np.asarray(where).reshape(*np.shape(where), *(1,) * (actual.ndim - np.ndim(where)))
    difference = np.where(mask, np.abs(actual - expected), 0.0)
    if not difference.size:
        return 0.0, ""
    if scale is None:
        scale = float(np.max(np.where(mask, np.abs(expected), 0.0)))
    # NaN is the largest error of all.
    index = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
    place = [int(i) for i in np.unravel_index(index, difference.shape)]
    return float(difference.reshape(-1)[index]) / max(scale, 1e-30), f"at {place}"


def largest_tree_error(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[float, str]:
    """Return the largest error of flat dicts of gradients, and the parameter that it is of.

    Each array has its own scale, of at least a thousandth of that of all: the gradient of a parameter that
    hardly matters is rounding.
    """
    floor = 1e-3 * max(float(np.max(np.abs(leaf), initial=0.0)) for leaf in expected.values())
    errors = {}
    for path, leaf in expected.items():
        scale = max(float(np.max(np.abs(leaf), initial=0.0)), floor)
        errors[path] = largest_error(actual[path], leaf, scale=scale)
    worst = max(errors, key=lambda path: np.nan_to_num(errors[path][0], nan=np.inf))
    return errors[worst][0], f"{worst} {errors[worst][1]}"


def count_not_finite(tree: Any) -> int:
    """Return how many numbers of a tree of arrays are infinite or NaN."""
    return sum(int(np.sum(~np.isfinite(np.asarray(leaf)))) for leaf in jax.tree.leaves(tree))
