"""Special tokens written into a text in a way that no other text can imitate.

A chat template writes special tokens by their names, and the messages it renders may contain these names,
too. Once both are one string, nothing distinguishes them. So an intended special token is written as its
mark, a name that is random in each process, and a vocabulary that knows the tokens only by their marks
encodes the string. A name in it is text.

    vocabulary = MarkedVocabulary(backend, {"<|im_end|>": 7})
    text = vocabulary.mark("user<|im_end|>")                # the name becomes the mark
    vocabulary.encode_batch([text])                         # ... and the mark becomes id 7
"""

import enum
import json
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import tokenizers

from slmjax.data import spans
from slmjax.data.plain_text import checked_encodings, without_names
from slmjax.data.spans import MARK_BEGINS, MARK_ENDS, TextTokens


class SpecialNames(enum.Enum):
    """The meaning of a special token's name in a document."""

    TEXT = "text"  # text like any other
    ENCODE = "encode"  # that token: for text that a chat template has made already


def names_pattern(names: Iterable[str], *, alone: Collection[str] = ()) -> re.Pattern[str]:
    """Return a pattern that matches these names, those in `alone` only as separate words."""
    # The longest name first, since a name may be the beginning of another.
    longest_first = sorted(names, key=len, reverse=True)
    patterns = [
        rf"(?<!\w){re.escape(name)}(?!\w)" if name in alone else re.escape(name) for name in longest_first
    ]
    return re.compile("|".join(patterns) or r"(?!)")


class MarkedVocabulary:
    """A vocabulary in which special tokens have other names.

    Args:
      backend: the vocabulary; it is not changed.
      special: ids of the special tokens, by name.

    `marks` has the mark of each name, and `names` matches the names.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: Mapping[str, int]) -> None:
        nonce = secrets.token_hex(8)
        self._nonce = nonce.encode()
        self.marks = {name: f"{MARK_BEGINS}{nonce}.{id}{MARK_ENDS}" for name, id in special.items()}
        specification = json.loads(backend.to_str())
        added = {token["content"]: token for token in specification["added_tokens"]}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for name, id in special.items():
            added[name] = {"id": id, **plain, **added.get(name, {})}
        self.names = names_pattern(
            special, alone={name for name, token in added.items() if token["single_word"]}
        )
        self._last_mark = re.compile(rf"{MARK_BEGINS}{nonce}\.(\d+){MARK_ENDS}\s*\Z")
        self._marks = re.compile(rf"{MARK_BEGINS}{nonce}\.\d+{MARK_ENDS}")
        self._marked_ids = {self.marks[name]: id for name, id in special.items()}
        # A token may include the white space next to it.
        blanks = {True: r"\s*", False: ""}
        self._with_blanks = re.compile(
            "|".join(
                blanks[added[name]["lstrip"]] + mark + blanks[added[name]["rstrip"]]
                for name, mark in self.marks.items()
            )
            or r"(?!)"
        )
        for name, mark in self.marks.items():
            added[name] |= {"content": mark, "single_word": False, "normalized": False, "special": True}
        # The model itself must not find the names either.
        model = without_names(specification["model"], self.marks)
        # Without the post-processor, which may trim offsets.
        specification |= {"added_tokens": list(added.values()), "model": model, "post_processor": None}
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(specification))
        # The library numbers tokens again, so ids are translated back.
        self._ids = {self._backend.token_to_id(mark): special[name] for name, mark in self.marks.items()}
        for name, id in backend.get_vocab(with_added_tokens=True).items():
            # The library renumbers added tokens.
            if name not in special:
                self._ids[self._backend.token_to_id(name)] = id

    def mark(self, text: str) -> str:
        """Return the text with the mark of each special token in place of its name."""
        return self.names.sub(lambda match: self.marks[match[0]], text)

    def canonical(self, text: bytes) -> bytes:
        """Return a text in UTF-8 with marks that are the same in any process."""
        return text.replace(self._nonce, b"")

    def without_marks(self, text: str) -> str:
        """Return the text without the special tokens that are marked in it."""
        return self._marks.sub("", text)

    def text_of(self, text: str) -> str:
        """Return the text without marks, and without the white space that special tokens include."""
        return self._with_blanks.sub("", text)

    def text_between(self, text: str, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Return the texts before, between and after the marks of a text, each with its ids.

        Args:
          text: with marks.
          ids: of the text, those of special tokens included.
        """
        parts: list[tuple[str, list[int]]] = []
        begin = start = 0
        for match in self._with_blanks.finditer(text):
            stop = ids.index(self._marked_ids[match[0].strip()], start)
            parts.append((text[begin : match.start()], list(ids[start:stop])))
            begin = match.end()
            start = stop + 1
        return [*parts, (text[begin:], list(ids[start:]))]

    def without_blanks(self, tokens: TextTokens, text: bytes) -> TextTokens:
        """Return tokens of a text with marks, without the white space around marks."""
        starts = tokens.starts.copy()
        ends = tokens.ends.copy()
        for index in np.flatnonzero(np.isin(tokens.ids, list(self._marked_ids.values()))).tolist():
            part = text[starts[index] : ends[index]].decode()
            if self._marks.search(part):
                starts[index] += len(part.encode()) - len(part.lstrip().encode())
                ends[index] -= len(part.encode()) - len(part.rstrip().encode())
        return TextTokens(ids=tokens.ids, starts=starts, ends=ends)

    def end_of_mark(self, text: str, index: int) -> int | None:
        """Return the index after the mark at an index of the text; None if there is none."""
        return None if (match := self._marks.match(text, index)) is None else match.end()

    def last_mark(self, text: str) -> tuple[int, int] | None:
        """Return the id of the mark at the end of the text, before white space, and the index after it.

        None if there is no such mark.
        """
        match = self._last_mark.search(text)
        return None if match is None else (int(match[1]), match.end(1) + 1)

    def encode_batch(self, texts: Sequence[str]) -> list[TextTokens]:
        """Return the tokens of each text; marks become special tokens. Spans count the bytes of marks."""
        encodings = checked_encodings(texts, self._backend.encode_batch, reserved={})
        return [
            spans.from_offsets([self._ids[id] for id in encoding.ids], encoding.offsets, text)
            for encoding, text in zip(encodings, texts, strict=True)
        ]
