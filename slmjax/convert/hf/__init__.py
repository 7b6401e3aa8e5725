"""Hugging Face model directories: settings and tensors.

Files in reading order:

- settings.py: keys of config.json that families share
- latent_settings.py: keys of models with latent attention
- tensors.py: tensor names that families share
"""
