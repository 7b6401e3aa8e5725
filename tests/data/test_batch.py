"""`Batch` as a pytree, and the empty batch."""

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.data.batch import NO_ROW, Batch, empty_batch

FIELDS = {"tokens", "targets", "loss_mask", "segment_ids", "positions", "row_ids", "num_bytes"}


def test_an_empty_batch_scores_nothing():
    batch = empty_batch(3, 5)
    assert batch.loss_mask.dtype == np.float32
    for name in FIELDS - {"loss_mask"}:
        assert getattr(batch, name).dtype == np.int32, name
    for name in FIELDS - {"row_ids", "num_bytes"}:
        assert getattr(batch, name).shape == (3, 5) and not getattr(batch, name).any(), name
    assert batch.row_ids.tolist() == [NO_ROW] * 3
    assert batch.num_bytes.tolist() == [0] * 3


def test_a_batch_is_a_pytree_of_its_seven_fields():
    batch = empty_batch(2, 4)
    paths = {
        jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(batch)
    }
    assert paths == FIELDS
    doubled = jax.jit(lambda batch: jax.tree.map(lambda leaf: 2 * leaf + 1, batch))(batch)
    assert isinstance(doubled, Batch)
    np.testing.assert_array_equal(doubled.tokens, np.ones((2, 4)))
    np.testing.assert_array_equal(doubled.row_ids, [-1, -1])


def test_leaves_may_be_what_transformations_put_there():
    batch = empty_batch(4, 4)
    shapes = jax.eval_shape(lambda batch: batch, batch)
    assert shapes.tokens.shape == (4, 4)
    assert jax.tree.map(lambda _: None, batch).tokens is None
    accumulated = jax.tree.map(lambda leaf: jnp.reshape(leaf, (2, 2, *leaf.shape[1:])), batch)
    assert accumulated.tokens.shape == (2, 2, 4) and accumulated.row_ids.shape == (2, 2)
