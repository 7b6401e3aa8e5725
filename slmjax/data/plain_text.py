"""A tokenizer that never produces special tokens for the text of a document.

    backend, forbidden = plain_text_backend(specification, reserved={"</s>": 2})
    backend.encode("a</s>b", add_special_tokens=False).ids      # without 2, whatever the model type

`tokenizers` keeps special tokens out of a text only where it looks for added tokens. The model behind that
(WordLevel, WordPiece, Unigram, BPE with a merge or a whole-word look-up) finds the same name in its own
vocabulary and yields its id, and an added token that is not marked special is always found. So documents are
encoded with a copy in which each reserved token has a name that no text contains. Ids stay the same, the
merges that would build the name are gone, and the text is encoded with the rest of the vocabulary.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from slmjax.data.patterns import library_errors

_NONCHARACTER = "\U0010ffff"  # never assigned to a character


def unknown_token(specification: Mapping[str, Any]) -> str | None:
    """Return the name of the model's unknown token; None if it has none."""
    model = specification["model"]
    # Unigram gives the index of its unknown token, the other models its name.
    if model["type"] != "Unigram":
        return model.get("unk_token")
    return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]


def reserved_tokens(
    specification: Mapping[str, Any], *, bos: str, eos: str, pad: str | None, ends: Iterable[str]
) -> set[str]:
    """Return names that no text may produce: special tokens, BOS, EOS, padding, and added end tokens.

    The model's unknown token is not among them, unless it is BOS or EOS.
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
    """Return the tokenizer for documents; None if that of the specification never yields a reserved id.

    Args:
      specification: a tokenizer.json.
      reserved: ids of the tokens that no text may produce, by name. The model's unknown token stays in use
        but loses its name: its id comes out for text that cannot be expressed, not for text with its name.
    """
    # The copy costs memory and a second vocabulary, so it is made only where it is needed.
    model = specification["model"]
    names = set(reserved)
    unreserved_added = any(
        token["content"] in names and not token["special"] for token in specification["added_tokens"]
    )
    unknown = unknown_token(specification)
    if not unreserved_added and unknown not in names and not any(_can_produce(model, name) for name in names):
        return None
    renamed = {
        name: f"{_NONCHARACTER}{number}{_NONCHARACTER}"
        for number, name in enumerate(sorted(names | {unknown or ""} - {""}))
    }
    added = [
        # Special tokens are not searched for in text, see encode_special_tokens.
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
    # Encode special tokens in a text as text instead of finding them.
    backend.encode_special_tokens = True
    return backend


def checked_encodings(
    texts: Sequence[str], encode: Callable[..., list[tokenizers.Encoding]], *, reserved: Mapping[int, str]
) -> list[tokenizers.Encoding]:
    """Return the encodings of texts, without reserved ids.

    Args:
      texts: to encode.
      encode: `encode_batch` or `encode_batch_fast` of a backend for documents.
      reserved: names of the tokens that no text may produce, by id.

    Raises:
      ValueError: the vocabulary cannot express a text, or expresses it by a reserved token.
    """
    with library_errors(
        "the vocabulary cannot express the text, and has no unknown token, or its patterns take too long: "
        "use a tokenizer that falls back on bytes, or one with an unknown token"
    ):
        encodings = encode(list(texts), add_special_tokens=False)
    for text, encoding in zip(texts, encodings if reserved else (), strict=False):
        if not reserved.keys().isdisjoint(ids := encoding.ids):
            name = next(reserved[id] for id in ids if id in reserved)
            raise ValueError(
                f"the vocabulary has {name!r} for text that it cannot express, and that token begins or ends "
                "documents: name another BOS or EOS, or use a tokenizer that falls back on bytes. The text: "
                f"{text[:80]!r}"
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
    # BPE reaches a name only by a merge whose parts join to it.
    return len(name) == 1 or any(left + right == name for left, right in model["merges"])


def without_names(model: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return the model with other names for some tokens, and without the merges that use the old names."""
    if model["type"] == "Unigram":
        return {**model, "vocab": [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]}
    changed = {**model, "vocab": {renamed.get(name, name): id for name, id in model["vocab"].items()}}
    if "unk_token" in model:
        changed["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    if model["type"] == "BPE":
        # A continuing subword has a prefix that a merge drops from its right part.
        prefix = len(model.get("continuing_subword_prefix") or "")
        changed["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if renamed.keys().isdisjoint((left, right, left + right[prefix:]))
        ]
    return changed
