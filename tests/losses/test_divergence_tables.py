"""Divergences of four columns against independently computed numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.losses import (
    DistillLossConfig,
    DistillWeights,
    Divergence,
    ForwardKl,
    Head,
    Jsd,
    ReverseKl,
    SkewKl,
    SkewReverseKl,
    SoftCrossEntropy,
    Taid,
    TeacherMean,
    TeacherOutput,
    TopK,
    TotalVariation,
    fit_rows,
)
from tests.losses.flat import divergence_of_tokens, flat_distill_loss

TEACHER = [[2, 1, 0.1, -1], [0, 0, 0, 0], [3, -1, 0.5, 0.2]]
STUDENT = [[1, 1.5, 0, 0.5], [1, 2, 3, 4], [0, 0, 0, 9]]
ENTROPY = (0.9606727901, 1.3862943611)  # of the teacher's first two

# What is compared, at a temperature and with the temperature squared or not: the first two tokens' values.
VALUES: dict[str, tuple[Divergence, float, bool, tuple[float, ...]]] = {
    "JSD 0": (Jsd(beta=0.0), 1.0, True, (0.3206185649, 0.5538953374)),
    "JSD .1": (Jsd(beta=0.1), 1.0, True, (0.0286756265, 0.0465821486)),
    "JSD .25": (Jsd(beta=0.25), 1.0, True, (0.0595305548, 0.0907427697)),
    "JSD .5": (Jsd(), 1.0, True, (0.0801334018, 0.1133397211)),
    "JSD .75": (Jsd(beta=0.75), 1.0, True, (0.0620522466, 0.0824767526)),
    "JSD .9": (Jsd(beta=0.9), 1.0, True, (0.0308389346, 0.0393989844)),
    "JSD 1": (Jsd(beta=1.0), 1.0, True, (0.3544511164, 0.4387573971)),
    "forward KL": (ForwardKl(), 1.0, True, (0.3206185649, 0.5538953374)),
    "reverse KL": (ReverseKl(), 1.0, True, (0.3544511164, 0.4387573971)),
    "T 2": (ForwardKl(), 2.0, True, (0.3781145004, 0.6041772423)),
    "T 4": (ForwardKl(), 4.0, True, (0.4008258703, 0.6195526870)),
    "top 2": (TopK(k=2), 1.0, True, (0.2840914700,)),
    "top 1": (TopK(k=1), 1.0, True, (0.2837785196,)),
    "top 4": (TopK(k=4), 1.0, True, (0.3206185649, 0.5538953374)),  # all of them: the forward KL itself
    "top 9": (TopK(k=9), 1.0, True, (0.3206185649, 0.5538953374)),
    "total variation": (TotalVariation(), 1.0, True, (0.3620620064,)),
    "skew": (SkewKl(), 1.0, True, (0.2568784598,)),
    "skew 0": (SkewKl(alpha=0.0), 1.0, True, (0.3206185649, 0.5538953374)),
    "skew 1": (SkewKl(alpha=1.0), 1.0, True, (0.0, 0.0)),
    "skew reverse": (SkewReverseKl(), 1.0, True, (0.2695810870,)),
    "skew reverse 0": (SkewReverseKl(alpha=0.0), 1.0, True, (0.3544511164, 0.4387573971)),
    "skew reverse 1": (SkewReverseKl(alpha=1.0), 1.0, True, (0.0, 0.0)),
    "soft cross entropy": (SoftCrossEntropy(), 1.0, True, (1.2812913550, 1.9401896986)),
    "TAID 0": (Taid(start=0.0), 1.0, True, (1.2450504275,)),
    "TAID .4": (Taid(), 1.0, True, (1.2520321839,)),
    "TAID 1": (Taid(start=1.0), 1.0, True, (1.2812913550,)),
}
# Means of the two at temperature 2, without its square.
MEANS_AT_2 = {
    0.0: 0.1227864678,
    0.1: 0.0109406727,
    0.25: 0.0225344997,
    0.5: 0.0297239731,
    0.75: 0.0222587655,
    0.9: 0.0107210474,
    1.0: 0.1196252603,
}
MEANS_AT_1 = {0.5: 0.0967365615, 1.0: 0.3966042568}
LIMITS: dict[str, tuple[Divergence, float, bool]] = {
    "beta near 0": (Jsd(beta=1e-6), 1.0, True),
    "beta near 1": (Jsd(beta=1 - 1e-6), 1.0, True),
    "T without end": (ForwardKl(), 1e3, True),
}
GRADIENTS = {
    "forward KL": [-0.3620620, 0.2203227, 0.0061016, 0.1356376],
    "T 2": [-0.3573087988, 0.1525529227, -0.0183886084, 0.2231444845],
    "top 2": [-0.3620620, 0.2203227, 0.0535123, 0.0882269],
    "top 4": [-0.3620620, 0.2203227, 0.0061016, 0.1356376],
    "soft cross entropy": [-0.3620620, 0.2203227, 0.0061016, 0.1356376],
    "TAID 0": [0.0, 0.0, 0.0, 0.0],
    "TAID 1": [-0.3620620, 0.2203227, 0.0061016, 0.1356376],
}
TOLERANCES = {"float32": 1e-6, "float64": 1e-9}


def identity_head(dtype, rows: int = 4, vocab_size: int = 4) -> Head:
    return Head(weight=jnp.eye(rows, 4, dtype=dtype), vocab_size=vocab_size)


@functools.cache
def results_of(dtype: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of everything above, values and gradients by the student's logits, from one program."""
    cases = {name: case[:3] for name, case in VALUES.items()} | LIMITS
    cases |= {f"at 2: {beta}": (Jsd(beta=beta), 2.0, False) for beta in MEANS_AT_2}

    def compute(student: jax.Array, teacher: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        head = identity_head(dtype)
        results = {}
        for name, (divergence, temperature, squared) in cases.items():
            fn = functools.partial(
                divergence_of_tokens,
                head=head,
                teachers=(TeacherOutput(hidden=teacher, head=head),),
                config=DistillLossConfig(divergence=divergence, scales_by_square=squared),
                temperature=temperature,
            )
            values, vjp_fn = jax.vjp(fn, student)
            results[name] = values, vjp_fn(jnp.ones_like(values))[0]
        return results

    with jax.enable_x64(dtype == "float64"):
        return jax.device_get(jax.jit(compute)(jnp.array(STUDENT, dtype), jnp.array(TEACHER, dtype)))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_and_gradients(dtype: str) -> None:
    for name, (*_, expected) in VALUES.items():
        np.testing.assert_allclose(
            results_of(dtype)[name][0][: len(expected)],
            expected,
            atol=TOLERANCES[dtype],
            rtol=0,
            err_msg=name,
        )
    for name, expected in GRADIENTS.items():  # the table has them to seven or ten places
        np.testing.assert_allclose(
            results_of(dtype)[name][1][0],
            expected,
            atol=1e-6 if dtype == "float32" else 6e-8,
            rtol=0,
            err_msg=name,
        )
    assert results_of(dtype)["T 2"][0].dtype == dtype
    np.testing.assert_allclose(
        results_of(dtype)["TAID 0"][1], np.zeros((3, 4)), atol=1e-6 if dtype == "float32" else 1e-15
    )
    kl_and_entropy = results_of(dtype)["forward KL"][0][:2] + ENTROPY
    np.testing.assert_allclose(
        results_of(dtype)["soft cross entropy"][0][:2], kl_and_entropy, atol=TOLERANCES[dtype]
    )
    for beta, expected in MEANS_AT_2.items():
        np.testing.assert_allclose(
            results_of(dtype)[f"at 2: {beta}"][0][:2].mean(),
            expected,
            atol=TOLERANCES[dtype],
            err_msg=str(beta),
        )


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_limits(dtype: str) -> None:
    values = {name: value[:2] for name, (value, _) in results_of(dtype).items()}
    np.testing.assert_allclose(values["beta near 0"].mean(), 4.4e-7, rtol=0.02)
    for near, limit in (("beta near 0", "forward KL"), ("beta near 1", "reverse KL")):
        # In float32 a beta of 1 - 1e-6 is itself known to 3% of its distance from 1.
        np.testing.assert_allclose(
            values[near] / 1e-6, values[limit], rtol=1e-4 if dtype == "float64" else 0.05
        )
    np.testing.assert_allclose(
        values["T without end"], [0.4134375, 0.625], rtol=1e-3 if dtype == "float64" else 0.05
    )


def test_sums_are_weighted_and_masked_tokens_count_nothing() -> None:
    head = identity_head("float32")
    teachers = (TeacherOutput(hidden=jnp.array(TEACHER), head=head),)
    targets = jnp.array([1, 2, 0])
    weights = jnp.array([1.0, 1.0, 0.0])
    for beta in (0.5, 1.0):
        total, metrics = flat_distill_loss(
            jnp.array(STUDENT), head, teachers, Jsd(beta=beta), targets, weights
        )
        np.testing.assert_allclose(total, 2 * MEANS_AT_1[beta], atol=1e-6)
        np.testing.assert_allclose(metrics["divergence"], total)


def test_taid_grows_as_its_loss_falls() -> None:
    with jax.enable_x64(True):
        taid = Taid()
        teacher_weights = []
        momenta = []
        state = taid.initial_state()
        assert not any(
            x.weak_type for x in state.values()
        )  # it would turn strong in the first step, and that be compiled anew
        for step, loss in enumerate((2.0, 1.9, 1.8, 1.85)):
            state = taid.updated_state(state, value=jnp.array(loss), progress=jnp.array(step / 100_000))
            teacher_weights.append(float(state["share"]))
            momenta.append(float(state["momentum"]))
        # Never behind the straight line, and never past the end.
        late = taid.updated_state(state, value=jnp.array(1.0), progress=jnp.array(0.5))
        last = jax.device_get(taid.updated_state(late, value=jnp.array(0.1), progress=jnp.array(1.0)))
    np.testing.assert_allclose(teacher_weights, [0.4, 0.4001500375, 0.4003000766, 0.4004500565], rtol=1e-9)
    np.testing.assert_allclose(momenta, [0, 5e-4, 1.0213158e-3, 7.333249e-4], rtol=1e-7)
    np.testing.assert_allclose(late["share"], 0.7)
    assert last["share"] == 1.0


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        (TeacherMean.LOGITS, [0.2377771, 0.2377771, 0.4121279, 0.1123179]),
        (TeacherMean.PROBABILITIES, [0.3367101, 0.1654165, 0.4027673, 0.0951061]),
    ],
)
def test_two_teachers(mean: TeacherMean, expected: list[float]) -> None:
    head = identity_head("float32")
    teachers = tuple(
        TeacherOutput(hidden=jnp.array([logits]), head=head) for logits in (TEACHER[0], [-1, 0, 2, 0.5])
    )
    student = jnp.array([STUDENT[0]])

    def gradient(weights: tuple[float, ...] = ()) -> jax.Array:
        config = DistillLossConfig(divergence=ForwardKl(), mean=mean, teacher_weights=weights)
        return jax.grad(lambda x: divergence_of_tokens(x, head, teachers, config)[0])(student)[0]

    # The gradient of the forward KL is q - p.
    np.testing.assert_allclose(jax.nn.softmax(student)[0] - gradient(), expected, atol=1e-6)
    alone = jax.nn.softmax(teachers[0].hidden)[0]
    np.testing.assert_allclose(jax.nn.softmax(student)[0] - gradient((2.0, 0.0)), alone, atol=1e-6)


