"""Tokens of a text, with the bytes of the text that each stands for.

A text that comes in pieces (a prompt and its completion, the turns of a conversation) is encoded as one
string, as the model will see it; the pieces are ranges of its UTF-8 bytes, and `held` finds their tokens. A
token that reaches over the boundary of two pieces belongs to both: it holds bytes of both.

A text that is too long to be encoded at once is encoded in windows that overlap (`windows_of`), and
`join_windows` goes from one to the next where both have the same tokens, so that the ids are those of the
whole text.

    tokens = tokenizer.encode_spans(["Q:yes"])[0]
    tokens.held([(2, 5)])                      # which tokens hold at least one byte of "yes"

Legend: T tokens, N characters of a text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Integer

Span = tuple[int, int]  # first byte, and the byte after the last

_OVERLAP = 4096  # bytes of text that two windows share
MARK_BEGINS = "\ufdd0"
MARK_ENDS = "\ufdd1"  # around the number of a special token, see marks.py: characters that are none
_LONGEST_MARK = 64  # bytes
# windows agree if their tokens are the same in the overlap, without this part of it at either end
_SHARED_PART = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextTokens:
    """Ids of a text, and the UTF-8 bytes `starts[i]` to `ends[i]` that token i stands for.

    A text has at most 2 GiB. Several tokens may stand for one character (the bytes of byte fallback), and a
    token for nothing (a blank that the vocabulary puts before the text): its start and end are then the same.
    """

    ids: Int32[np.ndarray, " T"]
    starts: Int32[np.ndarray, " T"]
    ends: Int32[np.ndarray, " T"]

    def held(self, spans: Sequence[Span]) -> Bool[np.ndarray, " T"]:
        """Return whether each token holds at least one byte of the spans, which are in order and apart.

        A token that stands for nothing goes with the byte after it.
        """
        spans = [(start, end) for start, end in spans if end > start]
        if not spans:
            return np.zeros(len(self.ids), bool)
        starts, ends = np.asarray(spans, np.int32).T
        # the first span that ends after the token's first byte
        place = np.searchsorted(ends, self.starts, side="right")
        is_before_end = place < len(spans)
        return is_before_end & (
            starts[np.minimum(place, len(spans) - 1)] < np.maximum(self.ends, self.starts + 1)
        )

    def num_bytes(self) -> Int32[np.ndarray, " T"]:
        """Return the bytes of the text that each token stands for, each byte counted once.

        Bytes that the vocabulary drops count to the token after them, those of a shared character to its
        first token.
        """
        return np.diff(np.maximum.accumulate(self.ends), prepend=np.int32(0))


def from_sizes(ids: Sequence[int], sizes: Integer[np.ndarray, " V"]) -> TextTokens:
    """Return tokens whose bytes join to the text, from the bytes of each id."""
    array = np.asarray(ids, np.int32)
    ends = np.cumsum(sizes[array], dtype=np.int32)
    return TextTokens(ids=array, starts=ends - sizes[array], ends=ends)


def from_offsets(ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str) -> TextTokens:
    """Return tokens with the characters `offsets` of the text, as the `tokenizers` library counts them."""
    places = character_places(text)
    of_characters = np.asarray(offsets, np.int64).reshape(-1, 2)
    return TextTokens(
        ids=np.asarray(ids, np.int32), starts=places[of_characters[:, 0]], ends=places[of_characters[:, 1]]
    )


def character_places(text: str) -> Int32[np.ndarray, " N1"]:
    """Return the place of each character in the UTF-8 bytes of the text, and of its end; N1 is N + 1."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int32)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int32) + (points >= 0x800) + (points >= 0x10000)
    return np.pad(np.cumsum(sizes, dtype=np.int32), (1, 0))


def windows_of(text: bytes, max_bytes: int, *, marked: bool = False) -> list[Span]:
    """Return windows of at most `max_bytes` (16 or more) that cover a UTF-8 text and overlap, never cut
    inside a character.

    With `marked`, which takes 256 bytes or more, they are not cut inside the mark of a special token
    (`marks.py`) either.
    """
    assert max_bytes >= 16, "a window must reach beyond its overlap, whatever characters are cut"
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
    """Return the tokens of the windows of a text as those of the whole; None where two windows disagree on
    the text that they share.

    Two agree if the same tokens stand in the middle of their overlap. Its ends are left out: a text that ends
    or begins there changes the tokens beside the cut.
    """
    begins: list[int] = [0]
    stops: list[int | None] = []
    for here in range(1, len(windows)):
        place = _common_place(encoded[here - 1], encoded[here], windows[here - 1], windows[here])
        if place is None:
            return None
        stops.append(place[0])
        begins.append(place[1])
    parts = [slice(begin, stop) for begin, stop in zip(begins, [*stops, None], strict=True)]
    chosen = list(zip(encoded, windows, parts, strict=True))
    return TextTokens(
        ids=np.concatenate([tokens.ids[part] for tokens, _, part in chosen]),
        starts=np.concatenate([tokens.starts[part] + start for tokens, (start, _), part in chosen]),
        ends=np.concatenate([tokens.ends[part] + start for tokens, (start, _), part in chosen]),
    )


def _common_place(left: TextTokens, right: TextTokens, before: Span, here: Span) -> tuple[int, int] | None:
    """The index of one token of the middle of the overlap in both windows; None where they disagree there."""
    margin = (before[1] - here[0]) // _SHARED_PART
    begin = here[0] + margin
    end = before[1] - margin
    of_left = np.flatnonzero(left.held([(begin - before[0], end - before[0])]))
    of_right = np.flatnonzero(right.held([(begin - here[0], end - here[0])]))
    if len(of_left) != len(of_right) or not len(of_left):
        return None
    moved = here[0] - before[0]
    same = (
        np.array_equal(left.ids[of_left], right.ids[of_right])
        and np.array_equal(left.starts[of_left], right.starts[of_right] + moved)
        and np.array_equal(left.ends[of_left], right.ends[of_right] + moved)
    )
    half = len(of_left) // 2
    return (int(of_left[half]), int(of_right[half])) if same else None


def _cut_before(text: bytes, place: int, *, marked: bool) -> int:
    """The place, or the first byte of the character or mark that it is inside of."""
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    if marked and place < len(text):
        begin = text.rfind(MARK_BEGINS.encode(), max(place - _LONGEST_MARK, 0), place)
        if begin >= 0 and text.find(MARK_ENDS.encode(), begin, place) < 0:
            return begin
    return place
