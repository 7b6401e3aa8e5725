"""Feed-forward layers: dense MLPs and mixtures of experts.

Files in reading order:

- mlp.py: the dense layer, gated or not
- moe.py: mixture of experts
"""
