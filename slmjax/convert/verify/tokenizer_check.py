"""The tokenizer of an exported file against the model's own: level four of `verification`.

Two comparisons. The keys `tokenizer.*` of the file (vocabulary, token types, scores, merges, special ids,
pre-tokenizer, chat template) must be those that `export` writes. The engine must give the ids that our
tokenizer gives, for texts on which tokenizers disagree.

llama.cpp is known to give other ids for some texts, whatever the file says. Such a text is reported with the
reason, and is no fault of the file.
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
# What llama.cpp cannot load where it does not know it or where it does not fit the rest.
KIND_KEYS = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
MOST_TOKENS = 512  # of the vocabulary, whose text is encoded again
_SHOWN = 60  # characters of a value in a message
_WORDS = "Straße naïve Привет мир"
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
    """A text for which the engine gives other ids."""

    text: str
    ours: tuple[int, ...]
    engine: tuple[int, ...]
    reason: str | None  # a limit of the engine that explains it; None: the tokenizers differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerCheck:
    """The tokenizer of a file, and that of the model."""

    keys: int  # of the metadata, that were compared
    differences: tuple[str, ...]  # keys that are not as they would be written, and how
    can_load: bool  # whether the engine may be given the file
    texts: int  # that the engine encoded; 0: it was not run
    differing_texts: tuple[TextCheck, ...]

    @property
    def holds(self) -> bool:
        """Return whether the file has the model's tokenizer, and the engine takes it for the same."""
        return not self.differences and all(one.reason is not None for one in self.differing_texts)


def compare_metadata(
    metadata: Mapping[str, Any], directory: Path, tokenizer: Tokenizer, *, num_rows: int
) -> TokenizerCheck:
    """Compare the keys `tokenizer.*` of a file with those that `export` writes for the tokenizer in
    `directory`.

    Args:
      metadata: of the file.
      num_rows: of the model's embedding table.

    Raises:
      ValueError: the tokenizer has no form in GGUF.
    """
    wanted = tokenizer_metadata(directory, adds_bos=tokenizer.adds_bos, num_rows=num_rows)
    found = {key: value for key, value in metadata.items() if key.startswith(PREFIX)}
    keys = sorted(wanted.keys() | found.keys())
    differences = tuple(
        f"{key}: {text}" for key in keys if (text := _difference(found.get(key), wanted.get(key))) is not None
    )
    lists = {key: value for key, value in wanted.items() if isinstance(value, list)}
    lengths_fit = all(
        isinstance(found.get(key), list) and len(found[key]) == len(value) for key, value in lists.items()
    )
    can_load = lengths_fit and all(found.get(key) == wanted.get(key) for key in KIND_KEYS)
    return TokenizerCheck(
        keys=len(keys), differences=differences, can_load=can_load, texts=0, differing_texts=()
    )


def compare_ids(check: TokenizerCheck, file: Path, tokenizer: Tokenizer, *, context: int) -> TokenizerCheck:
    """The check with the texts for which the engine gives other ids than our tokenizer.

    Args:
      file: what the engine loads.
      context: with which the engine has it loaded.
    """
    texts = [*TEXTS, *vocabulary_texts(tokenizer), "".join(tokenizer.special_ids)]
    # (text, our ids, whether the engine adds BOS and EOS, whether it finds special tokens in the text)
    cases = [(text, ids, False, False) for text in texts if (ids := _encoded(tokenizer, text)) is not None]
    cases += [
        (text, tokenizer.with_bos(ids), True, False) for text, ids, *_ in cases if text in (_WORDS, "a")
    ]
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
    """Texts made of tokens of the vocabulary, spread evenly over it: 16 tokens each."""
    chosen = np.unique(
        np.linspace(0, tokenizer.vocab_size - 1, min(tokenizer.vocab_size, MOST_TOKENS)).astype(int)
    )
    texts = [tokenizer.decode(chosen[start : start + 16].tolist()) for start in range(0, len(chosen), 16)]
    return ["a", *(text for text in texts if "\ufffd" not in text and "\0" not in text)]


def known_limit(tokenizer: Tokenizer, text: str, engine: Sequence[int]) -> str | None:
    """The limit of llama.cpp that explains other ids for a text; None where none is known."""
    specification = tokenizer.specification
    normalizer = json.dumps(specification["normalizer"])
    pre_tokenizer = specification["pre_tokenizer"] or {}
    if '"NFC"' in normalizer and unicodedata.normalize("NFC", text) != text:
        return "llama.cpp does not bring text to NFC first"
    if set(engine) & set(tokenizer.special_ids.values()):
        return "llama.cpp builds special tokens out of plain text in this kind of vocabulary"
    if pre_tokenizer.get("type") == "Metaspace" and text.startswith(" "):
        return "llama.cpp puts a blank before a text that begins with one"
    if "\\\\p{Lu}" in json.dumps(pre_tokenizer) and not text.isascii():
        return "llama.cpp cuts words with letters beyond ASCII otherwise in this kind of vocabulary"
    return None


def _encoded(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Our ids; None for a text that the vocabulary cannot express."""
    try:
        return tokenizer.encode(text)
    except ValueError:
        return None


def _difference(found: Any, wanted: Any) -> str | None:
    """How two values of a key differ, in words; None where they are equal."""
    if isinstance(found, list) and isinstance(wanted, list):
        if len(found) != len(wanted):
            return f"{len(found):,} entries in the file, {len(wanted):,} in the model"
        places = [place for place, pair in enumerate(zip(found, wanted, strict=True)) if not _equal(*pair)]
        if not places:
            return None
        first = f"entry {places[0]} is {_shown(found[places[0]])} in the file, {_shown(wanted[places[0]])} in the model"
        return f"{len(places):,} of {len(wanted):,} entries differ; {first}"
    if _equal(found, wanted):
        return None
    return f"{_shown(found)} in the file, {_shown(wanted)} in the model"


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, float):
        return np.float32(found) == np.float32(wanted)  # as GGUF stores it
    return type(found) is type(wanted) and found == wanted


def _shown(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
