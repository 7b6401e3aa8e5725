"""Token mixers, one file each.

Files in reading order:

- attention.py: softmax attention and its caches
- differential.py: differential attention
- latent.py: multi-head latent attention
- parallel.py: several mixers side by side
"""
