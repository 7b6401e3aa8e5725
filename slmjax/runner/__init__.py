"""The training loop and its input and output."""
