"""Weights in their formats, as pure functions of flat dicts of parameters by stack path.

A stacked parameter [R, ...] has a format for each of its layers, and the matrix of each expert is encoded by
itself. Every function here therefore works on one matrix [in, out] (or table [V, D]) and is mapped over the
dims in front. The parameters of a weight's quantizer are in the same dict, below the weight's path:
`segments/0/blocks/1/mixer/query/weight/log_scale`.

Dims: R layers of a stack.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt32

from slmjax.formats.bits import as_bits
from slmjax.formats.coding import Encoded, decode
from slmjax.formats.spec import QuantSpec
from slmjax.models.definition import Params
from slmjax.quantization.assignment import TensorQuant
from slmjax.quantization.estimators import QuantizerParams
from slmjax.quantization.quantizer_params import QUANTIZER_PARAMS, is_weight_quantizer_param

# By stack path: the format of each layer of a stacked parameter, the single format of any other.
Formats = Mapping[str, Sequence[TensorQuant | None]]


# Quantizer parameters ---------------------------------------------------------------------------------------
def quantizer_params_of(params: Mapping[str, Array], path: str) -> QuantizerParams:
    """Return the parameters of a weight's quantizer."""
    return {name: params[f"{path}/{name}"] for name in QUANTIZER_PARAMS if f"{path}/{name}" in params}


def init_quantizer_params(params: Mapping[str, Array], formats_of: Formats) -> Params:
    """Return the initial quantizer parameters for these weights, by stack path."""
    result: Params = {}
    for path, by_layer in formats_of.items():
        # Of the layers of one stack either all have quantizer parameters, of one shape, or none has: `plan`
        # divides stacks accordingly.
        formats = [tensor_quant for tensor_quant in by_layer if tensor_quant is not None]
        if not formats:
            continue
        if all(tensor_quant == formats[0] for tensor_quant in formats):
            values = _init_matrices(params[path], formats[0])
        else:
            layers = [
                _init_matrices(weight, tensor_quant)
                for weight, tensor_quant in zip(params[path], formats, strict=True)
            ]
            values = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        result |= {f"{path}/{name}": value for name, value in values.items()}
    return result


def _init_matrices(weight: Array, tensor_quant: TensorQuant) -> QuantizerParams:
    return map_matrices(tensor_quant.init_params, weight.ndim)(weight)


# Fake-quantization ------------------------------------------------------------------------------------------
def fake_quantize(params: Mapping[str, Array], formats_of: Formats, *, key: Array | None = None) -> Params:
    """Return the parameters that layers multiply with: weights rounded to their formats, in float32.

    Parameters without a format stay as they are; those of weight quantizers are left out.

    Args:
      key: randomness of estimators that round stochastically; None in evaluation.
    """
    # Every weight and layer folds its own index into the key: none of them shares its random numbers.
    result = {path: value for path, value in params.items() if not is_weight_quantizer_param(path)}
    for index, (path, formats) in enumerate(formats_of.items()):
        weight_key = None if key is None else jax.random.fold_in(key, index)
        result[path] = _fake_quantize_layers(params, path, formats, key=weight_key)
    return result


def blend_fake_quantized(
    params: Mapping[str, Array], fake_quantized: Params, formats_of: Formats, *, fraction: Float[Array, ""]
) -> Params:
    """Return parameters with a fraction of the rounding error of each weight, from 0 to 1 (warm-up)."""

    def blend(path: str, value: Array) -> Array:
        if path not in formats_of:
            return value
        # `where` keeps the fully rounded value to the bit: params + (value - params) may differ from it.
        return jnp.where(fraction < 1, params[path] + fraction * (value - params[path]), value)

    return {path: blend(path, value) for path, value in fake_quantized.items()}


