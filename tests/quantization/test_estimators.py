"""Estimators: the very numbers of the format, and the gradients that the papers state, worked out again in
NumPy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.formats.coding import decode, encode, fake_quant, scale_of
from slmjax.formats.presets import PRESETS, preset
from slmjax.formats.spec import Granularity, ScaleType, levels
from slmjax.quantization.estimators import (
    Calibrated,
    ClippedFrom,
    LearnedClip,
    LearnedScale,
    LearnedScaleAndOffset,
    StochasticRounding,
    StraightThrough,
    best_scale,
    default_estimator,
)

INT3 = preset("int3_g32")
Q4 = preset("q4_0")
Q8 = preset("q8_0")
PER_TENSOR = dataclasses.replace(preset("int4_g32"), granularity=Granularity.PER_TENSOR, group_size=None)
ASYMMETRIC = dataclasses.replace(preset("torchao_int8_token"), bits=4)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
DY = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)

CASES = [
    (StraightThrough(), Q4),
    (StraightThrough(), preset("ternary_g256")),
    (StraightThrough(), preset("mxfp4")),
    (StochasticRounding(), Q8),
    (LearnedScale(), INT3),
    (LearnedScale(), preset("stretched2_g32")),
    (LearnedScale(), preset("binary_g32")),
    (LearnedScaleAndOffset(), ASYMMETRIC),
    (LearnedClip(), PER_TENSOR),
    (Calibrated(), PER_TENSOR),
]


def gradients(estimator, spec, x, learned):
    """Of sum(DY * rounded), to `x` and what is learned."""

    def total(x, learned):
        return jnp.sum(
            DY[: x.shape[0], : x.shape[1]]
            * estimator.fake_quantize(x, spec, axis=-1, params=learned, key=None)
        )

    return jax.jit(jax.grad(total, argnums=(0, 1)))(x, learned)


@pytest.mark.parametrize(("estimator", "spec"), CASES)
def test_what_is_computed_is_what_is_deployed(estimator, spec):
    x = jnp.asarray(np.resize(X, (2, 256))) * 0.1
    learned = estimator.init_params(x, spec, axis=-1)
    learned = {name: value + 0.1 for name, value in learned.items()}
    value = jax.jit(lambda x, learned: estimator.fake_quantize(x, spec, axis=-1, params=learned, key=None))(
        x, learned
    )
    deployed = jax.jit(
        lambda x, learned: decode(estimator.encode(x, spec, axis=-1, params=learned), spec, axis=-1)
    )(x, learned)
    np.testing.assert_array_equal(value, deployed)
    assert len(np.unique(deployed)) > 2


def test_straight_through_leaves_out_what_is_out_of_reach():
    x = np.zeros((1, 32), np.float32)
    x[0, :4] = [
        -8.0,
        7.9,
        7.4,
        1.2,
    ]  # steps of 1: the largest, with its sign, has the code -8, so that 7.9 is cut off at 7
    dx, _ = gradients(StraightThrough(), Q4, x, {})
    np.testing.assert_array_equal(dx[0, :4], DY[0, :4] * [1, 0, 1, 1])
    dx, _ = gradients(StraightThrough(), Q8, x, {})  # whose scale reaches every number
    np.testing.assert_array_equal(dx, DY[:1, :32])


def test_a_learned_scale_has_the_gradient_of_the_paper():
    scale = np.full((3, 2), 0.3, np.float32)
    exact = dataclasses.replace(INT3, scale_type=ScaleType.FLOAT32)
    dx, learned = gradients(LearnedScale(), exact, X, {"log_scale": np.log2(scale)})
    steps = X / 0.3
    inside = (steps >= -3) & (steps <= 3)
    by_number = np.where(inside, np.round(steps) - steps, np.clip(steps, -3, 3)) * DY
    expected = by_number.reshape(3, 2, 32).sum(-1) / np.sqrt(32 * 3)
    np.testing.assert_array_equal(dx, np.where(inside, DY, 0))
    np.testing.assert_allclose(learned["log_scale"], expected * 0.3 * np.log(2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "num_levels", "shift"),
    [("stretched2_g32", 2.0, 0.5), ("stretched_ternary_row", 1.5, 0.0)],
    ids=["2 bits", "ternary"],
)
def test_a_stretched_grid_has_the_gradient_of_its_paper(name, num_levels, shift):
    """ParetoQ's StretchedElasticQuant in NumPy: values on a range alpha, a mask that ends at 0.99 of it."""
    spec = dataclasses.replace(
        preset(name), scale_type=ScaleType.FLOAT32, granularity=Granularity.PER_CHANNEL, group_size=None
    )
    alpha = 1.5
    steps = np.asarray(X) / alpha
    values = (np.round(np.clip(steps, -0.99, 0.99) * num_levels - shift) + shift) / num_levels
    last = (num_levels - shift) / num_levels if shift else 1 / 1.5
    inside = np.abs(steps) <= 0.99
    of_alpha = np.where(inside, values - steps, np.sign(steps) * last) * DY
    per_alpha = 4 if shift else 1.5  # scales of ours in one alpha
    learned = {"log_scale": jnp.full((3, 1), np.log2(alpha / per_alpha), jnp.float32)}
    estimator = LearnedScale(clipped_from=ClippedFrom.RANGE)
    np.testing.assert_allclose(
        estimator.fake_quantize(X, spec, axis=-1, params=learned, key=None), values * alpha, rtol=1e-5
    )
    dx, slopes = gradients(estimator, spec, X, learned)
    np.testing.assert_array_equal(dx, np.where(inside, DY, 0))
    assert 0 < np.mean(inside & (np.abs(steps) > last)) and np.any(
        ~inside
    )  # numbers that the last level would leave out
    # The slope of alpha over that of the logarithm is alpha ln 2; LSQ's divisor is the root of the numbers
    # times the highest level.
    expected = of_alpha.sum(-1, keepdims=True) * alpha * np.log(2) / np.sqrt(64 * (3 if shift else 1))
    np.testing.assert_allclose(slopes["log_scale"], expected, rtol=1e-4)
    with pytest.raises(
        ValueError,
        match="clipped_from=RANGE is for three levels, or for odd ones of 2 bits and more, and int3_g32 has",
    ):
        estimator.check(INT3)


