"""A small model around a mixer, and the programs that its checks run: each compiles once.

The model is one layer, or the layers before it that it reads from and itself, between an embedding and the
final norm. Its weights are large, so that what a token sees changes its result; vectors (decays, biases,
scales) stay near their initial values.

Dims: B rows, T time, D model, R repeats of a group.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import Definition, define
from slmjax.models.protocols import MixerConfig
from slmjax.parallel.batches import place_batch
from slmjax.parallel.mesh import MeshConfig, make_mesh
from slmjax.parallel.rules import parameter_shardings

LENGTH = 24  # tokens of a row
ROWS = 4
VOCAB = 29
# Three documents and padding: the second is one token, and no boundary is at the edge of a chunk of 8.
DOCUMENTS = (10, 1, 9)
# Of the parts that a prompt is read in, two.
PART = 8
# In the first part one row ends, one fills it, and two are longer; in the second, two are padding.
PROMPTS = (1, 8, 15, 11)
NOISE = 0.1  # deviation of vectors from their initial values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Token ids with their documents."""

    tokens: np.ndarray  # Int32 "B T"
    segment_ids: np.ndarray  # Int32 "B T"
    positions: np.ndarray  # Int32 "B T"

    @property
    def is_real(self) -> np.ndarray:
        """Which tokens are not padding, Bool "B T"."""
        return self.segment_ids > 0

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, segment ids and positions."""
        return self.tokens, self.segment_ids, self.positions


def whole_rows(seed: int = 0) -> Rows:
    """Return rows of one document each, without padding."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return Rows(tokens=tokens, segment_ids=np.ones_like(tokens), positions=positions)


