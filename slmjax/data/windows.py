"""Batches for evaluation: every scored token of every document exactly once, and every UTF-8 byte that these
stand for.

Scored is what training scores, or all text (`ScoredText`): of a pair of prompt and completion the completion
and EOS, of plain text everything but BOS. Documents that are not plain text are cut by the rule of training
(`scored.pieces_around`).

A document of L tokens is [BOS] text [EOS]: its L - 1 targets are scored, EOS included (which counts no byte),
BOS never. Up to `sequence_length` T targets fit one window. A longer document is cut at a stride of T -
overlap: each further window starts with the last `overlap` inputs of the one before, whose targets are not
scored again, so that a scored token sees at least `overlap` tokens before it, and the windows cost T / (T -
overlap) times the positions. With T = 4, overlap = 1 and 8 targets t1 .. t8 (inputs t0 .. t7; `.` marks a
target that is not scored):

    window 0   inputs t0 t1 t2 t3   targets t1 t2 t3 t4
    window 1   inputs t3 t4 t5 t6   targets .  t5 t6 t7
    window 2   inputs t6 t7         targets .  t8

Several windows share a row where they fit, told apart by segment ids. A document's scored bytes are spread
evenly over its scored tokens and always add up to them; so the bytes of a row are exact unless it holds part
of a cut document, and the bytes of all batches are exact.

Legend: B rows of the global batch, R of them made here, T positions of a row.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Integer

from slmjax.data.batch import Batch, checked_rows, empty_batch
from slmjax.data.packing import RowPlan, TokenizedDocuments, best_fit_rows, spans_of, write_row
from slmjax.data.scored import ScoredText

_PACKING_WINDOW = 4096  # documents that are packed into rows together


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationBatches:
    """Iterates over batches of one shape; may be iterated again. Made by `evaluation_batches`."""

    plans: tuple[
        tuple[TokenizedDocuments, RowPlan], ...
    ]  # the shards with documents to evaluate, and their rows
    batch_size: int  # rows of the global batch
    rows: tuple[int, ...]  # those of each global batch that are made here, ascending
    num_documents: int
    num_targets: int  # that are scored, over all batches and processes
    num_tokens: int  # of the documents but BOS, scored or not
    num_bytes: int  # of the scored text, over all batches and processes
    text: ScoredText  # what is scored

    @property
    def num_rows(self) -> int:
        return sum(len(plan) for _, plan in self.plans)

    def __len__(self) -> int:
        """Number of batches, the same for every process; the last one is filled up with rows of padding."""
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        rows = [(shards, plan, row) for shards, plan in self.plans for row in range(len(plan))]
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            batch = empty_batch(len(self.rows), self.plans[0][1].sequence_length)
            for index, number in enumerate(first + row for row in self.rows):
                if number < len(rows):
                    shards, plan, row = rows[number]
                    write_row(batch, index, plan=plan, row=row, shards=shards, text=self.text)
                    batch.row_ids[index] = number
            yield batch


def default_overlap(sequence_length: int) -> int:
    """Tokens of context that further windows of a document repeat, where nobody says: a quarter window, at
    most 64.
    """
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
    """Windows of the documents of all shards, in order, or of the first `max_documents` of them, whole.

    `batch_size` counts the rows of the global batch, of which `rows`, ascending, are made here (None: all of
    them). Raises ValueError for an overlap that leaves no new target, no documents, no scored token, and rows
    that are none of the batch.
    """
    made_here = checked_rows(rows, batch_size)
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents is {max_documents}: give at least 1, or None for all documents")
    plans: list[tuple[TokenizedDocuments, RowPlan]] = []
    num_documents = num_targets = num_tokens = num_bytes = 0
    for shards in shards_list:
        wanted = len(shards) if max_documents is None else min(len(shards), max_documents - num_documents)
        if wanted == 0:
            continue
        num_documents += wanted
        tokens, targets, text_bytes = _counts(shards, wanted, text)
        num_tokens += tokens
        if not targets:
            continue
        spans = (
            {}
            if text is ScoredText.ALL
            else spans_of(shards, sequence_length=sequence_length, num_documents=wanted)
        )
        plan = best_fit_rows(
            shards.lengths[:wanted],
            sequence_length=sequence_length,
            window=_PACKING_WINDOW,
            overlap=overlap,
            spans=spans,
        )
        plans.append((shards, plan))
        num_targets += targets
        num_bytes += text_bytes
    if not plans and num_tokens:
        raise ValueError(
            f"none of the {num_documents} documents has a scored token: to score prompts too, use --score "
            "all (eval.score)"
        )
    if not plans:
        raise ValueError(
            "there are no documents to evaluate on: the held-out split is empty; hold out a larger fraction "
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
    )


def _counts(shards: TokenizedDocuments, num_documents: int, text: ScoredText) -> tuple[int, int, int]:
    """Counts over the first documents: tokens but BOS, scored tokens, and bytes of the scored text."""
    num_tokens = np.maximum(shards.lengths - 1, 0)
    scored, scored_bytes = (
        (num_tokens, shards.num_bytes) if text is ScoredText.ALL else (shards.num_scored, shards.scored_bytes)
    )
    tokens, targets, num_bytes = (
        int(counts[:num_documents].sum(dtype=np.int64)) for counts in (num_tokens, scored, scored_bytes)
    )
    return tokens, targets, num_bytes
