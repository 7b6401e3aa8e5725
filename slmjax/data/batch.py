"""A batch of packed rows: the input of models, losses and evaluators, and the output of the data pipeline.

A row holds one or more pieces of documents. `segment_ids` distinguishes them, `positions` restart with each,
and the rest of the row is padding. `pipeline.py` makes batches for training, `windows.py` for evaluation.

Legend: B rows of the batch, T positions of a row.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

# Int32 or Float32, with the shape in the comment on each field. A Batch does not check them, because
# `jax.tree.map` also makes Batches of shardings, specs, ShapeDtypeStructs and arrays with a further dim.
ArrayLeaf = Any

PADDING_SEGMENT = 0  # segment id of positions that hold no document
NO_ROW = -1  # row id of a row that is all padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B rows of T tokens. Padding is token 0, target 0, loss mask 0, segment 0, position 0."""

    tokens: ArrayLeaf  # Int32 "B T": inputs
    targets: ArrayLeaf  # Int32 "B T": the token after each input in its document
    loss_mask: ArrayLeaf  # Float32 "B T": 1 where the target is scored, else 0
    segment_ids: ArrayLeaf  # Int32 "B T": 1.. for the pieces of a row, PADDING_SEGMENT for padding
    positions: ArrayLeaf  # Int32 "B T": 0.. within each piece
    row_ids: ArrayLeaf  # Int32 "B": index of the row in its dataset, NO_ROW for a row of padding
    num_bytes: ArrayLeaf  # Int32 "B": UTF-8 bytes of the row's scored targets


def checked_rows(rows: np.ndarray | None, batch_size: int) -> tuple[int, ...]:
    """Return the rows of a global batch that this process makes: all of them if `rows` is None.

    Raises:
      ValueError: these are not row numbers of such a batch, in ascending order.
    """
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} rows is empty: choose at least 1")
    # A single process makes the complete batch.
    if rows is None:
        return tuple(range(batch_size))
    chosen = tuple(int(row) for row in rows)
    is_ascending = chosen == tuple(sorted(set(chosen)))
    if not chosen or not is_ascending or chosen[0] < 0 or chosen[-1] >= batch_size:
        raise ValueError(
            f"rows {list(chosen)} are not rows of a batch of {batch_size}: give some of 0 to "
            f"{batch_size - 1}, ascending"
        )
    return chosen


def empty_batch(num_rows: int, sequence_length: int) -> Batch:
    """Return a batch of numpy arrays to write into, all padding."""
    shape = (num_rows, sequence_length)
    # Zeros are padding in every field, so that a row only has to write its tokens.
    return Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.float32),
        segment_ids=np.full(shape, PADDING_SEGMENT, np.int32),
        positions=np.zeros(shape, np.int32),
        row_ids=np.full(num_rows, NO_ROW, np.int32),
        num_bytes=np.zeros(num_rows, np.int32),
    )
