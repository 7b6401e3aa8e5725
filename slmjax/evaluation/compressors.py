"""General-purpose compressors on a text: the baseline that a language model has to beat."""

import gzip
import lzma

MOST_BYTES = 16 * 10**6  # xz is slow


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Return bits per byte of `gzip -9` and `xz -9` for the first 16 MB of a text; empty for no text."""
    text = text[:MOST_BYTES]
    if not text:
        return {}
    sizes = {
        # `mtime=0`: the header has a time, and results must be reproducible.
        "gzip -9": len(gzip.compress(text, compresslevel=9, mtime=0)),
        "xz -9": _xz_size(text),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def _xz_size(text: bytes) -> int:
    """Return the size of `lzma.compress(text, preset=9)`, in calls between which a signal is handled."""
    compressor = lzma.LZMACompressor(preset=9)
    pieces = (text[start : start + 2**20] for start in range(0, len(text), 2**20))
    return sum(len(compressor.compress(piece)) for piece in pieces) + len(compressor.flush())
