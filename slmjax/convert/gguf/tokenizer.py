"""Tokenizers in GGUF files: conversion of the keys `tokenizer.*` to a tokenizer.json, and back.

llama.cpp has two kinds that small language models use. "gpt2" is byte-level BPE: tokens, merges, and a name
for the pre-tokenizer (pre_tokenizers.py). "llama" is SentencePiece's BPE: tokens with scores. The pair whose
join has the highest score is merged next, spaces are "▁", and a character without a token becomes its bytes.
tokenizer.json has merges for both.

Each token has a type: normal, control (special: never matched in plain text), user-defined (matched before
pre-tokenization), byte, unused.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from slmjax.convert.gguf.pre_tokenizers import byte_level_steps, pre_tokenization_name, pre_tokenization_of
from slmjax.convert.gguf.stripped_spaces import name_for, stripping_tokens, strips_after, strips_before
from slmjax.data.conventions import read_conventions
from slmjax.stored_json import read_object

# tokenizer.ggml.token_type
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
_BLANK = "▁"  # SentencePiece's sign for a space
# llama.cpp requires a list of merges, but the GGUF writer cannot write an empty one: these two bytes occur in
# no UTF-8 text.
_NO_MERGES = ["ÿ ÿ"]
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))  # SentencePiece's names of bytes
# Names of tokens that end a turn, which llama.cpp also looks for if the file names none.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<EOT>", "<end_of_utterance>")
# Roles of special tokens: the names in tokenizer_config.json, and in GGUF.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """A vocabulary and its conventions. The backend adds neither BOS nor EOS."""

    backend: tokenizers.Tokenizer  # ids are rows of the embedding table, of which some may be padding
    bos: str | None  # first token of a text
    eos: str | None  # last token of a text
    unk: str | None  # for text without a token
    pad: str | None  # padding of batches
    adds_bos: bool  # whether a text's ids start with BOS
    adds_eos: bool  # whether they end with EOS
    chat_template: str | None  # Jinja
    end_of_turn: str | None  # last token of a turn in a chat, if any; may be EOS


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> GgufTokenizer:
    """Convert the tokenizer of a file's metadata.

    Raises:
      ValueError: the kind or the pre-tokenizer is not supported, or keys are inconsistent.
    """
    kind = metadata.get("tokenizer.ggml.model")
    kinds = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in kinds:
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r}; supported are {' and '.join(map(repr, kinds))}: use the "
            "tokenizer.json of the model's Hugging Face directory"
        )
    tokens, types = _tokens_and_types(metadata)
    backend = kinds[kind](metadata, tokens, types)
    backend.add_special_tokens(_added(metadata, tokens, types, {CONTROL, UNKNOWN}))
    backend.add_tokens(_added(metadata, tokens, types, {USER_DEFINED}))
    is_llama = kind == "llama"
    names = {role: _role_token(metadata, tokens, types, role) for role in (*_ROLES.values(), "eot")}
    control = [token for token, type in zip(tokens, types, strict=True) if type == CONTROL]
    # Only control tokens: as plain text, such a name ends no turn.
    by_name = next((name for name in _TURN_ENDS if name in control), None)
    # llama.cpp's default if the file has no flag depends on the kind, and for BPE on the pre-tokenizer.
    adds_bos = is_llama or pre_tokenization_of(metadata.get("tokenizer.ggml.pre") or "default").adds_bos
    return GgufTokenizer(
        backend=backend,
        bos=names["bos"],
        eos=names["eos"],
        unk=names["unknown"],
        pad=names["padding"],
        adds_bos=metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        adds_eos=metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
        end_of_turn=names["eot"] or by_name,
    )


def tokenizer_metadata(directory: Path, *, adds_bos: bool, num_rows: int) -> dict[str, Any]:
    """Return the keys `tokenizer.*` for a directory with tokenizer.json and tokenizer_config.json.

    Rows of the embedding table beyond the vocabulary get unused tokens: llama.cpp needs one for each. GGUF
    can represent special tokens that strip the spaces next to them only if all of Phi-3's tokens do. Then
    `general.name` is among the keys, by which llama.cpp decides; otherwise such spaces are kept as text.

    Args:
      adds_bos: whether a text's ids start with BOS.
      num_rows: rows of the embedding table.

    Raises:
      ValueError: llama.cpp cannot represent the vocabulary.
    """
    specification, config = _read_directory(directory)
    model = specification["model"]
    pre_tokenizer = specification["pre_tokenizer"]
    decoder = specification["decoder"]
    if model["type"] != "BPE":
        raise ValueError(
            f"{directory} has a vocabulary of type {model['type']}: only BPE, bytes and characters can be "
            "written to GGUF"
        )
    # What data/tokenizers.py writes for a vocabulary of characters: no merges, and no bytes.
    characters = (
        pre_tokenizer is None and not model["merges"] and decoder is not None and decoder["type"] == "Fuse"
    )
    if model["byte_fallback"] or characters:
        kind = _sentence_piece_keys(specification)
    else:
        kind = _byte_level_keys(specification)
    # Added tokens need not be in the vocabulary of the model.
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in specification["added_tokens"]}}
    # The list of tokens has one for each row: others would be lost without an error.
    if max(ids.values()) >= num_rows:
        raise ValueError(
            f"{directory} has ids up to {max(ids.values())}, but the embedding table has {num_rows} rows: "
            "they do not belong together"
        )
    name = name_for(specification["added_tokens"], ids.keys())
    tokens, types = _token_list(
        specification,
        ids,
        num_rows,
        unk=config["unk_token"],
        sentence_piece="scores" in kind,
        strips=name is not None,
    )
    # Only the kind "llama" has scores.
    scores = kind.pop("scores", None)
    lists = {"tokens": tokens, "token_type": types}
    if scores is not None:
        lists["tokens"] = [
            token.replace(" ", _BLANK) if type == NORMAL else token
            for token, type in zip(tokens, types, strict=True)
        ]
        # Tokens that no merge makes get a score below all others: they are never preferred.
        lists["scores"] = [float(scores.get(token, -len(scores) - 1)) for token in tokens]
    # llama.cpp maps text to ids with a table by text, so that one of them would be lost.
    if twice := [token for token, count in collections.Counter(lists["tokens"]).items() if count > 1]:
        raise ValueError(
            f"{directory} has several tokens that are {twice[0]!r} in llama.cpp, where they must differ: "
            "rename one"
        )
    special = _special_ids(directory, config, ids, adds_bos)
    flags = {"add_bos_token": adds_bos, "add_eos_token": bool(config.get("add_eos_token", False))}
    keys = {f"tokenizer.ggml.{key}": value for key, value in {**kind, **lists, **special, **flags}.items()}
    if name is not None:
        keys["general.name"] = name
    if config["chat_template"] is not None:
        keys["tokenizer.chat_template"] = config["chat_template"]
    return keys


# From GGUF --------------------------------------------------------------------------------------------------
def _tokens_and_types(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(
            "the file has no tokenizer.ggml.tokens, and so no vocabulary: use a tokenizer from elsewhere"
        )
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.tokens has {len(tokens)} entries, {len(set(tokens))} of them distinct, and "
            f"token_type {len(types)}: the file is damaged, convert the model again"
        )
    return tokens, types


def _role_token(metadata: Mapping[str, Any], tokens: list[str], types: list[int], role: str) -> str | None:
    """Return the token of a role. Raises ValueError for an id that does not exist."""
    key = f"tokenizer.ggml.{role}_token_id"
    # llama.cpp's default ids for the kind "llama". For "gpt2" it uses 11, which is right for one model only,
    # and not followed here.
    default, type = {"unknown": (0, UNKNOWN), "bos": (1, CONTROL), "eos": (2, CONTROL)}.get(role, (0, 0))
    if key not in metadata:
        applies = (
            metadata["tokenizer.ggml.model"] == "llama" and default < len(tokens) and types[default] == type
        )
        return tokens[default] if applies else None
    if not 0 <= metadata[key] < len(tokens):
        raise ValueError(
            f"{key} is {metadata[key]}, but there are {len(tokens)} tokens: the file is damaged, convert the "
            "model again"
        )
    return tokens[metadata[key]]


def _added(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], kinds: set[int]
) -> list[AddedToken]:
    # A set, since Phi-3's rule looks up several names for each token.
    known = set(tokens)
    return [
        AddedToken(
            token,
            special=type != USER_DEFINED,
            # llama.cpp finds these tokens in the text as it is, before any normalization.
            normalized=False,
            rstrip=strips_after(metadata, token, known),
            lstrip=strips_before(metadata, token),
        )
        for token, type in zip(tokens, types, strict=True)
        if type in kinds
    ]


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    pre_tokenization = pre_tokenization_of(metadata.get("tokenizer.ggml.pre") or "default")
    lines = metadata.get("tokenizer.ggml.merges", [])
    # A merge is two tokens separated by a space; the first may start with one.
    pairs = [
        (line[: line.find(" ", 1)], line[line.find(" ", 1) + 1 :])
        for line in ([] if lines == _NO_MERGES else lines)
    ]
    backend = tokenizers.Tokenizer(
        _bpe(_vocabulary(tokens), pairs, ignore_merges=pre_tokenization.takes_whole)
    )
    backend.pre_tokenizer = byte_level_steps(pre_tokenization)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens, but 'llama' needs "
            "one each: convert the model again"
        )
    # SentencePiece only merges normal tokens. llama.cpp also merges plain text into control tokens, which
    # lets text forge them.
    mergeable = {
        token: score for token, score, type in zip(tokens, scores, types, strict=True) if type == NORMAL
    }
    if BYTE not in types and all(len(token) == 1 for token in mergeable):
        return _characters(tokens, types)
    unk = _role_token(metadata, tokens, types, "unknown")
    backend = tokenizers.Tokenizer(
        # As in released Llama tokenizers: runs of unknown characters become one token, if not bytes.
        _bpe(_vocabulary(tokens), _merges(mergeable), unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    # SentencePiece adds a space before a text by default, so that its first word is like the others.
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _BLANK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), replace]) if prefix else replace
    steps = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    # The added space is stripped again.
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _characters(tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """Build a tokenizer of single characters without bytes, as data/tokenizers.py makes them."""
    names = [
        token.replace(_BLANK, " ") if type == NORMAL else token
        for token, type in zip(tokens, types, strict=True)
    ]
    backend = tokenizers.Tokenizer(_bpe(_vocabulary(names), []))
    backend.decoder = decoders.Fuse()
    return backend


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    # llama.cpp's name for empty tokens.
    return {token or f"[EMPTY_{id}]": id for id, token in enumerate(tokens)}


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens ({error}): convert the model again"
        ) from error


def _splits(token: str, parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every pair of tokens that joins to the token."""
    # SentencePiece merges any neighbours whose join is a token, not only the pair merged in training.
    splits = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in splits if left in parts and right in parts]


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return merges in SentencePiece's order of preference: by the score of the joined token."""
    # The sort is stable: equal scores stay in the order of ids.
    ordered = sorted(scores, key=lambda token: -scores[token])
    return [pair for token in ordered for pair in _splits(token, scores)]


