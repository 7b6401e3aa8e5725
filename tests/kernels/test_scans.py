"""Each scan equals its recurrence written as a loop: packed or alone, in any split, sharded, at extremes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import kernels
from slmjax.parallel.mesh import MeshConfig, make_mesh

CHANNELS = 4
STATE_DIM = 3
LENGTH = 29
# Boundaries within chunks and at their edges, a document of one token, padding at the end.
SEGMENTS = np.array([[1] * 8 + [2] + [3] * 16 + [0] * 4, [2] * 11 + [5] * 18], np.int32)

Q = np.array([[0.1, -0.3], [0.3, 0.4], [-0.5, 0.6], [0.7, -0.6], [0.9, 1.0]])
K = np.array([[0.2, 0.1], [-0.4, 0.3], [0.6, -0.5], [0.8, 0.7], [-1.0, 0.9]])
V = np.array([[1.0, 0.5], [-0.5, 2.0], [1.5, -1.0], [-2.0, 0.3], [0.4, -0.7]])
GATES = np.array([[0.5, 0.6], [0.7, 0.2], [0.4, 0.9], [0.3, 0.8], [0.6, 0.5]])


def selective_loop(arrays, segments):
    """Mamba's recurrence, token by token, in the dtype of numpy's float64."""
    x, dt, b, c = (np.asarray(arrays[name], np.float64) for name in ("x", "dt", "b", "c"))
    a, d = (np.asarray(arrays[name], np.float64) for name in ("a", "d"))
    y = np.zeros_like(x)
    for row, time in np.ndindex(x.shape[:2]):
        if time == 0 or segments[row, time] != segments[row, time - 1]:
            h = np.zeros(a.shape)
        h = np.exp(dt[row, time][:, None] * a) * h + (dt[row, time] * x[row, time])[:, None] * b[row, time]
        y[row, time] = h @ c[row, time] + d * x[row, time]
    return y


def rg_lru_loop(arrays, segments):
    x, log_decay = (np.asarray(arrays[name], np.float64) for name in ("x", "log_decay"))
    y = np.zeros_like(x)
    for row, time in np.ndindex(x.shape[:2]):
        a = np.exp(log_decay[row, time])
        if time == 0 or segments[row, time] != segments[row, time - 1]:
            y[row, time] = x[row, time]
        else:
            y[row, time] = a * y[row, time - 1] + np.sqrt(1 - a**2) * x[row, time]
    return y


def wkv4_loop(arrays, segments):
    """The weighted means by their definition, without scaled sums."""
    key, value = (np.asarray(arrays[name], np.float64) for name in ("key", "value"))
    log_decay, bonus = (np.asarray(arrays[name], np.float64) for name in ("log_decay", "bonus"))
    y = np.zeros_like(value)
    for row, time in np.ndindex(value.shape[:2]):
        earlier = [t for t in range(time) if segments[row, t] == segments[row, time]]
        logs = [key[row, t] + (time - 1 - t) * log_decay for t in earlier] + [key[row, time] + bonus]
        weights = np.exp(np.array(logs) - np.max(logs, axis=0))
        y[row, time] = np.sum(weights * value[row, [*earlier, time]], axis=0) / np.sum(weights, axis=0)
    return y


@dataclasses.dataclass(frozen=True)
class Case:
    """A scan, its loop, and random inputs: `tokens` have a dim of time, `weights` have none."""

    scan: Callable
    loop: Callable
    tokens: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    state: kernels.ScanState

    def run(self, arrays, segments, *, state=None, chunk_size=None):
        """Run the scan on arrays by name."""

        @jax.jit
        def scan(arrays, segments, state):
            inputs = [arrays[name] for name in list(self.tokens)[:2]]
            named = {name: array for name, array in arrays.items() if name not in list(self.tokens)[:2]}
            settings = {"segment_ids": segments, "state": state, "chunk_size": chunk_size}
            return self.scan(*inputs, **named, **settings)

        return scan(arrays, segments, state)


def cases() -> dict[str, Case]:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    rows = (2, LENGTH)
    # Slow decays too: a document's state then reaches far.
    log_decay = -np.exp(normal(*rows, CHANNELS) * 3 - 3)
    return {
        "selective": Case(
            kernels.selective_scan,
            selective_loop,
            {
                "x": normal(*rows, CHANNELS),
                "dt": np.exp(normal(*rows, CHANNELS) - 2),
                "b": normal(*rows, STATE_DIM),
                "c": normal(*rows, STATE_DIM),
            },
            {"a": -np.exp(normal(CHANNELS, STATE_DIM)), "d": normal(CHANNELS)},
            kernels.selective_scan_state(2, channels=CHANNELS, state_dim=STATE_DIM),
        ),
        "rg_lru": Case(
            kernels.rg_lru,
            rg_lru_loop,
            {"x": normal(*rows, CHANNELS), "log_decay": log_decay},
            {},
            kernels.rg_lru_state(2, channels=CHANNELS),
        ),
        "wkv4": Case(
            kernels.wkv4,
            wkv4_loop,
            {"key": 3 * normal(*rows, CHANNELS), "value": normal(*rows, CHANNELS)},
            {"log_decay": -np.exp(normal(CHANNELS) - 3), "bonus": normal(CHANNELS)},
            kernels.wkv4_state(2, channels=CHANNELS),
        ),
    }


CASES = cases()
every_scan = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


def golden_arrays(*values):
    return [jnp.asarray(value, jnp.float32) for value in values]


def assert_golden(run, state, *, packed, last_two_of_one, end):
    """Run five tokens of two documents, and again as one document."""
    run = jax.jit(run)
    y, after = run(segment_ids=jnp.asarray([[1, 1, 1, 2, 2]]), state=state)
    np.testing.assert_allclose(y[0], packed, atol=2e-6)
    jax.tree.map(
        lambda value, wanted: np.testing.assert_allclose(value[0], wanted, atol=2e-6), after.values, end
    )
    assert after.segments.tolist() == [2]
    y, _ = run(segment_ids=jnp.ones((1, 5), jnp.int32), state=state)
    np.testing.assert_allclose(y[0, 3:], last_two_of_one, atol=2e-6)


def test_golden_selective_scan():
    dt = np.array([[0.1, 0.2], [0.3, 0.1], [0.2, 0.5], [0.4, 0.3], [0.6, 0.2]])
    x, dt, b, c = golden_arrays(V[None], dt[None], K[None], Q[None])

    def run(**settings):
        a = jnp.asarray([[-1.0, -2.0], [-1.0, -2.0]])
        return kernels.selective_scan(x, dt, a=a, b=b, c=c, d=jnp.ones(2), chunk_size=2, **settings)

    assert_golden(
        run,
        kernels.selective_scan_state(1, channels=2, state_dim=2),
        packed=[
            [0.999, 0.499],
            [-0.4933598, 2.0087039],
            [1.2734814, -0.6661761],
            [-2.112, 0.3126],
            [-0.0847843, -0.6047161],
        ],
        last_two_of_one=[[-1.9512176, 0.0469759], [-0.0287917, -0.687777]],
        # The state is stored [N, C].
        end=np.array([[-0.5912394, 0.0473312], [0.1989486, -0.0837698]]).T,
    )


def test_golden_rg_lru():
    inputs = np.array([[0.2, 0.9], [0.5, 0.5], [0.8, 0.3], [0.6, 0.7], [0.4, 0.1]])
    log_decay = -8 * GATES * np.logaddexp(0, [-4.0, -5.0])
    x, log_decay = golden_arrays((inputs * V)[None], log_decay[None])
    assert_golden(
        lambda **settings: kernels.rg_lru(x, log_decay, chunk_size=2, **settings),
        kernels.rg_lru_state(1, channels=2),
        packed=[
            [0.2, 0.45],
            [0.0734476, 0.5909985],
            [0.4666951, 0.4720234],
            [-1.2, 0.21],
            [-1.0359001, 0.188425],
        ],
        last_two_of_one=[[0.100186, 0.5124353], [0.155808, 0.4828445]],
        end=np.array([-1.0359001, 0.188425]),
    )


def test_golden_wkv4():
    key, value = golden_arrays(K[None], V[None])

    def run(**settings):
        weights = {"log_decay": -jnp.exp(jnp.asarray([-1.0, 0.5])), "bonus": jnp.asarray([0.3, -0.2])}
        return kernels.wkv4(key, value, **weights, chunk_size=2, **settings)

    assert_golden(
        run,
        kernels.wkv4_state(1, channels=2),
        packed=[
            [1.0, 0.5],
            [0.3616638, 1.25],
            [1.0564277, 1.1216284],
            [-2.0, 0.3],
            [-1.5621787, -0.2],
        ],
        last_two_of_one=[[-0.4973064, 0.1673375], [-0.4492961, -0.1947628]],
        end=tuple(
            np.array(value) for value in ([-1.9044792, -0.6527685], [1.238802, 1.1574384], [0.4321206, 0.9])
        ),
    )


@every_scan
@pytest.mark.parametrize(
    "chunk_size",
    [4, pytest.param(1, marks=pytest.mark.nightly), pytest.param(LENGTH, marks=pytest.mark.nightly)],
)
def test_chunks_of_any_size_equal_the_loop(case, chunk_size):
    arrays = case.tokens | case.weights
    y, state = case.run(arrays, SEGMENTS, chunk_size=chunk_size)
    real = SEGMENTS > 0
    np.testing.assert_allclose(y[real], case.loop(arrays, SEGMENTS)[real], rtol=2e-5, atol=2e-5)
    assert state is None


@every_scan
def test_gradients_of_packed_rows_equal_those_of_a_scan_over_tokens(case):
    """The reference has each document in a row of its own, and computes one token at a time."""
    arrays = {name: jnp.asarray(array) for name, array in (case.tokens | case.weights).items()}

    def packed(arrays):
        y, _ = case.run(arrays, SEGMENTS, chunk_size=4)
        return jnp.sum(jnp.sin(y) * (SEGMENTS > 0)[..., None])

    def alone(arrays):
        # A row for each document, which padding follows.
        documents = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 5)]
        index = np.stack([np.argsort(SEGMENTS[row] != segment, stable=True) for row, segment in documents])
        counts = np.array([(SEGMENTS[row] == segment).sum() for row, segment in documents])
        real = np.arange(LENGTH)[None] < counts[:, None]
        rows = np.array([row for row, _ in documents])[:, None]
        tokens = {name: arrays[name][rows, index] for name in case.tokens}
        y, _ = case.run(arrays | tokens, real.astype(np.int32), chunk_size=1)
        return jnp.sum(jnp.sin(y) * real[..., None])

    actual = jax.jit(jax.grad(packed))(arrays)
    expected = jax.jit(jax.grad(alone))(arrays)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected)


@every_scan
def test_any_split_equals_one_call(case):
    """Prompts of unequal lengths padded on the right, further calls of several tokens, then single tokens."""
    lengths = np.array([LENGTH, 17])
    segments = np.where(np.arange(LENGTH)[None] < lengths[:, None], 1, 0).astype(np.int32)
    expected = case.loop(case.tokens | case.weights, segments)
    state = case.state
    starts = np.zeros(2, int)
    # One compiled function for all calls of a shape.
    run = jax.jit(lambda tokens, ids, state: case.run(tokens | case.weights, ids, state=state, chunk_size=4))
    for counts in ([6, 3], [6, 6], *[[1, 1]] * 19):
        counts = np.minimum(counts, lengths - starts)
        longest = 1 if counts.max() == 1 else 6
        index = np.minimum(starts[:, None] + np.arange(longest), LENGTH - 1)
        ids = (np.arange(longest)[None] < counts[:, None]).astype(np.int32)
        part = {name: np.take_along_axis(x, index[..., None], axis=1) for name, x in case.tokens.items()}
        y, state = run(part, jnp.asarray(ids), state)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            np.testing.assert_allclose(
                y[row, :count], expected[row, start : start + count], rtol=2e-5, atol=2e-5
            )
        starts += counts
    assert (starts >= [LENGTH - 1, 17]).all()


@every_scan
def test_a_changed_document_does_not_change_another(case):
    """Exactly, with states that do not decay."""
    tokens = dict(case.tokens)
    for name in ("dt", "log_decay"):
        if name in tokens:
            tokens[name] = tokens[name] * 1e-6
    weights = case.weights | (
        {"log_decay": np.zeros(CHANNELS, np.float32)} if "bonus" in case.weights else {}
    )
    changed = {name: np.where((SEGMENTS == 1)[..., None], 3 * x, x) for name, x in tokens.items()}
    y, _ = case.run(tokens | weights, SEGMENTS, chunk_size=4)
    y_changed, _ = case.run(changed | weights, SEGMENTS, chunk_size=4)
    assert not np.array_equal(y[0, :8], y_changed[0, :8])
    np.testing.assert_array_equal(y[0, 8:25], y_changed[0, 8:25])


@pytest.mark.parametrize(
    "case",
    [
        CASES["selective"],
        *[pytest.param(CASES[name], marks=pytest.mark.nightly) for name in ("rg_lru", "wkv4")],
    ],
    ids=list(CASES),
)
def test_sharded_sequences_equal_one_device(case):
    """Documents across several shards, boundaries in shards, a state before the row, and all gradients."""
    length = 24
    segments = jnp.asarray([[1] * 3 + [2] * 17 + [3, 3, 0, 0], [1] * 24], jnp.int32)
    arrays = {name: jnp.asarray(x[:, :length]) for name, x in case.tokens.items()}
    arrays |= {name: jnp.asarray(x) for name, x in case.weights.items()}
    _, state = case.run(arrays, jnp.ones((2, length), jnp.int32), state=case.state)

    def value_and_gradients(arrays, state):
        def total(arrays, values):
            before = kernels.ScanState(values=values, segments=state.segments)
            y, after = case.run(arrays, segments, state=before, chunk_size=4)
            return jnp.sum(jnp.sin(y)), (y, after)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(arrays, state.values)

    expected = jax.jit(value_and_gradients)(arrays, state)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4, tensor=2))):
        actual = jax.jit(value_and_gradients)(arrays, state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5), actual, expected)


@every_scan
def test_extreme_values_have_finite_gradients(case):
    """No decay at all, decay at once, and inputs of a thousand."""
    tokens = {name: jnp.asarray(x) for name, x in case.tokens.items()}
    extremes = {
        "dt": jnp.where(tokens["x"] > 0, 0.0, 50.0) if "x" in tokens else None,
        "log_decay": jnp.where(tokens["x"] > 0, 0.0, -200.0) if "x" in tokens else None,
        "key": 1e3 * tokens["key"] if "key" in tokens else None,
        "x": 1e3 * tokens["x"] if "x" in tokens else None,
    }
    tokens |= {name: x for name, x in extremes.items() if name in tokens}

    def total(arrays):
        y, _ = case.run(arrays, SEGMENTS, chunk_size=4)
        return jnp.sum(y), y

    gradients, y = jax.jit(jax.grad(total, has_aux=True))(tokens | case.weights)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradients, y)))


def test_slow_decays_keep_their_digits():
    """With a = 1 - 1e-7, the scale of the input is the root of 2e-7: 1 - a^2 in float32 would be 2.4e-7."""
    x = jnp.ones((1, 2, 1))
    y, _ = kernels.rg_lru(x, jnp.full((1, 2, 1), -1e-7), segment_ids=jnp.ones((1, 2), jnp.int32))
    np.testing.assert_allclose(y[0, 1, 0] - 1.0, np.sqrt(2e-7), rtol=1e-3)


def test_the_selective_scan_never_expands_a_whole_row():
    """Neither in the gradient: no array of the program has as many values as [B, T, C, N]."""
    case = CASES["selective"]
    length = 512
    arrays = {name: jax.ShapeDtypeStruct((1, length, x.shape[2]), x.dtype) for name, x in case.tokens.items()}
    arrays |= {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in case.weights.items()}
    segments = np.ones((1, length), np.int32)

    def total(arrays):
        return jnp.sum(case.run(arrays, segments, chunk_size=16)[0])

    jaxpr = jax.make_jaxpr(jax.grad(total))(arrays)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for value in jax.tree.leaves(tuple(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    largest = max(sizes(jaxpr.jaxpr))
    assert length * CHANNELS <= largest < length * CHANNELS * STATE_DIM


def test_chunks_have_tokens():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        CASES["rg_lru"].run(CASES["rg_lru"].tokens, SEGMENTS, chunk_size=0)
