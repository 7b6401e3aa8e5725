"""Number formats, one definition each: from numbers to codes and scales, and back; the presets; the bytes of
GGUF's blocks.
"""
