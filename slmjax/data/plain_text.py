"""A tokenizer that cannot be made to produce special tokens by the text it encodes.

    backend, forbidden = plain_text_backend(specification, reserved={"</s>": 2})
    backend.encode("a</s>b", add_special_tokens=False).ids      # without 2, whatever the model type

`tokenizers` keeps special tokens out of a text only where it looks for added tokens. The model behind that
(WordLevel, WordPiece, Unigram, BPE with a merge or a whole-word look-up) finds the same name in its own
vocabulary and yields the id all the same, and an added token that is not marked special is always found. So
documents are encoded with a copy in which each reserved token has a name that no text contains: ids stay, the
merges that would build the name are gone, and the text is encoded with what is left.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

_NONCHARACTER = "\U0010ffff"  # assigned to no character, ever


def unknown_token(specification: Mapping[str, Any]) -> str | None:
    """The name of the token that the model uses for text it cannot express; None where it has none."""
    model = specification["model"]
    if model["type"] != "Unigram":
        return model.get("unk_token")
    return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]


def reserved_tokens(
    specification: Mapping[str, Any], *, bos: str, eos: str, pad: str | None, ends: Iterable[str]
) -> set[str]:
    """Names that no text may produce: special tokens, BOS, EOS, padding, and added tokens that end a turn.

    The model's unknown token is none of them, unless it is BOS or EOS too.
    """
    added = {token["content"]: token["special"] for token in specification["added_tokens"]}
    names = {
        *(name for name, is_special in added.items() if is_special),
        *(added.keys() & set(ends)),
        *([] if pad is None else [pad]),
    }
    return names - {unknown_token(specification)} | {bos, eos}


def plain_text_backend(
    specification: Mapping[str, Any], *, reserved: Mapping[str, int]
) -> tokenizers.Tokenizer | None:
    """The tokenizer for documents; None where the one of the specification never yields a reserved id.

    Args:
      specification: a tokenizer.json.
      reserved: ids of the tokens that no text may produce, by name. The model's unknown token keeps its use
        but loses its name: its id comes out for text that cannot be expressed, not for text that spells it.
    """
    model = specification["model"]
    names = set(reserved)
    unreserved_added = any(
        token["content"] in names and not token["special"] for token in specification["added_tokens"]
    )
    unknown = unknown_token(specification)
    if not unreserved_added and unknown not in names and not any(_can_produce(model, name) for name in names):
        return None
    renamed = {
        name: f"{_NONCHARACTER}{place}{_NONCHARACTER}"
        for place, name in enumerate(sorted(names | {unknown or ""} - {""}))
    }
    added = [
        # A special token is not looked for in text, see encode_special_tokens.
        {
            **token,
            "content": renamed.get(token["content"], token["content"]),
            "special": token["special"] or token["content"] in names,
        }
        for token in specification["added_tokens"]
    ]
    changed = {
        **specification,
        "added_tokens": added,
        "model": without_names(model, renamed),
        "post_processor": None,
    }
    backend = tokenizers.Tokenizer.from_str(json.dumps(changed))
    backend.encode_special_tokens = True
    return backend


def checked_encodings(
    texts: Sequence[str], encode: Callable[..., list[tokenizers.Encoding]], *, reserved: Mapping[int, str]
) -> list[tokenizers.Encoding]:
    """Return the encodings of texts, which must not have a reserved id.

    Args:
      encode: `encode_batch` or `encode_batch_fast` of a backend for documents.
      reserved: names of the tokens that no text may produce, by id.

    Raises:
      ValueError: the vocabulary cannot express a text, or expresses it by a reserved token.
    """
    try:
        encodings = encode(list(texts), add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"the vocabulary cannot express the text, and has no token for what is unknown ({error}): take a "
            "tokenizer that falls back "
            "on bytes, or one that has such a token"
        ) from error
    for text, encoding in zip(texts, encodings if reserved else (), strict=False):
        if not reserved.keys().isdisjoint(ids := encoding.ids):
            name = next(reserved[id] for id in ids if id in reserved)
            raise ValueError(
                f"the vocabulary has {name!r} for text that it cannot express, and that token begins or ends "
                "documents: name another "
                f"BOS or EOS, or take a tokenizer that falls back on bytes. The text: {text[:80]!r}"
            )
    return encodings


def _can_produce(model: Mapping[str, Any], name: str) -> bool:
    """Return whether the model itself may find this name in a text."""
    if model["type"] == "Unigram":
        return any(piece == name for piece, _ in model["vocab"])
    if name not in model["vocab"]:
        return False
    if (
        model["type"] != "BPE"
        or model.get("ignore_merges")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        return True
    return len(name) == 1 or any(left + right == name for left, right in model["merges"])


def without_names(model: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The model with other names for some of its tokens, and without the merges that take part in the old
    ones.
    """
    if model["type"] == "Unigram":
        return {**model, "vocab": [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]}
    changed = {**model, "vocab": {renamed.get(name, name): id for name, id in model["vocab"].items()}}
    if "unk_token" in model:
        changed["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    if model["type"] == "BPE":
        prefix = len(model.get("continuing_subword_prefix") or "")
        changed["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if renamed.keys().isdisjoint((left, right, left + right[prefix:]))
        ]
    return changed
