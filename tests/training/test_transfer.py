"""The best learning rate of small models over widths and depths, by parameterization: it stays where theory
says so, and moves where nothing keeps it.
"""

import argparse

import pytest

from benchmarks import transfer
from slmjax.models.parameterization import Parameterization

STANDARD, MUP, COMPLETEP = Parameterization


def test_minimum_of_a_quadratic_in_the_logarithm():
    """The loss (log2 rate - log2 optimum)**2 has its minimum between the grid's rates."""
    rates = (0.5, 1.0, 2.0, 4.0)
    # By hand: the optimum is 2**0.25.
    best, is_resolved = transfer.best_rate(rates, [(exponent - 0.25) ** 2 for exponent in (-1, 0, 1, 2)])
    assert is_resolved and best == pytest.approx(2**0.25)
    assert transfer.best_rate(rates, [3.0, 2.0, 1.0, 0.5]) == (4.0, False)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("axis", "keeps", "moves", "expected"), [("width", MUP, STANDARD, 6.0), ("depth", COMPLETEP, MUP, 1.9)]
)
def test_the_best_rate_stays_or_moves(axis, keeps, moves, expected):
    """Four times as wide, and as deep; as found by `benchmarks/transfer.py` with more sizes and steps."""
    args = argparse.Namespace(
        optimizer="adamw", muon_ratio=5.0, widths=(64, 256), depths=(2, 8), steps=20, seeds=1
    )
    found = transfer.measure(axis, keeps, args)
    assert all(row["resolved"] for row in found["sizes"].values())
    assert found["moved"] < 1.25
    assert transfer.measure(axis, moves, args)["moved"] == pytest.approx(expected, rel=0.3)
