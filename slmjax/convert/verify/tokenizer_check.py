"""Comparison of the tokenizer of an exported file with the model's: level four of `export.py`.

There are two comparisons. The keys `tokenizer.*` of the file (vocabulary, token types, scores, merges,
special ids, pre-tokenizer, chat template) must be those that `export` writes. And the engine must encode
texts on which tokenizers tend to disagree to the same ids as ours.

llama.cpp is known to encode some texts differently, whatever the file says. Such a text is reported with the
reason, and does not count as a failure.
"""

import dataclasses
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.convert.gguf import llama_cpp
from slmjax.convert.gguf.tokenizer import tokenizer_metadata
from slmjax.data.tokenizers import Tokenizer

PREFIX = "tokenizer."
# llama.cpp cannot load a file in which these are unknown or do not fit the rest.
KIND_KEYS = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
MOST_TOKENS = 512  # of the vocabulary, to decode and encode again
_SHOWN = 60  # characters of a value in a message
_WORDS = "Straße naïve Привет мир"
# Runs of blanks, digits, contractions, code, marks, scripts without spaces, emoji, and names of special
# tokens.
TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    " leading",
    "  two blanks first",
    "trailing ",
    "trailing  \n",
    " " * 200,
    "Two  blanks   three    four\ttab\t\ttabs \n new\n\nlines",
    "a\r\nb\r\n\r\n \n c",
    "1 12 123 1234 12345678 3.14159 1,000,000 x2y33 ½ Ⅷ ٣٤٥",
    "It's we'LL don't 'tis CamelCaseHTTPServer a_b-c/d\\e|f",
    'x = 1 if y != 1e-5 else f("q")  # comment\n\t\treturn [i for i in range(10)]\n',
    _WORDS,
    "中文字符,混排abc 日本語テキスト 한국어",
    "e\u0301 a\u0308 हिन्दी ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ©™ \u00a0nbsp\u2003em\u200bzero",
    "supercalifragilistic" * 40,
    "</s> <s> <|eos|> <|endoftext|> [CLS]",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCheck:
    """A text that the engine encodes to other ids."""

    text: str
    ours: tuple[int, ...]
    engine: tuple[int, ...]
    reason: str | None  # a limit of the engine that explains it; None: the tokenizers differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerCheck:
    """Comparison of the tokenizers of a file and the model."""

    keys: int  # of the metadata that were compared
    differences: tuple[str, ...]  # keys that differ from what export writes, and how
    can_load: bool  # whether the engine can load the file
    texts: int  # encoded by the engine; 0 if it was not run
    differing_texts: tuple[TextCheck, ...]

    @property
    def holds(self) -> bool:
        """Whether the file has the model's tokenizer, and the engine computes the same with it."""
        return not self.differences and all(text.reason is not None for text in self.differing_texts)


def compare_metadata(
    metadata: Mapping[str, Any], directory: Path, tokenizer: Tokenizer, *, num_rows: int
) -> TokenizerCheck:
    """Compare the keys `tokenizer.*` of a file with those that `export` writes for a model's tokenizer.

    Args:
      metadata: of the file.
      directory: with the model's tokenizer.
      num_rows: of the model's embedding table.

    Raises:
      ValueError: GGUF cannot represent the tokenizer.
    """
    expected = tokenizer_metadata(directory, adds_bos=tokenizer.adds_bos, num_rows=num_rows)
    # Keys that only the file has are compared too: llama.cpp may read them.
    in_file = {key: value for key, value in metadata.items() if key.startswith(PREFIX)}
    keys = sorted(expected.keys() | in_file.keys())
    differences = tuple(
        f"{key}: {text}"
        for key in keys
        if (text := _difference(in_file.get(key), expected.get(key))) is not None
    )
    lists = {key: value for key, value in expected.items() if isinstance(value, list)}
    lengths_fit = all(
        isinstance(in_file.get(key), list) and len(in_file[key]) == len(value) for key, value in lists.items()
    )
    can_load = lengths_fit and all(in_file.get(key) == expected.get(key) for key in KIND_KEYS)
    return TokenizerCheck(
        keys=len(keys), differences=differences, can_load=can_load, texts=0, differing_texts=()
    )


