"""Weights in their formats, as pure functions of flat dicts of parameters by stack path.

A stacked parameter [R, ...] has a format for each of its layers, an expert's matrix is coded by itself, and
so every function here works on one matrix [in, out] (or table [V, D]) and is mapped over what comes before.
What an estimator learns beside a weight stands in the same dict, under the weight's path:
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
from slmjax.quantization.assignment import TensorQuant
from slmjax.quantization.estimators import SIGN, Learned

Params = Mapping[str, Array]
Formats = Mapping[
    str, Sequence[TensorQuant | None]
]  # by stack path: of each layer of a stacked parameter, of any other the one
LEARNED = ("log_scale", SIGN, "offset")


def learned_of(params: Params, path: str) -> Learned:
    """What is learned beside a weight."""
    return {name: params[f"{path}/{name}"] for name in LEARNED if f"{path}/{name}" in params}


def is_weight_quantizer_param(path: str) -> bool:
    """Whether this is something that is learned beside a weight, and no parameter of a module."""
    return path.rpartition("/")[2] in LEARNED and not is_activation_quantizer_param(path)


def is_activation_quantizer_param(path: str) -> bool:
    """Whether this is the scale or offset of what comes to a product, which a module holds."""
    parent, _, name = path.rpartition("/")
    return name in LEARNED and parent.endswith("input")


def is_learned(path: str) -> bool:
    """Return whether this is a scale or an offset of a number format, of a weight or of an input, and no
    parameter of the model.
    """
    return is_weight_quantizer_param(path) or is_activation_quantizer_param(path)


def is_sign(path: str) -> bool:
    """Return whether this is the sign of learned scales, which is fixed: no optimizer changes it. Checkpoints
    written before it was kept lack it, and all their learned scales are positive."""
    return path.endswith("/" + SIGN) and is_learned(path)


def learned(params: Params, formats_of: Formats) -> dict[str, Array]:
    """What estimators learn beside these weights, as it begins, by stack path."""
    found: dict[str, Array] = {}
    for path, numbers in formats_of.items():
        # Of layers of one stack either all learn, in groups of one size, or none does: `quantized` divides
        # stacks so.
        chosen = [one for one in numbers if one is not None]
        if not chosen:
            continue
        if all(one == chosen[0] for one in chosen):
            values = _begun(params[path], chosen[0])
        else:
            by_layer = [_begun(weight, one) for weight, one in zip(params[path], chosen, strict=True)]
            values = jax.tree.map(lambda *layers: jnp.stack(layers), *by_layer)
        found |= {f"{path}/{name}": value for name, value in values.items()}
    return found


def _begun(weight: Array, numbers: TensorQuant) -> Learned:
    def one(matrix: Array) -> Learned:
        return numbers.learned(matrix)

    return by_matrix(one, weight.ndim)(weight)


def effective(params: Params, formats_of: Formats, *, key: Array | None = None) -> dict[str, Array]:
    """The weights that layers multiply with: decoded numbers, float32, where there is a format; and all other
    parameters as they are.

    Args:
      key: randomness of estimators that round by chance; None in evaluation.
    """
    result = {path: value for path, value in params.items() if not is_weight_quantizer_param(path)}
    for index, (path, numbers) in enumerate(formats_of.items()):
        own_key = None if key is None else jax.random.fold_in(key, index)
        result[path] = _by_layer(params, path, numbers, key=own_key)
    return result


def eased(
    params: Params, decoded: Params, formats_of: Formats, *, share: Float[Array, ""]
) -> dict[str, Array]:
    """Parameters with a share of the rounding error of each weight, from 0 to 1; with all of it they are the
    decoded ones.
    """

    def one(path: str, value: Array) -> Array:
        if path not in formats_of:
            return value
        return jnp.where(share < 1, params[path] + share * (value - params[path]), value)

    return {path: one(path, value) for path, value in decoded.items()}


def _by_layer(
    params: Params, path: str, numbers: Sequence[TensorQuant | None], *, key: Array | None
) -> Array:
    def one(weight: Array, beside: Learned, numbers: TensorQuant | None, layer: int | None) -> Array:
        return _rounded(
            weight, beside, numbers, key if key is None or layer is None else jax.random.fold_in(key, layer)
        )

    return _over_layers(one, params, path, numbers)


def _over_layers(
    one: Callable[..., Array], params: Params, path: str, numbers: Sequence[TensorQuant | None]
) -> Array:
    """`one` of a weight, of what is learned beside it, of its format and of the layer: of a stack at once
    (None) where layers are alike.
    """
    weight = params[path]
    beside = learned_of(params, path)
    if all(other == numbers[0] for other in numbers):
        return one(weight, beside, numbers[0], None)
    rows = [
        one(weight[layer], {name: value[layer] for name, value in beside.items()}, own, layer)
        for layer, own in enumerate(numbers)
    ]
    return jnp.stack(rows)


def _rounded(weight: Array, beside: Learned, numbers: TensorQuant | None, key: Array | None) -> Array:
    if numbers is None:
        return weight
    keys = None if key is None else jax.random.split(key, weight.shape[:-2])

    def one(matrix: Array, beside: Learned, key: Array | None) -> Array:
        return numbers.estimator.rounded(matrix, numbers.spec, axis=numbers.axis, learned=beside, key=key)

    return by_matrix(one, weight.ndim)(weight, beside, keys)


def coded(params: Params, formats_of: Formats) -> dict[str, list[Encoded | None]]:
    """The codes and scales of every weight that has a format, layer by layer: what is deployed. A pure
    function: jit it.
    """
    found: dict[str, list[Encoded | None]] = {}
    for path, numbers in formats_of.items():
        weight = params[path]
        beside = learned_of(params, path)
        if not path.startswith("segments/"):
            found[path] = [_coded(weight, beside, numbers[0])]
            continue
        found[path] = [
            _coded(weight[layer], {name: value[layer] for name, value in beside.items()}, one)
            for layer, one in enumerate(numbers)
        ]
    return found


def _coded(weight: Array, beside: Learned, numbers: TensorQuant | None) -> Encoded | None:
    if numbers is None:
        return None

    def one(matrix: Array, beside: Learned) -> Encoded:
        return numbers.estimator.coded(matrix, numbers.spec, axis=numbers.axis, learned=beside)

    return by_matrix(one, weight.ndim)(weight, beside)


def codes(params: Params, formats_of: Formats) -> dict[str, Int8[Array, "..."]]:
    """Return the codes of every weight that has a format, by stack path; 0 in layers of it that have none."""

    def one(weight: Array, beside: Learned, numbers: TensorQuant | None, layer: int | None) -> Array:
        encoded = _coded(weight, beside, numbers)
        return jnp.zeros(weight.shape, jnp.int8) if encoded is None else encoded.codes

    return {path: _over_layers(one, params, path, layers) for path, layers in formats_of.items()}


def code_sums(params: Params, formats_of: Formats) -> dict[str, UInt32[Array, "..."]]:
    """`sum_of_codes` of every weight that has a format, by stack path; 0 for layers of it that have none. A
    pure function: jit it.
    """
    found: dict[str, Array] = {}
    for path, layers in formats_of.items():
        if axes := [one.axis for one in layers if one is not None]:
            found[path] = _over_layers(functools.partial(_row_sums, axis=axes[0]), params, path, layers)
    return found


def _row_sums(
    weight: Array, beside: Learned, numbers: TensorQuant | None, layer: int | None, *, axis: int
) -> Array:
    del layer
    encoded = _coded(weight, beside, numbers)
    # A layer without a format has a row for each that others have.
    return (
        jnp.zeros_like(jnp.take(weight, 0, axis=axis), jnp.uint32)
        if encoded is None
        else sum_of_codes(encoded, axis=axis)
    )


def sum_of_codes(encoded: Encoded, *, axis: int) -> UInt32[Array, "..."]:
    """A number for each row of codes, which changes where any of the codes or scales does.

    The sum of both along the axis that groups run along, modulo 2**32, each weighted by its place. Weights
    are odd: a change of one of them always shows, and that of several but by a chance of one in billions.
    """

    def one(encoded: Encoded) -> Array:
        total = _weighted_sum(encoded.codes, axis, start=1) + _weighted_sum(
            as_bits(encoded.scale), axis, start=100_003
        )
        total = total if encoded.zero is None else total + _weighted_sum(encoded.zero, axis, start=200_003)
        return (
            total
            if encoded.tensor_scale is None
            else total + as_bits(encoded.tensor_scale).astype(jnp.uint32)
        )

    return by_matrix(one, encoded.codes.ndim)(jax.tree.map(jnp.asarray, encoded))


def _weighted_sum(numbers: Array, axis: int, *, start: int) -> Array:
    numbers = numbers.astype(jnp.int32).astype(jnp.uint32)
    weights = 2 * jax.lax.broadcasted_iota(jnp.uint32, numbers.shape, axis % numbers.ndim) + start
    return jnp.sum(numbers * weights, axis=axis, dtype=jnp.uint32)


def damping(params: Params, decoded: Params, formats_of: Formats) -> Float[Array, ""]:
    """Sum of squared distances of weights to what they are rounded to, which counts as fixed (Nagel et al.
    2022).
    """
    distances = [
        jnp.sum(jnp.square(params[path] - jax.lax.stop_gradient(decoded[path]))) for path in formats_of
    ]
    return jnp.sum(jnp.stack(distances)) if distances else jnp.zeros(())


def decode_matrices(encoded: Encoded, spec: QuantSpec, *, axis: int) -> Float[Array, "..."]:
    """The numbers that codes of a weight stand for."""
    return by_matrix(lambda one: decode(one, spec, axis=axis), encoded.codes.ndim)(encoded)


def by_matrix(function: Callable[..., Any], ndim: int) -> Callable[..., Any]:
    """A function of a matrix, for arrays of `ndim` dims, each of whose matrices is one by itself."""
    for _ in range(ndim - 2):
        function = jax.vmap(function)
    return function
