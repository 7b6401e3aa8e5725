"""Quantization-aware training: which tensor gets which number format, and how it is trained.

Reading order: `rules` (settings), `estimators` (gradients and scales), `assignment` (a format for every
path), `quantizer_params` (paths of their parameters), `weights` and `activations` (fake-quantization), `plan`
(set into a model), `schedule` (warm-up, damping, freezing), `fake_quantization` (definitions of quantized
models), `flips`.
"""