# To GGUF ----------------------------------------------------------------------------------------------------
def _read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read tokenizer.json, upgraded to the library's current layout, and tokenizer_config.json.

    In the latter, special tokens are plain names, and there is one chat template or None.
    """
    file = directory / "tokenizer.json"
    config_file = directory / "tokenizer_config.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}: only a tokenizer.json can be written to GGUF")
    try:
        # The library reads older layouts, in which merges are strings, and writes the current one.
        specification = json.loads(tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8")).to_str())
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is damaged: {error}") from error
    conventions = read_conventions(directory)
    config = read_object(config_file, remedy="repair it") if config_file.is_file() else {}
    # What the file does not say is not guessed here.
    names = {f"{role}_token": getattr(conventions, role) for role in _ROLES}
    names["unk_token"] = names["unk_token"] or specification["model"].get("unk_token")
    return specification, {
        **names,
        "end_tokens": conventions.ends,
        "add_eos_token": config.get("add_eos_token"),
        "chat_template": conventions.chat_template,
    }


def _byte_level_keys(specification: dict[str, Any]) -> dict[str, Any]:
    model = specification["model"]
    pre_tokenizer = specification["pre_tokenizer"]
    # Qwen and others normalize to NFC, which llama.cpp does not: it encodes text that is not in NFC
    # differently.
    if specification["normalizer"] not in (None, {"type": "NFC"}):
        raise ValueError(
            f"this tokenizer.json has a normalizer ({specification['normalizer']}), which llama.cpp does not "
            "have for BPE"
        )
    if pre_tokenizer is None or (specification["decoder"] or {}).get("type") != "ByteLevel":
        raise ValueError(
            "this tokenizer.json is neither byte-level nor has it byte fallback: llama.cpp does not support "
            "its kind"
        )
    merges = [" ".join(pair) for pair in model["merges"]] or _NO_MERGES
    name = pre_tokenization_name(pre_tokenizer, takes_whole=bool(model.get("ignore_merges")))
    return {"model": "gpt2", "pre": name, "merges": merges, "add_space_prefix": False}


def _sentence_piece_keys(specification: dict[str, Any]) -> dict[str, Any]:
    """Return the kind, whether a space is added before a text, and the score of every merged token."""
    # Added tokens are matched before merges, and bytes are a fallback: neither is ever merged.
    added = {token["content"] for token in specification["added_tokens"]}
    normal = {
        token: id
        for token, id in specification["model"]["vocab"].items()
        if token not in added and token not in _BYTES
    }
    if (
        specification["normalizer"] is None
        and specification["pre_tokenizer"] is None
        and {" ", _BLANK} <= normal.keys()
    ):
        raise ValueError(
            f"the vocabulary has both a space and {_BLANK!r}, which are the same character in llama.cpp"
        )
    scores: dict[str, int] = {}
    merges = [(left, right) for left, right in specification["model"]["merges"] if left + right in normal]
    last = None
    for left, right in merges:
        # A score belongs to a token: all merges that make it have the same priority.
        if left + right != last and left + right in scores:
            raise ValueError(
                f"the merges that make {left + right!r} are not consecutive, so that no score represents "
                "their order"
            )
        last = left + right
        # Scores fall with the rank, since the highest is merged first.
        scores.setdefault(last, -len(scores))
    # llama.cpp tries every pair of neighbours whose join is a token, whether the merges have it or not.
    done = set(merges)
    for token in normal:
        if missing := [pair for pair in _splits(token, normal) if pair not in done]:
            raise ValueError(
                f"the merges lack {missing[0]}, which llama.cpp would merge to {token!r}: scores cannot "
                "represent the merge order of this vocabulary, so it cannot be written to GGUF"
            )
    if specification["model"]["byte_fallback"] and (
        lacking := sorted(_BYTES - specification["model"]["vocab"].keys())
    ):
        raise ValueError(
            f"the vocabulary lacks {lacking[0]}: llama.cpp fails on characters without a token unless it has "
            "every byte"
        )
    return {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": _has_space_prefix(specification),
        "scores": scores,
    }


def _has_space_prefix(specification: dict[str, Any]) -> bool:
    """Return whether a space is added before a text, as configured in Llama, Mistral and Gemma tokenizers."""
    normalizer = specification["normalizer"]
    pre_tokenizer = specification["pre_tokenizer"]
    # A single normalizer is not wrapped in a Sequence.
    steps = (
        normalizer["normalizers"]
        if normalizer and normalizer["type"] == "Sequence"
        else [normalizer]
        if normalizer
        else []
    )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
    prepend = {"type": "Prepend", "prepend": _BLANK}
    if not steps and pre_tokenizer is None:
        return False  # a vocabulary of characters
    if (
        not steps
        and pre_tokenizer["type"] == "Metaspace"
        and pre_tokenizer["replacement"] == _BLANK
        and not pre_tokenizer["split"]
    ):
        # Like SentencePiece, llama.cpp adds a space after special tokens too, and even if the text starts
        # with one. Metaspace does not do the latter, and with "first" not the former: only there the ids
        # differ.
        return pre_tokenizer["prepend_scheme"] != "never"
    # Gemma splits at spaces, and the normalizer has left none.
    idle = pre_tokenizer is None or (pre_tokenizer["type"], pre_tokenizer.get("pattern")) == (
        "Split",
        {"String": " "},
    )
    if not idle or steps not in ([replace], [prepend, replace]):
        raise ValueError(
            f"llama.cpp has no equivalent of this tokenizer.json's normalizer and pre-tokenizer: "
            f"{normalizer}, {pre_tokenizer}"
        )
    return steps[0] == prepend


def _token_list(
    specification: dict[str, Any],
    ids: Mapping[str, int],
    num_rows: int,
    *,
    unk: str | None,
    sentence_piece: bool,
    strips: bool,
) -> tuple[list[str], list[int]]:
    """Return a token and a type for every row.

    Tokens that are not special may only strip spaces if llama.cpp does so too (`strips`).
    """
    names: dict[int, str] = {id: token for token, id in ids.items()}
    added = {token["id"]: token for token in specification["added_tokens"]}
    for token in added.values():
        # Special tokens may strip spaces: such spaces are then noted (`gguf_model.tokenizer_notes`).
        if not token["special"] and ((stripping_tokens([token]) and not strips) or token["single_word"]):
            raise ValueError(
                f"the token {token['content']!r} strips spaces or matches only single words, which GGUF "
                "cannot represent"
            )
    tokens = []
    types = []
    for id in range(num_rows):
        # Names must differ: llama.cpp refuses equal tokens.
        token = names.get(id, f"[PAD{id}]")
        is_added = id in added
        if id not in names:
            type = UNUSED
        elif is_added and added[id]["special"]:
            # Byte-level vocabularies represent every text, and need no unknown token.
            type = UNKNOWN if sentence_piece and token == unk else CONTROL
        elif is_added:
            type = USER_DEFINED
        else:
            type = BYTE if sentence_piece and token in _BYTES else NORMAL
        # The library matches this token after normalization, so that it has "▁" for spaces; llama.cpp before.
        tokens.append(
            token.replace(_BLANK, " ")
            if type == USER_DEFINED and sentence_piece and added[id]["normalized"]
            else token
        )
        types.append(type)
    return tokens, types


def _special_ids(
    directory: Path, config: dict[str, Any], ids: Mapping[str, int], adds_bos: bool
) -> dict[str, int]:
    """Return the ids of tokens with a role, by GGUF's names."""
    roles: dict[str, str] = {
        _ROLES[role]: name for role in _ROLES if (name := config.get(f"{role}_token")) is not None
    }
    # data/tokenizers.py writes the tokens that end a text or a turn there.
    ends: Iterable[str] = config.get("end_tokens") or []
    # GGUF has one id for the end of a turn, so that only the first is written.
    if turn_end := next((name for name in ends if name != roles.get("eos")), None):
        roles["eot"] = turn_end
    # Without these ids, llama.cpp uses defaults of another vocabulary.
    if "eos" not in roles or (adds_bos and "bos" not in roles):
        raise ValueError(
            f"{directory / 'tokenizer_config.json'} has no {'bos' if 'eos' in roles else 'eos'}_token: add "
            "it, since GGUF needs its id"
        )
    if unknown := sorted(set(roles.values()) - ids.keys()):
        raise ValueError(
            f"{directory / 'tokenizer_config.json'} names {unknown}, which tokenizer.json does not have: fix "
            "one of them"
        )
    return {f"{role}_token_id": ids[name] for role, name in roles.items()}
