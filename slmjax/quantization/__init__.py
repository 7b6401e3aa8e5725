"""Quantization-aware training: which tensor gets which number format, and how it is trained.

Files in reading order:

- estimators.py: gradients of rounding, and learned scales
- quantizer_params.py: paths of the parameters of quantizers
- rules.py: `QuantConfig`, formats by path and phase
- assignment.py: the format of every parameter and cache, or the reason it has none
- activations.py: quantizers of activations and caches
- schedule.py: warm-up, damping and freezing by step
- weights.py: weights in their formats, as functions of flat dicts
- flips.py: codes that changed between lines of the log
- plan.py: the formats of each layer, set into a model's modules
- fake_quantization.py: definitions of models with fake-quantized weights
- ptq: quantization after training
"""
