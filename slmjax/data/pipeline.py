"""`batch(step)`: training batches as a pure function of the data, its seed and the step.

The rows of every source (`packing.py`) are shuffled again in each of its epochs. A mixture interleaves the
sources row by row in proportion to their weights. The source of row g of the run, and the index of its row,
are closed forms of g, so that resuming needs only the step. Batch `step` is rows step * B to (step + 1) * B -
1 of the run, whatever the number of processes and the mesh: each process makes only the rows of its devices.

    source = BatchSource(prepared.train, data, token_bytes=prepared.tokenizer.token_bytes)
    with source.iterate(start_step) as batches:     # reads ahead in the background
        for batch in batches: ...

Legend: B rows of the global batch, R of them made here, V vocabulary.
"""

import hashlib
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import cast

import grain
import numpy as np
from jaxtyping import Integer

from slmjax.data.batch import Batch, checked_rows, empty_batch
from slmjax.data.config import DataConfig
from slmjax.data.packing import TokenizedDocuments, load_or_pack, write_row


class Mixture:
    """Interleaves infinite sources so that every prefix holds them in proportion to their weights.

    `mixture[g]` is (source, number of earlier rows of that source), a closed form. Sources are the leaves of
    a binary tree, split by weight. Of the first k rows that reach a node, the integer nearest to k times its
    fraction goes left. Of the first n rows, source i has n * weight_i / total, off by at most half a row with
    two sources and by less than two with any number. (`grain.MapDataset.mix` rounds weights to hundredths of
    the smallest, which drifts without bound.)
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Create a mixture. Raises ValueError unless every weight is positive and finite."""
        if not weights:
            raise ValueError("there is no source to train on: give data.sources at least one")
        for source, weight in enumerate(weights):
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"source {source} has weight {weight}, which must be positive and finite: leave out a "
                    "source that is not used"
                )
        exact = [Fraction(weight) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        # Integers in the ratio of the weights, so that the closed form is exact for any row number.
        integers = [int(weight * unit) for weight in exact]
        self.fractions = tuple(weight / sum(integers) for weight in integers)  # of the rows, by source
        self._by_weight = sorted(range(len(integers)), key=lambda source: -integers[source])
        self._sums = [0, *itertools.accumulate(integers[source] for source in self._by_weight)]

    def __getitem__(self, row: int) -> tuple[int, int]:
        low = 0
        # Descend the tree: at each node the row goes to the side whose rounded count it increases.
        high = len(self._by_weight)
        while high - low > 1:
            middle = self._split(low, high)
            left = self._sums[middle] - self._sums[low]
            total = self._sums[high] - self._sums[low]
            before = (2 * row * left + total) // (2 * total)
            after = (2 * (row + 1) * left + total) // (2 * total)
            if after > before:
                high = middle
                row = before
            else:
                low = middle
                row = row - before
        return self._by_weight[low], row

    def _split(self, low: int, high: int) -> int:
        """Return the index that splits the sources low..high into two sides of similar weight."""
        total = self._sums[low] + self._sums[high]
        # Even splits keep the tree shallow, and the rounding error small.
        return min(range(low + 1, high), key=lambda middle: abs(2 * self._sums[middle] - total))


class BatchSource:
    """Training batches of token shards with weights, which are relative fractions of the rows of the run.

    The id of a row is its index in the plan of its source, plus the number of rows of the sources before it.
    """

    def __init__(
        self,
        train: Sequence[tuple[TokenizedDocuments, float]],
        data: DataConfig,
        *,
        token_bytes: Integer[np.ndarray, "V"] | None = None,
        rows: Integer[np.ndarray, "R"] | None = None,
    ) -> None:
        """Pack what is not packed yet.

        Args:
          train: shards with their weights.
          data: settings of packing and batches.
          token_bytes: UTF-8 bytes of each token id, if known.
          rows: rows of the global batch, ascending, that are made here (None: all of them).

        Raises:
          ValueError: empty sources, or weights and sizes that cannot be used.
        """
        self._data = data
        self._shards = [shards for shards, _ in train]
        self._mixture = Mixture([weight for _, weight in train])
        self._token_bytes = token_bytes
        self.rows = checked_rows(rows, data.batch_size)
        self.plans = tuple(
            load_or_pack(
                shards,
                packing=data.packing,
                sequence_length=data.sequence_length,
                window=data.packing_window,
                cache_dir=data.cache_path,
            )
            for shards in self._shards
        )
        self._first_row_id = [0, *itertools.accumulate(len(plan) for plan in self.plans)]
        self._orders = [
            _order(len(plan), seed=_seed(data.seed, source)) for source, plan in enumerate(self.plans)
        ]

    @property
    def num_rows(self) -> int:
        """Rows of all sources: those of one epoch."""
        return sum(len(plan) for plan in self.plans)

    @property
    def packing_efficiency(self) -> float:
        """The fraction of trained positions that hold tokens, the sources weighted as in the mixture."""
        return sum(
            fraction * plan.efficiency
            for fraction, plan in zip(self._mixture.fractions, self.plans, strict=True)
        )

    def batch(self, step: int) -> Batch:
        """Return the rows of global batch `step` that are made here, as numpy arrays."""
        if step < 0:
            raise ValueError(f"step is {step}: steps count from 0")
        batch = empty_batch(len(self.rows), self._data.sequence_length)
        for index, row_of_batch in enumerate(self.rows):
            source, index_in_source = self._mixture[step * self._data.batch_size + row_of_batch]
            # The type allows None, for elements that a filter dropped; there is no filter here.
            row = cast(int, self._orders[source][index_in_source])
            shards = self._shards[source]
            write_row(
                batch,
                index,
                plan=self.plans[source],
                row=row,
                shards=shards,
                token_bytes=self._token_bytes,
            )
            # Row ids are unique over all sources.
            batch.row_ids[index] = self._first_row_id[source] + row
        return batch

    def iterate(self, start_step: int = 0) -> "ReadAhead":
        """Iterate over batch(start_step), batch(start_step + 1), ..., made ahead by threads."""
        return ReadAhead(
            self.batch,
            start_step=start_step,
            read_threads=self._data.read_threads,
            prefetch=self._data.prefetch,
        )


class ReadAhead:
    """Iterates over batch(start_step), ...; up to `prefetch` batches are in progress or waiting at any time.

    An error in making a batch is raised when that batch is requested. Close it, or use it as a context:
    afterwards no thread makes a batch. A thread that has not begun one may take a moment to end.
    """

    def __init__(
        self, batch: Callable[[int], Batch], *, start_step: int, read_threads: int, prefetch: int
    ) -> None:
        # Time that the consumer has spent in next().
        self.waiting_seconds = 0.0
        self._batch = batch
        # The threads that make batches.
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closed = False
        # The range has no end in practice: a run stops by its number of steps.
        steps = grain.MapDataset.range(start_step, sys.maxsize).map(self._make)
        options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(steps.to_iter_dataset(options))

    def __iter__(self) -> "ReadAhead":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        try:
            return cast(Batch, next(self._iterator))
        finally:
            self.waiting_seconds += time.perf_counter() - started

    def close(self) -> None:
        """Stop reading, and wait for the batch that each thread is making. It may be called again."""
        with self._lock:
            # From now on no thread is added.
            self._closed = True
        self._iterator.close()
        # A thread that still reads would use shards after their files are closed.
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, step: int) -> Batch | None:
        with self._lock:
            if self._closed:
                return None
            # Grain's executor does not wait for its threads at the end, so close() does.
            self._threads.add(threading.current_thread())
        return self._batch(step)


def _order(num_rows: int, *, seed: int) -> grain.MapDataset:
    """Return the order of rows: each run of `num_rows` indices is one epoch, with its own permutation."""
    order = grain.MapDataset.range(num_rows).shuffle(seed=seed).repeat()
    # Grain creates its statistics at the first access, which must not happen in two threads at a time.
    order[0]
    return order


def _seed(seed: int, source: int) -> int:
    """Return 32 bits for a source.

    They are hashed because grain adds the epoch to its seed: otherwise seeds 0 and 1 would share all
    permutations, one epoch apart.
    """
    return int.from_bytes(hashlib.sha256(f"rows {seed} {source}".encode()).digest()[:4], "big")
