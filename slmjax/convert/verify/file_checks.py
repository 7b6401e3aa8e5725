"""Comparison of a GGUF file's tensors and matrix products with the model: levels one and two of `export.py`.

Dims: R rows of inputs, I inputs of a matrix, O its outputs.
"""

import dataclasses
import functools
import zlib
from collections.abc import Collection, Iterator, Sequence

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
MOST_OUTPUTS = 2048  # of a product; of more outputs, this many evenly spaced ones are computed
# llama.cpp's format for the inputs of matrices in blocks of 256: the value of largest magnitude becomes -127.
Q8_K = QuantSpec(
    bits=8, group_size=256, statistic=Statistic.SIGNED_MAX, divisor=127.0, rounding=Rounding.HALF_EVEN
)
INPUT_SPECS = {"Q8_0": preset("q8_0"), "Q8_K": Q8_K}
EPSILON = 2.0**-24  # unit roundoff of float32: relative error of one operation


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorCheck:
    """Comparison of a tensor of the file with the model's weights."""

    name: str  # in the file
    parameters: tuple[str, ...]  # of which it is composed
    type: str  # GGUF's name of its type; empty if it is missing or has another shape
    numbers: int  # of values
    differing: int  # values that differ from the model's
    differing_codes: int | None  # codes that differ from the trained ones; None if there are none
    differing_scales: int | None

    @property
    def is_missing(self) -> bool:
        """Whether the file has no such tensor of this shape."""
        return not self.type

    @property
    def holds(self) -> bool:
        """Whether all values equal the model's."""
        return not self.is_missing and not self.differing


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCheck:
    """Comparison of products of random inputs with a matrix of the file, by the engine and by slmjax."""

    name: str
    type: str
    input_type: str  # type to which the engine converts inputs: "F32", "Q8_0", ...
    outputs: int  # computed for each row of inputs
    # largest difference for equal input codes, relative to the sum of the magnitudes of the terms
    error: float
    bound: float  # difference that the order of summation in float32 explains
    input_codes: int  # 0 if inputs stay in floating point
    flipped_codes: int  # input codes that differ between the engine and slmjax

    @property
    def holds(self) -> bool:
        """Whether the products are equal up to the order of summation."""
        return self.error <= self.bound


# Bytes ------------------------------------------------------------------------------------------------------
def check_tensor(rule: BoundRule, local_model: LocalModel, tensor: GgufTensor | None) -> TensorCheck:
    """Compare a tensor of the file, or None if the file lacks it, with the model's parameters."""
    (name,) = rule.theirs
    expected = expected_tensor(rule, local_model)
    if tensor is None or tensor.shape != expected.shape:
        return TensorCheck(
            name=name,
            parameters=tuple(rule.ours),
            type="",
            numbers=expected.size,
            differing=expected.size,
            differing_codes=None,
            differing_scales=None,
        )
    codes, scales = _differing_codes(rule, local_model, tensor)
    return TensorCheck(
        name=name,
        parameters=tuple(rule.ours),
        type=tensor.type,
        numbers=expected.size,
        differing=_count_different(tensor.read().astype(np.float32), expected.astype(np.float32)),
        differing_codes=codes,
        differing_scales=scales,
    )


def expected_tensor(rule: BoundRule, local_model: LocalModel) -> np.ndarray:
    """Return the tensor of a rule for the model's dequantized weights."""
    return rule.write([local_model.read(path) for path in rule.ours])[0]


def _differing_codes(
    rule: BoundRule, local_model: LocalModel, tensor: GgufTensor
) -> tuple[int | None, int | None]:
    """Count the codes and scales of the file that differ from the trained ones; None if it has none."""
    if not all(path in local_model.formats for path in rule.ours):
        return None, None
    # Packed here again, so that codes are compared in the layout of the file.
    try:
        trained = unpack(blocks_of(rule, local_model, tensor.type), tensor.type)
    except ValueError:  # a type that cannot hold the trained codes
        return None, None
    in_file = unpack(tensor.raw.reshape(*tensor.shape[:-1], -1), tensor.type)
    return _count_different(trained.codes, in_file.codes), _count_different(trained.scale, in_file.scale)


def _count_different(a: Array | np.ndarray, b: Array | np.ndarray) -> int:
    return int(np.count_nonzero(np.asarray(a) != np.asarray(b)))


# Products ---------------------------------------------------------------------------------------------------
def is_matmul_weight(tensor: GgufTensor, names: Collection[str]) -> bool:
    """Return whether a tensor is the weight of a matrix product, rather than a vector or a lookup table.

    Args:
      names: of all tensors; without `output.weight` among them, the embedding is the head too.
    """
    name = tensor.name
    is_lookup = name.startswith("position_embd") or (
        name.startswith("token_embd") and "output.weight" in names
    )
    return len(tensor.shape) > 1 and name.endswith(".weight") and not is_lookup