def test_a_learned_clip_moves_by_what_is_cut_off():
    scale = np.full((1, 1), 0.2, np.float32)
    dx, learned = gradients(LearnedClip(), PER_TENSOR, X, {"log_scale": np.log2(scale)})
    cut = np.abs(X) > 7 * 0.2
    assert 0.05 < cut.mean() < 0.95
    np.testing.assert_array_equal(dx, np.where(cut, 0, DY))
    kept = float(jax.jit(lambda: jnp.exp2(jnp.log2(jnp.float32(0.2))))())
    np.testing.assert_allclose(
        learned["log_scale"], [[np.sum(DY * np.sign(X) * cut) * 7 * kept * np.log(2)]], rtol=1e-4
    )


def test_an_offset_is_learned_from_what_is_cut_off():
    estimator = LearnedScaleAndOffset()
    x = jnp.concatenate([X[:, :32] * 0.1 + 3, X[:, 32:] * 0.1 - 1], axis=1)
    learned = estimator.init_params(x, ASYMMETRIC, axis=-1)
    narrow = {"log_scale": learned["log_scale"] - 0.1, "offset": learned["offset"]}
    dx, slopes = gradients(estimator, ASYMMETRIC, x, narrow)
    assert (
        np.any(dx == 0)
        and np.any(np.isclose(dx, DY, rtol=1e-6))
        and np.all(np.isfinite(slopes["offset"]))
        and np.all(slopes["offset"] != 0)
    )
    dx, slopes = gradients(estimator, ASYMMETRIC, x, {**narrow, "log_scale": learned["log_scale"] + 1})
    np.testing.assert_allclose(dx, DY, rtol=1e-6)
    np.testing.assert_allclose(slopes["offset"], 0, atol=1e-5)  # it moves code and zero point alike


def test_stochastic_rounding_is_right_on_average():
    x = np.full((1, 32), 0.25, np.float32)
    x[0, 0] = 1.27  # steps of about 0.01, which float16 does not hold to the bit
    keys = jax.random.split(jax.random.key(0), 4000)
    x = jnp.asarray(x) * 0.997
    drawn = jax.jit(
        jax.vmap(lambda key: StochasticRounding().fake_quantize(x, Q8, axis=-1, params={}, key=key))
    )(keys)
    steps = 0.997 * 1.27 / 127
    assert (
        set(np.round(np.unique(drawn[:, 0, 1]) / steps)) == {25.0, 26.0}
        or len(np.unique(drawn[:, 0, 1])) <= 2
    )
    np.testing.assert_allclose(np.mean(drawn[:, 0, 1:]), 0.25 * 0.997, atol=2e-4)
    gradient = jax.grad(
        lambda x: jnp.sum(
            DY[:1, :32] * StochasticRounding().fake_quantize(x, Q8, axis=-1, params={}, key=keys[0])
        )
    )(x)
    np.testing.assert_array_equal(gradient, DY[:1, :32])


def test_the_best_scale_has_the_smallest_error():
    # outliers, which a whole scale would reach for
    x = X * jnp.where(jnp.arange(64) % 16 == 0, 5, 1)[None, :]
    spec = dataclasses.replace(INT3, bits=4)
    whole = scale_of(x, spec, axis=-1)
    (best, least) = best_scale(x, spec, axis=-1)
    assert (
        best.shape == whole.shape
        and np.all(np.abs(best) <= 1.11 * np.abs(whole))
        and np.any(np.abs(best) < 0.9 * np.abs(whole))
    )

    def error(scale):
        return (
            np.square(np.asarray(decode(encode(x, spec, axis=-1, scale=scale), spec, axis=-1)) - x)
            .reshape(3, 2, 32)
            .sum(-1)
        )

    tried = np.stack([error(whole * share) for share in np.arange(0.4, 1.101, 0.02)])
    np.testing.assert_allclose(error(best), tried.min(0), rtol=1e-3)
    np.testing.assert_allclose(least, error(best), rtol=1e-4)


