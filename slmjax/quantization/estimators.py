"""Estimators: the gradient of rounding, and where scales come from.

Rounding has a gradient of zero almost everywhere, so each estimator defines another one. `fake_quantize`
computes the exact values of the format, decode(encode(x)), and passes a gradient to x and to the quantizer's
parameters. Scales are trained as base-2 logarithms: an optimizer's step then changes a scale by a fraction,
whatever its size. In formats whose scale has a sign (`QuantSpec.has_signed_scale`) the sign of each group is
set when its scale is initialized, and stored next to the logarithm; it gets no gradient.

Straight-through: Bengio et al. 2013. Learned step size (LSQ): Esser et al. 2020; with an offset (LSQ+):
Bhalgat et al. 2020. Learned clip (PACT): Choi et al. 2018. Stretched and ternary grids with a learned scale:
Liu et al. 2025 (ParetoQ).
"""

import abc
import dataclasses
import enum
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slmjax.config import added_field
from slmjax.formats.coding import Encoded, decode, encode, expanded, fake_quant, scale_of, stored_scale
from slmjax.formats.division import divide
from slmjax.formats.presets import name_of
from slmjax.formats.spec import FLOAT_GRIDS, TERNARY_BITS, CodeGrid, Granularity, QuantSpec, Statistic, levels

QuantizerParams = dict[str, Array]  # log_scale, sign, offset: those that an estimator has
SIGN = "sign"  # of a scale: 1 or -1, constant while the logarithm is trained
SMALLEST_SCALE = -23.0  # as a power of two: a step of float16's subnormal numbers


