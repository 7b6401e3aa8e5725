"""Number formats: their definition, encoding of arrays as codes and scales, presets, and GGUF blocks."""
