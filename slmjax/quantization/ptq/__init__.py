"""Models in number formats after training: rounding to nearest, and whether an exported file is the model
that was trained.
"""
