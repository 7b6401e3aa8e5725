"""Quantization after training.

Files in reading order:

- round_to_nearest.py: rounding to nearest, also with searched scales
"""
