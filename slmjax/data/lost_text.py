"""The part of a text that a tokenizer loses: bytes that decoding its ids does not return.

    meter = LostTextMeter(tokenizer, sample=False);  meter.add("Größe 你", ids);  meter.result().fraction

Bits per byte divide the likelihood of ids by the bytes of the text. If characters are dropped, lowercased or
replaced by one unknown token, the ids carry less than the text, and bits per byte are too low to compare with
another tokenizer's. Byte-level vocabularies (`Tokenizer.token_bytes`) return every byte, and are not
measured.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Integer

from slmjax.data.tokenizers import Tokenizer

_SAMPLED_FIRST = 1_000_000
_SAMPLED_FRACTION = 1 / 16  # a sample has the first bytes, and this fraction of the rest
_MOST_SHOWN = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LostText:
    """Bytes of a text that were compared with the decoded ids."""

    measured: int = 0  # 0: the vocabulary returns every byte, or the text was not compared
    lost: int = 0
    characters: str = ""  # the lost characters, the most frequent first

    @property
    def fraction(self) -> float:
        """The fraction of the bytes that are lost."""
        return self.lost / self.measured if self.measured else 0.0


def lost_characters(text: str, decoded: str) -> collections.Counter[str]:
    """Count the characters of a text that the decoded text does not have as often.

    A character that the decoded text has more often counts too, up to its number in the text, since it is
    unknown which of them were in the text. Positions are not compared, so the counts are a lower bound.
    """
    if text == decoded:
        return collections.Counter()
    # Counts of characters, since normalisers may also reorder a text.
    before = collections.Counter(text)
    after = collections.Counter(decoded)
    return collections.Counter(
        {
            character: lost
            for character, count in before.items()
            if (lost := min(count, abs(count - after[character])))
        }
    )


class LostTextMeter:
    """Measures the lost text of the training documents, or of the held-out ones, of a source."""

    def __init__(self, tokenizer: Tokenizer, *, sample: bool) -> None:
        """Create a meter.

        Args:
          tokenizer: encodes and decodes.
          sample: compare only some documents, since decoding takes about as long as encoding.
        """
        self._tokenizer = tokenizer
        self._sample = sample
        self._is_exact = tokenizer.token_bytes is not None
        # BOS and EOS are not part of the text, whether or not they are special tokens.
        self._around = {tokenizer.bos_id, tokenizer.eos_id}
        self._bytes = self._measured = 0
        self._lost: collections.Counter[str] = collections.Counter()

    def add(
        self,
        text: bytes,
        ids: Sequence[int] | Integer[np.ndarray, " T"],
        *,
        marked: tuple[str, list[int]] | None = None,
    ) -> None:
        """Compare a document with its ids, BOS and EOS included.

        Args:
          text: without special tokens.
          ids: the ids of the text.
          marked: the text with the marks of special tokens (`marks.py`), if it has any, and its ids alone.
            Each part between two marks is compared by itself, since vocabularies that put a blank before a
            text also put one after each special token.
        """
        # Byte-level vocabularies lose nothing.
        if self._is_exact:
            return
        self._bytes += len(text)
        # The first bytes always count, so that small corpora are measured completely.
        if self._sample and self._measured > max(_SAMPLED_FIRST, self._bytes * _SAMPLED_FRACTION):
            return
        self._measured += len(text)
        if marked is None:
            plain = [id for id in np.asarray(ids).tolist() if id not in self._around]
            self._lost += lost_characters(text.decode(), self._tokenizer.decode(plain))
            return
        for part, part_ids in self._tokenizer.marked_vocabulary.text_between(*marked):
            decoded = self._tokenizer.decode([id for id in part_ids if id not in self._around])
            # Decoders remove one blank at the beginning, whether or not encoding added one.
            self._lost += lost_characters(part.removeprefix(" "), decoded.removeprefix(" "))

    def result(self) -> LostText:
        """Return the lost text of the documents so far."""
        lost = sum(count * len(character.encode()) for character, count in self._lost.items())
        shown = "".join(character for character, _ in self._lost.most_common(_MOST_SHOWN))
        return LostText(measured=self._measured, lost=lost, characters=shown)


def lost_fraction(parts: Iterable[LostText]) -> float:
    """Return the fraction of the bytes that are lost, over all parts."""
    parts = list(parts)
    return LostText(
        measured=sum(part.measured for part in parts), lost=sum(part.lost for part in parts)
    ).fraction


def lost_note(fraction: float) -> str:
    """Return a note to show with the bits per byte of such a text."""
    return f"the tokenizer loses {fraction:.2%} of the text's bytes: not comparable across tokenizers"


def check_lost_text(lost_text: LostText, max_fraction: float, *, source_name: str) -> None:
    """Raise ValueError if more than this fraction of a source's text is lost."""
    if lost_text.fraction > max_fraction:
        raise ValueError(
            f"{source_name}: the tokenizer loses {lost_text.fraction:.1%} of the bytes of the text (decoding "
            f"does not return them), more than data.max_lost_text={max_fraction:g}, most often "
            f"{', '.join(map(repr, lost_text.characters))}. Use a tokenizer that falls back on bytes, or "
            "allow it with --data.max-lost-text 1: bits per byte are then too low, and are marked wherever "
            "they are shown"
        )
