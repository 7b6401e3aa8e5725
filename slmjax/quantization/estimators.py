"""How a rounded number gets a gradient, and where its scale comes from.

Rounding has no gradient of use, so each estimator states one: `rounded` computes the very numbers of the
format, decode(encode(x)), and passes a gradient back to x and to what is learned beside it. Of a scale the
logarithm (base 2) is learned: an optimizer's step then changes it by a share, whatever its size. In formats
whose scale has a sign (`QuantSpec.has_signed_scale`) the sign of each group is taken from its numbers when
the scale begins to be learned, and is kept: it is stored beside the logarithm and gets no gradient.

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

QuantizerParams = dict[str, Array]
SIGN = "sign"  # of a scale: 1 or -1, fixed while the logarithm is learned
SMALLEST_SCALE = -23.0  # as a power of two: a step of float16's subnormal numbers


class Estimator(abc.ABC):
    """The gradient of numbers in a format, and what is learned beside them."""

    @abc.abstractmethod
    def check(self, spec: QuantSpec) -> None:
        """Raises ValueError for a format that it does not suit."""

    @abc.abstractmethod
    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """What is learned beside `x`, as it begins; empty where nothing is."""

    @abc.abstractmethod
    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """`x` in the format: what is deployed."""

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
        """The numbers that `coded` stands for, float32, with a gradient to `x` and to what is learned.

        Args:
          key: randomness of training; None in evaluation.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class StraightThrough(Estimator):
    """The scale is the format's own; the gradient passes unchanged, except where the number was out of the
    grid's reach.
    """

    def check(self, spec: QuantSpec) -> None:
        """It suits every format."""

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """Nothing."""
        return {}

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """`encode`."""
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
        """`fake_quant`."""
        return straight_through(x, spec, axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StochasticRounding(Estimator):
    """In training a number goes up with the chance that makes it right on average; evaluated and deployed it
    goes to the nearest.
    """

    def check(self, spec: QuantSpec) -> None:
        """Raises ValueError for formats whose levels are not evenly spaced."""
        if spec.grid is not CodeGrid.INTEGER or spec.is_asymmetric:
            raise ValueError(
                f"stochastic rounding is between neighbouring integers about zero, and {name_of(spec)} has "
                "none"
            )

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """Nothing."""
        return {}

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """`encode`."""
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
        """Between the two neighbours by chance."""
        if key is None:
            return straight_through(x, spec, axis)
        fixed = jax.lax.stop_gradient(x)
        scale = _wide(scale_of(fixed, spec, axis=axis), x, axis)
        steps = fixed / jnp.where(scale == 0, 1.0, scale)
        codes = jnp.clip(
            jnp.floor(steps + jax.random.uniform(key, x.shape)), spec.lowest_code, spec.highest_code
        )
        return _as_if(codes * scale, x)


class ClippedFrom(enum.Enum):
    """How far a number may lie from zero and still get a gradient."""

    LAST_LEVEL = "last_level"  # LSQ: up to the last level
    # ParetoQ's stretched grids: up to 0.99 of the range, which ends half a step beyond the last level
    RANGE = "range"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedScale(Estimator):
    """The scale is learned (LSQ); it begins as the one with the smallest squared error.

    ParetoQ trains its stretched grids (2 bits and three levels) with `clipped_from=RANGE`. Its parameter
    alpha is the range: 4 scales of `stretched2_*`, 1.5 of `stretched_ternary_*`. Two things differ from its
    code in either case: the logarithm of the scale is learned instead of alpha, and its gradient is divided
    by the root of the numbers of a group instead of those of the whole matrix.
    """

    # numbers beyond get no gradient
    clipped_from: ClippedFrom = added_field(ClippedFrom.LAST_LEVEL, before=ClippedFrom.LAST_LEVEL)

    def check(self, spec: QuantSpec) -> None:
        """Raise ValueError for formats with a zero point or floating-point codes, and for RANGE with a grid
        that is not stretched.
        """
        _check_integers(spec, "a learned scale")
        is_stretched = spec.bits == TERNARY_BITS or (spec.grid is CodeGrid.ODD and spec.bits > 1)
        if self.clipped_from is ClippedFrom.RANGE and not is_stretched:
            raise ValueError(
                "clipped_from=RANGE is for three levels, or for odd ones of 2 bits and more, and "
                f"{name_of(spec)} has others: leave it out"
            )

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """The logarithm of each scale, and its sign where the format has one."""
        return _magnitude_and_sign(best_scale(x, spec, axis=axis)[0], spec)

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """On the learned scale, rounded as the format stores it."""
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
        """The gradient reaches `x` within the grid's reach, and the scale by how far each number was rounded,
        or by its clipped level.
        """
        return learned_scale(x, _scale(params), spec, axis, self.clipped_from)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedScaleAndOffset(Estimator):
    """Scale and zero point are learned (LSQ+), for formats that have a zero point."""

    def check(self, spec: QuantSpec) -> None:
        """Raises ValueError for formats without a zero point."""
        if not spec.is_asymmetric:
            raise ValueError(
                f"an offset is learned where a format has a zero point, and {name_of(spec)} has none: take "
                "LearnedScale"
            )

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """The logarithm of each scale, and the zero point in codes, before it is rounded."""
        encoded = encode(x, spec, axis=axis)
        return {"log_scale": _logarithm(encoded.scale), "offset": encoded.zero.astype(jnp.float32)}

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """On the learned scale and the learned zero point, which is rounded to a code."""
        scale = stored_scale(_scale(params), spec)
        zero = jnp.clip(jnp.round(params["offset"]), spec.lowest_code, spec.highest_code)
        steps = jnp.round(divide(x, _wide(scale, x, axis))) + _wide(zero, x, axis)
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
        """As for a learned scale, about the zero point, which itself gets the gradient of numbers out of
        reach.
        """
        scale = _wide(_scale(params), x, axis)
        limited = jnp.clip(params["offset"], spec.lowest_code, spec.highest_code)
        zero = _wide(limited + jax.lax.stop_gradient(jnp.round(limited) - limited), x, axis)
        share = _gradient_share(x, spec, axis=axis)
        scale = _with_gradient(scale, share)
        zero = _with_gradient(zero, share)
        steps = jnp.clip(x / scale + zero, spec.lowest_code, spec.highest_code)
        smooth = (steps + jax.lax.stop_gradient(jnp.round(steps) - steps) - zero) * scale
        return _as_if(_value(self, x, spec, axis=axis, params=params), smooth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedClip(Estimator):
    """The largest number that is kept is learned (PACT): it gets the gradient of those that are cut off at
    it.
    """

    def check(self, spec: QuantSpec) -> None:
        """Raises ValueError for formats that have a zero point or codes that are floating point."""
        _check_integers(spec, "a learned clip")

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """The logarithm of each scale, which is the clip over the highest level, and its sign where the
        format has one.
        """
        return _magnitude_and_sign(scale_of(x, spec, axis=axis), spec)

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """On the learned scale."""
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
        """The numbers that are cut off move the clip; those within reach do not."""
        low, high = _reach(spec)
        scale = _wide(_scale(params), x, axis)
        ends = low * scale, high * scale  # the other way around where the scale is negative
        return _as_if(
            _value(self, x, spec, axis=axis, params=params),
            jnp.clip(x, jnp.minimum(*ends), jnp.maximum(*ends)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated(Estimator):
    """For inputs: one scale for all tokens, measured on the first batch of the phase and then kept."""

    def check(self, spec: QuantSpec) -> None:
        """Raises ValueError for formats that have a zero point or codes that are floating point, or scales
        that differ by token.
        """
        _check_integers(spec, "a calibrated scale")

    def init_params(self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int) -> QuantizerParams:
        """The logarithm of each scale, and its sign where the format has one. They are no parameters: nothing
        trains them.
        """
        return LearnedClip().init_params(x, spec, axis=axis)

    def encode(
        self, x: Float[Array, "..."], spec: QuantSpec, *, axis: int, params: QuantizerParams
    ) -> Encoded:
        """On the measured scale."""
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
        """The gradient passes within the grid's reach."""
        return learned_scale(x, jax.lax.stop_gradient(_scale(params)), spec, axis, ClippedFrom.LAST_LEVEL)


def default_estimator(spec: QuantSpec) -> Estimator:
    """What suits the weights of a format.

    With few levels their place decides, so that it is learned: with 3 bits or less, the stretched grids
    included. Elsewhere the scale follows the weights, as the format computes it; so it does where that is by
    their mean size, which is what those formats are for.
    """
    is_plain = (
        spec.grid not in FLOAT_GRIDS and not spec.is_asymmetric and spec.statistic is not Statistic.ABSMEAN
    )
    return LearnedScale() if is_plain and spec.bits <= 3 else StraightThrough()


def _check_integers(spec: QuantSpec, what: str) -> None:
    if spec.is_asymmetric:
        raise ValueError(
            f"{what} is for grids about zero, and {name_of(spec)} has a zero point: take "
            "LearnedScaleAndOffset"
        )
    if spec.grid in FLOAT_GRIDS:
        raise ValueError(
            f"{what} is for integer codes, and those of {name_of(spec)} are floating point: take "
            "StraightThrough"
        )


# Gradients --------------------------------------------------------------------------------------------------
@jax.custom_vjp
def _as_if(value: Array, smooth: Array) -> Array:
    """`value`, to the bit, with the gradient that `smooth` would have had."""
    return value


_as_if.defvjp(lambda value, smooth: (value, None), lambda _, dy: (jnp.zeros_like(dy), dy))


def _value(estimator: Estimator, x: Array, spec: QuantSpec, *, axis: int, params: QuantizerParams) -> Array:
    return decode(jax.lax.stop_gradient(estimator.encode(x, spec, axis=axis, params=params)), spec, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def straight_through(x: Float[Array, "..."], spec: QuantSpec, axis: int) -> Float[Array, "..."]:
    """`fake_quant`, whose gradient is that of the identity but 0 where a number was more than half a step out
    of reach.
    """
    return fake_quant(x, spec, axis=axis)


def _straight_forward(x: Array, spec: QuantSpec, axis: int) -> tuple[Array, Array | None]:
    y = fake_quant(x, spec, axis=axis)
    if not clips(spec):
        return y, None
    step = 2.0 if spec.grid is CodeGrid.ODD else 1.0
    return y, jnp.abs(y - x) <= 0.501 * step * jnp.abs(_wide(scale_of(x, spec, axis=axis), x, axis))


def _straight_backward(spec: QuantSpec, axis: int, inside: Array | None, dy: Array) -> tuple[Array]:
    return (dy if inside is None else jnp.where(inside, dy, 0),)


straight_through.defvjp(_straight_forward, _straight_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def learned_scale(
    x: Float[Array, "..."], scale: Float[Array, "..."], spec: QuantSpec, axis: int, clipped_from: ClippedFrom
) -> Float[Array, "..."]:
    """`x` rounded on a given scale, with the gradient of learned step sizes (Esser et al. 2020) to both.

    The gradient of a scale is divided by the root of how many numbers share it times its highest level, as
    there.
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
    wide = _wide(scale, x, axis)
    low, high = _reach(spec)
    if clipped_from is ClippedFrom.RANGE:
        half_step = 1.0 if spec.grid is CodeGrid.ODD else 0.5
        low = 0.99 * (low - half_step)
        high = 0.99 * (high + half_step)
    steps = x / wide
    inside = (steps >= low) & (steps <= high)
    by_number = dy * jnp.where(inside, y - x, y) / wide
    total = sum_groups(by_number, scale, axis=axis)
    return jnp.where(inside, dy, 0), total * _gradient_share(x, spec, axis=axis)


learned_scale.defvjp(_learned_forward, _learned_backward)


def clips(spec: QuantSpec) -> bool:
    """Whether a computed scale leaves numbers more than half a step beyond the last level."""
    if spec.grid in FLOAT_GRIDS or spec.is_asymmetric:
        return False
    if (
        spec.statistic is Statistic.ABSMEAN
    ):  # a scale by the mean size means to leave large numbers out: they are trained on all the same
        return False
    return spec.statistic is Statistic.SIGNED_MAX or spec.divisor > _reach(spec)[1] + 0.5 * (
        2.0 if spec.grid is CodeGrid.ODD else 1.0
    )


def _wide(scale: Array, x: Array, axis: int) -> Array:
    """A number for each group, for each of its numbers."""
    return jnp.broadcast_to(expanded(scale, x.shape[axis], axis=axis), x.shape)


def sum_groups(x: Float[Array, "..."], scale: Float[Array, "..."], *, axis: int) -> Float[Array, "..."]:
    """Sums of `x` over the numbers that share each scale, in the shape of `scale`."""
    axis = axis % x.ndim
    groups = x.reshape(*x.shape[:axis], scale.shape[axis], -1, *x.shape[axis + 1 :])
    shared = tuple(dim for dim, size in enumerate(scale.shape) if size == 1 and dim != axis)
    total = jnp.sum(groups, axis=axis + 1)
    return jnp.sum(total, axis=shared, keepdims=True) if shared else total


def _gradient_share(x: Array, spec: QuantSpec, *, axis: int) -> float:
    sharing = {
        Granularity.PER_GROUP: spec.group_size,
        Granularity.PER_CHANNEL: x.shape[axis],
        Granularity.PER_TENSOR: x.shape[axis],
    }[spec.granularity]
    return 1.0 / math.sqrt((sharing or 1) * max(_reach(spec)[1], 1e-3))


def _with_gradient(x: Array, share: float) -> Array:
    """`x`, whose gradient is multiplied."""
    return x * share + jax.lax.stop_gradient(x - x * share)


def _reach(spec: QuantSpec) -> tuple[float, float]:
    """Lowest and highest level, in units of the scale."""
    known = levels(spec)
    return float(known[0]), float(known[-1])


def _logarithm(scale: Array) -> Array:
    return jnp.log2(jnp.maximum(jnp.abs(scale), 2.0**SMALLEST_SCALE))


def _magnitude_and_sign(scale: Array, spec: QuantSpec) -> QuantizerParams:
    magnitude = {"log_scale": _logarithm(scale)}
    return magnitude | {SIGN: jnp.where(scale < 0, -1.0, 1.0)} if spec.has_signed_scale else magnitude


def _scale(params: QuantizerParams) -> Array:
    scale = jnp.exp2(jnp.maximum(params["log_scale"], SMALLEST_SCALE))
    return jnp.where(params[SIGN] < 0, -scale, scale) if SIGN in params else scale


# Scales -----------------------------------------------------------------------------------------------------
# of the format's own scale: from a tenth more down to four tenths
FACTORS = tuple(round(1.1 - 0.02 * step, 2) for step in range(36))


def best_scale(
    x: Float[Array, "..."], spec: QuantSpec, *, axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Of each group the scale, among those around the format's own, that has the smallest squared error; and
    that error, summed.
    """
    own = scale_of(x, spec, axis=axis)

    def better(found: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        scale = own * factor
        error = squared_error(x, encode(x, spec, axis=axis, scale=scale), spec, axis=axis)
        return (jnp.where(error < found[1], scale, found[0]), jnp.minimum(error, found[1])), None

    return jax.lax.scan(better, (own, jnp.full_like(own, jnp.inf)), jnp.asarray(FACTORS, jnp.float32))[0]


def squared_error(
    x: Float[Array, "..."], encoded: Encoded, spec: QuantSpec, *, axis: int
) -> Float[Array, "..."]:
    """Of each group the sum of squared differences of `x` to what its codes stand for, in the shape of the
    scales.
    """
    return sum_groups(jnp.square(decode(encoded, spec, axis=axis) - x), encoded.scale, axis=axis)
