"""Number formats: their definition, encoding of arrays as codes and scales, presets, and GGUF blocks.

Files in reading order:

- bits.py: bit patterns of float32
- division.py: division with the same bits on every platform
- spec.py: `QuantSpec`, the definition of a format
- presets.py: formats by name
- rounding.py: rounding to the levels of a grid
- scales.py: scales and zero points of groups
- coding.py: encode and decode arrays
- blocks.py: the bytes of GGUF blocks
"""
