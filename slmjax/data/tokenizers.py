"""Tokenizers: byte-level BPE trained here, bytes, characters, or an existing tokenizer.json.

Every kind is a `tokenizers.Tokenizer` (so each one saves as tokenizer.json), wrapped in `Tokenizer`, which
adds what training needs: BOS and EOS, ids of plain text only (the text "<|eos|>" in a document is encoded as
text), the UTF-8 bytes of each id, and a hash. Vocabularies made here have "<|bos|>" as id 0 and "<|eos|>" as
id 1. It also has what sampling needs: whether a text begins with BOS, the end tokens, the chat template.

    tokenizer = BpeTokenizer(vocab_size=4096).build(texts);  tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.prompt_ids("def main(")       # the model's input for a text
"""

import abc
import dataclasses
import enum
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, pre_tokenizers, trainers

from slmjax.config import added_field
from slmjax.data import conventions, spans
from slmjax.data.conventions import BOS, EOS, SpecialToken
from slmjax.data.detokenization import Detokenizer
from slmjax.data.marks import MarkedVocabulary, names_pattern
from slmjax.data.patterns import check_patterns, library_errors
from slmjax.data.plain_text import checked_encodings, plain_text_backend, reserved_tokens
from slmjax.data.spans import TextTokens
from slmjax.data.vocabulary import (
    NUM_BYTES,
    byte_characters,
    exact_pieces,
    is_character_vocabulary,
    sample_of,
    with_short_words,
)
from slmjax.stored_json import read_object

_NUM_SPECIAL = 2


class Reads(enum.Enum):
    """The text from which a vocabulary is made."""

    NOTHING = "nothing"
    TRAINING_TEXT = "training_text"
    ALL_TEXT = "all_text"


