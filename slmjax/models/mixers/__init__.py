"""Token mixers, one file each.

Files in reading order:

- attention.py: softmax attention and its caches
- differential.py: differential attention
- latent.py: multi-head latent attention
- mamba.py: selective state space model
- short_convolution.py: gated short convolution
- griffin.py: gated linear recurrence
- rwkv4.py: time mix of RWKV-4
- parallel.py: several mixers side by side
"""