def damping_loss(
    params: Mapping[str, Array], fake_quantized: Mapping[str, Array], formats_of: Formats
) -> Float[Array, ""]:
    """Sum of squared differences between weights and their rounded values (Nagel et al. 2022).

    The rounded values count as constants, so that the gradient draws weights to the centres of their bins.
    """
    losses = [
        jnp.sum(jnp.square(params[path] - jax.lax.stop_gradient(fake_quantized[path]))) for path in formats_of
    ]
    return jnp.sum(jnp.stack(losses)) if losses else jnp.zeros(())


def _fake_quantize_layers(
    params: Mapping[str, Array], path: str, formats: Sequence[TensorQuant | None], *, key: Array | None
) -> Array:
    def fake_quantize_layer(
        weight: Array, quantizer_params: QuantizerParams, tensor_quant: TensorQuant | None, layer: int | None
    ) -> Array:
        layer_key = key if key is None or layer is None else jax.random.fold_in(key, layer)
        return _fake_quantize_matrices(weight, quantizer_params, tensor_quant, layer_key)

    return _map_layers(fake_quantize_layer, params, path, formats)


def _fake_quantize_matrices(
    weight: Array, quantizer_params: QuantizerParams, tensor_quant: TensorQuant | None, key: Array | None
) -> Array:
    if tensor_quant is None:
        return weight
    # A key for each matrix that `map_matrices` maps over.
    keys = None if key is None else jax.random.split(key, weight.shape[:-2])

    def fake_quantize_matrix(matrix: Array, quantizer_params: QuantizerParams, key: Array | None) -> Array:
        return tensor_quant.estimator.fake_quantize(
            matrix, tensor_quant.spec, axis=tensor_quant.axis, params=quantizer_params, key=key
        )

    return map_matrices(fake_quantize_matrix, weight.ndim)(weight, quantizer_params, keys)


# Codes ------------------------------------------------------------------------------------------------------
def encode_weights(params: Mapping[str, Array], formats_of: Formats) -> dict[str, list[Encoded | None]]:
    """Return the codes and scales of every weight that has a format, layer by layer: what is deployed.

    A pure function: jit it.
    """
    result: dict[str, list[Encoded | None]] = {}
    for path, formats in formats_of.items():
        weight = params[path]
        quantizer_params = quantizer_params_of(params, path)
        if not path.startswith("segments/"):
            result[path] = [_encode(weight, quantizer_params, formats[0])]
            continue
        # A list, because layers of different formats have codes and scales of different shapes.
        result[path] = [
            _encode(
                weight[layer], {name: value[layer] for name, value in quantizer_params.items()}, tensor_quant
            )
            for layer, tensor_quant in enumerate(formats)
        ]
    return result


def _encode(
    weight: Array, quantizer_params: QuantizerParams, tensor_quant: TensorQuant | None
) -> Encoded | None:
    if tensor_quant is None:
        return None

    def encode_matrix(matrix: Array, quantizer_params: QuantizerParams) -> Encoded:
        return tensor_quant.estimator.encode(
            matrix, tensor_quant.spec, axis=tensor_quant.axis, params=quantizer_params
        )

    return map_matrices(encode_matrix, weight.ndim)(weight, quantizer_params)


def codes(params: Mapping[str, Array], formats_of: Formats) -> dict[str, Int8[Array, "..."]]:
    """Return the codes of every weight that has a format, by stack path; 0 in its layers that have none."""

    def codes_of_layer(
        weight: Array, quantizer_params: QuantizerParams, tensor_quant: TensorQuant | None, layer: int | None
    ) -> Array:
        del layer
        encoded = _encode(weight, quantizer_params, tensor_quant)
        return jnp.zeros(weight.shape, jnp.int8) if encoded is None else encoded.codes

    return {path: _map_layers(codes_of_layer, params, path, formats) for path, formats in formats_of.items()}


