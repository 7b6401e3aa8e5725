"""What general compressors make of a text: the first bar a language model has to clear."""

import gzip
import lzma

MOST_BYTES = 16 * 10**6  # xz is slow


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9` need for the first 16 MB of a text; empty for an empty
    text.
    """
    text = text[:MOST_BYTES]
    if not text:
        return {}
    sizes = {
        "gzip -9": len(gzip.compress(text, compresslevel=9, mtime=0)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
