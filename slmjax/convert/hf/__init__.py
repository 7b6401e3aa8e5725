"""Hugging Face model directories: settings and tensors.

Files in reading order:

- settings.py: keys of config.json that families share
- latent_settings.py: keys of models with latent attention
- mamba2_settings.py: keys and tensors of Mamba-2 layers
- delta_net_settings.py: keys of models with Gated DeltaNet layers
- tensors.py: tensor names that families share
"""
