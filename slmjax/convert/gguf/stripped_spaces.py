"""Special tokens that strip the spaces next to them.

tokenizer.json marks such tokens (`lstrip`, `rstrip`); llama.cpp decides by the name of the model. If
`general.name` contains "phi-3" or "phi3", in any case, every special token but three strips the spaces after
it. If it contains "modern-bert", [MASK] strips those before it. A name is therefore written for this effect.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

NAME = "phi-3"
NAMES = (NAME, "phi3")
KEEPERS = ("<unk>", "<s>", "<|endoftext|>")  # special tokens that strip nothing even then
NEEDED = (*KEEPERS, "</s>")  # without these, llama.cpp does not load a file with such a name
MASK = "[MASK]"
MASK_NAME = "modern-bert"


def _name(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("general.name", "")).lower()


def _follows_phi3(metadata: Mapping[str, Any]) -> bool:
    return any(name in _name(metadata) for name in NAMES)


def strips_after(metadata: Mapping[str, Any], token: str, tokens: Collection[str]) -> bool:
    """Return whether llama.cpp strips the spaces after a special token of a file with these tokens."""
    return _follows_phi3(metadata) and token not in KEEPERS and all(name in tokens for name in NEEDED)


def strips_before(metadata: Mapping[str, Any], token: str) -> bool:
    """Return whether llama.cpp strips the spaces before a special token."""
    # llama.cpp tests for "phi-3" first, and then never for this name.
    return token == MASK and MASK_NAME in _name(metadata) and not _follows_phi3(metadata)


def name_notes(metadata: Mapping[str, Any]) -> list[str]:
    """Return notes for the import of a file whose name affects llama.cpp."""
    if not _follows_phi3(metadata):
        return []
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    name = f"general.name is {metadata['general.name']!r}"
    if missing := [name for name in NEEDED if name not in tokens]:
        return [
            f"{name}: llama.cpp takes it for a Phi-3, and does not load it without a token {missing[0]}. It "
            "is imported by its metadata"
        ]
    return [f"{name}: as in llama.cpp, its special tokens strip the spaces after them"]


def name_for(added: Sequence[Mapping[str, Any]], tokens: Collection[str]) -> str | None:
    """Return the `general.name` with which llama.cpp strips the same spaces; None if there is none.

    Args:
      added: `added_tokens` of a tokenizer.json.
      tokens: the full vocabulary.
    """
    # With such a name and without these tokens, llama.cpp would fail to load the file.
    if not stripping_tokens(added) or not all(name in tokens for name in NEEDED):
        return None
    return (
        # The name changes all special tokens, so that each of them must agree.
        NAME if all(_strips(token) == (token["content"] not in KEEPERS, False) for token in added) else None
    )


def stripping_tokens(added: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the added tokens of a tokenizer.json that strip the spaces next to them."""
    return [token["content"] for token in added if any(_strips(token))]


def _strips(token: Mapping[str, Any]) -> tuple[bool, bool]:
    return token["rstrip"], token["lstrip"]