class Tokenizer:
    """One vocabulary, with the conventions of its model.

    `token_bytes` int32 [V] (UTF-8 bytes per id, 0 for special tokens) is None if the bytes of a text's ids do
    not add up to the text.

    Args:
      backend: the vocabulary; its settings are changed.
      bos: the token that begins a document in training, and an empty text always.
      eos: the token that ends a document.
      ends: further tokens that end a text or a turn.
      adds_bos: the ids of any text begin with BOS.
      has_bos: False if another token takes the place of BOS: files then name none.
      named_bos: the model's BOS, if documents begin with another token (`conventions.separator`).
      chat_template: Jinja source of a text of messages.
      unk, pad: further names, for programs that read the files.
      sources: the rules that chose "bos" and "eos", for reports.

    Raises:
      ValueError: the vocabulary lacks one of these tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str,
        eos: str,
        ends: Sequence[str] = (),
        adds_bos: bool = True,
        has_bos: bool = True,
        named_bos: str | None = None,
        chat_template: str | None = None,
        unk: str | None = None,
        pad: str | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        # A tokenizer.json may ask for either, and would shorten documents.
        backend.no_truncation()
        backend.no_padding()
        # Special tokens inside a text are text, see also _plain.
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if absent := [
            name
            for name in (bos, eos, named_bos, *ends, unk, pad)
            if name is not None and name not in vocabulary
        ]:
            raise ValueError(
                f"the vocabulary has no token {', '.join(map(repr, absent))}: add it first, with add_tokens"
            )
        self._backend = backend
        self.bos = bos
        self.eos = eos
        self.unk = unk
        self.pad = pad
        # EOS is an end token anyway, so it is listed once.
        self.ends = tuple(name for name in dict.fromkeys(ends) if name != eos)
        is_default = {"bos": bos == BOS, "eos": eos == EOS}
        self._sources = {
            kind: conventions.OWN_NAME if is_own else conventions.OPTION
            for kind, is_own in is_default.items()
        } | dict(sources or {})
        self.adds_bos = adds_bos
        # BOS as the model's files name it, which chat templates write; None for a model without BOS.
        self.named_bos = (named_bos or bos) if has_bos or adds_bos else None
        self.chat_template = chat_template
        self.vocab_size = max(vocabulary.values()) + 1
        # Tables with an entry per id would fill the memory.
        if self.vocab_size > 2 * len(vocabulary) + 100_000:
            raise ValueError(
                f"the vocabulary has {len(vocabulary):,} tokens, and an id of {self.vocab_size - 1:,}: it is "
                "damaged"
            )
        self.bos_id = vocabulary[bos]
        self.eos_id = vocabulary[eos]
        self.end_ids = (self.eos_id, *(vocabulary[name] for name in self.ends))  # each ends a text or a turn
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in added.items() if token.special}
        # The hash excludes the post-processor, which adds tokens around a text but does not change its ids.
        specification = {**json.loads(backend.to_str()), "post_processor": None}
        names = reserved_tokens(specification, bos=bos, eos=eos, pad=pad, ends=self.ends)
        reserved = {name: vocabulary[name] for name in names}
        self._added = [
            token.content for token in added.values() if not token.special and token.content not in reserved
        ]
        # Encodes documents; None: the backend itself does.
        self._plain = plain_text_backend(specification, reserved=reserved)
        self._reserved_names = {id: name for name, id in reserved.items()}
        # Sorted keys, so that equal vocabularies have equal hashes.
        canonical = json.dumps([specification, bos, eos], sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()
        is_of_characters = is_character_vocabulary(specification)
        # Names that no text may contain.
        excluded = reserved if self._plain is not None else ()
        self._alphabet = (
            frozenset(set(specification["model"]["vocab"]) - set(excluded)) if is_of_characters else None
        )
        pieces = exact_pieces(specification, vocabulary, self.vocab_size)
        self.detokenizer = Detokenizer(backend, specification, pieces=pieces)
        sizes = None if pieces is None else [len(piece) for piece in pieces]
        self.token_bytes: Int32[np.ndarray, " V"] | None = (
            None if sizes is None else np.asarray(sizes, np.int32)
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS, EOS or any special token, whatever names are in the text.

        Raises:
            ValueError: the vocabulary cannot express the text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as `encode` does, with several threads."""
        backend = self._plain or self._backend
        return [encoding.ids for encoding in self._encodings(texts, backend.encode_batch_fast)]

    def encode_arrays(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " T"]]:
        """Return the ids of each text as `encode_batch` does, in arrays, which are faster to work with.

        Raises:
          ValueError: the vocabulary cannot express a text.
        """
        encodings = self._encodings(texts, (self._plain or self._backend).encode_batch_fast)
        lists = [encoding.ids for encoding in encodings]
        # The ids of a batch in one array: thousands of small conversions take longer.
        count = sum(map(len, lists))
        ids = np.fromiter(itertools.chain.from_iterable(lists), np.int32, count)
        return np.split(ids, np.cumsum([len(ids_of_text) for ids_of_text in lists[:-1]], dtype=np.int64))

    def encode_spans(self, texts: Sequence[str], *, marked: bool = False) -> list[TextTokens]:
        """Return the ids of each text as `encode` does, with the bytes of the text for each id.

        With `marked`, the marks of `marked_vocabulary` in the texts become special tokens, and spans count
        the bytes of marks.
        """
        if marked:
            for text in texts:
                self._check(self.marked_vocabulary.without_marks(text), recognised=self._added)
            return self.marked_vocabulary.encode_batch(texts)
        # With exact bytes, spans follow from ids alone, which are faster to compute.
        if (sizes := self.token_bytes) is not None:
            return [spans.from_sizes(ids, sizes) for ids in self.encode_arrays(texts)]
        encodings = self._encodings(texts, (self._plain or self._untrimmed).encode_batch)
        return [
            spans.from_offsets(encoding.ids, encoding.offsets, text)
            for encoding, text in zip(encodings, texts, strict=True)
        ]

    def encode_with_special(self, text: str) -> list[int]:
        """Return the ids of a text in which all names of special tokens become these tokens."""
        return self.encode_spans([self.marked_vocabulary.mark(text)], marked=True)[0].ids.tolist()

    @property
    def has_bos(self) -> bool:
        """Whether the model's files name a BOS."""
        return self.named_bos is not None

    @property
    def named_bos_id(self) -> int | None:
        """The id of `named_bos`."""
        return None if self.named_bos is None else self._backend.token_to_id(self.named_bos)

    @property
    def specification(self) -> dict[str, Any]:
        """The vocabulary as the content of a tokenizer.json."""
        return json.loads(self._backend.to_str())

    @property
    def special_tokens(self) -> dict[str, SpecialToken]:
        """BOS ("bos") and EOS ("eos"), with the rules that chose them."""
        tokens = {"bos": (self.bos, self.bos_id), "eos": (self.eos, self.eos_id)}
        return {
            kind: SpecialToken(name=name, id=id, source=self._sources[kind])
            for kind, (name, id) in tokens.items()
        }

    def name_of(self, id: int) -> str | None:
        """Return the token with this id; None if there is none."""
        return self._backend.id_to_token(id) if 0 <= id < self.vocab_size else None

    def differs_at(self, other: "Tokenizer") -> int | None:
        """Return the first id with another token, or none, in the other vocabulary; None if all are equal."""
        return next(
            (
                id
                for id in range(max(self.vocab_size, other.vocab_size))
                if self.name_of(id) != other.name_of(id)
            ),
            None,
        )

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a text with BOS first if the model expects it, or if the text is empty."""
        return [self.bos_id, *ids] if self.adds_bos or not len(ids) else list(ids)

    def prompt_ids(self, text: str) -> list[int]:
        """Return the model's input for a text: its ids, with BOS as in `with_bos`."""
        return self.with_bos(self.encode(text))

    def prompt_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the model's input for each text, as `prompt_ids` does."""
        return [self.with_bos(ids) for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens; one U+FFFD for each ill-formed subsequence."""
        return self.detokenizer.decode(ids)

    def decode_continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that ids add to a prompt, with a character that the prompt has begun.

        Many vocabularies strip the space before the first word when they decode, so that the text of the ids
        alone differs.
        """
        return self.detokenizer.decode_continuation(prompt, ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of the ids. ValueError if the vocabulary does not define them."""
        return self.detokenizer.decode_bytes(ids)

    def without_rows_from(self, num_rows: int) -> "Tokenizer":
        """Return a tokenizer without the added tokens whose ids are `num_rows` or more.

        Raises:
            ValueError: other tokens have such ids, too.
        """
        specification = json.loads(self._backend.to_str())
        remaining = [token for token in specification["added_tokens"] if token["id"] < num_rows]
        dropped = {token["content"] for token in specification["added_tokens"]} - {
            token["content"] for token in remaining
        }
        if used := sorted(dropped & {self.bos, self.eos, *self.ends, *filter(None, (self.unk, self.pad))}):
            raise ValueError(
                f"the tokenizer's {used[0]!r} has an id beyond the model's {num_rows:,} rows: they do not "
                "belong together"
            )
        backend = tokenizers.Tokenizer.from_str(json.dumps({**specification, "added_tokens": remaining}))
        # The check comes after removing tokens, since added ids need not be at the end.
        smaller = self._with_backend(backend)
        if smaller.vocab_size > num_rows:
            raise ValueError(
                f"the tokenizer has ids up to {smaller.vocab_size - 1:,}, and the model {num_rows:,} rows: "
                "they do not belong together"
            )
        return smaller

    def add_tokens(self, names: Sequence[str], *, special: bool) -> "Tokenizer":
        """Return a tokenizer with further tokens after its own; special ones are never part of a text."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        tokens = [tokenizers.AddedToken(name, special=special, normalized=False) for name in names]
        _ = backend.add_special_tokens(tokens) if special else backend.add_tokens(tokens)
        return self._with_backend(backend)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which Hugging Face libraries can read."""
        directory.mkdir(parents=True, exist_ok=True)
        specification = json.loads(self._backend.to_str())
        # Libraries that read the file add BOS as this tokenizer does.
        specification["post_processor"] = conventions.post_processor_for(
            specification["post_processor"],
            bos=self.named_bos or self.bos,
            bos_id=self.bos_id if self.named_bos_id is None else self.named_bos_id,
            adds_bos=self.adds_bos,
        )
        (directory / "tokenizer.json").write_text(
            json.dumps(specification, indent=2, ensure_ascii=False), encoding="utf-8"
        )
        written = conventions.Conventions(
            bos=self.named_bos,
            eos=self.eos,
            unk=self.unk,
            pad=self.pad,
            ends=self.ends,
            has_bos=self.has_bos,
            begins=None if self.bos == self.named_bos else self.bos,
            adds_bos=self.adds_bos,
            chat_template=self.chat_template,
            sources=self._sources,
        )
        conventions.write_conventions(directory, written)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        bos: str | None = None,
        eos: str | None = None,
        ends: Sequence[str] | None = None,
        adds_bos: bool | None = None,
        is_for_new_model: bool = False,
        model_ids: Mapping[str, int | None] | None = None,
    ) -> "Tokenizer":
        """Read a tokenizer.json or the directory of one.

        BOS and EOS follow the rules of `data/conventions.py`; `model_ids` are the ids of "bos" and "eos" in
        the model's configuration. A text begins with BOS as `adds_bos` specifies, else tokenizer_config.json
        (by add_bos_token, or by a bos_token that is null); if neither does, it does for a new model, and for
        another if the post-processor adds BOS or BOS is that of vocabularies made here.

        Raises:
          ValueError: there is no such file, it is damaged, or there is no BOS or EOS.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no {file}: give a tokenizer.json, or its directory")
        remedy = "restore it, it is not a tokenizer.json that the tokenizers library can read"
        specification = read_object(file, {"model": dict}, remedy=remedy)
        # Before the library compiles them: the file may be anyone's.
        check_patterns(specification, name=str(file))
        with library_errors(f"{file} is damaged, {remedy}"):
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        configured = conventions.read_conventions(file.parent)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = sorted(token.content for token in backend.get_added_tokens_decoder().values())
        known = {"vocabulary": vocabulary, "special": special, "file": file, "conventions": configured}
        end = conventions.end_token(option=eos, model=(model_ids or {}).get("eos"), **known)
        begin = conventions.begin_token(option=bos, model=(model_ids or {}).get("bos"), eos=end, **known)
        has_bos = configured.has_bos or bos is not None
        if adds_bos is None:
            adds_bos = configured.adds_bos
        if adds_bos is None and is_for_new_model:
            adds_bos = has_bos
        if adds_bos is None:
            processor = json.loads(backend.to_str())["post_processor"]
            adds_bos = conventions.begins_with_bos(processor, bos=begin.name) or begin.name == BOS
        named = begin.name
        if has_bos and not adds_bos:
            begin = conventions.separator(
                begin, eos=end, conventions=configured, special=special, vocabulary=vocabulary
            )
        # A configured name that is not in the vocabulary has no meaning for the model.
        unk, pad = (name if name in vocabulary else None for name in (configured.unk, configured.pad))
        return cls(
            backend,
            bos=begin.name,
            eos=end.name,
            adds_bos=adds_bos,
            has_bos=has_bos,
            named_bos=named if has_bos else None,
            unk=unk,
            pad=pad,
            ends=tuple(name for name in configured.ends if name in vocabulary) if ends is None else ends,
            chat_template=configured.chat_template,
            sources={"bos": begin.source, "eos": end.source},
        )

    def _with_backend(self, backend: tokenizers.Tokenizer) -> "Tokenizer":
        """Return a tokenizer with the same conventions."""
        return Tokenizer(
            backend,
            bos=self.bos,
            eos=self.eos,
            ends=self.ends,
            adds_bos=self.adds_bos,
            has_bos=self.has_bos,
            named_bos=self.named_bos,
            chat_template=self.chat_template,
            unk=self.unk,
            pad=self.pad,
            sources=self._sources,
        )

    @functools.cached_property
    def special_names(self) -> re.Pattern[str]:
        """A pattern that matches the names of special tokens."""
        return names_pattern(self.special_ids)

    @functools.cached_property
    def marked_vocabulary(self) -> MarkedVocabulary:
        """The vocabulary that knows special and reserved tokens only by their marks."""
        return MarkedVocabulary(
            self._backend, self.special_ids | {name: id for id, name in self._reserved_names.items()}
        )

    @functools.cached_property
    def _untrimmed(self) -> tokenizers.Tokenizer:
        """The vocabulary without its post-processor, which may exclude blanks from offsets."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.post_processor = None
        backend.encode_special_tokens = True
        return backend

    def _encodings(
        self, texts: Sequence[str], encode: Callable[..., list[tokenizers.Encoding]]
    ) -> list[tokenizers.Encoding]:
        for text in texts:
            self._check(text, recognised=self._added)
        return checked_encodings(
            texts, encode, reserved=self._reserved_names if self._plain is not None else {}
        )

    def _check(self, text: str, *, recognised: Sequence[str]) -> None:
        try:
            if not text.isascii():
                text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has an unpaired surrogate at character {error.start}: it is not Unicode text"
            ) from error
        if self._alphabet is None:
            return
        # Added tokens are found before characters are looked up.
        for name in recognised:
            text = text.replace(name, "")
        # A character vocabulary has no unknown token, so the error comes here with the characters' names.
        if unknown := sorted(set(text) - self._alphabet):
            raise ValueError(
                f"the character vocabulary has no {', '.join(map(repr, unknown[:8]))}, only the "
                f"{len(self._alphabet) - _NUM_SPECIAL} characters of the text it was made from. Remove them, "
                "or train with a byte or BPE tokenizer, which express any text."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(abc.ABC):
    """The choice of a tokenizer."""

    @property
    @abc.abstractmethod
    def reads(self) -> Reads:
        """The text that `build` needs."""

    @abc.abstractmethod
    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Return the tokenizer, made from the texts if it needs any; their order has no effect."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BpeTokenizer(TokenizerConfig):
    """Byte-level BPE with the pre-tokenizer of GPT-2, trained on the training text."""

    vocab_size: int = 4096  # with BOS, EOS and the 256 bytes
    # most bytes of text to learn from: the documents with the smallest hashes
    training_bytes: int = 100_000_000

    def __post_init__(self) -> None:
        if self.vocab_size < _NUM_SPECIAL + NUM_BYTES:
            raise ValueError(f"vocab_size is {self.vocab_size}, must be at least 258: BOS, EOS and 256 bytes")
        if self.training_bytes < 1:
            raise ValueError(f"training_bytes is {self.training_bytes}, must be at least 1")

    @property
    def reads(self) -> Reads:
        return Reads.TRAINING_TEXT

    def build(self, texts: Iterable[str]) -> Tokenizer:
        # All 256 bytes are in the alphabet, so that every text can be encoded.
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        # The pre-tokenizer of GPT-2, which GGUF and Hugging Face formats can express.
        backend = _byte_level(models.BPE())
        backend.train_from_iterator(with_short_words(sample_of(texts, self.training_bytes)), trainer)
        return Tokenizer(backend, bos=BOS, eos=EOS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizer(TokenizerConfig):
    """The 256 bytes: byte b is id 2 + b."""

    @property
    def reads(self) -> Reads:
        return Reads.NOTHING

    def build(self, texts: Iterable[str]) -> Tokenizer:
        vocabulary = {
            BOS: 0,
            EOS: 1,
            **{character: _NUM_SPECIAL + byte for byte, character in enumerate(byte_characters())},
        }
        backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
        backend.add_special_tokens([BOS, EOS])
        return Tokenizer(backend, bos=BOS, eos=EOS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharTokenizer(TokenizerConfig):
    """The characters of the text, held-out part included, in code point order.

    Other characters cannot be encoded.
    """

    @property
    def reads(self) -> Reads:
        return Reads.ALL_TEXT

    def build(self, texts: Iterable[str]) -> Tokenizer:
        characters = sorted(set().union(*map(set, texts)))
        vocabulary = {
            BOS: 0,
            EOS: 1,
            **{character: _NUM_SPECIAL + i for i, character in enumerate(characters)},
        }
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([BOS, EOS])
        return Tokenizer(backend, bos=BOS, eos=EOS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTokenizer(TokenizerConfig):
    """An existing tokenizer.json."""

    path: str  # the file, or its directory
    # token that begins a document; by default the configured one, else one of the usual names
    bos: str | None = None
    # token that ends a document; by default the configured one, else one of the usual names
    eos: str | None = None
    # any text begins with BOS; by default as the files specify (add_bos_token), else true
    adds_bos: bool | None = added_field(None, before=True)

    @property
    def reads(self) -> Reads:
        return Reads.NOTHING

    def build(self, texts: Iterable[str]) -> Tokenizer:
        return Tokenizer.load(
            Path(self.path).expanduser(),
            bos=self.bos,
            eos=self.eos,
            adds_bos=self.adds_bos,
            is_for_new_model=True,
        )


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
