"""Bytes and matrix products of a GGUF file against the model that it was made of: levels one and two of
`verification`.

Dims: R rows of inputs, I inputs of a matrix, O its outputs.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8

from slmjax.checkpoints.stored_model import LocalModel
from slmjax.convert.family import BoundRule
from slmjax.convert.gguf.container import GgufTensor
from slmjax.convert.gguf.llama_cpp import Product
from slmjax.convert.gguf.tensor_codes import blocks_of
from slmjax.formats.blocks import unpack
from slmjax.formats.coding import Encoded, decode, encode
from slmjax.formats.presets import preset
from slmjax.formats.spec import QuantSpec, Rounding, Statistic

INPUT_ROWS = 4
MOST_OUTPUTS = 2048  # of a product: of more outputs, so many that lie evenly among them
# How llama.cpp rounds the inputs of matrices in blocks of 256: the number of largest magnitude becomes -127.
Q8_K = QuantSpec(
    bits=8, group_size=256, statistic=Statistic.SIGNED_MAX, divisor=127.0, rounding=Rounding.HALF_EVEN
)
INPUT_SPECS = {"Q8_0": preset("q8_0"), "Q8_K": Q8_K}
EPSILON = 2.0**-24  # half a step of float32: what one of its sums or products may be wrong by, as a share


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorCheck:
    """A tensor of the file, and the numbers that the model multiplies with."""

    name: str  # in the file
    parameters: tuple[str, ...]  # that it is made of
    type: str  # GGUF's name of its type; empty where the file lacks it, or has it in another shape
    numbers: int
    differing: int  # numbers that are not those of the model
    differing_codes: int | None  # of a type with codes: those that are not the trained ones
    differing_scales: int | None

    @property
    def is_missing(self) -> bool:
        """Whether the file has no such tensor."""
        return not self.type

    @property
    def holds(self) -> bool:
        """Whether all numbers are those of the model."""
        return not self.is_missing and not self.differing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCheck:
    """Products of seeded inputs with a matrix of the file, by the engine and by us."""

    name: str
    type: str
    input_type: str  # what the engine turns inputs into: "F32", "Q8_0", ...
    outputs: int  # that were computed, of each of the inputs' rows
    # largest difference on the same codes of inputs, over the sum of magnitudes of what is added up
    error: float
    bound: float  # what float32 sums in different orders may differ by
    input_codes: int  # of the inputs; 0 where they stay in floating point
    flipped_codes: int  # of these, that ours has otherwise than the engine

    @property
    def holds(self) -> bool:
        """Whether the products are equal but for the order of sums."""
        return self.error <= self.bound


# Bytes ------------------------------------------------------------------------------------------------------
def check_tensor(one: BoundRule, own: LocalModel, tensor: GgufTensor | None) -> TensorCheck:
    """One tensor; None for one that the file does not have."""
    (name,) = one.theirs
    wanted = written(one, own)
    if tensor is None or tensor.shape != wanted.shape:
        return TensorCheck(
            name=name,
            parameters=tuple(one.ours),
            type="",
            numbers=wanted.size,
            differing=wanted.size,
            differing_codes=None,
            differing_scales=None,
        )
    codes, scales = _differing_codes(one, own, tensor)
    return TensorCheck(
        name=name,
        parameters=tuple(one.ours),
        type=tensor.type,
        numbers=wanted.size,
        differing=int(np.count_nonzero(tensor.read().astype(np.float32) != wanted.astype(np.float32))),
        differing_codes=codes,
        differing_scales=scales,
    )


def written(one: BoundRule, own: LocalModel) -> np.ndarray:
    """The tensor that a rule makes of what the model multiplies with."""
    return one.rule.write([own.read(path) for path in one.ours])[0]


def _differing_codes(one: BoundRule, own: LocalModel, tensor: GgufTensor) -> tuple[int | None, int | None]:
    """Codes and scales of the file that are not the trained ones; None where there is nothing to compare."""
    if not all(path in own.formats for path in one.ours):
        return None, None
    try:
        trained = unpack(blocks_of(one, own, tensor.type), tensor.type)
    except ValueError:  # a type that does not hold the trained codes
        return None, None
    found = unpack(tensor.raw.reshape(*tensor.shape[:-1], -1), tensor.type)
    return _differing(trained.codes, found.codes), _differing(trained.scale, found.scale)


def _differing(one: Array | np.ndarray, other: Array | np.ndarray) -> int:
    return int(np.count_nonzero(np.asarray(one) != np.asarray(other)))


# Products ---------------------------------------------------------------------------------------------------
def is_multiplied_with(name: str, names: Sequence[str]) -> bool:
    """Whether a tensor is a matrix that inputs are multiplied with, and no vector or table that is only
    looked up in.
    """
    looked_up = name.startswith("position_embd") or (
        name.startswith("token_embd") and "output.weight" in names
    )
    return name.endswith(".weight") and not looked_up


def input_type(type: str) -> str:
    """What the engine turns inputs of a matrix of this type into."""
    return _product(type).input_type


_product = functools.lru_cache(maxsize=16)(Product)


def check_product(one: BoundRule, own: LocalModel, tensor: GgufTensor) -> ProductCheck:
    """One matrix, with inputs that depend on its name alone."""
    product = _product(tensor.type)
    width = tensor.shape[-1]
    rows = tensor.raw.reshape(int(np.prod(tensor.shape[:-1])), -1)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MOST_OUTPUTS)).astype(np.int64)
    weight = written(one, own).astype(np.float32).reshape(len(rows), width)[chosen]
    x = _inputs(tensor.name, width)
    coded = product.coded(x)
    theirs = product(rows[chosen], coded, width=width)
    inputs, flipped, codes = _compared_inputs(x, coded, product.input_type)
    ours = np.asarray(_times(inputs, weight))
    size = np.abs(inputs).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    error = np.abs(ours.astype(np.float64) - theirs) / np.where(size == 0, 1.0, size)
    return ProductCheck(
        name=tensor.name,
        type=tensor.type,
        input_type=product.input_type,
        outputs=len(chosen),
        error=float(np.max(error)),
        bound=2 * width * EPSILON,
        input_codes=codes,
        flipped_codes=flipped,
    )


@jax.jit
def _times(x: Float[Array, "R I"], weight: Float[Array, "O I"]) -> Float[Array, "R O"]:
    return jnp.dot(x, weight.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _inputs(name: str, width: int) -> Float[np.ndarray, "R I"]:
    """Draws as a norm leaves them, each row of another size."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return (
        generator.normal(size=(INPUT_ROWS, width)) * np.exp(generator.normal(size=(INPUT_ROWS, 1)))
    ).astype(np.float32)


