"""Blanks that a special token swallows beside it: tokenizer.json marks such tokens, llama.cpp goes by the
name of the model.

Where `general.name` has "phi-3" or "phi3" in it, in any case, blanks after every special token but three are
part of the token. Where it has "modern-bert", so are those before [MASK]. A name is therefore written for
this rule alone.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

NAME = "phi-3"
NAMES = (NAME, "phi3")
KEEPERS = ("<unk>", "<s>", "<|endoftext|>")  # special tokens that swallow nothing, all the same
NEEDED = (*KEEPERS, "</s>")  # llama.cpp does not load a file of such a name without them
MASK = "[MASK]"
MASK_NAME = "modern-bert"


def _name(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("general.name", "")).lower()


def _follows_phi3(metadata: Mapping[str, Any]) -> bool:
    return any(name in _name(metadata) for name in NAMES)


def swallows_after(metadata: Mapping[str, Any], token: str, tokens: Collection[str]) -> bool:
    """Return whether llama.cpp makes blanks after a special token part of it, in a file with this metadata
    and these tokens.
    """
    return _follows_phi3(metadata) and token not in KEEPERS and all(name in tokens for name in NEEDED)


def swallows_before(metadata: Mapping[str, Any], token: str) -> bool:
    """Return whether llama.cpp makes blanks before a special token part of it."""
    return token == MASK and MASK_NAME in _name(metadata) and not _follows_phi3(metadata)


def name_notes(metadata: Mapping[str, Any]) -> list[str]:
    """Notes for the import of a file whose name changes what llama.cpp does."""
    if not _follows_phi3(metadata):
        return []
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    called = f"general.name is {metadata['general.name']!r}"
    if missing := [name for name in NEEDED if name not in tokens]:
        return [
            (
                f"{called}: llama.cpp takes it for a Phi-3, and does not load it without a token "
                f"{missing[0]}. "
                "It is read by its metadata"
            )
        ]
    return [f"{called}: as in llama.cpp, blanks after its special tokens are part of them"]


def name_for(added: Sequence[Mapping[str, Any]], tokens: Collection[str]) -> str | None:
    """Return the `general.name` with which llama.cpp swallows the blanks that these added tokens do; None
    where there is none.

    Args:
      added: `added_tokens` of a tokenizer.json.
      tokens: the whole vocabulary.
    """
    if not swallowing(added) or not all(name in tokens for name in NEEDED):
        return None
    return (
        NAME if all(_swallows(token) == (token["content"] not in KEEPERS, False) for token in added) else None
    )


def swallowing(added: Sequence[Mapping[str, Any]]) -> list[str]:
    """The added tokens of a tokenizer.json that swallow blanks beside them."""
    return [token["content"] for token in added if any(_swallows(token))]


def _swallows(token: Mapping[str, Any]) -> tuple[bool, bool]:
    return token["rstrip"], token["lstrip"]
