"""Token mixers: attention, and recurrent mixers, whose state has a fixed size.

Files in reading order:

- attention.py: softmax attention and its caches
- differential.py: differential attention
- latent.py: multi-head latent attention
- recurrent_parts.py: decays, unit vectors and short convolutions of recurrent mixers
- linear_attention.py: linear attention
- retention.py: retention (RetNet, Lightning Attention)
- gated_linear.py: gated linear attention
- mamba2.py: Mamba-2
- delta_net.py: DeltaNet, Gated DeltaNet and Kimi Delta Attention
- rwkv7.py: RWKV-7
- mamba.py: selective state space model
- short_convolution.py: gated short convolution
- griffin.py: gated linear recurrence
- rwkv4.py: time mix of RWKV-4
- parallel.py: several mixers side by side
"""