def code_sums(params: Mapping[str, Array], formats_of: Formats) -> dict[str, UInt32[Array, "..."]]:
    """Return `sum_of_codes` of every weight that has a format, by stack path.

    It is 0 for layers of the weight that have none. A pure function: jit it.
    """
    result: dict[str, Array] = {}
    for path, formats in formats_of.items():
        if axes := [tensor_quant.axis for tensor_quant in formats if tensor_quant is not None]:
            # The axis depends on the path alone: all layers have the same.
            sums_of_layer = functools.partial(_sums_of_layer, axis=axes[0])
            result[path] = _map_layers(sums_of_layer, params, path, formats)
    return result


def _sums_of_layer(
    weight: Array,
    quantizer_params: QuantizerParams,
    tensor_quant: TensorQuant | None,
    layer: int | None,
    *,
    axis: int,
) -> Array:
    del layer
    encoded = _encode(weight, quantizer_params, tensor_quant)
    if encoded is None:  # as many sums as other layers of the stack have
        return jnp.zeros_like(jnp.take(weight, 0, axis=axis), jnp.uint32)
    return sum_of_codes(encoded, axis=axis)


def sum_of_codes(encoded: Encoded, *, axis: int) -> UInt32[Array, "..."]:
    """Return a checksum for each row of codes, which changes when any of its codes or scales does.

    It is the sum of both along the axis of the groups, modulo 2**32, each weighted by its position. Weights
    are odd: a change of one code always shows, and a change of several is missed with a probability of one in
    billions.
    """

    def sum_matrix(encoded: Encoded) -> Array:
        # Weights of codes, scales and zero points start apart, so that exchanging two of them shows.
        total = _weighted_sum(encoded.codes, axis, start=1)
        total += _weighted_sum(as_bits(encoded.scale), axis, start=100_003)
        if encoded.zero is not None:
            total += _weighted_sum(encoded.zero, axis, start=200_003)
        if encoded.tensor_scale is not None:
            total += as_bits(encoded.tensor_scale).astype(jnp.uint32)
        return total

    return map_matrices(sum_matrix, encoded.codes.ndim)(jax.tree.map(jnp.asarray, encoded))


def _weighted_sum(integers: Array, axis: int, *, start: int) -> Array:
    # Signs are extended first: -1 of an int8 is then 2**32 - 1, its value modulo 2**32.
    integers = integers.astype(jnp.int32).astype(jnp.uint32)
    weights = 2 * jax.lax.broadcasted_iota(jnp.uint32, integers.shape, axis % integers.ndim) + start
    return jnp.sum(integers * weights, axis=axis, dtype=jnp.uint32)


def decode_matrices(encoded: Encoded, spec: QuantSpec, *, axis: int) -> Float[Array, "..."]:
    """Return the float32 values of a weight's codes."""
    return map_matrices(lambda matrix: decode(matrix, spec, axis=axis), encoded.codes.ndim)(encoded)


# Mapping ----------------------------------------------------------------------------------------------------
def map_matrices(function: Callable[..., Any], ndim: int) -> Callable[..., Any]:
    """Return a function of a matrix mapped over the leading dims of arrays of `ndim` dims."""
    for _ in range(ndim - 2):
        function = jax.vmap(function)
    return function


def _map_layers(
    function: Callable[..., Array],
    params: Mapping[str, Array],
    path: str,
    formats: Sequence[TensorQuant | None],
) -> Array:
    """Call `function(weight, quantizer_params, format, layer)` for each layer of a stacked weight.

    Where all layers have the same format it is called once, for the stack, with None as the layer: the
    program does not grow with depth.
    """
    weight = params[path]
    quantizer_params = quantizer_params_of(params, path)
    if all(tensor_quant == formats[0] for tensor_quant in formats):
        return function(weight, quantizer_params, formats[0], None)
    # One computation for each layer: formats are static.
    layers = [
        function(
            weight[layer],
            {name: value[layer] for name, value in quantizer_params.items()},
            tensor_quant,
            layer,
        )
        for layer, tensor_quant in enumerate(formats)
    ]
    return jnp.stack(layers)