def row_of(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, segment ids and positions of documents packed into one row, padded on the right."""
    row = np.zeros((3, LENGTH), np.int32)
    start = 0
    for index, document in enumerate(documents):
        end = start + len(document)
        # Segment ids count from 1, and positions begin again with each document.
        row[0, start:end] = document
        row[1, start:end] = index + 1
        row[2, start:end] = np.arange(end - start)
        start = end
    return row[0], row[1], row[2]


def packed_rows(rows: Sequence[Sequence[np.ndarray]]) -> Rows:
    """Return `ROWS` rows of packed documents; rows beyond those given are all padding."""
    rows = [*rows, *([()] * (ROWS - len(rows)))]
    tokens, segment_ids, positions = map(np.stack, zip(*map(row_of, rows), strict=True))
    return Rows(tokens=tokens, segment_ids=segment_ids, positions=positions)


# The model --------------------------------------------------------------------------------------------------
def model_around(mixer: MixerConfig, before: Sequence[MixerConfig], *, embed_dim: int) -> ModelConfig:
    """Return a model of the layers `before` and of this one."""
    pattern = tuple(BlockConfig(mixer=config, ffn=None) for config in (*before, mixer))
    return ModelConfig(
        embed_dim=embed_dim,
        stack=(LayerGroup(pattern=pattern),),
        vocab_size=VOCAB,
        context_length=LENGTH,
    )


def large_params(definition: Definition, *, seed: int) -> dict[str, Array]:
    """Return parameters with matrices that keep the size of inputs, and vectors near their initial ones."""
    params, _ = jax.jit(definition.init)(jax.random.key(seed))
    draws = np.random.default_rng(seed)
    changed = {}
    for path, leaf in params.items():
        noise = draws.standard_normal(leaf.shape).astype(np.float32)
        is_matrix = path.startswith("segments/") and leaf.ndim > 2 and path.endswith(("weight", "taps"))
        if is_matrix:
            changed[path] = jnp.asarray(noise * leaf.shape[-2] ** -0.5)
        else:
            changed[path] = leaf + NOISE * noise if path.startswith("segments/") else jnp.asarray(noise)
    changed["final_norm/scale"] = jnp.ones_like(params["final_norm/scale"])
    return changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Values:
    """Hidden states of rows, and the gradient of a weighted sum of them."""

    hidden: np.ndarray  # Float32 "B T D"
    grads: dict[str, np.ndarray]


class Subject:
    """A model with its parameters, and its compiled programs."""

    def __init__(
        self, config: ModelConfig, *, seed: int = 0, params: Mapping[str, Array] | None = None
    ) -> None:
        self.config = config
        self.definition = define(config)
        self.params = large_params(self.definition, seed=seed) if params is None else params
        self._values = jax.jit(functools.partial(hidden_and_grads, self.definition))
        self._hidden = jax.jit(functools.partial(hidden_states, self.definition))

    def hidden(self, rows: Rows) -> np.ndarray:
        """Return hidden states in float32, without compiling the gradient."""
        return np.asarray(self._hidden(self.params, *rows.arrays()), np.float32)

    def values(self, rows: Rows, weights: np.ndarray, *, params: Mapping[str, Array] | None = None) -> Values:
        """Return hidden states, and the gradient of their sum weighted by `weights` [B T D]."""
        return _on_host(self._values(self.params if params is None else params, weights, *rows.arrays()))

    def values_on(self, mesh_config: MeshConfig, rows: Rows, weights: np.ndarray) -> Values:
        """Return the same on a mesh of all devices, with parameters and rows sharded over it."""
        mesh = make_mesh(mesh_config)
        params = jax.device_put(dict(self.params), parameter_shardings(self.params, mesh))
        with jax.set_mesh(mesh):
            placed = place_batch((weights, *rows.arrays()), mesh)
            return _on_host(jax.jit(functools.partial(hidden_and_grads, self.definition))(params, *placed))

    def decoded(self, rows: Rows) -> np.ndarray:
        """Return hidden states [B T D] of prompts of `PROMPTS` tokens, then of a token at a time."""
        program = jax.jit(functools.partial(decoded_states, self.definition))
        return np.asarray(program(self.params, rows.tokens, np.asarray(PROMPTS, np.int32)))


def _on_host(results: tuple[Array, dict[str, Array]]) -> Values:
    hidden, grads = results
    return Values(hidden=np.asarray(hidden), grads={path: np.asarray(leaf) for path, leaf in grads.items()})


# Inside the compiled programs -------------------------------------------------------------------------------
def hidden_states(
    definition: Definition,
    params: Mapping[str, Array],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Return the final hidden states."""
    return definition.merge(params, {})(tokens, segment_ids=segment_ids, positions=positions).hidden


def hidden_and_grads(
    definition: Definition,
    params: Mapping[str, Array],
    weights: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """Return the final hidden states, and the gradient of their sum weighted by `weights`."""

    def loss(params: dict[str, Array]) -> tuple[Array, Array]:
        hidden = hidden_states(definition, params, tokens, segment_ids, positions)
        return jnp.sum(hidden * weights), hidden

    (_, hidden), grads = jax.value_and_grad(loss, has_aux=True)(dict(params))
    return hidden, grads


def decoded_states(
    definition: Definition,
    params: Mapping[str, Array],
    tokens: Int[Array, "B T"],
    prompt_lengths: Int[Array, " B"],
) -> Float[Array, "B T D"]:
    """Return hidden states of every token: prompts are read in two parts, padded on the right, then tokens.

    A row that has ended reads padding until the last one has.
    """
    model = definition.merge(params, {})
    num_rows, length = tokens.shape
    rows = jnp.arange(num_rows)

    def call(carry: tuple[Any, Array], xs: tuple[Array, Array]) -> tuple[tuple[Any, Array], None]:
        state, collected = carry
        at, is_real = xs
        inputs = jnp.take_along_axis(tokens, jnp.minimum(at, length - 1), axis=1)
        output = model(inputs, segment_ids=is_real.astype(jnp.int32), positions=at, state=state)
        # An index out of range drops what padding gives.
        places = jnp.where(is_real, at, length)
        return (output.state, collected.at[rows[:, None], places].set(output.hidden, mode="drop")), None

    parts = jnp.arange(2 * PART).reshape(2, 1, PART) + jnp.zeros((2, num_rows, 1), jnp.int32)
    steps = prompt_lengths[None, :, None] + jnp.arange(length)[:, None, None]
    carry = (
        model.init_state(num_rows, max_length=length),
        jnp.full((num_rows, length, definition.config.embed_dim), jnp.nan, jnp.float32),
    )
    carry, _ = jax.lax.scan(call, carry, (parts, parts < prompt_lengths[None, :, None]))
    (_, collected), _ = jax.lax.scan(call, carry, (steps, steps < length))
    return collected
