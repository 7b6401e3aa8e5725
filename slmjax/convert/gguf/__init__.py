"""GGUF files: container, codes, settings, tensors and tokenizers."""