def test_columns_that_only_one_model_has_are_cut() -> None:
    student = jnp.array([[1, 1.5, 0, 0]])
    teacher = jnp.array([[2, 1, 0.1, -30]])
    wide = identity_head("float32")
    narrow = identity_head("float32", rows=3, vocab_size=3)
    padded = fit_rows(narrow, 4)
    assert padded.weight.shape == (4, 4) and padded.vocab_size == 3
    assert fit_rows(wide, 3).vocab_size == 3 and fit_rows(wide, 6).vocab_size == 4
    for own, other in ((narrow, fit_rows(wide, 3)), (padded, wide), (wide, padded)):
        value = divergence_of_tokens(student, own, (TeacherOutput(hidden=teacher, head=other),), ForwardKl())
        np.testing.assert_allclose(
            value, [0.2347418], atol=1e-6
        )  # and not the .3498115 of a student padded with zeros
    teachers = (TeacherOutput(hidden=teacher, head=wide),)
    with pytest.raises(ValueError, match=r"tables of \[3, 4\] rows"):
        flat_distill_loss(student, narrow, teachers, ForwardKl(), jnp.array([0]), jnp.ones(1))


def test_invalid_settings_are_refused() -> None:
    head = identity_head("float32")
    teachers = (TeacherOutput(hidden=jnp.array(TEACHER), head=head),)
    for make in (
        lambda: Jsd(beta=1.5),
        lambda: SkewKl(alpha=-0.1),
        lambda: SkewReverseKl(alpha=float("nan")),
        lambda: Taid(momentum=2.0),
    ):
        with pytest.raises(ValueError, match="between 0 and 1"):
            make()
    with pytest.raises(ValueError, match="start=0.5 up to end=0.4"):
        Taid(start=0.5, end=0.4)
    with pytest.raises(ValueError, match="at least 1"):
        TopK(k=0)
    for temperature in (0, float("inf")):
        with pytest.raises(ValueError, match="temperature is"):
            DistillWeights(temperature=temperature)
    with pytest.raises(ValueError, match="give each one"):
        divergence_of_tokens(
            jnp.array(STUDENT),
            head,
            teachers,
            DistillLossConfig(divergence=ForwardKl(), teacher_weights=(1.0, 1.0)),
        )
