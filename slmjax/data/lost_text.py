"""How much of a text a tokenizer loses: what decoding its ids does not give back.

    meter = LostTextMeter(tokenizer, sample=False);  meter.add("Größe 你", ids);  meter.found().share

Bits per byte divide the likelihood of ids by the bytes of the text. Where characters are dropped, lowercased
or turned into one unknown token, the ids say less than the text, and bits per byte are too low: they compare
with no other tokenizer's. Byte-level vocabularies (`Tokenizer.token_bytes`) give back every byte, and are not
measured.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from slmjax.data.tokenizers import Tokenizer

_SAMPLED_FIRST = 1_000_000
_SAMPLED_SHARE = 1 / 16  # bytes of a sample: so many, and this share of what follows
_MOST_SHOWN = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LostText:
    """Bytes of a text that were compared with what its ids decode to."""

    measured: int = 0  # 0: the vocabulary gives back every byte, or the text was not compared
    lost: int = 0
    characters: str = ""  # the most frequent of those that are lost

    @property
    def share(self) -> float:
        """The share of the bytes that are lost."""
        return self.lost / self.measured if self.measured else 0.0


def lost_characters(text: str, decoded: str) -> collections.Counter[str]:
    """Characters of the text that the decoded text has not as often, and how many of each.

    One that the decoded text has more often is counted too, as far as the text has it: which of them were in
    the text cannot be told. Where characters stand is not compared, so that the counts are the least that is
    lost.
    """
    if text == decoded:
        return collections.Counter()
    before = collections.Counter(text)
    after = collections.Counter(decoded)
    return collections.Counter(
        {one: lost for one, count in before.items() if (lost := min(count, abs(count - after[one])))}
    )


class LostTextMeter:
    """The lost text of the training documents, or of the held-out ones, of a source."""

    def __init__(self, tokenizer: Tokenizer, *, sample: bool) -> None:
        """With `sample`, some of the documents are compared: decoding takes about as long as encoding."""
        self._tokenizer = tokenizer
        self._sample = sample
        self._is_exact = tokenizer.token_bytes is not None
        self._around = {tokenizer.bos_id, tokenizer.eos_id}
        self._bytes = self._measured = 0
        self._lost: collections.Counter[str] = collections.Counter()

    def add(self, text: bytes, ids: Sequence[int], *, marked: tuple[str, list[int]] | None = None) -> None:
        """Compare a document with its ids, BOS and EOS included.

        Args:
          text: without special tokens.
          ids: of the text.
          marked: the text with the marks of special tokens (`marks.py`), if it has any, and its ids alone.
            What stands between two marks is compared by itself, since vocabularies that put a blank before a
            text put one behind each special token too.
        """
        if self._is_exact:
            return
        self._bytes += len(text)
        if self._sample and self._measured > max(_SAMPLED_FIRST, self._bytes * _SAMPLED_SHARE):
            return
        self._measured += len(text)
        if marked is None:
            self._lost += lost_characters(
                text.decode(), self._tokenizer.decode([id for id in ids if id not in self._around])
            )
            return
        for part, of_part in self._tokenizer.marked_vocabulary.text_between(*marked):
            decoded = self._tokenizer.decode([id for id in of_part if id not in self._around])
            # Decoders take one blank off the beginning, whether or not one was put there.
            self._lost += lost_characters(part.removeprefix(" "), decoded.removeprefix(" "))

    def found(self) -> LostText:
        """Return the text that the documents so far have lost."""
        lost = sum(count * len(character.encode()) for character, count in self._lost.items())
        shown = "".join(character for character, _ in self._lost.most_common(_MOST_SHOWN))
        return LostText(measured=self._measured, lost=lost, characters=shown)


def lost_share(parts: Iterable[LostText]) -> float:
    """The share of the bytes that are lost, over all parts together."""
    parts = list(parts)
    return LostText(
        measured=sum(part.measured for part in parts), lost=sum(part.lost for part in parts)
    ).share


def lost_note(share: float) -> str:
    """A note that stands beside bits per byte of such a text."""
    return f"the tokenizer loses {share:.2%} of the text's bytes: not comparable across tokenizers"


def check_lost_text(found: LostText, max_share: float, *, source_name: str) -> None:
    """Raise ValueError if more than this share of a source's text is lost."""
    if found.share > max_share:
        raise ValueError(
            f"{source_name}: the tokenizer loses {found.share:.1%} of the bytes of the text (decoding does "
            "not give them back), more than "
            f"data.max_lost_text={max_share:g}: first of all {', '.join(map(repr, found.characters))}. Take "
            "a tokenizer that falls back on "
            "bytes, or allow it with --data.max-lost-text 1: bits per byte are then too low, and are marked "
            "wherever they are shown"
        )
