"""Division is rounded once on any device, from quotients that are off by up to 2 ulp."""

import jax
import numpy as np
import pytest

from slmjax.formats.division import corrected_quotient, divide, reciprocal

COUNT = 1 << 14
SMALLEST = np.float32(2.0**-126)


def pairs(kind: str) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)

    def any_bits() -> np.ndarray:
        return draw.integers(-(2**31), 2**31, COUNT, dtype=np.int64).astype(np.int32).view(np.float32)

    def near_one() -> np.ndarray:
        return (1 + draw.integers(0, 64, COUNT) * 2.0**-23).astype(np.float32)

    if kind == "any bits":
        return any_bits(), any_bits()
    if kind == "by 7.5":
        return draw.normal(size=COUNT).astype(np.float32), np.full(COUNT, 7.5, np.float32)
    if kind == "halves":  # quotients that end in a half, ties between two codes
        divisors = draw.integers(1, 4096, COUNT).astype(np.float32)
        return (draw.integers(-256, 256, COUNT) + np.float32(0.5)).astype(np.float32) * divisors, divisors
    return near_one() * np.where(draw.random(COUNT) < 0.5, -1, 1).astype(np.float32), near_one()


@pytest.mark.parametrize("kind", ["any bits", "by 7.5", "halves", "about one"])
def test_it_is_the_nearest_value(kind: str) -> None:
    x, divisor = pairs(kind)
    with np.errstate(all="ignore"):
        exact = x / divisor
    is_normal = np.isfinite(exact) & np.isfinite(divisor) & (np.abs([x, divisor, exact]) >= SMALLEST).all(0)
    assert is_normal.mean() > 0.5
    x = x[is_normal]
    divisor = divisor[is_normal]
    exact = exact[is_normal]
    run = jax.jit(corrected_quotient)
    for ulp in range(-2, 3):
        guess = np.clip(
            (exact.view(np.int32) + ulp).view(np.float32), -np.finfo(np.float32).max, np.finfo(np.float32).max
        )
        np.testing.assert_array_equal(
            run(np.where(np.isfinite(guess), guess, exact), x, divisor), exact, err_msg=str(ulp)
        )
    np.testing.assert_array_equal(jax.jit(divide)(x, divisor), exact)
    divisor = divisor[np.abs(divisor) <= 1 / SMALLEST]
    np.testing.assert_array_equal(jax.jit(reciprocal)(divisor), np.float32(1) / divisor)


def test_values_that_are_not_normal_stay_as_they_are() -> None:
    x = np.array([np.nan, np.inf, 1, 0, 1, -np.inf, 2e38], np.float32)
    divisor = np.array([1, 2, np.inf, 3, 0, 0, 1e-10], np.float32)
    with np.errstate(all="ignore"):
        exact = x / divisor
    np.testing.assert_array_equal(jax.jit(divide)(x, divisor), exact)
    np.testing.assert_array_equal(jax.jit(corrected_quotient)(exact, x, divisor), exact)
    assert jax.jit(reciprocal)(np.zeros(1, np.float32))[0] == 0
