"""Rounding of what flows: inputs of matrix products, and what caches keep.

Dims: `*B` any leading dims (rows, time, heads), D the dim that is summed over in the product.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slmjax import kernels
from slmjax.formats.spec import Granularity, QuantSpec
from slmjax.parallel import communication, mesh
from slmjax.parallel.mesh import Dims
from slmjax.quantization.assignment import LEARNED_INPUTS, TensorQuant
from slmjax.quantization.estimators import SIGN, Calibrated, Learned, StraightThrough, clips


class CalibratedScale(nnx.Variable[Any]):
    """What calibration measured: it is no parameter."""


class ActivationQuantizer(nnx.Module):
    """Rounds what comes to a product; without a format, as before the phase that begins with one, it changes
    nothing.
    """

    def __init__(
        self,
        numbers: TensorQuant | None,
        *,
        dim: str | None = None,
        learner: TensorQuant | None = None,
        learned: Learned | None = None,
        is_observed: bool = False,
    ) -> None:
        """How inputs are rounded.

        Args:
          numbers: the format now.
          dim: the logical name of their last dim, where it may be divided.
          learner: the format that learns in some phase, with what it learns.
          is_observed: whether this is for calibration (`_observed`).
        """
        self.numbers = numbers
        self.dim = dim
        self.is_observed = is_observed
        kind = (
            CalibratedScale
            if learner is not None and isinstance(learner.estimator, Calibrated)
            else nnx.Param
        )
        kept = {
            name: CalibratedScale(value) if name == SIGN else kind(value)
            for name, value in (learned or {}).items()
        }
        self.log_scale = kept.get("log_scale")
        self.sign = kept.get(SIGN)
        self.offset = kept.get("offset")

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if self.numbers is None:
            return x
        kept = {"log_scale": self.log_scale, SIGN: self.sign, "offset": self.offset}
        learned = {name: value[...] for name, value in kept.items() if value is not None}
        if self.is_observed:
            return (
                _observed(x, learned, self.numbers)
                if isinstance(self.numbers.estimator, LEARNED_INPUTS)
                else x
            )
        shards = mesh.num_devices(self.dim) if self.dim else 1
        width = x.shape[-1] if x.shape[-1] % shards else x.shape[-1] // shards
        if x.ndim == 3 and _in_one_pass(x, self.numbers, width=width):
            return _round_groups(x, self.numbers.spec, ("batch", "time", self.dim))
        return rounded(x, self.numbers, learned)


def rounded(x: Float[Array, "*B D"], numbers: TensorQuant, learned: Learned) -> Float[Array, "*B D"]:
    """`x` in a format, computed in float32 and returned in its dtype."""
    wide = x.astype(jnp.float32)
    broadcast = {name: value.reshape((1,) * x.ndim) for name, value in learned.items()}
    y = numbers.estimator.rounded(wide, numbers.spec, axis=numbers.axis, learned=broadcast, key=None)
    return y.astype(x.dtype)


def rounded_part(x: Float[Array, "*B d"], rounding: ActivationQuantizer, dim: str) -> Float[Array, "*B d"]:
    """Inside `sharding.local`: the same where the last dim may be divided, as the whole is rounded."""
    if rounding.numbers is None:
        return x
    count = communication.num_shards(dim)
    spec = rounding.numbers.spec
    if count == 1 or (
        spec.granularity is Granularity.PER_GROUP and x.shape[-1] % (spec.group_size or 1) == 0
    ):
        is_in_one_pass = _in_one_pass(x, rounding.numbers, width=x.shape[-1])
        return _round_groups(x, spec, None) if is_in_one_pass else rounded(x, rounding.numbers, {})
    whole = rounded(communication.gather(x, dim, axis=x.ndim - 1), rounding.numbers, {})
    return jax.lax.dynamic_slice_in_dim(
        whole, communication.shards_of(dim).index() * x.shape[-1], x.shape[-1], axis=x.ndim - 1
    )


def _in_one_pass(x: Array, numbers: TensorQuant, *, width: int) -> bool:
    """Whether rounding has a kernel here, for devices that hold so much of the last dim.

    Its gradient is that of the identity: beside a scale by the largest magnitude, no number is out of reach.
    """
    has_plain_gradient = isinstance(numbers.estimator, StraightThrough) and not clips(numbers.spec)
    return has_plain_gradient and kernels.can_round_groups(
        numbers.spec, width=width, platform=mesh.platform(), dtype=x.dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _round_groups(x: Float[Array, "*B D"], spec: QuantSpec, dims: Dims | None) -> Float[Array, "*B D"]:
    """`rounded` by the kernel; without logical dims, of what a device holds."""

    def on_device(x: Array) -> Array:
        return kernels.round_groups(x.reshape(-1, x.shape[-1]), spec).reshape(x.shape)

    return (
        on_device(x)
        if dims is None
        else communication.shard_mapped(on_device, in_dims=(dims,), out_dims=dims, checked=False)(x)
    )


_round_groups.defvjp(
    lambda x, spec, dims: (_round_groups(x, spec, dims), None), lambda spec, dims, _, dy: (dy,)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _observed(x: Array, learned: Learned, numbers: TensorQuant) -> Array:
    """`x`; the "gradient" of what is learned is what it should begin as for these inputs."""
    return x


def _observed_backward(
    numbers: TensorQuant, saved: tuple[Array, Learned], dy: Array
) -> tuple[Array, Learned]:
    x, learned = saved
    found = {SIGN: jnp.ones(()), **numbers.learned(x.astype(jnp.float32))}
    return dy, {name: found[name].reshape(value.shape) for name, value in learned.items()}


_observed.defvjp(lambda x, learned, numbers: (x, (x, learned)), _observed_backward)


def initial(numbers: TensorQuant | None, *, num_layers: int | None) -> dict[str, Float[Array, "..."]]:
    """What a module learns of its inputs until calibration has seen any; with the layer dim of a stack."""
    if numbers is None:
        return {}
    shapes = jax.eval_shape(
        lambda: dataclasses.replace(numbers, axis=-1).learned(jnp.zeros((1, numbers.spec.group_size or 1)))
    )
    return {name: jnp.zeros(() if num_layers is None else (num_layers,), jnp.float32) for name in shapes}
