"""Chunks of a linear recurrence equal the recurrence: golden values, gradients, packed rows, extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import kernels
from slmjax.kernels.linear_recurrence import RecurrentState
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.planning import flops

# One head, two key dims and two value dims; the values of `OUTPUTS` and `STATES` are from a loop in float64.
Q = np.array([[0.1, -0.3], [0.3, 0.4], [-0.5, 0.6], [0.7, -0.6], [0.9, 1]])
K = np.array([[0.2, 0.1], [-0.4, 0.3], [0.6, -0.5], [0.8, 0.7], [-1, 0.9]])
V = np.array([[1, 0.5], [-0.5, 2], [1.5, -1], [-2, 0.3], [0.4, -0.7]])
SEGMENTS = np.array([1, 1, 1, 2, 2])
SCALAR = np.array([-0.1, -0.2, -0.3, -0.4, -0.5])
VECTOR = np.array([[-0.1, -0.3], [-0.2, -0.1], [-0.5, -0.4], [-0.3, -0.6], [-0.05, -0.2]])
BETA = np.array([0.5, 0.9, 0.3, 1, 0.7])
RATE = np.array([[0.5, 0.6], [0.7, 0.2], [0.4, 0.9], [0.3, 0.8], [0.6, 0.5]])
UNIT_KEYS = K / np.sqrt(np.sum(K**2, axis=1, keepdims=True) + 1e-6)


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(x))


def diagonal_plus_rank_one():
    removal = K * [0.7, 0.8]
    removal = removal / np.sqrt(np.sum(removal**2, axis=1, keepdims=True))
    keys = K * (1 + (RATE - 1) * [1.02, 0.98])
    return {"k": keys, "removal": removal, "strength": removal * RATE, "log_decay": VECTOR}


DT = np.array([0.1, 0.3, 0.2, 0.4, 0.6])
# The arguments that differ from (Q, K, V).
CASES = {
    "linear": {
        "q": elu_plus_one(Q),
        "k": elu_plus_one(K),
        "v": np.concatenate([V, np.ones((5, 1))], axis=1),
    },
    "gla": {"log_decay": VECTOR},
    "retnet": {"log_decay": np.full(5, np.log(1 - 2.0**-5))},
    "delta": {"k": UNIT_KEYS, "beta": BETA},
    "gated_delta": {"k": UNIT_KEYS, "beta": BETA, "log_decay": SCALAR},
    "kda": {"k": UNIT_KEYS, "beta": BETA, "log_decay": VECTOR},
    "ssd": {"v": V * DT[:, None], "log_decay": -1.5 * DT},
    "rwkv7": diagonal_plus_rank_one(),
}
# Rows 1 to 5 packed, then rows 4 and 5 if all five tokens are one document.
OUTPUTS = {
    "linear": "1 .5 .3029124 1.1970876 .6009712 .6183617 -2 .3 -1.0460679 -.0974717 "
    "-.1463681 .2748846 -.1219455 .1935528",
    "gla": "-.01 -.005 .0853173 .0426587 -1.0342486 1.0772941 -.28 .042 -2.5159934 .377399 "
    ".5612268 -.8020825 -2.1601953 .1396307",
    "retnet": "-.01 -.005 .096875 .0484375 -1.1216016 1.3174805 -.28 .042 -2.75125 .4126875 "
    "1.0548315 -1.4825325 -2.4210602 .3893539",
    "delta": "-.0223605 -.0111802 .2236046 .1118023 -.5207539 1.2158555 -.2634017 .0395103 -2.6716461 "
    ".4007469 .3580458 -1.3839352 -2.7805589 .6502166",
    "gated_delta": "-.0223605 -.0111802 .1830719 .091536 -.4838929 .9562056 -.2634017 .0395103 -1.6204353 "
    ".2430653 .1214511 -.7114293 -1.6613446 .3228895",
    "kda": "-.0223605 -.0111802 .1907735 .0953867 -.45618 .8610501 -.2634017 .0395103 -2.3668465 .355027 "
    ".1082085 -.6019212 -2.3881889 .3918662",
    "ssd": ".999 .4995 -.4936237 2.0031881 1.2758839 -.7120382 -2.112 .3168 -.0618631 -.6307205 "
    "-1.9633295 .1265949 -.0547467 -.6369807",
    "rwkv7": "-.00844 -.00422 .0710153 -.0935524 -.5649707 .3568678 .35504 -.053256 -1.3515862 .2499699 "
    ".7514587 -.3699111 -1.2779844 .1814517",
}
# The memory [K, V] after the packed row.
STATES = {
    "linear": "-3.4528482 .2824844 2.1678794 -2.64 -.82 3.6",
    "gla": "-1.9219671 .9282951 -.7862231 -.4580665",
    "retnet": "-1.95 .9325 -.99625 -.4265625",
    "delta": "-1.5895782 .5714324 -1.2410257 -.1135423",
    "gated_delta": "-1.0460176 .4898983 -.6790194 -.1978432",
    "kda": "-1.4614656 .5522155 -1.0515275 -.141967",
    "ssd": "-.5002046 .4590307 -.011679 -.3438481",
    "rwkv7": "-.8762149 .5103122 -.5629928 -.2093111",
}


def numbers(text):
    return np.array([float(number) for number in text.split()])


def outputs_of(case, outputs):
    """Finish a mixer: the normaliser of linear attention, the skip of SSD."""
    outputs = np.asarray(outputs)
    if case == "linear":
        return outputs[..., :2] / outputs[..., 2:]
    return outputs + V if case == "ssd" else outputs


def golden_inputs(case):
    arrays = {"q": Q, "k": K, "v": V, **CASES[case]}
    # [T, ...] -> [1, T, 1, ...]; scalars by head have no further dim.
    return {name: jnp.asarray(x, jnp.float32).reshape(1, 5, 1, *x.shape[1:]) for name, x in arrays.items()}


@pytest.mark.parametrize("case", CASES)
def test_golden_values(case):
    q, k, v, *_ = (inputs := golden_inputs(case)).values()
    options = {name: x for name, x in inputs.items() if name not in "qkv"}
    run = jax.jit(functools.partial(kernels.decayed_recurrence, chunk_size=3))
    expected = numbers(OUTPUTS[case])
    packed, state = run(q, k, v, segment_ids=jnp.asarray(SEGMENTS)[None], **options)
    single, _ = run(q, k, v, segment_ids=jnp.ones((1, 5), jnp.int32), **options)
    np.testing.assert_allclose(outputs_of(case, packed[0, :, 0]).ravel(), expected[:10], atol=2e-6)
    np.testing.assert_allclose(outputs_of(case, single[0, :, 0])[3:].ravel(), expected[10:], atol=2e-6)
    np.testing.assert_allclose(state.memory.ravel(), numbers(STATES[case]), atol=2e-6)
    assert state.segment_ids.tolist() == [2]


# Random inputs ----------------------------------------------------------------------------------------------
KINDS = ("none", "scalar", "vector", "delta", "gated_delta", "kda", "rank_one")
LENGTH = 23


def random_inputs(kind, *, length=LENGTH, groups=2, heads=4, key_dim=8, value_dim=6):
    """Two rows of documents that begin inside chunks, of one token too, and end in padding."""
    rng = np.random.default_rng(len(kind))

    def normal(*shape):
        return rng.normal(size=(2, length, *shape)).astype(np.float32)

    keys = normal(groups, key_dim)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    arrays = {"q": normal(groups, key_dim), "k": keys, "v": normal(heads, value_dim)}
    if kind in ("scalar", "gated_delta"):
        arrays["log_decay"] = -np.logaddexp(0, normal(heads) - 2)
    if kind in ("vector", "kda", "rank_one"):
        arrays["log_decay"] = -np.logaddexp(0, 3 * normal(heads, key_dim) - 1)
    if kind in ("delta", "gated_delta", "kda"):
        arrays["beta"] = 2 / (1 + np.exp(-normal(heads)))
    if kind == "rank_one":
        arrays["removal"] = keys
        arrays["strength"] = keys / (1 + np.exp(-normal(groups, key_dim)))
    segment_ids = np.ones((2, length), np.int32)
    segment_ids[0, 5:] = 2
    segment_ids[0, 6:] = 3
    segment_ids[0, 15:] = 4
    segment_ids[0, length - 3 :] = 0
    segment_ids[1, length // 2 :] = 2
    return {name: jnp.asarray(x) for name, x in arrays.items()}, jnp.asarray(segment_ids)


def initial_state(*, heads=4, key_dim=8, value_dim=6):
    memory = np.random.default_rng(9).normal(size=(2, heads, key_dim, value_dim))
    return RecurrentState(memory=jnp.asarray(memory, jnp.float32), segment_ids=jnp.ones(2, jnp.int32))


def score(implementation, arrays, segment_ids, state, **settings):
    """Return a sum over all results, at real tokens, and the results."""
    outputs, end = implementation(**arrays, segment_ids=segment_ids, state=state, **settings)
    outputs = jnp.where((segment_ids > 0)[..., None, None], outputs, 0.0)
    return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.cos(end.memory)), (outputs, end)


def results_and_gradients(implementation, arrays, segment_ids, state, **settings):
    program = jax.jit(jax.value_and_grad(functools.partial(score, implementation, **settings), has_aux=True))
    (_, results), gradients = program(arrays, segment_ids, state)
    return results, gradients


def assert_close(actual, expected, *, tolerance=2e-5):
    def compare(a, b):
        scale = max(1.0, float(np.max(np.abs(b), initial=0.0)))
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0)

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_the_recurrence(kind):
    arrays, ids = random_inputs(kind)
    state = initial_state()
    expected = results_and_gradients(kernels.reference_recurrence, arrays, ids, state)
    assert_close(
        results_and_gradients(kernels.decayed_recurrence, arrays, ids, state, chunk_size=8), expected
    )
    assert expected[0][1].segment_ids.tolist() == [4, 2]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_every_chunk_size(kind):
    arrays, ids = random_inputs(kind)
    state = initial_state()
    _, expected = score(kernels.reference_recurrence, arrays, ids, state)
    for chunk_size in range(1, LENGTH + 1):
        run = jax.jit(functools.partial(score, kernels.decayed_recurrence, chunk_size=chunk_size))
        assert_close(run(arrays, ids, state)[1], expected)


@pytest.mark.parametrize("kind", ["scalar", "kda", "rank_one"])
def test_calls_continue_each_other(kind):
    """Any split of a row gives the same outputs and state, also one token at a time and through padding."""
    arrays, ids = random_inputs(kind, length=8)
    run = jax.jit(functools.partial(kernels.decayed_recurrence, chunk_size=4))
    expected, end = run(**arrays, segment_ids=ids, state=initial_state())
    state = initial_state()
    parts = []
    for start, stop in [(0, 1), (1, 4), (4, 5), (5, 8)]:
        part = {name: x[:, start:stop] for name, x in arrays.items()}
        outputs, state = run(**part, segment_ids=ids[:, start:stop], state=state)
        parts.append(outputs)
    is_real = np.asarray(ids > 0)
    assert_close(np.concatenate(parts, axis=1)[is_real], np.asarray(expected)[is_real], tolerance=2e-6)
    assert_close(state, end, tolerance=2e-6)
    only_padding = jax.tree.map(lambda x: x[:, :1], (arrays, jnp.zeros_like(ids)))
    _, unchanged = run(**only_padding[0], segment_ids=only_padding[1], state=state)
    assert_close(unchanged, state, tolerance=0)


@pytest.mark.parametrize("kind", ["gated_delta", "kda", "rank_one"])
def test_packed_documents_do_not_change_each_other(kind):
    """With slow decays nothing hides a leak; the second document is bitwise the same for any first one."""
    arrays, _ = random_inputs(kind, length=12)
    arrays["log_decay"] = jnp.full_like(arrays["log_decay"], -1e-3)
    ids = jnp.asarray([[1] * 5 + [2] * 7] * 2)

    def second(arrays):
        outputs, end = kernels.decayed_recurrence(**arrays, segment_ids=ids, chunk_size=8)
        return outputs[:, 5:], end.memory

    run = jax.jit(lambda arrays: (second(arrays), jax.grad(lambda a: jnp.sum(second(a)[0]))(arrays)))
    results, gradients = run(arrays)
    # Another first document, with decays that forget all.
    changed = {name: x.at[:, :5].multiply(-3.0 if name != "log_decay" else 1e6) for name, x in arrays.items()}
    other_results, _ = run(changed)
    jax.tree.map(np.testing.assert_array_equal, results, other_results)
    for gradient in gradients.values():
        assert not np.any(gradient[:, :5])
    alone, _ = kernels.reference_recurrence(
        **{name: x[:, 5:] for name, x in arrays.items()}, segment_ids=ids[:, 5:]
    )
    assert_close(results[0], alone, tolerance=2e-6)


@pytest.mark.parametrize("kind", ["scalar", "kda", "rank_one"])
def test_extreme_gates(kind):
    """Decays of none, little and all, side by side: results and gradients are finite and right."""
    arrays, ids = random_inputs(kind, length=16)
    extremes = np.array([0.0, -1e-4, -20.0, -1e4, -np.inf], np.float32)
    shape = arrays["log_decay"].shape
    arrays["log_decay"] = jnp.asarray(np.random.default_rng(1).choice(extremes, size=shape))
    # Equal keys: the triangular system of the delta rule is as far from the identity as it can be.
    arrays["k"] = jnp.broadcast_to(arrays["k"][:, :1], arrays["k"].shape)
    if kind == "kda":
        arrays["beta"] = jnp.full_like(arrays["beta"], 2.0)
        arrays["log_decay"] = arrays["log_decay"].at[1].set(0.0)
    expected = results_and_gradients(kernels.reference_recurrence, arrays, ids, initial_state())
    actual = results_and_gradients(kernels.decayed_recurrence, arrays, ids, initial_state(), chunk_size=16)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(actual))
    assert_close(actual, expected, tolerance=1e-4)


def test_bfloat16_operands():
    arrays, ids = random_inputs("kda")
    rounded = {name: x.astype(jnp.bfloat16) if name in "qkv" else x for name, x in arrays.items()}
    run = jax.jit(functools.partial(score, kernels.decayed_recurrence, chunk_size=8))
    (outputs, end), (expected, _) = (run(inputs, ids, initial_state())[1] for inputs in (rounded, arrays))
    assert outputs.dtype == jnp.bfloat16
    assert end.memory.dtype == jnp.float32
    assert_close(outputs.astype(jnp.float32), expected, tolerance=2e-2)


@pytest.mark.parametrize(("kind", "groups"), [("vector", 4), ("gated_delta", 1), ("rank_one", 2)])
def test_on_a_mesh(kind, groups):
    """Heads on two devices, and each row on four: a document may span them, and begin between them."""
    arrays, ids = random_inputs(kind, length=24, groups=groups)
    arrays["log_decay"] = 0.05 * arrays["log_decay"]
    state = initial_state()
    expected = results_and_gradients(kernels.decayed_recurrence, arrays, ids, state, chunk_size=4)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4, tensor=2))):
        actual = results_and_gradients(kernels.decayed_recurrence, arrays, ids, state, chunk_size=4)
    assert_close(jax.device_get(actual), jax.device_get(expected), tolerance=1e-5)


def test_wrong_arguments():
    arrays, ids = random_inputs("delta", length=4)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        kernels.decayed_recurrence(**arrays, segment_ids=ids, chunk_size=0)
    with pytest.raises(ValueError, match="exclude each other"):
        kernels.decayed_recurrence(**arrays, segment_ids=ids, removal=arrays["k"], strength=arrays["k"])
    with pytest.raises(ValueError, match="give both or neither"):
        kernels.decayed_recurrence(
            arrays["q"], arrays["k"], arrays["v"], segment_ids=ids, removal=arrays["k"]
        )
    with pytest.raises(ValueError, match="do not share"):
        kernels.decayed_recurrence(arrays["q"], arrays["k"], arrays["v"][:, :, :3], segment_ids=ids)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gated_delta", {"heads_per_group": 2, "has_delta_rule": True}),
        ("rank_one", {"has_channel_decay": True, "has_removal": True}),
    ],
)
def test_flops(kind, options):
    """The count equals that of the program, but for the substitution, which is no product."""
    groups = 4 // options.get("heads_per_group", 1)
    arrays, ids = random_inputs(kind, length=16, groups=groups)
    counted = flops.count(
        lambda arrays: kernels.decayed_recurrence(**arrays, segment_ids=ids, chunk_size=8)[0], arrays
    )
    per_head = kernels.recurrence_flops(key_dim=8, value_dim=6, chunk_size=8, **options)
    assert counted == 2 * 16 * 4 * (per_head - 8 * 6)
