"""A teacher with a short context reads long rows in windows: which token comes from which, and what it saw
there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.distill.windows import num_windows, windowed
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.definition import define
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig

LENGTH = 29


def rows(*documents: tuple[int, ...], length: int = LENGTH) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, segment ids and positions of rows of documents of these lengths, padded."""
    tokens = np.random.default_rng(0).integers(1, 40, (len(documents), length))
    segment_ids, positions = np.zeros((2, len(documents), length), int)
    for row, lengths in enumerate(documents):
        start = 0
        for number, size in enumerate(lengths, start=1):
            segment_ids[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    return (
        jnp.asarray(np.where(segment_ids, tokens, 0), jnp.int32),
        jnp.asarray(segment_ids, jnp.int32),
        jnp.asarray(positions, jnp.int32),
    )


@pytest.fixture(scope="module")
def model():
    """A model of one layer as a function of a batch."""
    block = BlockConfig(mixer=AttentionConfig(num_heads=2), ffn=MlpConfig(hidden_dim=16))
    definition = define(
        ModelConfig(embed_dim=16, stack=(LayerGroup(pattern=(block,)),), context_length=64, vocab_size=40)
    )
    draws = np.random.default_rng(1)
    params = {
        name: jnp.asarray(draws.normal(size=leaf.shape), jnp.float32)
        for name, leaf in definition.params.items()
    }
    decoder = definition.merge(params, {})
    return jax.jit(
        lambda tokens, segment_ids, positions: (
            decoder(tokens, segment_ids=segment_ids, positions=positions).hidden
        )
    )


@pytest.mark.parametrize(("context_length", "overlap"), [(16, 9), (11, 8)])
def test_short_documents_are_as_in_the_whole_row(model, context_length: int, overlap: int) -> None:
    """No document is longer than the overlap: every token sees the whole of its own, in whatever window it
    is.
    """
    batch = rows((8, 8, 5, 8), (1, 2, 7, 8, 8))
    whole = model(*batch)
    given = []

    def record(*parts: jax.Array) -> jax.Array:
        given.append(parts)
        return model(*parts)

    pieces = windowed(record, *batch, context_length=context_length, overlap=overlap)
    real = np.asarray(batch[1]) > 0
    assert pieces.shape == whole.shape
    np.testing.assert_allclose(np.asarray(pieces)[real], np.asarray(whole)[real], rtol=1e-5, atol=1e-5)
    (tokens, segment_ids, positions) = map(np.asarray, given[0])
    count = num_windows(LENGTH, context_length=context_length, overlap=overlap)
    assert (
        tokens.shape == (2 * count, context_length)
        and not segment_ids[count - 1, LENGTH - (count - 1) * (context_length - overlap) :].any()
    )
    assert positions.min() == 0 and positions.max() < context_length and (positions[:, 0] == 0).all()


def test_a_long_document_is_what_direct_runs_of_its_parts_give(model) -> None:
    """One document of 29 tokens, read 12 at a time and 5 again: tokens 0-11, 12-18, 19-25 and 26-28 from
    windows at 0, 7, 14 and 21.
    """
    tokens, segment_ids, positions = rows((LENGTH,))
    pieces = windowed(model, tokens, segment_ids, positions, context_length=12, overlap=5)
    assert num_windows(LENGTH, context_length=12, overlap=5) == 4
    for start, kept in ((0, range(12)), (7, range(12, 19)), (14, range(19, 26)), (21, range(26, 29))):
        part = slice(start, min(start + 12, LENGTH))
        direct = model(tokens[:, part], segment_ids[:, part], positions[:, part] - start)
        np.testing.assert_allclose(
            pieces[:, list(kept)], direct[:, [t - start for t in kept]], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("overlap", [0, 3, 6])
@pytest.mark.parametrize("length", [8, 9, 16, 29])
def test_every_token_has_its_overlap(length: int, overlap: int) -> None:
    """States that say where in its window a token is: at its place in the first, and at least `overlap` in
    every other.
    """

    def place(tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.stack(
            [tokens, positions, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)], axis=-1
        ).astype(jnp.float32)

    ones = jnp.ones((2, length), jnp.int32)
    numbers = jnp.broadcast_to(jnp.arange(length), (2, length))
    tokens, positions, places = np.moveaxis(
        np.asarray(windowed(place, numbers, ones, numbers, context_length=8, overlap=overlap)), -1, 0
    )
    np.testing.assert_array_equal(tokens, numbers)  # each is where it was
    np.testing.assert_array_equal(positions, places)  # of one document, which begins with every window
    np.testing.assert_array_equal(places[:, :8], numbers[:, :8])
    assert (places[:, 8:] >= overlap).all()


@pytest.mark.parametrize("context_length", [LENGTH, LENGTH + 1, 1000])
def test_rows_that_fit_are_given_as_they_are(context_length: int) -> None:
    batch = rows((20, 9))

    def check(*given: jax.Array) -> jax.Array:
        assert all(theirs is ours for theirs, ours in zip(given, batch, strict=True))
        return given[0][:, :, None].astype(jnp.float32)

    windowed(check, *batch, context_length=context_length, overlap=0)


def test_an_overlap_must_leave_something_new() -> None:
    with pytest.raises(
        ValueError,
        match=r"an overlap of 8 tokens does not fit the teacher's context of 8: choose one from 0 to 7",
    ):
        num_windows(9, context_length=8, overlap=8)
