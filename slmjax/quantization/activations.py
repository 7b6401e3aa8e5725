"""Quantization of activations: the inputs of matrix products, and what caches store.

Dims: `*B` any leading dims (batch, time, heads), D the dim that the product sums over.
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
from slmjax.quantization.assignment import SCALE_ESTIMATORS, TensorQuant
from slmjax.quantization.estimators import SIGN, Calibrated, QuantizerParams, StraightThrough, clips


class CalibratedScale(nnx.Variable[Any]):
    """A scale that calibration has measured: a buffer, not a parameter."""


# Modules ----------------------------------------------------------------------------------------------------
class ActivationQuantizer(nnx.Module):
    """Fake-quantizes activations: the inputs of a layer, or what a cache stores.

    Without a format, as before the phase that begins with one, it is the identity.
    """

    def __init__(
        self,
        tensor_quant: TensorQuant | None,
        *,
        dim: str | None = None,
        learned: TensorQuant | None = None,
        params: QuantizerParams | None = None,
        is_calibrating: bool = False,
    ) -> None:
        """Initialize the quantizer.

        Args:
          tensor_quant: the format in this phase.
          dim: the logical name of the activations' last dim, where it may be sharded.
          learned: the format in the phase that has quantizer parameters, with the estimator that they belong
            to.
          params: the quantizer parameters, which are there in all phases.
          is_calibrating: return activations as they are, with a "gradient" of the quantizer's parameters that
            is their initial value for these activations (`_calibrate`).
        """
        self.tensor_quant = tensor_quant
        self.dim = dim
        self.is_calibrating = is_calibrating
        is_calibrated = learned is not None and isinstance(learned.estimator, Calibrated)
        variables = {
            # Signs are constants, also of scales that are trained.
            name: CalibratedScale(value) if is_calibrated or name == SIGN else nnx.Param(value)
            for name, value in (params or {}).items()
        }
        self.log_scale = variables.get("log_scale")
        self.sign = variables.get(SIGN)
        self.offset = variables.get("offset")

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if self.tensor_quant is None:
            return x
        variables = {"log_scale": self.log_scale, SIGN: self.sign, "offset": self.offset}
        params = {name: value[...] for name, value in variables.items() if value is not None}
        if self.is_calibrating:
            has_params = isinstance(self.tensor_quant.estimator, SCALE_ESTIMATORS)
            return _calibrate(x, params, self.tensor_quant) if has_params else x
        # Where the devices of a mesh do not divide the last dim, each of them has all of it.
        shards = mesh.num_devices(self.dim) if self.dim else 1
        width = x.shape[-1] if x.shape[-1] % shards else x.shape[-1] // shards
        # The kernel takes [B, T, D] on each device; caches, with a dim of heads, take the computation below.
        if x.ndim == 3 and _has_kernel(x, self.tensor_quant, width=width):
            return _round_groups(x, self.tensor_quant.spec, ("batch", "time", self.dim))
        return fake_quantize_activations(x, self.tensor_quant, params)


class ShardActivationQuantizer(nnx.Module):
    """Fake-quantizes a device's shard of activations inside `shard_map`, as one device would all of them."""

    def __init__(self, tensor_quant: TensorQuant | None, *, dim: str) -> None:
        """Initialize the quantizer; `dim` is the logical name of the last dim, which may be sharded."""
        self.tensor_quant = tensor_quant
        self.dim = dim

    def __call__(self, x: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
        if self.tensor_quant is None:
            return x
        spec = self.tensor_quant.spec
        has_whole_groups = (
            spec.granularity is Granularity.PER_GROUP and x.shape[-1] % (spec.group_size or 1) == 0
        )
        if communication.num_shards(self.dim) == 1 or has_whole_groups:
            if _has_kernel(x, self.tensor_quant, width=x.shape[-1]):
                return _round_groups(x, spec, None)
            return fake_quantize_activations(x, self.tensor_quant, {})
        # A scale depends on numbers of several devices: round all of them and take this device's.
        gathered = communication.gather(x, self.dim, axis=x.ndim - 1)
        rounded = fake_quantize_activations(gathered, self.tensor_quant, {})
        start = communication.shards_of(self.dim).index() * x.shape[-1]
        return jax.lax.dynamic_slice_in_dim(rounded, start, x.shape[-1], axis=x.ndim - 1)


def init_activation_params(
    tensor_quant: TensorQuant | None, *, num_layers: int | None
) -> dict[str, Float[Array, "..."]]:
    """Return zeros for a quantizer's parameters, until calibration; with the layer dim of a stack, if any."""
    if tensor_quant is None:
        return {}
    # Only the names of the parameters matter here: those for any one group.
    group_size = tensor_quant.spec.group_size or 1
    shapes = jax.eval_shape(
        lambda: dataclasses.replace(tensor_quant, axis=-1).init_params(jnp.zeros((1, group_size)))
    )
    return {name: jnp.zeros(() if num_layers is None else (num_layers,), jnp.float32) for name in shapes}


# Functions --------------------------------------------------------------------------------------------------
def fake_quantize_activations(
    x: Float[Array, "*B D"], tensor_quant: TensorQuant, params: QuantizerParams
) -> Float[Array, "*B D"]:
    """Return `x` rounded to a format, computed in float32 and returned in its dtype."""
    # Engines compute scales in float32: in bfloat16 many codes would differ from theirs.
    x32 = x.astype(jnp.float32)
    # One scale for all tokens: a scalar for each layer.
    broadcast = {name: value.reshape((1,) * x.ndim) for name, value in params.items()}
    # No key reaches the layers: only weights are rounded stochastically.
    y = tensor_quant.estimator.fake_quantize(
        x32, tensor_quant.spec, axis=tensor_quant.axis, params=broadcast, key=None
    )
    return y.astype(x.dtype)


def _has_kernel(x: Array, tensor_quant: TensorQuant, *, width: int) -> bool:
    """Whether a fused kernel rounds activations of which a device has `width` numbers of the last dim."""
    # The kernel's gradient is that of the identity: it is right where the scale is computed from the largest
    # magnitude, so that nothing is clipped.
    has_identity_gradient = isinstance(tensor_quant.estimator, StraightThrough) and not clips(
        tensor_quant.spec
    )
    return has_identity_gradient and kernels.can_round_groups(
        tensor_quant.spec, width=width, platform=mesh.platform(), dtype=x.dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _round_groups(x: Float[Array, "*B D"], spec: QuantSpec, dims: Dims | None) -> Float[Array, "*B D"]:
    """Round by the kernel; without logical dims, a device's shard."""

    def on_device(x: Array) -> Array:
        return kernels.round_groups(x.reshape(-1, x.shape[-1]), spec).reshape(x.shape)

    if dims is None:
        return on_device(x)
    return communication.shard_mapped(on_device, in_dims=(dims,), out_dims=dims, checked=False)(x)


_round_groups.defvjp(
    lambda x, spec, dims: (_round_groups(x, spec, dims), None), lambda spec, dims, _, dy: (dy,)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _calibrate(x: Array, params: QuantizerParams, tensor_quant: TensorQuant) -> Array:
    """Return `x`; the "gradient" of the quantizer's parameters is their initial value for these activations.

    So one backward pass measures every layer of a scanned stack, and nothing needs to be returned from
    layers.
    """
    return x


def _calibrate_backward(
    tensor_quant: TensorQuant, saved: tuple[Array, QuantizerParams], dy: Array
) -> tuple[Array, QuantizerParams]:
    x, params = saved
    # Where only another phase's format has a sign, this one's scale is positive.
    measured = {SIGN: jnp.ones(()), **tensor_quant.init_params(x.astype(jnp.float32))}
    return dy, {name: measured[name].reshape(value.shape) for name, value in params.items()}


_calibrate.defvjp(lambda x, params, tensor_quant: (x, (x, params)), _calibrate_backward)
