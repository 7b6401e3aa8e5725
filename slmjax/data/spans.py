"""Tokens of a text, each with the bytes of the text that it stands for.

A text in pieces (a prompt and its completion, the turns of a conversation) is encoded as one string, as the
model will see it. The pieces are ranges of its UTF-8 bytes, and `overlap_mask` finds their tokens. A token
that crosses the boundary of two pieces has bytes of both, and belongs to both.

A text that is too long to be encoded at once is encoded in overlapping windows (`windows_of`). `WindowJoin`
passes from one window to the next where both have the same tokens, so that the ids are those of the complete
text.

    tokens = tokenizer.encode_spans(["Q:yes"])[0]
    tokens.overlap_mask([(2, 5)])              # the tokens with at least one byte of "yes"

Legend: T tokens, N characters of a text.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

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
# Windows that disagree are encoded as one up to the bytes of so many.
_MOST_WINDOWS = 8


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


def from_sizes(ids: Sequence[int] | Int32[np.ndarray, " T"], sizes: Integer[np.ndarray, " V"]) -> TextTokens:
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


class WindowJoin:
    """Joins the tokens of a text's windows, in order, to those of the complete text.

    join = WindowJoin(windows_of(text, 1_000_000), encode=lambda start, end: ...)
    for tokens in encoded: join.add(tokens)
    join.ids()                                  # or, with the bytes of each, join.tokens()

    Two windows agree if they have the same tokens in the middle of their overlap. Its ends are ignored: a
    text that ends or begins there changes the tokens next to the cut. Windows that disagree, for example in
    a run of one character that is longer than their overlap, are encoded as one. In a run of more than
    `_MOST_WINDOWS` windows the text is cut, so that memory is bounded: every byte keeps its token, but at
    the cut the tokens may differ from those of the complete text (`num_cuts`).
    """

    def __init__(
        self, windows: Sequence[Span], *, encode: Callable[[int, int], TextTokens], keeps_spans: bool = True
    ) -> None:
        """Create a join of these windows.

        Args:
          windows: of the text, overlapping.
          encode: returns the tokens of a range of bytes of the text.
          keeps_spans: False if only ids are needed, which take a third of the memory.
        """
        self._windows = collections.deque(windows)
        self._encode = encode
        self._keeps_spans = keeps_spans
        self._most_bytes = _MOST_WINDOWS * max(end - start for start, end in windows)
        self._ids: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        # The last window, its bytes, and the first of its tokens that is not in a part.
        self._last: TextTokens | None = None
        self._span = (0, 0)
        self._begin = 0
        self.num_cuts = 0

    @property
    def is_complete(self) -> bool:
        """Whether all windows were added."""
        return not self._windows

    def add(self, tokens: TextTokens) -> None:
        """Add the tokens of the next window."""
        window = self._windows.popleft()
        if self._last is None:
            self._replace(tokens, window, begin=0)
            return
        common = _common_token(self._last, tokens, self._span, window)
        if common is not None:
            self._finish_last(common[0])
            self._replace(tokens, window, begin=common[1])
            return
        begin = self._span[0]
        if window[1] - begin <= self._most_bytes:
            both = self._encode(begin, window[1])
            # The parts so far end before this token, so it must be the same in both.
            if self._begin < len(both.ids) and both.starts[self._begin] == self._last.starts[self._begin]:
                self._replace(both, (begin, window[1]), begin=self._begin)
                return
        cut = self._span[1]
        self.num_cuts += 1
        self._finish_last(None)
        self._replace(self._encode(cut, window[1]), (cut, window[1]), begin=0)

    def ids(self) -> Int32[np.ndarray, " T"]:
        """Return the ids of the complete text. Call this or `tokens` once, after the last window."""
        assert self.is_complete, "a window is missing"
        self._finish_last(None)
        # The parts are not needed any more, and of a long document they are large.
        parts = self._ids
        self._ids = []
        return np.concatenate(parts)

    def tokens(self) -> TextTokens:
        """Return the tokens of the complete text, if spans were kept."""
        assert self._keeps_spans, "spans were not kept"
        ids = self.ids()
        return TextTokens(ids=ids, starts=np.concatenate(self._starts), ends=np.concatenate(self._ends))

    def _replace(self, tokens: TextTokens, span: Span, *, begin: int) -> None:
        self._last = tokens
        self._span = span
        self._begin = begin

    def _finish_last(self, stop: int | None) -> None:
        """Append the tokens of the last window before `stop` to the parts."""
        assert self._last is not None, "there is no window"
        part = slice(self._begin, stop)
        # A copy, which does not keep the rest of the window.
        self._ids.append(self._last.ids[part].copy())
        if self._keeps_spans:
            offset = np.int32(self._span[0])
            self._starts.append(self._last.starts[part] + offset)
            self._ends.append(self._last.ends[part] + offset)


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
