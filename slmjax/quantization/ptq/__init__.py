"""Models in number formats after training: rounding to nearest, and whether an exported file is the model
that was trained.

Files in reading order:

- round_to_nearest.py: rounding to nearest, also with searched scales
"""
