"""Token mixers beside softmax attention with keys and values of its own, one file each."""
