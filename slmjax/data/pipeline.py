"""`batch(step)`: the batches of training, a pure function of the data, its seed and the step.

The rows of every source (`packing.py`) are shuffled anew for each of its epochs; a mixture interleaves the
sources row by row in proportion to their weights. Which source row g of the whole run comes from, and which
of its rows it is, are closed forms of g, so that resuming needs the step alone, and nothing is remembered.
Batch `step` is rows step * B to (step + 1) * B - 1 of the run, whatever the number of processes and the mesh:
each process makes the rows that its devices hold, and no others.

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

    `mixture[g]` is (source, how many rows of that source came before), a closed form. Sources are the leaves
    of a binary tree, halved by weight; of the first k rows that reach a node, the nearest integer to k times
    its share goes left. Of the first n rows, source i has n * weight_i / total, off by at most half a row
    with two sources and by less than two with any number. (`grain.MapDataset.mix` rounds weights to
    hundredths of the smallest, which drifts without bound.)
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Raises ValueError unless every weight is positive and finite."""
        if not weights:
            raise ValueError("there is no source to train on: give data.sources at least one")
        for place, weight in enumerate(weights):
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(
                    f"source {place} has weight {weight}: weights are positive numbers; leave a source out "
                    "to not use it"
                )
        exact = [Fraction(weight) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * unit) for weight in exact]
        self.shares = tuple(weight / sum(whole) for weight in whole)  # of the rows, by source
        self._by_weight = sorted(range(len(whole)), key=lambda source: -whole[source])
        self._sums = [0, *itertools.accumulate(whole[source] for source in self._by_weight)]

    def __getitem__(self, row: int) -> tuple[int, int]:
        low = 0
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
        """Where to cut the sources low..high so that both sides weigh as nearly the same as they can."""
        whole = self._sums[low] + self._sums[high]
        return min(range(low + 1, high), key=lambda middle: abs(2 * self._sums[middle] - whole))


class BatchSource:
    """Training batches of token shards with their weights; weights are shares of the rows of the run,
    relative to each other.

    A row's id is its index in the plan of its source, plus the number of rows of the sources before it.
    """

    def __init__(
        self,
        train: Sequence[tuple[TokenizedDocuments, float]],
        data: DataConfig,
        *,
        token_bytes: Integer[np.ndarray, "V"] | None = None,
        rows: Integer[np.ndarray, "R"] | None = None,
    ) -> None:
        """Packs what is not yet packed; `rows` of the global batch, ascending, are made here (None: all of
        them).

        Raises:
          ValueError: empty sources, weights and sizes that do not work.
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
    def packing_efficiency(self) -> float:
        """Share of the trained positions that hold tokens rather than padding, the sources weighted as in the
        mixture.
        """
        return sum(
            share * plan.efficiency for share, plan in zip(self._mixture.shares, self.plans, strict=True)
        )

    def batch(self, step: int) -> Batch:
        """The rows of global batch `step` that are made here, as numpy arrays."""
        if step < 0:
            raise ValueError(f"step is {step}, but steps count from 0")
        batch = empty_batch(len(self.rows), self._data.sequence_length)
        for index, row_of_batch in enumerate(self.rows):
            source, place = self._mixture[step * self._data.batch_size + row_of_batch]
            # grain's None stands for what a filter dropped: there is no filter
            row = cast(int, self._orders[source][place])
            shards = self._shards[source]
            write_row(
                batch,
                index,
                plan=self.plans[source],
                row=row,
                shards=shards,
                token_bytes=self._token_bytes,
            )
            batch.row_ids[index] = self._first_row_id[source] + row
        return batch

    def iterate(self, start_step: int = 0) -> "ReadAhead":
        """batch(start_step), batch(start_step + 1), ... without end, made ahead by `read_threads` threads."""
        return ReadAhead(
            self.batch,
            start_step=start_step,
            read_threads=self._data.read_threads,
            prefetch=self._data.prefetch,
        )


class ReadAhead:
    """Iterates over batch(start_step), ...; up to `prefetch` batches are being made or are waiting at any
    time.

    An error in making a batch is raised where that batch is asked for. Close it, or use it as a context:
    afterwards none of its threads makes a batch; one that never got to make any may take a moment to end.
    """

    def __init__(
        self, batch: Callable[[int], Batch], *, start_step: int, read_threads: int, prefetch: int
    ) -> None:
        self.waiting_seconds = 0.0  # that the consumer has spent in next()
        self._batch = batch
        self._threads: set[threading.Thread] = set()  # those that make batches
        self._lock = threading.Lock()
        self._closed = False
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
        """Ends the reading; waits for the batch that each thread is at. Harmless to call again."""
        with self._lock:
            self._closed = True  # from here on no thread is added
        self._iterator.close()
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
            # Grain's executor ends its threads without waiting for them, so close() waits for those seen
            # here.
            self._threads.add(threading.current_thread())
        return self._batch(step)


def _order(num_rows: int, *, seed: int) -> grain.MapDataset:
    """order[i] is the i-th row to take: each run of `num_rows` is one epoch, a permutation of its own."""
    order = grain.MapDataset.range(num_rows).shuffle(seed=seed).repeat()
    order[0]  # grain sets up its statistics at the first access, which must not happen in two threads at once
    return order


def _seed(seed: int, source: int) -> int:
    """32 bits. Hashed, as grain adds the epoch to it: seeds 0 and 1 would share all permutations, an epoch
    apart.
    """
    return int.from_bytes(hashlib.sha256(f"rows {seed} {source}".encode()).digest()[:4], "big")
