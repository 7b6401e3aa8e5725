"""Rules of quantization, and the numbers that weights, inputs and caches become."""
