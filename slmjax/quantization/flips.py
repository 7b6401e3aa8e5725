"""Codes of weights that change in training, from one line of the log to the next.

    flips = CodeFlips(weight_formats(definition))
    flips.begin(state.params, 100)
    flips.count(state.params, 110)      # {"flipped_codes": 0.0123, "flipped_since": 100}

Weights that oscillate between two codes show as a fraction that does not fall with the learning rate (Nagel
et al. 2022).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.models.definition import Params
from slmjax.quantization import weights
from slmjax.quantization.weights import Formats

Codes = Mapping[str, Array]


class CodeFlips:
    """A counter that stores the codes of the last count on the devices, a byte for each weight.

    Without formats it counts nothing.
    """

    def __init__(self, formats_of: Formats) -> None:
        self._formats_of = formats_of
        self._is_counting = bool(formats_of)

        def compare(params: Params, before: Codes) -> tuple[Codes, Array]:
            now = weights.codes(params, formats_of)
            return now, fraction_of_flips(before, now, formats_of)

        self._codes = jax.jit(lambda params: weights.codes(params, formats_of))
        # The former codes are donated: two copies would take two bytes for each weight.
        self._compare = jax.jit(compare, donate_argnums=1)
        self._before: Codes = {}
        self._step = 0

    def fresh(self) -> "CodeFlips":
        """Return a counter for another run with the same formats."""
        return CodeFlips(self._formats_of)

    def begin(self, params: Params, step: int) -> None:
        """Store the codes of `step`, from which the next count is made."""
        self._before = self._codes(params) if self._is_counting else {}
        self._step = step

    def count(self, params: Params, step: int) -> dict[str, Any]:
        """Return the fraction of codes that changed since the last count, and the step of that count."""
        if not self._is_counting:
            return {}
        self._before, fraction = self._compare(params, self._before)
        metrics = {"flipped_codes": float(fraction), "flipped_since": self._step}
        self._step = step
        return metrics


def fraction_of_flips(before: Codes, now: Codes, formats_of: Formats) -> Float[Array, ""]:
    """Return the number of codes that differ over the number of codes of all weights that have a format."""
    # Counts of rows are exact; a sum of them in int32 could overflow.
    changed = [
        jnp.sum(jnp.sum(now[path] != before[path], axis=-1).astype(jnp.float32)) for path in formats_of
    ]
    # Layers without a format have codes of 0 in both, which never differ and are not counted.
    num_codes = sum(now[path].size * _fraction_with_format(layers) for path, layers in formats_of.items())
    return jnp.sum(jnp.stack(changed)) / num_codes


def _fraction_with_format(layers: Sequence[Any]) -> float:
    return sum(tensor_quant is not None for tensor_quant in layers) / len(layers)
