"""Tokenizers: byte-level BPE trained here, bytes, characters, or an existing tokenizer.json.

Every kind is a `tokenizers.Tokenizer` (so each one saves as tokenizer.json), wrapped in `Tokenizer`, which adds what
training needs: BOS and EOS, ids of plain text only (the text "<|eos|>" in a document is encoded as text), the UTF-8
bytes that each id stands for, and a hash. Vocabularies made here have "<|bos|>" as id 0 and "<|eos|>" as id 1.

    tokenizer = BpeTokenizer(vocab_size=4096).build(texts);  tokenizer.decode(tokenizer.encode(text)) == text
"""

import abc
import dataclasses
import enum
import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, pre_tokenizers, trainers

from slmjax.config import near_names

BOS, EOS = "<|bos|>", "<|eos|>"
# What vocabularies in use call them, tried in this order.
_BOS_NAMES = (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>", "[CLS]")
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<|im_end|>", "[SEP]")
_NUM_SPECIAL = 2
_NUM_BYTES = 256


class Reads(enum.Enum):
    """Which text a vocabulary is made from."""

    NOTHING = "nothing"
    TRAINING_TEXT = "training_text"
    ALL_TEXT = "all_text"


class Tokenizer:
    """One vocabulary. `token_bytes` int32 [V] (UTF-8 bytes per id, 0 for special tokens) is None where bytes do not add up."""

    def __init__(self, backend: tokenizers.Tokenizer, *, bos: str, eos: str) -> None:
        backend.no_truncation()  # a tokenizer.json may ask for either, and would cut documents short
        backend.no_padding()
        backend.encode_special_tokens = True  # special tokens inside a text are text
        self._backend = backend
        self._bos, self._eos = bos, eos
        specification = json.loads(backend.to_str())
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id, self.eos_id = vocabulary[bos], vocabulary[eos]
        canonical = json.dumps([specification, bos, eos], sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()
        self._alphabet = frozenset(specification["model"]["vocab"]) if _is_character_vocabulary(specification) else None
        self._pieces = _exact_pieces(specification, vocabulary, self.vocab_size)
        sizes = None if self._pieces is None else [len(piece) for piece in self._pieces]
        self.token_bytes: Int32[np.ndarray, " V"] | None = None if sizes is None else np.asarray(sizes, np.int32)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS or EOS. Raises ValueError for text the vocabulary cannot express."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, by several threads."""
        for text in texts:
            self._check(text)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out; U+FFFD where they stop inside a character."""
        if self._pieces is None:
            return self._backend.decode([int(id) for id in ids], skip_special_tokens=True)
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ids add to a prompt: many vocabularies strip the space before the first word of what they decode."""
        if self._pieces is not None:
            return self.decode(ids)
        return self.decode([*prompt, *ids])[len(self.decode(prompt)) :]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Exactly the bytes of the ids. Raises ValueError for a vocabulary whose ids have no bytes of their own."""
        if self._pieces is None:
            raise ValueError("this vocabulary does not say which bytes a token stands for (its token_bytes is None): use decode")
        return b"".join(self._pieces[int(id)] for id in ids)

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, in the form that Hugging Face libraries read too."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "bos_token": self._bos,
            "eos_token": self._eos,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        (directory / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, *, bos: str | None = None, eos: str | None = None) -> "Tokenizer":
        """Reads a tokenizer.json or the directory that holds one; BOS and EOS as given, as configured beside it, or by name."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no {file}: name a tokenizer.json, or a directory that holds one")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is no tokenizer.json that the tokenizers library reads: {error}") from error
        configured = _configured_names(file.parent / "tokenizer_config.json")
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = sorted(token.content for token in backend.get_added_tokens_decoder().values())
        names = {
            kind: _special_name(kind, given, configured.get(f"{kind}_token"), common, vocabulary, special, file)
            for kind, given, common in (("bos", bos, _BOS_NAMES), ("eos", eos, _EOS_NAMES))
        }
        return cls(backend, bos=names["bos"], eos=names["eos"])

    def _check(self, text: str) -> None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has an unpaired surrogate at character {error.start}: it is not Unicode text") from error
        unknown = set() if self._alphabet is None else set(text) - self._alphabet
        if unknown:
            raise ValueError(
                f"the character vocabulary has no {', '.join(map(repr, sorted(unknown)[:8]))}, only the {self.vocab_size - _NUM_SPECIAL}"
                " characters of the text it was made from. Remove them, or train with a byte or BPE tokenizer, which express any text."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(abc.ABC):
    """How text becomes ids."""

    @property
    @abc.abstractmethod
    def reads(self) -> Reads:
        """Which text `build` needs."""

    @abc.abstractmethod
    def build(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer, made from the texts as far as it reads any; the same whatever their order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BpeTokenizer(TokenizerConfig):
    """Byte-level BPE with the pre-tokenizer of GPT-2, trained on the training text."""

    vocab_size: int = 4096  # with BOS, EOS and the 256 bytes
    training_bytes: int = 100_000_000  # at most this much text is learned from: the documents of the smallest hashes

    def __post_init__(self) -> None:
        if self.vocab_size < _NUM_SPECIAL + _NUM_BYTES:
            raise ValueError(f"vocab_size is {self.vocab_size}, must be at least 258: BOS, EOS and 256 bytes")
        if self.training_bytes < 1:
            raise ValueError(f"training_bytes is {self.training_bytes}, must be at least 1")

    @property
    def reads(self) -> Reads:
        return Reads.TRAINING_TEXT

    def build(self, texts: Iterable[str]) -> Tokenizer:
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend = _byte_level(models.BPE())
        backend.train_from_iterator(_sample(texts, self.training_bytes), trainer)
        return Tokenizer(backend, bos=BOS, eos=EOS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizer(TokenizerConfig):
    """The 256 bytes: byte b is id 2 + b."""

    @property
    def reads(self) -> Reads:
        return Reads.NOTHING

    def build(self, texts: Iterable[str]) -> Tokenizer:
        vocabulary = {BOS: 0, EOS: 1, **{character: _NUM_SPECIAL + byte for byte, character in enumerate(_byte_characters())}}
        backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
        backend.add_special_tokens([BOS, EOS])
        return Tokenizer(backend, bos=BOS, eos=EOS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharTokenizer(TokenizerConfig):
    """The characters of the whole text, held-out part included, in code point order; any other is an error to encode."""

    @property
    def reads(self) -> Reads:
        return Reads.ALL_TEXT

    def build(self, texts: Iterable[str]) -> Tokenizer:
        characters = sorted(set().union(*map(set, texts)))
        vocabulary = {BOS: 0, EOS: 1, **{character: _NUM_SPECIAL + i for i, character in enumerate(characters)}}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([BOS, EOS])
        return Tokenizer(backend, bos=BOS, eos=EOS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTokenizer(TokenizerConfig):
    """An existing tokenizer.json."""

    path: str  # the file, or a directory that holds tokenizer.json
    bos: str | None = None  # token that begins a document; by default the configured one, else one of the usual names
    eos: str | None = None  # token that ends a document; by default the configured one, else one of the usual names

    @property
    def reads(self) -> Reads:
        return Reads.NOTHING

    def build(self, texts: Iterable[str]) -> Tokenizer:
        return Tokenizer.load(Path(self.path).expanduser(), bos=self.bos, eos=self.eos)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """The texts of the smallest hashes that fit in `max_bytes`, at least one: a sample that no order of reading changes."""
    heap: list[tuple[int, str]] = []
    total, limit = 0, 1 << 256
    for text in texts:
        raw = text.encode()
        rank = int.from_bytes(hashlib.sha256(raw).digest())
        if rank >= limit:
            continue
        heapq.heappush(heap, (-rank, text))
        total += len(raw)
        while total > max_bytes and len(heap) > 1:
            rank, dropped = heapq.heappop(heap)
            total -= len(dropped.encode())
            limit = -rank  # what came earlier may have been dropped from here on, so what comes later must be too
    return [text for _, text in sorted(heap, reverse=True)]


def _special_name(
    kind: str, given: str | None, configured: str | None, common: Sequence[str], vocabulary: dict[str, int], special: list[str], file: Path
) -> str:
    """The name of the BOS or EOS token. Raises ValueError that lists the candidates."""
    if given is not None and given not in vocabulary:
        raise ValueError(f"{file} has no token {given!r} for {kind}.{near_names(given, special)} Its special tokens: {special[:40]}")
    for name in (given, configured, *common):
        if name is not None and name in vocabulary:
            return name
    raise ValueError(f"{file}: no {kind.upper()} token under a usual name. Name one with --tokenizer.{kind}: {special[:40]}")


def _configured_names(path: Path) -> dict[str, str]:
    """bos_token and eos_token of a tokenizer_config.json, where they are: strings or {"content": string}."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): repair it, or delete it and name bos and eos") from error
    values = {kind: config.get(kind) for kind in ("bos_token", "eos_token")}
    return {kind: value["content"] if isinstance(value, dict) else value for kind, value in values.items() if value is not None}


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: printable ones for themselves, others from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(_NUM_BYTES)]


def _is_character_vocabulary(specification: dict[str, Any]) -> bool:
    model, decoder = specification["model"], specification["decoder"]
    plain = specification["normalizer"] is None and specification["pre_tokenizer"] is None
    fused = decoder is not None and decoder["type"] == "Fuse"
    return plain and fused and model["type"] == "BPE" and not model["merges"]


def _exact_pieces(specification: dict[str, Any], vocabulary: dict[str, int], vocab_size: int) -> list[bytes] | None:
    """The bytes of each id, if those of a text's ids always join to the text; else None."""
    added = {token["id"]: token for token in specification["added_tokens"]}
    byte_level = _keeps_every_byte(specification)
    if not byte_level and not _is_character_vocabulary(specification):
        return None
    if any(not token["special"] and (token["lstrip"] or token["rstrip"]) for token in added.values()):
        return None  # such a token swallows the blanks beside it
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    if byte_level and not byte_of.keys() <= vocabulary.keys():
        return None
    pieces = [b""] * vocab_size  # an id without a token stays empty
    for name, id in vocabulary.items():
        if id in added:
            pieces[id] = b"" if added[id]["special"] else name.encode()
        elif byte_level and not set(name) <= byte_of.keys():
            return None
        else:
            pieces[id] = bytes(byte_of[character] for character in name) if byte_level else name.encode()
    return pieces


def _keeps_every_byte(specification: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is byte-level and neither normalises, adds a blank, nor drops anything."""
    steps, decoder = specification["pre_tokenizer"], specification["decoder"]
    if specification["normalizer"] is not None or specification["model"]["type"] != "BPE" or None in (steps, decoder):
        return False
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    kept = {
        "ByteLevel": lambda step: not step["add_prefix_space"],
        "Split": lambda step: step["behavior"] != "Removed",
        "Digits": lambda step: True,
    }
    all_kept = all(step["type"] in kept and kept[step["type"]](step) for step in steps)
    return all_kept and any(step["type"] == "ByteLevel" for step in steps) and decoder["type"] == "ByteLevel"
