"""Hugging Face model directories: settings and tensors."""
