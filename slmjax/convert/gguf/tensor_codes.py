"""Quantized parameters as tensors of a GGUF file: codes and scales go into blocks as they were trained, and
nothing is quantized again.

A rule that turns our parameters into a tensor moves numbers about (transposes, reorders the rows of heads,
joins, stacks). It is applied to the codes and, apart, to the scales of all numbers; then each block's scale
is read off. What the blocks stand for is compared with what the rule makes of the decoded parameters, so that
a rule that computed with them would be found out.
"""

import numpy as np
from jaxtyping import UInt8

from slmjax.checkpoints.stored_model import LocalModel
from slmjax.convert.family import BoundRule
from slmjax.convert.gguf.container import block_size, decoded_blocks
from slmjax.formats.blocks import container_for, pack
from slmjax.formats.coding import Encoded
from slmjax.formats.spec import QuantSpec

WAYS_OUT = "export with --dtype f32, which writes the numbers that codes stand for, or --to hf"
WIDEST = {"TQ2_0": 0, "Q4_0": 1, "Q8_0": 2}  # a container holds the integer codes of those before it


def container_of(one: BoundRule, own: LocalModel) -> str | None:
    """GGUF's name of the blocks that a tensor's codes go into; None where its parameters are in floating
    point.

    Raises:
      ValueError: no blocks hold them; the message names parameter, format and a way out.
    """
    formats = {name: own.formats.get(name) for name in one.ours}
    if not any(formats.values()):
        return None
    if plain := [name for name, stored in formats.items() if stored is None]:
        coded = next(name for name, stored in formats.items() if stored is not None)
        raise ValueError(
            f"{one.theirs[0]} is made of {plain[0]}, in floating point, and {coded}, in codes: GGUF has one "
            "type for a tensor. Give "
            f"both the same format, or {WAYS_OUT}"
        )
    width = one.rule.write([np.empty(shape, bool) for shape in one.shapes])[0].shape[-1]
    found = {_container(name, stored.spec, width) for name, stored in formats.items() if stored is not None}
    if len(found) > 1 and not found <= WIDEST.keys():
        raise ValueError(
            f"{one.theirs[0]} joins {' and '.join(sorted(found))}: give {', '.join(formats)} one format, or "
            f"{WAYS_OUT}"
        )
    return found.pop() if len(found) == 1 else max(found, key=WIDEST.__getitem__)


def _container(name: str, spec: QuantSpec, width: int) -> str:
    try:
        return container_for(spec, width=width)
    except ValueError as error:
        raise ValueError(f"{name} goes into no block of GGUF: {error}; or {WAYS_OUT}") from error


def blocks_of(one: BoundRule, own: LocalModel, container: str) -> UInt8[np.ndarray, "..."]:
    """The bytes [..., bytes of a row] of a tensor whose codes `container` holds.

    Raises:
      ValueError: a scale is none that the container can store, or the family's tensor is made by computing
        with numbers.
    """
    name = one.theirs[0]
    parts = [own.encoded(path) for path in one.ours]
    codes = one.rule.write([np.asarray(encoded.codes) for encoded in parts])[0]
    scales = one.rule.write([_scales(encoded) for encoded in parts])[0]
    in_blocks = scales.reshape(*scales.shape[:-1], -1, block_size(container))
    scale = in_blocks[..., 0]
    if not np.array_equal(in_blocks, np.broadcast_to(scale[..., None], in_blocks.shape)):
        raise ValueError(
            f"{name} has several scales in one block of {container}, which has room for one: {WAYS_OUT}"
        )
    try:
        packed = np.asarray(pack(Encoded(codes=codes, scale=scale), container))
    except ValueError as error:
        raise ValueError(
            f"{', '.join(one.ours)} does not go into {container}: {error}. {WAYS_OUT.capitalize()}"
        ) from error
    wanted = one.rule.write([own.read(path) for path in one.ours])[0]
    if not np.array_equal(decoded_blocks(packed, container, wanted.shape), wanted):
        raise ValueError(
            f"{name} as {container} would not be the numbers that {', '.join(one.ours)} is trained with: "
            "this family computes with them on "
            f"the way, or the scale is not one that {container} stores. {WAYS_OUT.capitalize()}"
        )
    return packed


def _scales(encoded: Encoded) -> np.ndarray:
    """The scale of each number, in the shape of the codes."""
    scale = np.asarray(encoded.scale, np.float32)
    for axis, (numbers, groups) in enumerate(zip(encoded.codes.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, numbers // groups, axis=axis)
    return scale