def _compared_inputs(
    x: Float[np.ndarray, "R I"], coded: UInt8[np.ndarray, "R bytes"], type: str
) -> tuple[np.ndarray, int, int]:
    """Inputs as the engine has them after coding, in float32; how many of its codes ours has otherwise, and
    how many there are.
    """
    if type == "F32":
        return x, 0, 0
    if type not in INPUT_SPECS:
        half = {"F16": np.float16, "BF16": jnp.bfloat16}.get(type)
        if half is None:
            raise ValueError(
                f"llama.cpp turns inputs into {type} here, which is not known to slmjax: tell of it in "
                "INPUT_SPECS"
            )
        return coded.view(half).astype(np.float32), 0, 0
    spec = INPUT_SPECS[type]
    theirs = _read_q8_k(coded) if type == "Q8_K" else unpack(coded, type)
    ours = _coded(x, spec)
    return np.asarray(_decoded(theirs, spec)), _differing(ours.codes, theirs.codes), x.size


_coded = jax.jit(encode, static_argnums=1)
_decoded = jax.jit(decode, static_argnums=1)


def _read_q8_k(coded: UInt8[np.ndarray, "R bytes"]) -> Encoded:
    """Blocks of 256: a float32 scale, the codes, and 16 sums of them as int16, which llama.cpp keeps for
    later.
    """
    blocks = coded.reshape(coded.shape[0], -1, 4 + 256 + 32)
    codes: Int8[np.ndarray, "R G 256"] = np.ascontiguousarray(blocks[..., 4:260]).view(np.int8)
    scale = np.ascontiguousarray(blocks[..., :4]).view(np.float32)[..., 0]
    return Encoded(codes=codes.reshape(coded.shape[0], -1), scale=scale)


def check_products(
    bound: Sequence[BoundRule], own: LocalModel, tensors: dict[str, GgufTensor]
) -> Iterator[ProductCheck]:
    """Every matrix that inputs are multiplied with."""
    for one in bound:
        tensor = tensors.get(one.theirs[0])
        if tensor is not None and len(tensor.shape) > 1 and is_multiplied_with(tensor.name, tuple(tensors)):
            yield check_product(one, own, tensor)