def compare_ids(check: TokenizerCheck, file: Path, tokenizer: Tokenizer, *, context: int) -> TokenizerCheck:
    """Add to a check the texts that the engine encodes to other ids than our tokenizer.

    Args:
      file: the file to load.
      context: the context length with which the engine loads it.
    """
    texts = [*TEXTS, *vocabulary_texts(tokenizer), "".join(tokenizer.special_ids)]
    # (text, our ids, whether the engine adds BOS and EOS, whether it finds special tokens in the text)
    cases = [(text, ids, False, False) for text in texts if (ids := _encoded(tokenizer, text)) is not None]
    cases += [
        (text, tokenizer.with_bos(ids), True, False) for text, ids, *_ in cases if text in (_WORDS, "a")
    ]
    # Names of special tokens must be text for one call, and the tokens for the other.
    special = "".join(tokenizer.special_ids)
    cases.append((special, tokenizer.encode_with_special(special), False, True))
    differing = []
    for text, ids, adds, finds in cases:
        theirs = llama_cpp.tokenize(file, text, add_special=adds, parse_special=finds, context=context)
        if theirs != ids:
            reason = None if adds or finds else known_limit(tokenizer, text, theirs)
            differing.append(TextCheck(text=text, ours=tuple(ids), engine=tuple(theirs), reason=reason))
    return dataclasses.replace(check, texts=len(cases), differing_texts=tuple(differing))


def vocabulary_texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts of 16 tokens each, from tokens evenly spaced in the vocabulary."""
    chosen = np.unique(
        np.linspace(0, tokenizer.vocab_size - 1, min(tokenizer.vocab_size, MOST_TOKENS)).astype(int)
    )
    texts = [tokenizer.decode(chosen[start : start + 16].tolist()) for start in range(0, len(chosen), 16)]
    # Tokens that end inside a character decode to U+FFFD; a C string ends at NUL.
    return ["a", *(text for text in texts if "\ufffd" not in text and "\0" not in text)]


def known_limit(tokenizer: Tokenizer, text: str, engine: Sequence[int]) -> str | None:
    """Return the limitation of llama.cpp that explains other ids for a text; None if none is known."""
    specification = tokenizer.specification
    normalizer = json.dumps(specification["normalizer"])
    pre_tokenizer = specification["pre_tokenizer"] or {}
    if '"NFC"' in normalizer and unicodedata.normalize("NFC", text) != text:
        return "llama.cpp does not normalize text to NFC"
    # The texts contain special tokens only as names, which must stay text.
    if set(engine) & set(tokenizer.special_ids.values()):
        return "llama.cpp merges plain text into special tokens in this kind of vocabulary"
    if pre_tokenizer.get("type") == "Metaspace" and text.startswith(" "):
        return "llama.cpp adds a space before a text that starts with one"
    # Only gpt-4o's and tekken's expressions tell cases apart (`pre_tokenizers.py`).
    if "\\\\p{Lu}" in json.dumps(pre_tokenizer) and not text.isascii():
        return "llama.cpp splits words with non-ASCII letters differently in this kind of vocabulary"
    return None


def _encoded(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Return our ids; None for a text that the vocabulary cannot represent."""
    try:
        return tokenizer.encode(text)
    except ValueError:
        return None


def _difference(in_file: Any, expected: Any) -> str | None:
    """Describe how two values of a key differ; None if they are equal."""
    if isinstance(in_file, list) and isinstance(expected, list):
        if len(in_file) != len(expected):
            return f"{len(in_file):,} entries in the file, {len(expected):,} in the model"
        pairs = zip(in_file, expected, strict=True)
        differing = [index for index, pair in enumerate(pairs) if not _equal(*pair)]
        if not differing:
            return None
        first = differing[0]
        values = f"{_shorten(in_file[first])} in the file, {_shorten(expected[first])} in the model"
        return f"{len(differing):,} of {len(expected):,} entries differ; entry {first} is {values}"
    if _equal(in_file, expected):
        return None
    return f"{_shorten(in_file)} in the file, {_shorten(expected)} in the model"


def _equal(in_file: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(in_file, float):
        return np.float32(in_file) == np.float32(expected)  # as GGUF stores it
    return type(in_file) is type(expected) and in_file == expected


def _shorten(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
