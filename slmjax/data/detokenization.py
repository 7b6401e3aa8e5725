"""Tokens to text, where a token may be one byte of a character, and a text may grow token by token.

    detokenizer = Detokenizer(backend, specification, pieces=None)
    detokenizer.decode([101, 102, 103, 104])       # ids of <0xE4>, <0xBD>, <0xA0>, <0xE5> -> "你\\ufffd"
    detokenizer.decode_continuation(prompt, ids)   # the text that ids add

Bytes become text as in `bytes.decode("utf-8", "replace")`: one U+FFFD for each maximal ill-formed subsequence
(Unicode 3.9, table 3-8). The decoder `ByteFallback` of the tokenizers library instead gives one for every
byte of a run that has a fault anywhere.
"""

import codecs
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from slmjax.data.patterns import library_errors
from slmjax.data.vocabulary import byte_characters

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # the name of a byte's token in SentencePiece's vocabularies
_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
_LONGEST_TORN = 3  # bytes that may begin a character without being one


class Detokenizer:
    """The decoder of a vocabulary.

    Args:
      backend: the vocabulary.
      specification: its tokenizer.json.
      pieces: the bytes of each id, if the pieces of a text's ids join to the text; else None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        specification: Mapping[str, Any],
        *,
        pieces: Sequence[bytes] | None,
    ) -> None:
        self._backend = backend
        self._pieces = pieces
        self._special = {token["content"] for token in specification["added_tokens"] if token["special"]}
        steps = _steps(specification["decoder"])
        self._has_byte_tokens = "ByteFallback" in steps
        self._is_byte_level = "ByteLevel" in steps
        # All decoders of the library work token by token, except a replacement in text that is joined.
        self.is_incremental = "Fuse" not in steps or "Replace" not in steps[steps.index("Fuse") :]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        if self._pieces is not None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        with library_errors("the vocabulary cannot decode these ids"):
            # Only byte fallback can produce invalid UTF-8 that the library would decode in another way.
            if not self._has_byte_tokens:
                return self._backend.decode([int(id) for id in ids], skip_special_tokens=True)
            return self._backend.decoder.decode(replace_invalid_bytes(filter(None, map(self._name, ids))))

    def decode_continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that ids add to a prompt, with a character that the prompt has begun."""
        if self._pieces is None:
            # Decoders may treat the first token of a text specially, so the ids are decoded after their
            # prompt.
            return _added(self.decode(prompt), self.decode([*prompt, *ids]))
        torn = self.torn_bytes(prompt)
        return _added(
            torn.decode("utf-8", "replace"), (torn + self.decode_bytes(ids)).decode("utf-8", "replace")
        )

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of the ids. Raises ValueError if the vocabulary does not define them."""
        if self._pieces is None:
            raise ValueError(
                "this vocabulary does not define the bytes of a token (its token_bytes is None): use decode"
            )
        # A released model may have rows beyond its tokens, and could sample one.
        return b"".join(self._pieces[int(id)] for id in ids if id < len(self._pieces))

    def torn_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of an unfinished character at the end of the ids."""
        tail = b""
        # At most three bytes can begin a character that is not complete.
        for id in reversed(ids):
            tail = self._bytes(int(id)) + tail
            if len(tail) >= _LONGEST_TORN:
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The state of an incremental decoder is the bytes of a character that is not complete yet.
        decoder.decode(tail[-_LONGEST_TORN:])
        return decoder.getstate()[0]

    def _name(self, id: int) -> str | None:
        """Return the token of an id; None for a special token and for an unused id."""
        name = self._backend.id_to_token(int(id))
        return None if name in self._special else name

    def _bytes(self, id: int) -> bytes:
        if self._pieces is not None:
            return self.decode_bytes([id])
        name = self._name(id) or ""
        if self._has_byte_tokens and _BYTE.fullmatch(name):
            return bytes.fromhex(name[3:5])
        if self._is_byte_level and _BYTE_OF.keys() >= set(name):
            return bytes(_BYTE_OF[character] for character in name)
        return name.encode()


def replace_invalid_bytes(tokens: Iterable[str]) -> list[str]:
    """Return the tokens with one U+FFFD for each maximal ill-formed subsequence of UTF-8."""
    replaced: list[str] = []
    run: list[str] = []  # of tokens that are bytes
    for token in tokens:
        if _BYTE.fullmatch(token):
            run.append(token)
            continue
        replaced += [*_valid(run), token]
        run = []
    return [*replaced, *_valid(run)]


def _valid(run: Sequence[str]) -> list[str]:
    raw = bytes(int(token[3:5], 16) for token in run)
    tokens: list[str] = []
    start = 0
    while start < len(raw):
        try:
            raw[start:].decode()
        except UnicodeDecodeError as error:
            tokens += [*run[start : start + error.start], REPLACEMENT]
            start += error.end
        else:
            tokens += run[start:]
            break
    return tokens


def _steps(decoder: Mapping[str, Any] | None) -> list[str]:
    """Return the types of a tokenizer.json's decoder, in order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [kind for step in decoder["decoders"] for kind in _steps(step)]
    return [decoder["type"]]


def _added(before: str, after: str) -> str:
    """Return the part of `after` that follows its common prefix with `before`."""
    return after[len(os.path.commonprefix([before, after])) :]
