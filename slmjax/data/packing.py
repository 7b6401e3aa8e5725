"""Packing: the pieces of documents that make up each row, decided once for a set of token shards, and saved.

A piece is (document, start, length): inputs tokens[start : start + length], targets tokens[start + 1 : start
+ length + 1].

`best_fit_rows` cuts a document of L tokens (BOS and EOS included) into pieces that score each of its L - 1
targets once, and fills rows with them by best-fit decreasing within windows of consecutive documents.
`concatenated_rows` cuts the stream of all documents every T tokens. All rows but the last are full. A piece
that ends its document has EOS as its last input, whose target would be the BOS of the next document: it is
not scored. Neither loses or repeats a target.

If only some text of a document is scored (`scored.py`), no row without a scored target is used. Best fit cuts
a document that does not fit a row so that each piece has a scored target (`pieces_around`); concatenation
leaves out rows that have none.

A plan is a pure function of the document lengths, the scored tokens and the settings. It takes 16 bytes a
piece and 8 a row in memory. Use: `plan = load_or_pack(shards, ...)`, then `write_row(batch, 0, plan=plan,
row=17, shards=shards)`.

Legend: T positions of a row, V vocabulary.
"""

import bisect
import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from slmjax.atomic_files import atomic_file
from slmjax.data.batch import Batch
from slmjax.data.config import Packing
from slmjax.data.scored import ScoredText, Spans, is_all_scored, pieces_around, spans_in

_PLAN_VERSION = 2  # part of the name of a saved plan: increase it when the same settings give other rows


