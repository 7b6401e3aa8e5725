"""Rounding of what flows: inputs of matrix products, and what caches keep.

Dims: `*B` any leading dims (rows, time, heads), D the dim that is summed over in the product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slmjax import sharding
from slmjax.formats.spec import Share
from slmjax.numerics.coverage import LEARNED_INPUTS, Numbers
from slmjax.numerics.estimators import Calibrated, Learned


class Measured(nnx.Variable[Any]):
    """What calibration measured: it is no parameter."""


class RoundedInput(nnx.Module):
    """Rounds what comes to a product; without a format, as before the phase that begins with one, it changes nothing."""

    def __init__(
        self, numbers: Numbers | None, *, learner: Numbers | None = None, learned: Learned | None = None, is_observed: bool = False
    ) -> None:
        """The format now; the one that learns in some phase, with what it learns; whether this is for calibration (`_observed`)."""
        self.numbers, self.is_observed = numbers, is_observed
        kind = Measured if learner is not None and isinstance(learner.estimator, Calibrated) else nnx.Param
        kept = {name: kind(value) for name, value in (learned or {}).items()}
        self.log_scale, self.offset = kept.get("log_scale"), kept.get("offset")

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if self.numbers is None:
            return x
        kept = {"log_scale": self.log_scale, "offset": self.offset}
        learned = {name: value[...] for name, value in kept.items() if value is not None}
        if self.is_observed:
            return _observed(x, learned, self.numbers) if isinstance(self.numbers.estimator, LEARNED_INPUTS) else x
        return rounded(x, self.numbers, learned)


def rounded(x: Float[Array, "*B D"], numbers: Numbers, learned: Learned) -> Float[Array, "*B D"]:
    """`x` in a format, computed in float32 and returned in its dtype."""
    wide = x.astype(jnp.float32)
    broadcast = {name: value.reshape((1,) * x.ndim) for name, value in learned.items()}
    y = numbers.estimator.rounded(wide, numbers.spec, axis=numbers.axis, learned=broadcast, key=None)
    return y.astype(x.dtype)


def rounded_part(x: Float[Array, "*B d"], rounding: RoundedInput, dim: str) -> Float[Array, "*B d"]:
    """Inside `sharding.local`: the same where the last dim may be divided, as the whole is rounded."""
    if rounding.numbers is None:
        return x
    count, spec = sharding.num_shards(dim), rounding.numbers.spec
    if count == 1 or (spec.share is Share.GROUP and x.shape[-1] % (spec.group_size or 1) == 0):
        return rounding(x)
    whole = rounding(sharding.gather(x, dim, axis=x.ndim - 1))
    return jax.lax.dynamic_slice_in_dim(whole, sharding.shards_of(dim).index() * x.shape[-1], x.shape[-1], axis=x.ndim - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _observed(x: Array, learned: Learned, numbers: Numbers) -> Array:
    """`x`; the "gradient" of what is learned is what it should begin as for these inputs."""
    return x


def _observed_backward(numbers: Numbers, saved: tuple[Array, Learned], dy: Array) -> tuple[Array, Learned]:
    x, learned = saved
    found = numbers.estimator.learned(x.astype(jnp.float32), numbers.spec, axis=numbers.axis)
    return dy, {name: found[name].reshape(value.shape) for name, value in learned.items()}


_observed.defvjp(lambda x, learned, numbers: (x, (x, learned)), _observed_backward)


def initial(numbers: Numbers | None, *, num_layers: int | None) -> dict[str, Float[Array, "..."]]:
    """What a module learns of its inputs until calibration has seen any; with the layer dim of a stack."""
    if numbers is None:
        return {}
    shapes = jax.eval_shape(lambda: numbers.estimator.learned(jnp.zeros((1, numbers.spec.group_size or 1)), numbers.spec, axis=-1))
    return {name: jnp.zeros(() if num_layers is None else (num_layers,), jnp.float32) for name in shapes}
