"""Evaluation batches: every scored token of every document once, with every UTF-8 byte of their text.

The scored text is that of training, or all text (`ScoredText`): of a pair of prompt and completion the
completion and EOS, of plain text everything but BOS. Documents that are not plain text are cut by the rule of
training (`scored.pieces_around`).

A document of L tokens is [BOS] text [EOS]. Its L - 1 targets are scored, EOS included (which has no bytes),
BOS never. Up to `sequence_length` T targets fit one window. A longer document is cut at a stride of T -
overlap: each further window starts with the last `overlap` inputs of the previous one, whose targets are not
scored again. So a scored token has a context of at least `overlap` tokens, and the windows cost T / (T -
overlap) times the positions. With T = 4, overlap = 1 and 8 targets t1 .. t8 (inputs t0 .. t7; `.` marks a
target that is not scored):

    window 0   inputs t0 t1 t2 t3   targets t1 t2 t3 t4
    window 1   inputs t3 t4 t5 t6   targets .  t5 t6 t7
    window 2   inputs t6 t7         targets .  t8

Several windows share a row if they fit, distinguished by segment ids. A document's scored bytes are spread
evenly over its scored tokens and always add up to them. So the bytes of a row are exact unless it has a part
of a cut document, and the bytes of all batches are exact.

Legend: B rows of the global batch, R of them made here, T positions of a row, G groups of documents.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64, Integer

from slmjax.data.batch import NO_ROW, Batch, checked_rows, empty_batch
from slmjax.data.packing import RowPlan, TokenizedDocuments, best_fit_rows, spans_of, write_row
from slmjax.data.scored import ScoredText

_PACKING_WINDOW = 4096  # documents that are packed into rows together


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationBatches:
    """Iterates over batches of one shape, any number of times. Made by `evaluation_batches`."""

    plans: tuple[tuple[TokenizedDocuments, RowPlan], ...]  # shards with documents to evaluate, and their rows
    batch_size: int  # rows of the global batch
    rows: tuple[int, ...]  # rows of each global batch that are made here, ascending
    num_documents: int
    num_targets: int  # scored tokens, over all batches and processes
    num_tokens: int  # of the documents without BOS, scored or not
    num_bytes: int  # of the scored text, over all batches and processes
    text: ScoredText  # the text that is scored
    documents: tuple[
        range, ...
    ]  # of each plan: numbers of its shards' documents, among all of the evaluation

    @property
    def num_rows(self) -> int:
        return sum(len(plan) for _, plan in self.plans)

    def __len__(self) -> int:
        """The number of batches, the same for every process; rows of padding fill the last one."""
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # Rows of all sources in order, so that a row id is its index in this list.
        rows = [(shards, plan, row) for shards, plan in self.plans for row in range(len(plan))]
        # The number of batches is that of the global rows, so that all processes make equally many.
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            batch = empty_batch(len(self.rows), self.plans[0][1].sequence_length)
            for index, number in enumerate(first + row for row in self.rows):
                # The rest of the last batch stays padding.
                if number < len(rows):
                    shards, plan, row = rows[number]
                    write_row(batch, index, plan=plan, row=row, shards=shards, text=self.text)
                    batch.row_ids[index] = number
            yield batch

    def groups_of(self, batch: Batch, *, num_groups: int) -> Int32[np.ndarray, "R T"]:
        """Return the group of the document at each position; documents are in groups 0, 1, ... in turn.

        Padding is in group 0, and scores nothing.
        """
        first_rows = np.cumsum([0, *(len(plan) for _, plan in self.plans)])
        groups = np.zeros(batch.segment_ids.shape, np.int32)
        for index, number in enumerate(batch.row_ids.tolist()):
            if number == NO_ROW:
                continue
            source = int(np.searchsorted(first_rows, number, side="right")) - 1
            _, plan = self.plans[source]
            row = number - int(first_rows[source])
            here = plan.documents[int(plan.row_starts[row]) : int(plan.row_starts[row + 1])]
            # Segment 0 is padding, and the pieces of a row are segments 1, 2, ...
            of_segments = np.concatenate([[0], (self.documents[source].start + here) % num_groups])
            groups[index] = of_segments[batch.segment_ids[index]]
        return groups

    def group_counts(self, num_groups: int) -> tuple[Int64[np.ndarray, "G"], Int64[np.ndarray, "G"]]:
        """Return the scored tokens of each group of documents, and the bytes of their text."""
        num_used = min(self.num_documents, num_groups)
        counts = np.zeros((2, num_used), np.int64)
        for (shards, _), numbers in zip(self.plans, self.documents, strict=True):
            _, *scored = _counts_by_document(shards, len(numbers), self.text)
            for sums, values in zip(counts, scored, strict=True):
                np.add.at(sums, np.asarray(numbers) % num_groups, values)
        return counts[0], counts[1]


def default_overlap(sequence_length: int) -> int:
    """Return the default overlap of windows: a quarter of a window, at most 64 tokens."""
    return min(64, sequence_length // 4)


def evaluation_batches(
    shards_list: Sequence[TokenizedDocuments],
    *,
    sequence_length: int,
    batch_size: int,
    overlap: int,
    max_documents: int | None = None,
    rows: Integer[np.ndarray, "R"] | None = None,
    text: ScoredText = ScoredText.COMPLETIONS,
) -> EvaluationBatches:
    """Return windows of the documents of all shards, in order, or of the first `max_documents`.

    Args:
      shards_list: the documents.
      sequence_length: positions of a row.
      batch_size: rows of the global batch.
      overlap: inputs that further windows of a document repeat.
      max_documents: number of documents; None for all.
      rows: rows of the global batch, ascending, that are made here; None for all.
      text: the text that is scored.

    Raises:
      ValueError: the overlap leaves no new target, there are no documents or no scored tokens, or `rows` are
        not rows of the batch.
    """
    # Arguments are checked before any shards are read.
    made_here = checked_rows(rows, batch_size)
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents is {max_documents}: give at least 1, or None for all documents")
    plans: list[tuple[TokenizedDocuments, RowPlan]] = []
    documents: list[range] = []
    num_documents = num_targets = num_tokens = num_bytes = 0
    for shards in shards_list:
        num_here = len(shards) if max_documents is None else min(len(shards), max_documents - num_documents)
        if num_here == 0:
            continue
        num_documents += num_here
        tokens, targets, text_bytes = _counts(shards, num_here, text)
        num_tokens += tokens
        # Shards without a scored token still count in num_tokens, but have no rows.
        if not targets:
            continue
        spans = (
            {}
            if text is ScoredText.ALL
            else spans_of(shards, sequence_length=sequence_length, num_documents=num_here)
        )
        # Short documents share a row, which saves computation on padding.
        plan = best_fit_rows(
            shards.lengths[:num_here],
            sequence_length=sequence_length,
            window=_PACKING_WINDOW,
            overlap=overlap,
            spans=spans,
        )
        plans.append((shards, plan))
        documents.append(range(num_documents - num_here, num_documents))
        num_targets += targets
        num_bytes += text_bytes
    if not plans and num_tokens:
        raise ValueError(
            f"none of the {num_documents} documents has a scored token: to score prompts too, use --score "
            "all (eval.score)"
        )
    if not plans:
        raise ValueError(
            "there are no documents to evaluate on, the held-out split is empty: hold out a larger fraction "
            "of the text"
        )
    return EvaluationBatches(
        plans=tuple(plans),
        batch_size=batch_size,
        rows=made_here,
        num_documents=num_documents,
        num_targets=num_targets,
        num_tokens=num_tokens,
        text=text,
        num_bytes=num_bytes,
        documents=tuple(documents),
    )


def _counts(shards: TokenizedDocuments, num_documents: int, text: ScoredText) -> tuple[int, int, int]:
    """Return counts of the first documents: tokens but BOS, scored tokens, and bytes of the scored text."""
    by_document = _counts_by_document(shards, num_documents, text)
    tokens, targets, num_bytes = (int(counts.sum(dtype=np.int64)) for counts in by_document)
    return tokens, targets, num_bytes


def _counts_by_document(
    shards: TokenizedDocuments, num_documents: int, text: ScoredText
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_tokens = np.maximum(shards.lengths - 1, 0)
    scored, scored_bytes = (
        (num_tokens, shards.num_bytes) if text is ScoredText.ALL else (shards.num_scored, shards.scored_bytes)
    )
    return num_tokens[:num_documents], scored[:num_documents], scored_bytes[:num_documents]
