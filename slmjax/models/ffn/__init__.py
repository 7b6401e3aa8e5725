"""Feed-forward layers: dense MLPs, mixtures of experts, and RWKV's channel mix.

Files in reading order:

- mlp.py: the dense layer, gated or not
- moe.py: mixture of experts
- channel_mix.py: channel mix of RWKV-4
"""
