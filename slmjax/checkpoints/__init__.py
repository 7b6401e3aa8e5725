"""Checkpoints of runs, model directories in safetensors, and loading a model from either."""
