"""Codes that change from one line of the log to the next."""

import jax.numpy as jnp
import numpy as np

from slmjax.formats.presets import preset
from slmjax.quantization.assignment import TensorQuant
from slmjax.quantization.estimators import StraightThrough
from slmjax.quantization.flips import CodeFlips


def test_codes_that_differ_are_counted():
    """In a table of 2 x 32 and a stack of which one layer of two has a format: 64 + 128 codes."""
    table, stacked = (
        TensorQuant(spec=preset("q8_0"), estimator=StraightThrough(), axis=axis) for axis in (-1, -2)
    )
    flips = CodeFlips({"embed/table": (table,), "segments/0/blocks/0/ffn/up/weight": (None, stacked)})
    numbers = np.linspace(-1, 1, 32, dtype=np.float32)
    first = {
        "embed/table": jnp.asarray(np.tile(numbers, (2, 1))),
        "segments/0/blocks/0/ffn/up/weight": jnp.asarray(np.tile(numbers[:, None], (2, 1, 4))),
    }
    flips.begin(first, step=3)
    table_moved = first["embed/table"].at[0, 4].add(2 / 127).at[1, 7].add(0.1 / 127).at[1, 9].add(-5 / 127)
    stack_moved = first["segments/0/blocks/0/ffn/up/weight"].at[0].multiply(-1).at[1, 5, 2].add(1 / 127)
    second = {"embed/table": table_moved, "segments/0/blocks/0/ffn/up/weight": stack_moved}
    assert flips.count(second, step=5) == {
        "flipped_codes": np.float32(3) / np.float32(192),
        "flipped_since": 3,
    }
    assert flips.count(second, step=7) == {"flipped_codes": 0.0, "flipped_since": 5}
    assert flips.count(first, step=8)["flipped_codes"] == np.float32(3) / np.float32(192)