ESTIMATORS = (
    StraightThrough(),
    StochasticRounding(),
    LearnedScale(),
    LearnedScaleAndOffset(),
    LearnedClip(),
    Calibrated(),
)
DIFFERENT = ("q4_0", "tq2_0", "torchao_int8_token", "ternary_row", "stretched2_g32")


@pytest.mark.parametrize(
    "names", [DIFFERENT, pytest.param(tuple(PRESETS), marks=pytest.mark.nightly)], ids=["different", "all"]
)
def test_no_estimator_begins_with_a_larger_error_than_rounding_to_nearest(names):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 2)), jnp.float32)

    def suits(estimator, spec):
        try:
            estimator.check(spec)
        except ValueError:
            return False
        return True

    def error(estimator, spec):
        learned = estimator.init_params(x, spec, axis=0)
        return jnp.mean(jnp.square(estimator.fake_quantize(x, spec, axis=0, params=learned, key=None) - x))

    def errors():
        return {
            name: (
                jnp.mean(jnp.square(fake_quant(x, PRESETS[name], axis=0) - x)),
                [
                    error(estimator, PRESETS[name])
                    for estimator in ESTIMATORS
                    if suits(estimator, PRESETS[name])
                ],
            )
            for name in names
        }

    for name, (nearest, found) in jax.jit(errors)().items():
        # A scale whose logarithm is kept differs in its last bits.
        assert found and max(found) <= nearest * (1 + 1e-6), (name, nearest, found)


# They differ where two numbers of other signs are the largest.
@pytest.mark.parametrize("name", ["q4_0", pytest.param("onnx_int4_b32", marks=pytest.mark.nightly)])
def test_a_learned_scale_keeps_the_sign_of_its_group(name):
    spec = preset(name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), jnp.float32)
    few = x[:, :4]
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(512, 4)), jnp.float32)

    def total(estimator, x, learned):
        return jnp.sum(dy * estimator.fake_quantize(x, spec, axis=0, params=learned, key=None))

    @jax.jit
    def results():
        learned = LearnedScale().init_params(x, spec, axis=0)
        both = [
            jnp.mean(jnp.square(LearnedScale().fake_quantize(x, spec, axis=0, params=one, key=None) - x))
            for one in (learned, {"log_scale": learned["log_scale"]})
        ]
        begun = LearnedClip().init_params(few, spec, axis=0)
        clip = {**begun, "log_scale": begun["log_scale"] - 0.2}
        slopes = [
            jax.grad(total, argnums=(1, 2))(estimator, few, clip)
            for estimator in (LearnedScale(), LearnedClip())
        ]
        return learned, both, clip, slopes, scale_of(x, spec, axis=0)

    learned, (error, without_signs), clip, slopes, scale = results()
    np.testing.assert_array_equal(learned["sign"], np.sign(scale))
    assert 0.4 < np.mean(scale < 0) < 0.6
    assert error == pytest.approx(0.00664, abs=1e-5)
    assert without_signs == pytest.approx(0.00853, abs=1e-5), (
        "a checkpoint from before has no signs, and the values that it had"
    )
    wide = np.repeat(np.exp2(clip["log_scale"]) * clip["sign"], 32, axis=0)
    steps = few / wide
    for dx, of_learned in slopes:
        assert np.all(of_learned["sign"] == 0)
        np.testing.assert_array_equal(dx, np.where((steps >= -8) & (steps <= 7), dy, 0))
    cut = dy * wide * np.where(steps < -8, -8, np.where(steps > 7, 7, 0))
    np.testing.assert_allclose(
        slopes[1][1]["log_scale"], cut.reshape(16, 32, 4).sum(1) * np.log(2), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("q4_0", StraightThrough),
        ("q8_0", StraightThrough),
        ("tq2_0", LearnedScale),
        ("ternary_g256", StraightThrough),
        ("int3_g32", LearnedScale),
        ("int2_g32", LearnedScale),
        ("stretched2_g32", LearnedScale),
        ("binary_g32", StraightThrough),
        ("mxfp4", StraightThrough),
        ("torchao_int8_token", StraightThrough),
    ],
)
def test_each_format_has_an_estimator_that_suits_it(name, kind):
    estimator = default_estimator(preset(name))
    assert isinstance(estimator, kind)
    estimator.check(preset(name))


def test_what_nobody_could_have_rounded_stays_visible():
    x = X.at[1, 5].set(jnp.nan)
    for spec in (Q4, INT3):
        estimator = default_estimator(spec)
        learned = estimator.init_params(X, spec, axis=-1)
        assert np.isnan(estimator.fake_quantize(x, spec, axis=-1, params=learned, key=None)).any()
    assert float(levels(INT3)[-1]) == 3 and np.all(np.isfinite(fake_quant(X, INT3)))
