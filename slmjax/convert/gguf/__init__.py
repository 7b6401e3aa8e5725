"""GGUF files: container, codes, settings, tensors and tokenizers.

Files in reading order:

- container.py: the GGUF file, named metadata and named tensors
- settings.py: metadata keys that families share
- tensors.py: tensor names that families share
- mamba2_settings.py: keys and tensors of Mamba-2 layers
- tensor_codes.py: codes and scales as GGUF blocks
- pre_tokenizers.py: llama.cpp's rules that split text before merges
- stripped_spaces.py: special tokens that strip the spaces next to them
- tokenizer.py: tokenizers in GGUF metadata
- llama_cpp.py: llama.cpp inside this process, for comparisons
"""
