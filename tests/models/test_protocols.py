"""The optional parts of the protocol: constants of layers, values across layers, feed-forward layers with a
state. Two mixers without weights show them, so that every result is worked out by hand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int

from slmjax.models import (
    NO_CONTEXT,
    BlockConfig,
    ContextMixer,
    FfnAux,
    FfnConfig,
    LayerGroup,
    MixerConfig,
    MixerContext,
    ModelConfig,
    ModelDims,
    Remat,
    StatefulFfn,
    StateSize,
    Visibility,
    fill_padding,
    last_real,
    zoo,
)
from slmjax.models.definition import define, restack, unstack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares(MixerConfig):
    """`weight * x + offset`, plus a value of an earlier layer; a value may be written for later ones."""

    source: str | None = None
    target: str | None = None

    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Sharing":
        return Sharing(self, dims)

    def mixing_flops(self, dims: ModelDims, *, length: int) -> float:
        return 0.0

    def state_size(self, dims: ModelDims, *, length: int) -> StateSize:
        return StateSize(recurrent=3)

    def layer_constants(self, dims: ModelDims, *, index: int, num_layers: int) -> dict[str, np.ndarray]:
        return {"offset": np.float32(index), "weight": np.full((dims.embed_dim,), index / num_layers)}

    def reads(self) -> tuple[str, ...]:
        return () if self.source is None else (self.source,)

    def writes(self) -> tuple[str, ...]:
        return () if self.target is None else (self.target,)


class Sharing(ContextMixer):
    def __init__(self, config: Shares, dims: ModelDims) -> None:
        self.config = config
        self.weight = nnx.Param(dims.constants["weight"].astype(jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: None,
        context: MixerContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B T D"], None]:
        y = x * self.weight[...][None, None] + context.constants["offset"]
        if self.config.source is not None:
            y = y + context.shared[self.config.source]["value"]
        if self.config.target is not None:
            context.write(self.config.target, {"value": y})
        return y, state

    def init_state(self, batch_size: int, *, max_length: int) -> None:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftConfig(FfnConfig):
    def build(self, dims: ModelDims, *, rngs: nnx.Rngs) -> "Shift":
        return Shift(dims)

    def active_fraction(self) -> float:
        return 1.0

    def for_inference(self) -> "ShiftConfig":
        return self

    def state_size(self, dims: ModelDims) -> StateSize:
        return StateSize(history=dims.embed_dim)


class Shift(StatefulFfn):
    """The token before, of the same document."""

    def __init__(self, dims: ModelDims) -> None:
        self.dim = dims.embed_dim
        self.dtype = dims.dtype

    def __call__(
        self, x: Array, *, segment_ids: Array, state: dict | None
    ) -> tuple[Array, FfnAux, dict | None]:
        before = self.init_state(x.shape[0]) if state is None else state
        values = jnp.concatenate([before["values"], x], axis=1)
        documents = fill_padding(segment_ids, before["last"])
        previous = jnp.concatenate([before["last"][:, None], documents[:, :-1]], axis=1)
        y = jnp.where((documents == previous)[..., None], values[:, :-1], 0.0)
        if state is not None:
            state = {"values": last_real(values, segment_ids, size=1), "last": documents[:, -1]}
        return y, FfnAux(losses={}, metrics={}), state

    def init_state(self, batch_size: int) -> dict[str, Array]:
        return {
            "values": jnp.zeros((batch_size, 1, self.dim), self.dtype),
            "last": jnp.zeros((batch_size,), jnp.int32),
        }


def layer(source: str | None = None, target: str | None = None) -> BlockConfig:
    return BlockConfig(mixer=Shares(source=source, target=target), ffn=None)


def model(*groups: LayerGroup, **settings) -> ModelConfig:
    return ModelConfig(embed_dim=4, stack=groups, vocab_size=7, context_length=8, **settings)


TOKENS = jnp.array([[1, 2, 3, 4, 5, 6]])
ROW = {"segment_ids": jnp.array([[1, 1, 1, 2, 2, 0]]), "positions": jnp.array([[0, 1, 2, 0, 1, 2]])}
# The source of "first" is in another group than its readers. "pair" is written and read in each repeat, and
# "sum" is read, then written, by each.
GROUPS = (
    LayerGroup(pattern=(layer(target="first"), layer(target="sum"))),
    LayerGroup(pattern=(layer("first", "pair"), layer("pair"), layer("sum", "sum")), repeats=3),
    LayerGroup(pattern=(layer("sum"), layer("pair"))),
)
LAYERS = [block for group in GROUPS for _ in range(group.repeats) for block in group.pattern]


def by_hand(x: np.ndarray) -> np.ndarray:
    """The layers one after another; a pre-norm precedes each."""
    values: dict[str, np.ndarray] = {}
    for index, block in enumerate(LAYERS):
        normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        y = normed * (index / len(LAYERS)) + index
        if block.mixer.source is not None:
            y = y + values[block.mixer.source]
        if block.mixer.target is not None:
            values[block.mixer.target] = y
        x = x + y
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def test_constants_and_shared_values_reach_their_layers() -> None:
    definition = define(model(*GROUPS))
    params, buffers = definition.init(jax.random.key(0))
    output = jax.jit(lambda: definition.merge(params, buffers)(TOKENS, **ROW).hidden)()
    np.testing.assert_allclose(output, by_hand(np.asarray(params["embed/table"])[TOKENS]), rtol=1e-5)


def test_grouping_and_rematerialisation_change_nothing() -> None:
    together = define(model(*GROUPS, remat=Remat.FULL))
    apart = define(model(*(LayerGroup(pattern=(block,)) for block in LAYERS)))
    params, buffers = together.init(jax.random.key(0))
    assert not buffers
    others = restack(apart.config, unstack(together.config, params), like=apart.params)
    # The initial weights come from the constants, too, whatever the groups.
    for path, leaf in apart.init(jax.random.key(0))[0].items():
        np.testing.assert_array_equal(leaf, others[path])

    def loss(definition, params):
        return jnp.mean(jnp.sin(7 * definition.merge(params, {})(TOKENS, **ROW).hidden))

    grads = jax.jit(lambda: jax.grad(lambda params: loss(together, params))(params))()
    expected = jax.jit(lambda: jax.grad(lambda params: loss(apart, params))(others))()
    # Grouping leaves constants, decoding and shared values as they are, and adds no parameter for them.
    for path, leaf in restack(apart.config, unstack(together.config, grads), like=apart.params).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ((layer("first"), layer(target="first")), "layer 0 .Shares. reads 'first', and no earlier layer"),
        ((layer(target="first"), layer("second")), "layer 1 .Shares. reads 'second'"),
    ],
)
def test_a_reader_needs_an_earlier_source(pattern, message) -> None:
    # In its second repeat there would be one.
    with pytest.raises(ValueError, match=message):
        model(LayerGroup(pattern=pattern, repeats=2))


def test_what_is_written_is_what_is_declared(monkeypatch) -> None:
    monkeypatch.setattr(Shares, "writes", lambda self: ("other",))
    config = model(LayerGroup(pattern=(layer(target="first"),)))
    definition = define(config)
    with pytest.raises(ValueError, match=r"wrote \['first'\].* returns \['other'\]"):
        jax.eval_shape(lambda params: definition.merge(params, {})(TOKENS, **ROW).hidden, definition.params)


def test_constants_of_a_config_have_one_shape(monkeypatch) -> None:
    monkeypatch.setattr(
        Shares, "layer_constants", lambda self, dims, *, index, num_layers: {"a": [0.0] * index}
    )
    with pytest.raises(ValueError, match="layer_constants returns .* names or shapes for another layer"):
        define(model(LayerGroup(pattern=(layer(),), repeats=2)))


def test_a_mixer_refuses_a_visibility_that_it_lacks() -> None:
    definition = define(model(LayerGroup(pattern=(layer(),))))
    call = lambda **more: jax.eval_shape(  # noqa: E731 -- shapes alone
        lambda params: definition.merge(params, {})(TOKENS, **ROW, **more).hidden, definition.params
    )
    with pytest.raises(ValueError, match="visibility=both was asked for, and Shares computes causal"):
        call(visibility=Visibility.BOTH)
    with pytest.raises(ValueError, match="visibility=prefix and is_prefix=none"):
        call(visibility=Visibility.PREFIX)


def test_a_feed_forward_layer_with_a_state() -> None:
    """Calls of one, several and no tokens, each padded, equal the whole row; the padding of a row that has
    ended keeps its state.
    """
    block = BlockConfig(mixer=Shares(), ffn=ShiftConfig())
    config = model(LayerGroup(pattern=(block,), repeats=2))
    definition = define(config)
    params, _ = definition.init(jax.random.key(0))
    decoder = definition.merge(params, {})
    tokens = jnp.concatenate([TOKENS, TOKENS[:, ::-1]])
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    ones = jnp.ones_like(tokens)
    whole = decoder(tokens, segment_ids=ones, positions=positions).hidden
    packed = decoder(tokens, segment_ids=ones.at[:, 2:].set(2), positions=positions).hidden
    np.testing.assert_array_equal(
        packed[:, 2:], decoder(tokens[:, 2:], segment_ids=ones[:, 2:], positions=positions[:, :4]).hidden
    )
    assert np.abs(packed - whole)[:, 2:].max() > 0.1
    state = decoder.init_state(2, max_length=6)
    starts = np.array([0, 0])
    for counts in ([1, 2], [0, 2], [3, 0], [1, 1], [1, 1]):
        at = starts[:, None] + np.arange(3)[None]
        real = np.arange(3)[None] < np.array(counts)[:, None]
        output = decoder(
            jnp.take_along_axis(tokens, np.minimum(at, 5), axis=1),
            segment_ids=jnp.asarray(real, jnp.int32),
            positions=jnp.asarray(at),
            state=state,
        )
        state = output.state
        for row, count in enumerate(counts):
            np.testing.assert_allclose(
                output.hidden[row, :count], whole[row, starts[row] : starts[row] + count], rtol=1e-5
            )
        starts = starts + np.array(counts)
    assert starts.tolist() == [6, 6]
    # Two layers with three float32 numbers each, and the last token of each in the dtype of the computation.
    assert zoo.state_size(config, length=100) == StateSize(recurrent=6, history=8)
    assert zoo.state_size(config, length=100).bytes(2) == 40
