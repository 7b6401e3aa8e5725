"""The kit that checks mixers: the mixers of the package pass, and each mistake is named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax.models import (
    AttentionConfig,
    LatentAttentionConfig,
    Linear,
    Mixer,
    MixerConfig,
    ModelDims,
    StateSize,
    last_real,
)
from slmjax.testing import Check, MixerError, check_mixer, properties
from slmjax.testing.operations import Operations, count_operations
from slmjax.testing.report import largest_error
from slmjax.testing.subject import Subject, Values, model_around, whole_rows

MIXERS = {
    "attention": AttentionConfig(num_heads=4, num_kv_heads=2, window=7),
    "latent": LatentAttentionConfig(num_heads=4, latent_dim=16, plain_dim=8, rope_dim=4, value_dim=8),
}


@pytest.mark.parametrize("name", MIXERS)
def test_attention_passes(name: str) -> None:
    report = check_mixer(MIXERS[name])
    assert not report.skipped and len(report.checks) > 20


@pytest.mark.nightly
@pytest.mark.parametrize("name", MIXERS)
def test_attention_passes_in_full(name: str) -> None:
    report = check_mixer(MIXERS[name], level="full")
    assert not report.skipped and len(report.checks) > 30


# Mistakes ---------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Faulty(MixerConfig):
    """The token before, of the same document, or one of several mistakes."""

    fault: str = ""

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Shifted":
        return Shifted(self, dims, rngs=rngs)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        return dims.embed_dim * (1e4 if self.fault == "flops" else 1)

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        kind = "recurrent" if self.fault == "size" else "history"
        return StateSize(**{kind: dims.embed_dim})


class Shifted(Mixer):
    def __init__(self, config: Faulty, dims: ModelDims, *, rngs: nnx.Rngs) -> None:
        self.fault = config.fault
        self.dim = dims.embed_dim
        self.dtype = dims.dtype
        self.output = Linear(self.dim, self.dim, std=1.0, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: dict[str, Array] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
        before = self.init_state(x.shape[0], max_length=0) if state is None else state
        values = jnp.concatenate([before["values"], x], axis=1)
        segments = jnp.concatenate([before["segments"], segment_ids], axis=1)
        same = segments[:, :-1] == segments[:, 1:]
        if self.fault == "documents":
            same = segments[:, :-1] > 0
        previous = jnp.where(same[..., None], values[:, :-1], 0.0)
        if self.fault == "causality":
            previous = jnp.roll(x, -1, axis=1)
        if state is not None:
            state = {
                "values": last_real(values, segment_ids, size=1),
                "segments": last_real(segments, segment_ids, size=1),
            }
            if self.fault == "padding":
                state = {"values": values[:, -1:], "segments": segments[:, -1:]}
        y = self.output(x + previous)
        return jnp.exp(y**2) if self.fault == "extremes" else y, state

    def init_state(self, batch_size: int, *, max_length: int) -> dict[str, Array]:
        return {
            "values": jnp.zeros((batch_size, 1, self.dim), self.dtype),
            "segments": jnp.zeros((batch_size, 1), jnp.int32),
        }


def failures(fault: str) -> list[Check]:
    """What fails of the checks that one compilation each serves."""
    mixer = Faulty(fault=fault)
    subject = Subject(model_around(mixer, (), embed_dim=16))
    rows = whole_rows()
    if fault == "size":
        checks = properties.check_state_size(subject.config)
    elif fault == "flops":
        checks = properties.check_flops(subject.config, [mixer])
    else:
        weights = properties.weights_of(rows, 16)
        whole = subject.values(rows, weights)
        checks = properties.check_causality(subject, whole, rows, weights)
        checks += properties.check_documents(subject, subject.params, kind="")
        checks += properties.check_extremes(subject, rows, weights)
        checks += properties.check_decoding(subject, whole, rows) if fault == "padding" else []
    return [check for check in checks if not check.is_passed]


@pytest.mark.parametrize(
    "fault, names",
    [
        ("causality", {"no token sees a later one"}),
        ("documents", {"a packed row equals its documents alone", "a document changes no other of its row"}),
        ("padding", {"decoding token by token equals the full pass"}),
        ("size", {"state_size counts the bytes of the state (bfloat16, 24 tokens)"}),
        ("flops", {"mixing_flops is the cost of mixing"}),
        ("extremes", {"finite values and gradients with matrices times 100"}),
    ],
)
def test_a_mistake_is_named_with_its_size(fault: str, names: set[str]) -> None:
    failed = failures(fault)
    assert names <= {check.name for check in failed}, failed
    assert all(not check.error <= check.bound for check in failed)


def test_without_a_mistake_nothing_fails() -> None:
    assert not failures("")


def test_all_failures_are_listed(monkeypatch) -> None:
    for name in [name for name in dir(properties) if name.startswith("check_")]:
        monkeypatch.setattr(properties, name, lambda *args, **more: [])
    wrong = [Check(name="a", error=0.5, bound=0.1, detail="here"), Check(name="b", error=np.nan, bound=1.0)]
    monkeypatch.setattr(properties, "check_formats", lambda config: wrong)
    monkeypatch.setattr(properties, "check_mesh", lambda *args, **more: ([], []))
    values = Values(hidden=np.zeros(0), grads={})
    monkeypatch.setattr(Subject, "values", lambda *args, **more: values)
    message = r"Faulty lacks 2 of 2 .*\n  FAILED: a: 0.5, at most 0.1 .here.\n.*b: nan"
    with pytest.raises(MixerError, match=message):
        check_mixer(Faulty())
    with pytest.raises(ValueError, match="slow_decay names 'rate/bias', and .* are .*output/weight"):
        check_mixer(Faulty(), slow_decay={"rate/bias": 3.0})


# Numbers ----------------------------------------------------------------------------------------------------
def test_operations_are_counted_with_the_trips_of_loops() -> None:
    def loop(x: Array) -> Array:
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ x), None), x, None, length=10)[0]

    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert count_operations(loop, x) == Operations(products=10 * 2 * 4**3, elementwise=10 * 16)
    assert count_operations(jax.jit(jax.checkpoint(loop)), x).products == 10 * 2 * 4**3
    assert count_operations(jnp.sum, x) == Operations(elementwise=16)


def test_errors_are_relative_and_have_a_place() -> None:
    expected = np.array([[1.0, -4.0], [2.0, 0.0]])
    assert largest_error(expected + [[0.0, 0.0], [0.0, 0.2]], expected) == (pytest.approx(0.05), "at [1, 1]")
    assert largest_error(expected + 1.0, expected, where=np.array([True, False]))[1] == "at [0, 0]"
    error, place = largest_error(np.array([1.0, np.nan]), np.array([1.0, 1.0]))
    assert np.isnan(error) and place == "at [1]"
