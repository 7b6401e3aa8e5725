"""Tokens of a text, each with the bytes of the text that it stands for.

A text in pieces (a prompt and its completion, the turns of a conversation) is encoded as one string, as the
model will see it. The pieces are ranges of its UTF-8 bytes, and `overlap_mask` finds their tokens. A token
that crosses the boundary of two pieces has bytes of both, and belongs to both.

A text that is too long to be encoded at once is encoded in overlapping windows (`windows_of`). `join_windows`
passes from one window to the next where both have the same tokens, so that the ids are those of the complete
text.

    tokens = tokenizer.encode_spans(["Q:yes"])[0]
    tokens.overlap_mask([(2, 5)])              # the tokens with at least one byte of "yes"

Legend: T tokens, N characters of a text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Integer

Span = tuple[int, int]  # first byte, and the byte after the last

_OVERLAP = 4096  # bytes of text that two windows share
# Noncharacters around the number of a special token, see marks.py.
MARK_BEGINS = "\ufdd0"
MARK_ENDS = "\ufdd1"
_LONGEST_MARK = 64  # bytes
# Windows agree if they have the same tokens in the overlap, except in this part of it at both ends.
_IGNORED_PART = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextTokens:
    """Ids of a text, and the UTF-8 bytes `starts[i]` to `ends[i]` of token i.

    A text has at most 2 GiB. Several tokens may stand for one character (the bytes of byte fallback), and a
    token for nothing (a blank that the vocabulary puts before the text): its start and end are then equal.
    """

    ids: Int32[np.ndarray, " T"]
    starts: Int32[np.ndarray, " T"]
    ends: Int32[np.ndarray, " T"]

    def overlap_mask(self, spans: Sequence[Span]) -> Bool[np.ndarray, " T"]:
        """Return whether each token has at least one byte of the spans, which are in order and disjoint.

        A token that stands for nothing belongs to the byte after it.
        """
        spans = [(start, end) for start, end in spans if end > start]
        if not spans:
            return np.zeros(len(self.ids), bool)
        starts, ends = np.asarray(spans, np.int32).T
        # The first span that ends after the token's first byte.
        index = np.searchsorted(ends, self.starts, side="right")
        has_span = index < len(spans)
        return has_span & (starts[np.minimum(index, len(spans) - 1)] < np.maximum(self.ends, self.starts + 1))

    def num_bytes(self) -> Int32[np.ndarray, " T"]:
        """Return the bytes of the text for each token, so that each byte counts once.

        Bytes that the vocabulary drops count for the token after them, those of a shared character for its
        first token.
        """
        # The running maximum keeps a character that several tokens share from counting twice.
        return np.diff(np.maximum.accumulate(self.ends), prepend=np.int32(0))


def from_sizes(ids: Sequence[int], sizes: Integer[np.ndarray, " V"]) -> TextTokens:
    """Return tokens whose bytes join to the text, from the number of bytes of each id."""
    array = np.asarray(ids, np.int32)
    ends = np.cumsum(sizes[array], dtype=np.int32)
    return TextTokens(ids=array, starts=ends - sizes[array], ends=ends)


def from_offsets(ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str) -> TextTokens:
    """Return tokens with the characters `offsets` of the text, as the `tokenizers` library counts them."""
    byte_offsets = character_offsets(text)
    characters = np.asarray(offsets, np.int64).reshape(-1, 2)
    return TextTokens(
        ids=np.asarray(ids, np.int32),
        starts=byte_offsets[characters[:, 0]],
        ends=byte_offsets[characters[:, 1]],
    )


def character_offsets(text: str) -> Int32[np.ndarray, " N1"]:
    """Return the offset of each character in the UTF-8 bytes of the text, and of its end; N1 is N + 1."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int32)
    # Code points in one array: UTF-8 takes 1 to 4 bytes by their value.
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int32) + (points >= 0x800) + (points >= 0x10000)
    return np.pad(np.cumsum(sizes, dtype=np.int32), (1, 0))


def windows_of(text: bytes, max_bytes: int, *, marked: bool = False) -> list[Span]:
    """Return overlapping windows of at most `max_bytes` (16 or more) that make up a UTF-8 text.

    Windows begin and end between characters. With `marked`, for which `max_bytes` is 256 or more, they do not
    cut the mark of a special token (`marks.py`) either.
    """
    assert max_bytes >= 16, "a window must be longer than its overlap, wherever characters end"
    overlap = min(_OVERLAP, max_bytes // 2)
    windows = []
    start = 0
    while True:
        end = _cut_before(text, min(start + max_bytes, len(text)), marked=marked)
        windows.append((start, end))
        if end == len(text):
            return windows
        start = _cut_before(text, end - overlap, marked=marked)


def join_windows(encoded: Sequence[TextTokens], windows: Sequence[Span]) -> TextTokens | None:
    """Return the tokens of the complete text from those of its windows; None if two windows disagree.

    Two windows agree if they have the same tokens in the middle of their overlap. Its ends are ignored: a
    text that ends or begins there changes the tokens next to the cut.
    """
    begins: list[int] = [0]
    stops: list[int | None] = []
    for i in range(1, len(windows)):
        common = _common_token(encoded[i - 1], encoded[i], windows[i - 1], windows[i])
        if common is None:
            return None
        stops.append(common[0])
        begins.append(common[1])
    parts = [slice(begin, stop) for begin, stop in zip(begins, [*stops, None], strict=True)]
    chosen = list(zip(encoded, windows, parts, strict=True))
    return TextTokens(
        ids=np.concatenate([tokens.ids[part] for tokens, _, part in chosen]),
        starts=np.concatenate([tokens.starts[part] + start for tokens, (start, _), part in chosen]),
        ends=np.concatenate([tokens.ends[part] + start for tokens, (start, _), part in chosen]),
    )


def _common_token(left: TextTokens, right: TextTokens, before: Span, here: Span) -> tuple[int, int] | None:
    """Return the indices of a common token in both windows, in the middle of the overlap; None without."""
    # Tokens next to a cut may differ, so only the middle of the overlap is compared.
    margin = (before[1] - here[0]) // _IGNORED_PART
    begin = here[0] + margin
    end = before[1] - margin
    of_left = np.flatnonzero(left.overlap_mask([(begin - before[0], end - before[0])]))
    of_right = np.flatnonzero(right.overlap_mask([(begin - here[0], end - here[0])]))
    if len(of_left) != len(of_right) or not len(of_left):
        return None
    moved = here[0] - before[0]
    same = (
        np.array_equal(left.ids[of_left], right.ids[of_right])
        and np.array_equal(left.starts[of_left], right.starts[of_right] + moved)
        and np.array_equal(left.ends[of_left], right.ends[of_right] + moved)
    )
    # The token in the middle is as far as possible from both cuts.
    half = len(of_left) // 2
    return (int(of_left[half]), int(of_right[half])) if same else None


def _cut_before(text: bytes, index: int, *, marked: bool) -> int:
    """Return the index, or that of the first byte of the character or mark that contains it."""
    # Continuation bytes of UTF-8 are 10xxxxxx.
    while 0 < index < len(text) and text[index] & 0xC0 == 0x80:
        index -= 1
    if marked and index < len(text):
        begin = text.rfind(MARK_BEGINS.encode(), max(index - _LONGEST_MARK, 0), index)
        if begin >= 0 and text.find(MARK_ENDS.encode(), begin, index) < 0:
            return begin
    return index
