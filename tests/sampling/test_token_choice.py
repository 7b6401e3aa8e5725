"""From logits to tokens: filters by hand, and draws from the distribution they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.sampling import filtered_logits, next_tokens, penalised

# Probabilities in powers of two, out of order: sums and comparisons are exact.
PROBABILITIES = [[0.125, 0.5, 0.0625, 0.25, 0.0625]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES[0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"top_k": 4}, [2 / 15, 8 / 15, 1 / 15, 4 / 15, 0]),  # of the equal ones the first stays
        ({"top_p": 0.75}, [0, 2 / 3, 0, 1 / 3, 0]),  # 0.5 + 0.25 reaches it
        ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7, 0]),
        ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),  # at least one
        (
            {"top_k": 3, "top_p": 0.6},
            [0, 2 / 3, 0, 1 / 3, 0],
        ),  # of [4, 2, 1] / 7: top-p alone would keep the same two
        (
            {"top_k": 3, "top_p": 0.857},
            [0, 2 / 3, 0, 1 / 3, 0],
        ),  # 6/7 reaches it: without top-k it would be three tokens
        ({"min_p": 0.5}, [0, 2 / 3, 0, 1 / 3, 0]),  # at least half as likely as the likeliest
        ({"min_p": 0.25}, [1 / 7, 4 / 7, 0, 2 / 7, 0]),
        ({"min_p": 0.25, "top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"min_p": 1.0, "top_p": 0.99}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, [4 / 90, 64 / 90, 1 / 90, 16 / 90, 1 / 90 + 4 / 90]),  # squares; see below
    ],
)
def test_filters_by_hand(settings: dict, expected: list[float]) -> None:
    if "temperature" in settings:
        squares = np.square(PROBABILITIES[0])
        expected = (squares / squares.sum()).tolist()
    remaining = filtered_logits(jnp.log(jnp.asarray(PROBABILITIES)), **{"temperature": 1.0, **settings})
    np.testing.assert_allclose(jax.nn.softmax(remaining)[0], expected, rtol=1e-5, atol=1e-7)


def test_temperature_comes_before_top_p() -> None:
    remaining = filtered_logits(jnp.log(jnp.asarray(PROBABILITIES)), temperature=0.5, top_p=0.9)
    assert (jax.nn.softmax(remaining)[0] > 0).tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]  # 64 + 16 of 86 parts, 0.93
    warm = filtered_logits(jnp.log(jnp.asarray(PROBABILITIES)), temperature=1.0, top_p=0.9)
    assert (jax.nn.softmax(warm)[0] > 0).tolist() == [True, True, True, True, False]


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    rows = jnp.asarray([[1.0, 300.0, 299.0], [-5.0, -900.0, -5.1]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert next_tokens(rows, keys, temperature=1e-30, top_k=None, top_p=None).tolist() == [1, 0]


def test_draws_follow_the_filtered_distribution() -> None:
    num_draws = 4000
    expected = np.asarray([1 / 7, 4 / 7, 2 / 7])
    rows = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES)), (num_draws, 5))
    drawn = next_tokens(
        rows, jax.random.split(jax.random.key(0), num_draws), temperature=1.0, top_k=3, top_p=None
    )
    counts = np.bincount(np.asarray(drawn), minlength=5)
    assert counts[2] == counts[4] == 0
    chi_square = np.sum(np.square(counts[[0, 1, 3]] - num_draws * expected) / (num_draws * expected))
    assert chi_square < 13.8  # two degrees of freedom: exceeded by one seed in a thousand


def test_a_penalty_by_hand() -> None:
    rows = jnp.asarray([[2.0, -2.0, 0.0, 1.0]])
    seen = jnp.asarray([[True, True, True, False]])
    assert penalised(rows, seen, penalty=2.0).tolist() == [[1.0, -4.0, 0.0, 1.0]]
