"""Quantized parameters as tensors of a GGUF file: trained codes and scales are packed, not quantized again.

A rule that converts our parameters to a tensor only moves values (transposes, reorders the rows of heads,
joins, stacks). It is applied to the codes and, separately, to the scale of every value; then the scale of
each block is read off. The dequantized blocks are compared with the rule's result for the dequantized
parameters, which detects a rule that computes with values.
"""

import numpy as np
from jaxtyping import UInt8

from slmjax.checkpoints.stored_model import LocalModel
from slmjax.convert.family import BoundRule
from slmjax.convert.gguf.container import block_size, dequantize_blocks
from slmjax.formats.blocks import container_for, pack
from slmjax.formats.coding import Encoded
from slmjax.formats.spec import QuantSpec

WAYS_OUT = "export with --dtype f32, which writes dequantized weights, or --to hf"
WIDEST = {"TQ2_0": 0, "Q4_0": 1, "Q8_0": 2}  # a container can hold the integer codes of those before it


def container_of(rule: BoundRule, local_model: LocalModel) -> str | None:
    """Return GGUF's block type for a tensor's codes; None if its parameters are in floating point.

    Raises:
      ValueError: no block type holds them; the message names the parameter, its format and a way out.
    """
    formats = {name: local_model.formats.get(name) for name in rule.ours}
    if not any(formats.values()):
        return None
    if plain := [name for name, stored in formats.items() if stored is None]:
        coded = next(name for name, stored in formats.items() if stored is not None)
        raise ValueError(
            f"{rule.theirs[0]} joins {plain[0]}, in floating point, and {coded}, quantized, but a GGUF "
            f"tensor has one type. Give both the same format, or {WAYS_OUT}"
        )
    # Booleans have a byte each: the shape costs little memory.
    width = rule.write([np.empty(shape, bool) for shape in rule.shapes])[0].shape[-1]
    containers = {
        _container(name, stored.spec, width) for name, stored in formats.items() if stored is not None
    }
    # Integer codes fit a wider container unchanged; codes of the other containers are no plain integers.
    if len(containers) > 1 and not containers <= WIDEST.keys():
        raise ValueError(
            f"{rule.theirs[0]} joins {' and '.join(sorted(containers))}: give {', '.join(formats)} the same "
            f"format, or {WAYS_OUT}"
        )
    return containers.pop() if len(containers) == 1 else max(containers, key=WIDEST.__getitem__)


def _container(name: str, spec: QuantSpec, width: int) -> str:
    try:
        return container_for(spec, width=width)
    except ValueError as error:
        raise ValueError(f"{name} fits no block type of GGUF: {error}; or {WAYS_OUT}") from error


def blocks_of(rule: BoundRule, local_model: LocalModel, container: str) -> UInt8[np.ndarray, "..."]:
    """Pack a tensor's codes into blocks: its bytes [..., bytes per row].

    Raises:
      ValueError: the container cannot store a scale, or the rule computes with values.
    """
    name = rule.theirs[0]
    parts = [local_model.encoded(path) for path in rule.ours]
    codes = rule.write([np.asarray(encoded.codes) for encoded in parts])[0]
    # A scale for every value: then the same rule moves both, and a block's scale is where its codes are.
    scales = rule.write([_scales(encoded) for encoded in parts])[0]
    in_blocks = scales.reshape(*scales.shape[:-1], -1, block_size(container))
    scale = in_blocks[..., 0]
    # Groups shorter than a block, or rows reordered across groups.
    if not np.array_equal(in_blocks, np.broadcast_to(scale[..., None], in_blocks.shape)):
        raise ValueError(
            f"{name} has several scales in one block of {container}, which stores one: {WAYS_OUT}"
        )
    # All values of a block have one scale now.
    try:
        packed = np.asarray(pack(Encoded(codes=codes, scale=scale), container))
    except ValueError as error:
        raise ValueError(
            f"{', '.join(rule.ours)} does not fit {container}: {error}. {WAYS_OUT.capitalize()}"
        ) from error
    # Compared after packing: also a scale that the container rounds, to float16 say, is found.
    expected = rule.write([local_model.read(path) for path in rule.ours])[0]
    if not np.array_equal(dequantize_blocks(packed, container, expected.shape), expected):
        raise ValueError(
            f"{name} as {container} would differ from the trained weights of {', '.join(rule.ours)}: the "
            f"family's rule computes with them, or {container} cannot store the scale. "
            f"{WAYS_OUT.capitalize()}"
        )
    return packed


def _scales(encoded: Encoded) -> np.ndarray:
    """Repeat the scales for every value, in the shape of the codes."""
    scale = np.asarray(encoded.scale, np.float32)
    # Each row has its own scales; along the other axis, the values of a group share one.
    for axis, (size, groups) in enumerate(zip(encoded.codes.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, size // groups, axis=axis)
    return scale
