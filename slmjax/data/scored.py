"""The tokens of a document that are scored, stored as the indices where that changes.

Token i is scored as a target, that is, where the model predicts it. BOS, token 0, is never predicted. In
plain text every other token is scored, EOS included; in a pair of prompt and completion only the completion
and EOS are.

The edges of a document are the indices i >= 1 with `scored[i] != scored[i - 1]`, where token 0 counts as
scored. So plain text has no edge, and a pair whose prompt takes the tokens 0 to p - 1 has the edges 1 and p.

Legend: D documents, E edges of all documents, T tokens of a document.
"""

import bisect
import dataclasses
import enum

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer


class ScoredText(enum.Enum):
    """The text that is scored."""

    COMPLETIONS = "completions"  # the text after a prompt; all text of documents without a prompt
    ALL = "all"  # prompts, too


def edges_of(scored: Bool[np.ndarray, " T"]) -> Int32[np.ndarray, " edges"]:
    """Return the edges of one document; the flag of token 0 has no effect."""
    flags = np.concatenate([[True], scored[1:]])
    return (np.flatnonzero(flags[1:] != flags[:-1]) + 1).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoredTokens:
    """The edges of all documents of a shard directory, in document order."""

    lengths: Int32[np.ndarray, " D"]  # tokens of each document, BOS and EOS included
    documents: Int32[np.ndarray, " E"]  # the document of each edge, ascending
    edges: Int32[np.ndarray, " E"]  # ascending within a document

    def of(self, document: int, *, start: int = 0, stop: int | None = None) -> Bool[np.ndarray, " T"]:
        """Return a flag for each of the tokens `start` to `stop`."""
        stop = int(self.lengths[document]) if stop is None else stop
        first, last = np.searchsorted(self.documents, [document, document + 1])
        edges = self.edges[first:last]
        # Between an odd number of edges and the next one, tokens are not scored.
        if len(edges):
            flags = np.searchsorted(edges, np.arange(start, stop), side="right") % 2 == 0
        else:
            flags = np.ones(stop - start, bool)
        if start == 0:
            flags[:1] = False
        return flags

    def counts(self) -> Int32[np.ndarray, " D"]:
        """Return the number of scored tokens of each document."""
        # Each edge removes the tokens from there to the end (even numbers) or adds them again (odd numbers).
        number = np.arange(len(self.edges)) - np.searchsorted(self.documents, self.documents)
        after: Int64[np.ndarray, " E"] = self.lengths[self.documents].astype(np.int64) - self.edges
        changes = np.zeros(len(self.lengths), np.int64)
        np.add.at(changes, self.documents, np.where(number % 2 == 0, -after, after))
        return (np.maximum(self.lengths.astype(np.int64) - 1, 0) + changes).astype(np.int32)


def is_all_scored(
    lengths: Integer[np.ndarray, " D"], num_scored: Integer[np.ndarray, " D"]
) -> Bool[np.ndarray, " D"]:
    """Return whether each document is plain text: every token but BOS is scored."""
    return num_scored >= lengths - 1


Spans = list[tuple[int, int]]  # the scored tokens of a document: first, and one after the last


def spans_in(scored: Bool[np.ndarray, " T"]) -> Spans:
    """Return the spans of one document."""
    changes = np.diff(scored.astype(np.int8), prepend=0, append=0)
    return list(zip(np.flatnonzero(changes > 0).tolist(), np.flatnonzero(changes < 0).tolist(), strict=True))


def pieces_around(spans: Spans, *, sequence_length: int, overlap: int) -> list[tuple[int, int, int]]:
    """Return pieces (start, length, context) of a document longer than a row that score each target once.

    A span is the scored text between two unscored ones: a completion, or a turn of a conversation. The first
    of these rules that applies makes a piece:

    - A piece takes the next span, and those after it, that end within a row which begins half a row before
    the first
      of them. The rest of the row is filled with more of the text before. So a pair is cut from the left of
      its prompt.
    - A span that does not end there but fits a row is a piece, with as much of the text before it as fits.
    - A longer span is cut as running text is. Its first piece begins with half a row of the text before it.
    """
    pieces: list[tuple[int, int, int]] = []
    ends = [stop for _, stop in spans]
    next_span = 0
    # One after the last target that is scored.
    scored_to = 0
    while next_span < len(spans):
        begin, stop = spans[next_span]
        first = max(begin, scored_to)
        is_continued = first > begin
        start = first - 1 - overlap if is_continued else max(first - max(sequence_length // 2, 1), 0)
        # One after the last target of a row that begins there.
        limit = start + sequence_length + 1
        # Spans that end within that row.
        fitting = bisect.bisect_right(ends, limit) - next_span
        if fitting or (stop - first <= sequence_length and not is_continued):
            next_span += max(fitting, 1)
            scored_to = ends[next_span - 1]
            start = start if is_continued else max(scored_to - 1 - sequence_length, 0)
        else:
            scored_to = limit
        pieces.append((start, scored_to - 1 - start, first - 1 - start))
    return pieces
