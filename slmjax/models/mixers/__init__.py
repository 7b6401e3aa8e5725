"""Token mixers, one file each: softmax attention and latent attention.

Files in reading order:

- attention.py: softmax attention and its caches
- latent.py: multi-head latent attention
"""