def input_type(type: str) -> str:
    """Return the type to which the engine converts the inputs of a matrix of this type."""
    return _product(type).input_type


# Types are few and kernels are looked up by type: one object serves all tensors of a type.
_product = functools.lru_cache(maxsize=16)(Product)


def check_product(rule: BoundRule, local_model: LocalModel, tensor: GgufTensor) -> ProductCheck:
    """Compare the products of one matrix with random inputs, seeded by its name."""
    product = _product(tensor.type)
    width = tensor.shape[-1]
    rows = tensor.raw.reshape(int(np.prod(tensor.shape[:-1])), -1)
    # Evenly spaced outputs reach all heads and experts.
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MOST_OUTPUTS)).astype(np.int64)
    weight = expected_tensor(rule, local_model).astype(np.float32).reshape(len(rows), width)[chosen]
    # Seeded by name: a failure can be repeated for a single tensor.
    x = _inputs(tensor.name, width)
    coded = product.coded(x)
    theirs = product(rows[chosen], coded, width=width)
    # The engine's codes go into both products, so that only the order of summation can differ.
    inputs, flipped, codes = _engine_inputs(x, coded, product.input_type)
    ours = np.asarray(_times(inputs, weight))
    # Rounding errors of a sum are proportional to this, not to the sum itself, which may cancel to zero.
    magnitude = np.abs(inputs).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    error = np.abs(ours.astype(np.float64) - theirs) / np.where(magnitude == 0, 1.0, magnitude)
    return ProductCheck(
        name=tensor.name,
        type=tensor.type,
        input_type=product.input_type,
        outputs=len(chosen),
        error=float(np.max(error)),
        # Two inner products are compared, each with a relative error of up to n u (Higham, 2002, section
        # 3.1).
        bound=2 * width * EPSILON,
        input_codes=codes,
        flipped_codes=flipped,
    )


@jax.jit
def _times(x: Float[Array, "R I"], weight: Float[Array, "O I"]) -> Float[Array, "R O"]:
    # On accelerators, the default precision rounds float32 inputs.
    return jnp.dot(x, weight.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _inputs(name: str, width: int) -> Float[np.ndarray, "R I"]:
    """Draw inputs like those after a norm, with rows of different magnitude."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    x = generator.normal(size=(INPUT_ROWS, width)) * np.exp(generator.normal(size=(INPUT_ROWS, 1)))
    return x.astype(np.float32)


def _engine_inputs(
    x: Float[np.ndarray, "R I"], coded: UInt8[np.ndarray, "R bytes"], type: str
) -> tuple[np.ndarray, int, int]:
    """Return the engine's dequantized inputs, the number of its codes that differ from ours, and of all."""
    if type == "F32":
        return x, 0, 0
    if type not in INPUT_SPECS:
        half = {"F16": np.float16, "BF16": jnp.bfloat16}.get(type)
        if half is None:
            raise ValueError(
                f"llama.cpp converts inputs to {type} here, which slmjax does not know: add it to INPUT_SPECS"
            )
        return coded.view(half).astype(np.float32), 0, 0
    spec = INPUT_SPECS[type]
    theirs = _read_q8_k(coded) if type == "Q8_K" else unpack(coded, type)
    # Codes near a rounding boundary may differ: they are counted, and do not fail the check.
    ours = _encode(x, spec)
    return np.asarray(_decode(theirs, spec)), _count_different(ours.codes, theirs.codes), x.size


_encode = jax.jit(encode, static_argnums=1)
_decode = jax.jit(decode, static_argnums=1)


def _read_q8_k(coded: UInt8[np.ndarray, "R bytes"]) -> Encoded:
    """Read blocks of 256 values: a float32 scale, the codes, and 16 int16 sums, which are not needed."""
    # block_q8_K of ggml-common.h.
    blocks = coded.reshape(coded.shape[0], -1, 4 + 256 + 32)
    codes: Int8[np.ndarray, "R G 256"] = np.ascontiguousarray(blocks[..., 4:260]).view(np.int8)
    scale = np.ascontiguousarray(blocks[..., :4]).view(np.float32)[..., 0]
    return Encoded(codes=codes.reshape(coded.shape[0], -1), scale=scale)


def check_products(
    rules: Sequence[BoundRule], local_model: LocalModel, tensors: dict[str, GgufTensor]
) -> Iterator[ProductCheck]:
    """Compare the products of every matrix."""
    for rule in rules:
        tensor = tensors.get(rule.theirs[0])
        if tensor is not None and is_matmul_weight(tensor, tensors):
            yield check_product(rule, local_model, tensor)