class Estimator(abc.ABC):
    """The gradient of rounding to a format, and the parameters of its quantizer."""

    @abc.abstractmethod
    def check(self, spec: QuantSpec) -> None:
        """Raise ValueError for a format that the estimator does not suit."""

    @abc.abstractmethod
    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """Return the initial quantizer parameters for `x`; empty where scales are computed."""

    @abc.abstractmethod
    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """Return the codes and scales of `x`: what is deployed."""

    @abc.abstractmethod
    def fake_quantize(
        self,
        x: Float[Array, "..."],
        spec: QuantSpec,
        *,
        axis: int,
        params: QuantizerParams,
        key: Array | None,
    ) -> Float[Array, "..."]:
        """Return the float32 values of `encode`, with a gradient to `x` and to the quantizer parameters.

        Args:
          key: randomness of training; None in evaluation.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class StraightThrough(Estimator):
    """The scale is computed by the format; the gradient passes unchanged, except to clipped numbers."""

    def check(self, spec: QuantSpec) -> None:
        """Accept every format."""

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """Return no parameters."""
        return {}

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """Return codes on the scales that the format computes."""
        return encode(x, spec, axis=axis)

    def fake_quantize(
        self,
        x: Float[Array, "..."],
        spec: QuantSpec,
        *,
        axis: int,
        params: QuantizerParams,
        key: Array | None,
    ) -> Float[Array, "..."]:
        """Return `fake_quant` with the straight-through gradient."""
        return straight_through(x, spec, axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StochasticRounding(Estimator):
    """Training rounds a number up or down at random, without bias; evaluation rounds to the nearest."""

    def check(self, spec: QuantSpec) -> None:
        """Raise ValueError for formats whose levels are not evenly spaced."""
        if spec.grid is not CodeGrid.INTEGER or spec.is_asymmetric:
            raise ValueError(
                "stochastic rounding needs consecutive integer codes and no zero point, unlike "
                f"{name_of(spec)}: use StraightThrough"
            )

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """Return no parameters."""
        return {}

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """Return codes on the scales that the format computes."""
        return encode(x, spec, axis=axis)

    def fake_quantize(
        self,
        x: Float[Array, "..."],
        spec: QuantSpec,
        *,
        axis: int,
        params: QuantizerParams,
        key: Array | None,
    ) -> Float[Array, "..."]:
        """Return one of the two neighbouring levels at random; the nearest without a key."""
        if key is None:
            return straight_through(x, spec, axis)
        constant = jax.lax.stop_gradient(x)
        # The scale is a constant: how it depends on `x` adds no gradient.
        scale = _broadcast(scale_of(constant, spec, axis=axis), x, axis)
        # Only a group of zeros has the scale 0, and its codes are 0 on any scale.
        steps = constant / jnp.where(scale == 0, 1.0, scale)
        # E[floor(x + u)] = x for u uniform in [0, 1) (Gupta et al. 2015).
        codes = jnp.clip(
            jnp.floor(steps + jax.random.uniform(key, x.shape)), spec.lowest_code, spec.highest_code
        )
        return _as_if(codes * scale, x)


class ClippedFrom(enum.Enum):
    """The clipping range of the gradient: how far a number may lie from zero and still get one."""

    LAST_LEVEL = "last_level"  # LSQ: up to the last level
    # ParetoQ's stretched grids: up to 0.99 of the range, which ends half a step beyond the last level
    RANGE = "range"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedScale(Estimator):
    """The scale is a parameter (LSQ), initialized as the one with the smallest squared error.

    ParetoQ trains its stretched grids (2 bits and three levels) with `clipped_from=RANGE`. Its parameter
    alpha is the range: 4 scales of `stretched2_*`, 1.5 of `stretched_ternary_*`. Two things differ from its
    code: the logarithm of the scale is trained instead of alpha, and its gradient is divided by the square
    root of the size of a group instead of that of the matrix.
    """

    # numbers beyond it get no gradient
    clipped_from: ClippedFrom = added_field(ClippedFrom.LAST_LEVEL, before=ClippedFrom.LAST_LEVEL)

    def check(self, spec: QuantSpec) -> None:
        """Raise ValueError for a zero point, floating-point codes, or RANGE with an unstretched grid."""
        _check_integers(spec, "a learned scale")
        # Only these grids have a range that ends half a step beyond the last level.
        is_stretched = spec.bits == TERNARY_BITS or (spec.grid is CodeGrid.ODD and spec.bits > 1)
        if self.clipped_from is ClippedFrom.RANGE and not is_stretched:
            raise ValueError(
                "clipped_from=RANGE is for three levels, or for odd ones of 2 bits and more, and "
                f"{name_of(spec)} has others: leave it out"
            )

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """Return the logarithm of each scale, and its sign where the format has one."""
        # LSQ begins with 2 mean|x| / sqrt(highest level). A search is closer to the optimum for few levels.
        return _magnitude_and_sign(best_scale(x, spec, axis=axis)[0], spec)

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """Return codes on the trained scale, rounded as the format stores it."""
        return encode(x, spec, axis=axis, scale=_scale(params))

    def fake_quantize(
        self,
        x: Float[Array, "..."],
        spec: QuantSpec,
        *,
        axis: int,
        params: QuantizerParams,
        key: Array | None,
    ) -> Float[Array, "..."]:
        """Return the rounded values with the gradient of `learned_scale`."""
        return learned_scale(x, _scale(params), spec, axis, self.clipped_from)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedScaleAndOffset(Estimator):
    """Scale and zero point are parameters (LSQ+), for formats that have a zero point."""

    def check(self, spec: QuantSpec) -> None:
        """Raise ValueError for formats without a zero point."""
        if not spec.is_asymmetric:
            raise ValueError(
                f"an offset is learned where a format has a zero point, and {name_of(spec)} has none: use "
                "LearnedScale"
            )

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """Return the logarithm of each scale, and the zero point in codes, not yet rounded."""
        encoded = encode(x, spec, axis=axis)
        return {"log_scale": _logarithm(encoded.scale), "offset": encoded.zero.astype(jnp.float32)}

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """Return codes on the trained scale and the trained zero point, rounded to a code."""
        scale = stored_scale(_scale(params), spec)
        zero = jnp.clip(jnp.round(params["offset"]), spec.lowest_code, spec.highest_code)
        # Rounded before the zero point is added, as engines do: ties to even differ for an odd zero point.
        steps = jnp.round(divide(x, _broadcast(scale, x, axis))) + _broadcast(zero, x, axis)
        codes = jnp.clip(steps, spec.lowest_code, spec.highest_code).astype(jnp.int8)
        return Encoded(codes=codes, scale=scale, zero=zero.astype(jnp.int32))

    def fake_quantize(
        self,
        x: Float[Array, "..."],
        spec: QuantSpec,
        *,
        axis: int,
        params: QuantizerParams,
        key: Array | None,
    ) -> Float[Array, "..."]:
        """Return the rounded values; gradients are those of `learned_scale` about the zero point.

        The zero point gets the gradient of clipped numbers.
        """
        scale = _broadcast(_scale(params), x, axis)
        limited = jnp.clip(params["offset"], spec.lowest_code, spec.highest_code)
        # Rounding passes the gradient; the clip stops it where no code is left for the zero point.
        zero = _broadcast(limited + jax.lax.stop_gradient(jnp.round(limited) - limited), x, axis)
        # LSQ's factor for both: their gradients sum over a group, and would outgrow those of weights.
        factor = _gradient_scale(x, spec, axis=axis)
        scale = _scale_gradient(scale, factor)
        zero = _scale_gradient(zero, factor)
        steps = jnp.clip(x / scale + zero, spec.lowest_code, spec.highest_code)
        # LSQ+'s expression, of which autodiff finds all three gradients. It is not equal to `encode` to the
        # bit.
        smooth = (steps + jax.lax.stop_gradient(jnp.round(steps) - steps) - zero) * scale
        return _as_if(_value(self, x, spec, axis=axis, params=params), smooth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedClip(Estimator):
    """The clipping range is a parameter (PACT), which gets the gradient of clipped numbers."""

    def check(self, spec: QuantSpec) -> None:
        """Raise ValueError for formats with a zero point or floating-point codes."""
        _check_integers(spec, "a learned clip")

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """Return the logarithm of each scale, and its sign where the format has one.

        The scale is the end of the clipping range over the highest level.
        """
        return _magnitude_and_sign(scale_of(x, spec, axis=axis), spec)

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """Return codes on the trained scale."""
        return encode(x, spec, axis=axis, scale=_scale(params))

    def fake_quantize(
        self,
        x: Float[Array, "..."],
        spec: QuantSpec,
        *,
        axis: int,
        params: QuantizerParams,
        key: Array | None,
    ) -> Float[Array, "..."]:
        """Return the rounded values; clipped numbers move the range, others do not."""
        # PACT learns the upper end for outputs of a ReLU; here one scale moves both ends.
        low, high = _clipping_range(spec)
        scale = _broadcast(_scale(params), x, axis)
        # The gradient of a clip goes to x inside the range, and to its end outside.
        ends = low * scale, high * scale  # in descending order where the scale is negative
        return _as_if(
            _value(self, x, spec, axis=axis, params=params),
            jnp.clip(x, jnp.minimum(*ends), jnp.maximum(*ends)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated(Estimator):
    """Static activation quantization: one scale for all tokens, measured on the first batch of the phase."""

    def check(self, spec: QuantSpec) -> None:
        """Raise ValueError for formats with a zero point or floating-point codes."""
        _check_integers(spec, "a calibrated scale")

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """Return the logarithm of each scale, and its sign where the format has one: buffers, not trained."""
        return LearnedClip().init_params(x, spec, axis=axis)

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """Return codes on the measured scale."""
        return encode(x, spec, axis=axis, scale=_scale(params))

    def fake_quantize(
        self,
        x: Float[Array, "..."],
        spec: QuantSpec,
        *,
        axis: int,
        params: QuantizerParams,
        key: Array | None,
    ) -> Float[Array, "..."]:
        """Return the rounded values; the gradient passes within the clipping range."""
        return learned_scale(x, jax.lax.stop_gradient(_scale(params)), spec, axis, ClippedFrom.LAST_LEVEL)


def default_estimator(spec: QuantSpec) -> Estimator:
    """Return the estimator that suits weights in a format.

    With 3 bits or less, stretched grids included, the positions of the few levels matter, so that the scale
    is trained. Otherwise, and for formats whose scale is the mean magnitude, it is computed from the weights.
    """
    # The mean magnitude defines BitNet's ternary weights (Ma et al. 2024): that scale follows the weights.
    has_trainable_scale = (
        spec.grid not in FLOAT_GRIDS and not spec.is_asymmetric and spec.statistic is not Statistic.ABSMEAN
    )
    return LearnedScale() if has_trainable_scale and spec.bits <= 3 else StraightThrough()


def _check_integers(spec: QuantSpec, what: str) -> None:
    if spec.is_asymmetric:
        raise ValueError(
            f"{what} is for grids about zero, and {name_of(spec)} has a zero point: use LearnedScaleAndOffset"
        )
    if spec.grid in FLOAT_GRIDS:
        raise ValueError(
            f"{what} is for integer codes, and those of {name_of(spec)} are floating point: use "
            "StraightThrough"
        )


# Gradients --------------------------------------------------------------------------------------------------
@jax.custom_vjp
def _as_if(value: Array, smooth: Array) -> Array:
    """Return `value`, to the bit, with the gradient of `smooth`."""
    # `smooth + stop_gradient(value - smooth)` would have the gradient too, and rounding errors in its value.
    return value


_as_if.defvjp(lambda value, smooth: (value, None), lambda _, dy: (jnp.zeros_like(dy), dy))


def _value(estimator: Estimator, x: Array, spec: QuantSpec, *, axis: int, params: QuantizerParams) -> Array:
    return decode(jax.lax.stop_gradient(estimator.encode(x, spec, axis=axis, params=params)), spec, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def straight_through(x: Float[Array, "..."], spec: QuantSpec, axis: int) -> Float[Array, "..."]:
    """Return `fake_quant` with the gradient of the identity, but 0 where a number was clipped.

    Clipped: more than half a step beyond the last level.
    """
    return fake_quant(x, spec, axis=axis)


def _straight_forward(x: Array, spec: QuantSpec, axis: int) -> tuple[Array, Array | None]:
    y = fake_quant(x, spec, axis=axis)
    if not clips(spec):
        return y, None
    # A little over half a step: a number that is exactly half a step beyond was rounded, not clipped.
    # Odd levels are two scales apart.
    step = 2.0 if spec.grid is CodeGrid.ODD else 1.0
    return y, jnp.abs(y - x) <= 0.501 * step * jnp.abs(_broadcast(scale_of(x, spec, axis=axis), x, axis))


def _straight_backward(spec: QuantSpec, axis: int, inside: Array | None, dy: Array) -> tuple[Array]:
    return (dy if inside is None else jnp.where(inside, dy, 0),)


straight_through.defvjp(_straight_forward, _straight_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def learned_scale(
    x: Float[Array, "..."], scale: Float[Array, "..."], spec: QuantSpec, axis: int, clipped_from: ClippedFrom
) -> Float[Array, "..."]:
    """Return `x` rounded on a scale, with the gradient of learned step sizes (Esser et al. 2020) to both.

    `x` gets it within the clipping range; the scale gets the rounding error of each number in the range, and
    the level of each clipped one. The gradient of a scale is divided by sqrt(numbers that share it * highest
    level), as there.
    """
    return decode(encode(x, spec, axis=axis, scale=scale), spec, axis=axis)


def _learned_forward(
    x: Array, scale: Array, spec: QuantSpec, axis: int, clipped_from: ClippedFrom
) -> tuple[Array, tuple[Array, Array, Array]]:
    y = decode(encode(x, spec, axis=axis, scale=scale), spec, axis=axis)
    return y, (x, scale, y)


def _learned_backward(
    spec: QuantSpec, axis: int, clipped_from: ClippedFrom, saved: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, scale, y = saved
    group_scale = _broadcast(scale, x, axis)
    low, high = _clipping_range(spec)
    if clipped_from is ClippedFrom.RANGE:
        # 0.99 is in ParetoQ's code. Odd levels are two scales apart.
        half_step = 1.0 if spec.grid is CodeGrid.ODD else 0.5
        low = 0.99 * (low - half_step)
        high = 0.99 * (high + half_step)
    # A negative scale mirrors the grid, and the quotient with it.
    steps = x / group_scale
    inside = (steps >= low) & (steps <= high)
    # d y / d scale is (y - x) / scale inside the range, and the level y / scale of a clipped number.
    by_number = dy * jnp.where(inside, y - x, y) / group_scale
    total = sum_groups(by_number, scale, axis=axis)
    return jnp.where(inside, dy, 0), total * _gradient_scale(x, spec, axis=axis)


learned_scale.defvjp(_learned_forward, _learned_backward)


def clips(spec: QuantSpec) -> bool:
    """Return whether a computed scale may clip: leave numbers over half a step beyond the last level."""
    if spec.grid in FLOAT_GRIDS or spec.is_asymmetric:
        return False
    # A scale by the mean magnitude leaves out large numbers on purpose: they get their gradient all the same.
    if spec.statistic is Statistic.ABSMEAN:
        return False
    # SIGNED_MAX takes the lowest code for the largest magnitude: a number opposite to it is a step too far.
    return spec.statistic is Statistic.SIGNED_MAX or spec.divisor > _clipping_range(spec)[1] + 0.5 * (
        2.0 if spec.grid is CodeGrid.ODD else 1.0
    )


def _broadcast(scale: Array, x: Array, axis: int) -> Array:
    """The scale of each number, from that of each group."""
    return jnp.broadcast_to(expanded(scale, x.shape[axis], axis=axis), x.shape)


def sum_groups(x: Float[Array, "..."], scale: Float[Array, "..."], *, axis: int) -> Float[Array, "..."]:
    """Return the sums of `x` over the numbers that share each scale, in the shape of `scale`."""
    axis = axis % x.ndim
    groups = x.reshape(*x.shape[:axis], scale.shape[axis], -1, *x.shape[axis + 1 :])
    # A PER_TENSOR scale has size 1 in all dims.
    shared = tuple(dim for dim, size in enumerate(scale.shape) if size == 1 and dim != axis)
    total = jnp.sum(groups, axis=axis + 1)
    return jnp.sum(total, axis=shared, keepdims=True) if shared else total


def _gradient_scale(x: Array, spec: QuantSpec, *, axis: int) -> float:
    # LSQ counts the numbers that share a scale: for activations the features of a layer, not its tokens.
    sharing = {
        Granularity.PER_GROUP: spec.group_size,
        Granularity.PER_CHANNEL: x.shape[axis],
        Granularity.PER_TENSOR: x.shape[axis],
    }[spec.granularity]
    return 1.0 / math.sqrt((sharing or 1) * max(_clipping_range(spec)[1], 1e-3))


def _scale_gradient(x: Array, factor: float) -> Array:
    """`x` with its gradient multiplied by `factor`."""
    return x * factor + jax.lax.stop_gradient(x - x * factor)


def _clipping_range(spec: QuantSpec) -> tuple[float, float]:
    """Lowest and highest level, in units of the scale."""
    ascending = levels(spec)
    return float(ascending[0]), float(ascending[-1])


def _logarithm(scale: Array) -> Array:
    # A group of zeros has the scale 0, whose logarithm would be infinite.
    return jnp.log2(jnp.maximum(jnp.abs(scale), 2.0**SMALLEST_SCALE))


def _magnitude_and_sign(scale: Array, spec: QuantSpec) -> QuantizerParams:
    params = {"log_scale": _logarithm(scale)}
    if spec.has_signed_scale:
        # Not `jnp.sign`: the scale of a group of zeros needs a sign as well.
        params[SIGN] = jnp.where(scale < 0, -1.0, 1.0)
    return params


def _scale(params: QuantizerParams) -> Array:
    # At the bound, near the smallest number of float16, a scale gets no further gradient.
    scale = jnp.exp2(jnp.maximum(params["log_scale"], SMALLEST_SCALE))
    return jnp.where(params[SIGN] < 0, -scale, scale) if SIGN in params else scale


# Scales -----------------------------------------------------------------------------------------------------
# Candidates, relative to the computed scale: from a tenth more down to four tenths.
FACTORS = tuple(round(1.1 - 0.02 * step, 2) for step in range(36))


def best_scale(
    x: Float[Array, "..."], spec: QuantSpec, *, axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return each group's scale with the smallest squared error, and that error, summed over the group.

    The candidates are around the scale that the format computes (`FACTORS`).
    """
    computed = scale_of(x, spec, axis=axis)

    def try_factor(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        scale = computed * factor
        # Errors are those of the scale as stored, not of the candidate before it is rounded.
        error = squared_error(x, encode(x, spec, axis=axis, scale=scale), spec, axis=axis)
        return (jnp.where(error < best[1], scale, best[0]), jnp.minimum(error, best[1])), None

    # A scan instead of a batch: all candidates at once would need 36 times the memory of a weight.
    start = (computed, jnp.full_like(computed, jnp.inf))
    return jax.lax.scan(try_factor, start, jnp.asarray(FACTORS, jnp.float32))[0]


def squared_error(
    x: Float[Array, "..."], encoded: Encoded, spec: QuantSpec, *, axis: int
) -> Float[Array, "..."]:
    """Return each group's sum of squared rounding errors, in the shape of the scales."""
    return sum_groups(jnp.square(decode(encoded, spec, axis=axis) - x), encoded.scale, axis=axis)
