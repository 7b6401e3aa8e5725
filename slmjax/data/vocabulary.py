"""The bytes of the ids of a vocabulary, read from a tokenizer.json, and a sample of text to learn one from.

pieces = exact_pieces(json.loads(backend.to_str()), backend.get_vocab(), vocab_size)
# pieces[id] is bytes; None if they are unknown
"""

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator
from typing import Any

NUM_BYTES = 256


def byte_characters() -> list[str]:
    """Return the character for each byte in byte-level vocabularies.

    Printable characters stand for themselves, other bytes have characters from U+0100 on.
    """
    # The table of GPT-2's byte-level BPE.
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(NUM_BYTES)]


def is_character_vocabulary(specification: dict[str, Any]) -> bool:
    """Return whether each character is an id: a BPE without merges, normaliser and pre-tokenizer."""
    model = specification["model"]
    decoder = specification["decoder"]
    plain = specification["normalizer"] is None and specification["pre_tokenizer"] is None
    fused = decoder is not None and decoder["type"] == "Fuse"
    return plain and fused and model["type"] == "BPE" and not model["merges"]


# Letters, digits, other signs, or white space: the kinds of words of the pre-tokenizer of GPT-2. The classes
# of Python differ from its own in a few numerals, which is no matter for where a long word is cut.
LONGEST_WORD = 256
_KINDS = (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s")
_LONG_WORD = re.compile("|".join(f"{kind}{{{LONGEST_WORD + 1},}}" for kind in _KINDS))


def sample_of(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Return the texts with the smallest hashes that fit `max_bytes`, whatever their order.

    There is at least one; if it is longer, it is cut.
    """
    # A heap of the texts with the smallest hashes, the largest of them on top.
    heap: list[tuple[int, str]] = []
    total = 0
    limit = 1 << 256
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
            # Earlier texts with larger hashes may have been dropped, so later ones must be, too.
            limit = -rank
    if len(heap) == 1 and total > max_bytes:
        return [heap[0][1].encode()[:max_bytes].decode(errors="ignore")]
    return [text for _, text in sorted(heap, reverse=True)]


def with_short_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, cut so that no word of byte-level BPE is longer than `LONGEST_WORD` characters.

    The time to learn from a word grows with the square of its length, so that one of a megabyte (a base64
    block, one character repeated) would take hours. Other words are not cut.
    """
    for text in texts:
        start = 0
        for word in _LONG_WORD.finditer(text):
            # The space before a word belongs to it.
            cuts = range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD)
            for cut in cuts:
                yield text[start:cut]
                start = cut
        yield text[start:]


def exact_pieces(
    specification: dict[str, Any], vocabulary: dict[str, int], vocab_size: int
) -> list[bytes] | None:
    """Return the bytes of each id, if those of a text's ids always join to the text; else None."""
    added = {token["id"]: token for token in specification["added_tokens"]}
    byte_level = _keeps_every_byte(specification)
    if not byte_level and not is_character_vocabulary(specification):
        return None
    if any(not token["special"] and (token["lstrip"] or token["rstrip"]) for token in added.values()):
        # Such a token includes the blanks next to it.
        return None
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    # Without a token for each byte, some text would be lost.
    if byte_level and not byte_of.keys() <= vocabulary.keys():
        return None
    # An id without a token stays empty.
    pieces = [b""] * vocab_size
    for name, id in vocabulary.items():
        if id in added:
            pieces[id] = b"" if added[id]["special"] else name.encode()
        elif byte_level and not set(name) <= byte_of.keys():
            return None
        else:
            pieces[id] = bytes(byte_of[character] for character in name) if byte_level else name.encode()
    return pieces


def _keeps_every_byte(specification: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is byte-level and does not normalise, add a blank, or drop bytes."""
    steps = specification["pre_tokenizer"]
    decoder = specification["decoder"]
    if (
        specification["normalizer"] is not None
        or specification["model"]["type"] != "BPE"
        or None in (steps, decoder)
    ):
        return False
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    is_lossless = {
        "ByteLevel": lambda step: not step["add_prefix_space"],
        "Split": lambda step: step["behavior"] != "Removed",
        "Digits": lambda step: True,
    }
    all_lossless = all(step["type"] in is_lossless and is_lossless[step["type"]](step) for step in steps)
    return (
        all_lossless and any(step["type"] == "ByteLevel" for step in steps) and decoder["type"] == "ByteLevel"
    )