@runtime_checkable
class TokenizedDocuments(Protocol):
    """The documents that packing needs, each [BOS] tokens [EOS]. `TokenShards` implements it."""

    lengths: Int32[np.ndarray, "documents"]  # tokens with BOS and EOS
    num_bytes: Int32[np.ndarray, "documents"]  # of UTF-8 text
    num_scored: Int32[np.ndarray, "documents"]  # tokens that are scored as targets
    scored_bytes: Int32[np.ndarray, "documents"]  # of the UTF-8 text that these stand for

    @property
    def hash(self) -> str:
        """A hash that differs if any document differs."""
        ...

    def __len__(self) -> int: ...

    def tokens(self, document: int, *, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "T"]:
        """Return the token ids from `start` to `stop`."""
        ...

    def scored(self, document: int, *, start: int = 0, stop: int | None = None) -> Bool[np.ndarray, "T"]:
        """Return whether each of the tokens `start` to `stop` is scored as a target; BOS never is."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """Rows of pieces in compressed sparse row form: row r has pieces row_starts[r] to row_starts[r + 1]."""

    sequence_length: int  # positions of a row
    overlap: int  # inputs of the previous piece that a further piece of running text repeats
    row_starts: Int64[np.ndarray, "rows_and_end"]
    documents: Int32[np.ndarray, "pieces"]
    starts: Int32[np.ndarray, "pieces"]
    lengths: Int32[np.ndarray, "pieces"]
    # leading targets of the piece that it does not score: prompt, or scored by an earlier piece
    contexts: Int32[np.ndarray, "pieces"]

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def efficiency(self) -> float:
        """The fraction of positions that hold a token rather than padding."""
        return float(self.lengths.sum(dtype=np.int64)) / (len(self) * self.sequence_length)

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """Return (document, start, length) of each piece of a row, in order."""
        here = slice(int(self.row_starts[row]), int(self.row_starts[row + 1]))
        return list(
            zip(
                self.documents[here].tolist(),
                self.starts[here].tolist(),
                self.lengths[here].tolist(),
                strict=True,
            )
        )


def best_fit_rows(
    document_lengths: Integer[np.ndarray, "documents"],
    *,
    sequence_length: int,
    window: int,
    overlap: int = 0,
    spans: Mapping[int, Spans] = MappingProxyType({}),
) -> RowPlan:
    """Pack `window` consecutive documents at a time; the pieces of a document are in order over the rows.

    Args:
      document_lengths: tokens of each document.
      sequence_length: positions of a row.
      window: documents that are packed together.
      overlap: inputs of the previous piece with which a further piece of running text starts.
      spans: the scored spans, by document, of documents that are not plain text and either longer than a row
        or without a scored token (`spans_of`).

    Raises:
      ValueError: there are no rows.
    """
    _check_sequence_length(sequence_length)
    if window < 1:
        raise ValueError(f"the packing window is {window} documents: set it to at least 1")
    if not 0 <= overlap < sequence_length:
        raise ValueError(
            f"an overlap of {overlap} leaves no new target in a row of {sequence_length}: choose 0 to "
            f"{sequence_length - 1}"
        )
    documents, starts, lengths, contexts = _cut(
        document_lengths, sequence_length=sequence_length, overlap=overlap, spans=spans
    )
    # Packing windows of documents keeps the memory and time of a large corpus bounded.
    rows = np.empty(len(documents), np.int64)
    num_rows = 0
    edges = np.searchsorted(documents, np.arange(0, len(document_lengths) + window, window))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        rows_in_window, num_rows_in_window = _best_fit_decreasing(lengths[begin:end], sequence_length)
        rows[begin:end] = num_rows + rows_in_window
        num_rows += num_rows_in_window
    # Stable, so that the pieces of a document stay in order.
    order = np.argsort(rows, kind="stable")
    pieces = (values[order] for values in (rows, documents, starts, lengths, contexts))
    return _plan(*pieces, sequence_length=sequence_length, overlap=overlap)


def concatenated_rows(document_lengths: Integer[np.ndarray, "documents"], *, sequence_length: int) -> RowPlan:
    """Cut the joined documents every `sequence_length` tokens, without the last EOS (it predicts nothing)."""
    _check_sequence_length(sequence_length)
    offsets = np.concatenate([[0], np.cumsum(document_lengths, dtype=np.int64)])
    end = max(int(offsets[-1]) - 1, 0)
    # A piece ends at the end of a document or of a row, whichever comes first.
    cuts = np.union1d(offsets[offsets < end], np.arange(0, end, sequence_length))
    documents = np.searchsorted(offsets, cuts, side="right") - 1
    lengths = np.diff(cuts, append=end)
    rows = cuts // sequence_length
    contexts = np.zeros(len(rows), np.int64)
    return _plan(
        rows,
        documents,
        cuts - offsets[documents],
        lengths,
        contexts,
        sequence_length=sequence_length,
        overlap=0,
    )


def with_targets(plan: RowPlan, shards: TokenizedDocuments) -> RowPlan:
    """Return the rows of a plan that have a scored target. Raises ValueError if there are none."""
    lengths = shards.lengths[plan.documents]
    num_scored = shards.num_scored[plan.documents]
    # Plain text is decided by its lengths alone; only other documents need their flags.
    is_scored = (num_scored > 0) & (plan.starts + 1 < lengths)  # EOS alone predicts nothing
    for piece in np.flatnonzero(~is_all_scored(lengths, num_scored)).tolist():
        start = int(plan.starts[piece])
        stop = min(start + int(plan.lengths[piece]) + 1, int(lengths[piece]))
        is_scored[piece] = shards.scored(int(plan.documents[piece]), start=start + 1, stop=stop).any()
    rows = np.repeat(np.arange(len(plan)), np.diff(plan.row_starts))
    has_target = np.isin(rows, rows[is_scored])
    pieces = (values[has_target] for values in (plan.documents, plan.starts, plan.lengths, plan.contexts))
    new_rows = np.unique(rows[has_target], return_inverse=True)[1]
    return _plan(new_rows, *pieces, sequence_length=plan.sequence_length, overlap=plan.overlap)


def spans_of(
    shards: TokenizedDocuments, *, sequence_length: int, num_documents: int | None = None
) -> dict[int, Spans]:
    """Return the scored spans that `best_fit_rows` needs, of the first `num_documents` (None: all)."""
    lengths = shards.lengths[:num_documents]
    num_scored = shards.num_scored[:num_documents]
    needs_spans = ~is_all_scored(lengths, num_scored) & ((lengths - 1 > sequence_length) | (num_scored == 0))
    return {document: spans_in(shards.scored(document)) for document in np.flatnonzero(needs_spans).tolist()}


def load_or_pack(
    shards: TokenizedDocuments, *, packing: Packing, sequence_length: int, window: int, cache_dir: Path
) -> RowPlan:
    """Return the plan for these shards and settings, from `cache_dir` if it is valid, else made and saved."""
    # All that decides the plan, so that an old plan is never used for other data or settings.
    settings = {
        "version": _PLAN_VERSION,
        "shards": shards.hash,
        "packing": packing.value,
        "sequence_length": sequence_length,
        "window": window if packing is Packing.BEST_FIT else None,
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_dir / "packing" / f"{name}.npz"
    plan = _load(path, sequence_length=sequence_length)
    # Packing a large corpus is slow, so a plan is saved.
    if plan is None:
        if packing is Packing.BEST_FIT:
            spans = spans_of(shards, sequence_length=sequence_length)
            plan = best_fit_rows(shards.lengths, sequence_length=sequence_length, window=window, spans=spans)
        else:
            plan = concatenated_rows(shards.lengths, sequence_length=sequence_length)
            if not is_all_scored(shards.lengths, shards.num_scored).all():
                plan = with_targets(plan, shards)
        _save(plan, path)
    return plan


def write_row(
    batch: Batch,
    index: int,
    *,
    plan: RowPlan,
    row: int,
    shards: TokenizedDocuments,
    text: ScoredText = ScoredText.COMPLETIONS,
    token_bytes: Integer[np.ndarray, "V"] | None = None,
) -> None:
    """Write row `row` of the plan into row `index` of an empty batch; the caller sets its row id.

    The bytes of the row are exact with `token_bytes` (UTF-8 bytes of each token id). Without them, the scored
    bytes of a document are spread evenly over its scored tokens, rounded so that its pieces add up to them.
    """
    column = 0
    num_bytes = 0
    contexts = plan.contexts[int(plan.row_starts[row]) : int(plan.row_starts[row + 1])].tolist()
    for segment, ((document, start, length), context) in enumerate(
        zip(plan.pieces(row), contexts, strict=True), start=1
    ):
        num_tokens = int(shards.lengths[document])
        tokens = shards.tokens(document, start=start, stop=min(start + length + 1, num_tokens))
        # One less than `length` where the last input is EOS.
        num_targets = len(tokens) - 1
        end = column + length
        batch.tokens[index, column:end] = tokens[:length]
        batch.targets[index, column : column + num_targets] = tokens[1:]
        batch.segment_ids[index, column:end] = segment
        batch.positions[index, column:end] = np.arange(length, dtype=np.int32)
        first = start + 1 + context
        stop = start + 1 + num_targets
        if first < stop:
            # Leading targets of the piece are context: prompt, or scored by an earlier piece.
            scored = _scored(shards, document, start=first, stop=stop, text=text)
            batch.loss_mask[index, column + context : column + num_targets] = scored
            if token_bytes is not None:
                num_bytes += int(token_bytes[tokens[1 + context :][scored]].sum())
            else:
                num_bytes += _spread_bytes(
                    shards, document, start=first, num_scored=int(scored.sum()), text=text
                )
        column = end
    batch.num_bytes[index] = num_bytes


def _scored(
    shards: TokenizedDocuments, document: int, *, start: int, stop: int, text: ScoredText
) -> np.ndarray:
    """Return whether each of the tokens `start`, at least 1, to `stop` is scored."""
    if text is ScoredText.ALL or shards.num_scored[document] == shards.lengths[document] - 1:
        return np.ones(max(stop - start, 0), bool)
    return shards.scored(document, start=start, stop=stop)


def _spread_bytes(
    shards: TokenizedDocuments, document: int, *, start: int, num_scored: int, text: ScoredText
) -> int:
    """Return the bytes of `num_scored` scored tokens from `start`: spread evenly, none for EOS."""
    # Cumulative rounding: the bytes up to the last token minus those before the first.
    num_tokens = int(shards.lengths[document])
    is_all = text is ScoredText.ALL or bool(shards.num_scored[document] == num_tokens - 1)
    total = int(shards.num_bytes[document] if text is ScoredText.ALL else shards.scored_bytes[document])
    before = start - 1 if is_all else int(shards.scored(document, start=1, stop=start).sum())
    num_all = num_tokens - 1 if is_all else int(shards.num_scored[document])
    num_ends = 1 if is_all else int(shards.scored(document, start=num_tokens - 1)[0])
    text_tokens = max(num_all - num_ends, 1)
    return (
        total * min(before + num_scored, text_tokens) // text_tokens
        - total * min(before, text_tokens) // text_tokens
    )


def _check_sequence_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}: a row needs at least 2 positions")


def _cut(
    document_lengths: np.ndarray, *, sequence_length: int, overlap: int, spans: Mapping[int, Spans]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return pieces of up to `sequence_length` targets: documents, starts, lengths, contexts, by document."""
    num_targets = np.maximum(document_lengths.astype(np.int64) - 1, 0)
    # These are cut by their spans, below.
    num_targets[list(spans)] = 0
    stride = sequence_length - overlap
    # Ceiling division: the pieces after the first, each with `stride` new targets.
    further = np.maximum(-(-(num_targets - sequence_length) // stride), 0)
    num_pieces = np.where(num_targets > 0, 1 + further, 0)
    documents = np.repeat(np.arange(len(num_targets)), num_pieces)
    # The number of each piece within its document.
    piece = np.arange(len(documents)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    starts = piece * stride
    lengths = np.minimum(num_targets[documents] - starts, sequence_length)
    contexts = np.where(starts > 0, overlap, 0)
    cut = [
        (document, *piece)
        for document, document_spans in spans.items()
        for piece in pieces_around(document_spans, sequence_length=sequence_length, overlap=overlap)
    ]
    # Plain text alone needs no merging with pieces of spans.
    if not cut:
        return documents, starts, lengths, contexts
    of_spans = np.asarray(cut, np.int64).T
    joined = [
        np.concatenate(pair) for pair in zip((documents, starts, lengths, contexts), of_spans, strict=True)
    ]
    order = np.argsort(joined[0], kind="stable")
    documents, starts, lengths, contexts = (values[order] for values in joined)
    return documents, starts, lengths, contexts


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Return the row of each piece, and the number of rows: longest first, each into the fullest row it fits.

    Pieces of equal length keep their order. O(n log n), since there are at most `capacity` different numbers
    of free positions.
    """
    # Stable, so that the plan does not depend on the sorting algorithm.
    order = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), np.int64)
    # Sorted: each number of free positions that some row has.
    free: list[int] = []
    # By the number of free positions.
    rows_with: dict[int, list[int]] = {}
    num_rows = 0
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        index = bisect.bisect_left(free, length)
        if index < len(free):
            num_free = free[index]
            row = rows_with[num_free].pop()
            if not rows_with[num_free]:
                del free[index]
        else:
            num_free = capacity
            row = num_rows
            num_rows += 1
        rows[piece] = row
        if num_left := num_free - length:
            same = rows_with.setdefault(num_left, [])
            if not same:
                bisect.insort(free, num_left)
            same.append(row)
    return rows, num_rows


def _plan(
    rows: np.ndarray,
    documents: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    contexts: np.ndarray,
    *,
    sequence_length: int,
    overlap: int,
) -> RowPlan:
    """Return the plan of pieces that are sorted by row; every row from 0 on has a piece."""
    if not len(rows):
        raise ValueError(
            "there are no documents to pack: the source, or this split of it, is empty, or none of its text "
            "is scored"
        )
    return RowPlan(
        sequence_length=sequence_length,
        overlap=overlap,
        row_starts=np.searchsorted(rows, np.arange(rows[-1] + 2)).astype(np.int64),
        documents=documents.astype(np.int32),
        starts=starts.astype(np.int32),
        lengths=lengths.astype(np.int32),
        contexts=contexts.astype(np.int32),
    )


_SAVED = ("row_starts", "documents", "starts", "lengths", "contexts")


def _save(plan: RowPlan, path: Path) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: getattr(plan, name) for name in _SAVED})


def _load(path: Path, *, sequence_length: int) -> RowPlan | None:
    """Return a saved plan; None if there is none or its checksums (one per array) do not match."""
    try:
        with path.open("rb") as file, np.load(file) as archive:
            return RowPlan(
                sequence_length=sequence_length, overlap=0, **{name: archive[name] for name in _SAVED}
            )
    # RuntimeError: a flipped bit of the header says that the archive is encrypted or compressed otherwise.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
