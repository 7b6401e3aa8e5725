"""Golden codes and scales of other packages for the same values.

`python -m tests.formats.make_golden [PACKAGE ...]` writes golden/PACKAGE.npz. With --check it writes nothing,
but compares the results of the installed packages with the files and prints differences. A file holds the
codes and scales of each preset ("q4_0/codes", "q4_0/scale", ...), and the versions that made it. The encoded
values are in numbers.npz. The extra `oracle` has the packages.
"""

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parent / "golden"
WIDTH = 256
Arrays = dict[str, np.ndarray]


def input_values() -> np.ndarray:
    """Return float32 [15, 256]: rows of different kinds, described in comments."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((8, WIDTH)).astype(np.float32)
    normal[0] *= np.float32(0.02)  # a weight
    normal[1, [3, 40]] = 30, -25  # outliers
    normal[2] = _ties()
    # Values of 8 bits, with many ties, and with largest magnitudes of both signs.
    normal[3] = (normal[3] * 16).round() / 16
    normal[4] *= np.float32(1e-6)  # subnormal float16 scales
    normal[4, :32] *= np.float32(1e-3)  # and below all of them
    normal[5] *= np.float32(9e3)
    normal[5, 100] = 6e4
    normal[6] = abs(normal[6])
    normal[6, 128:] *= -1
    normal[7] = 0
    # Values so close to a tie that the kind of division by the scale decides.
    rows = [
        [(7.5, 32), (7.0, 32), (8.0, 32), (127.0, 32)] * 2,
        [(7.5, 128), (7.0, 128)],
        [(127.5, 256)],
        [(127.0, 256)],
        [(7.0, 256)],
    ]
    near = [np.concatenate([_near_ties(rng, *group) for group in row]) for row in rows]
    near.append(np.concatenate([_near_ties(rng, 7.0, size, short=True) for size in (32, 32, 64, 128)]))
    lowest = np.float32(-0.05)
    highest = np.float32(0.07)  # of an asymmetric format
    near.append(((rng.integers(-100, 140, WIDTH) + 0.5) * (float(highest - lowest) / 255)).astype(np.float32))
    near[-1][:2] = lowest, highest
    return np.concatenate([normal, near])


def of_one_size(x: np.ndarray) -> np.ndarray:
    """Remove the row of large values, with which a scale for the tensor would round the others to zero."""
    return np.delete(x, 5, axis=0)


def _ties() -> np.ndarray:
    """Return groups of 32: zeros, then groups of ties, each at the scale of another format."""
    halves = np.arange(-16, 16, dtype=np.float32) + np.float32(0.5)
    groups = [np.zeros(32), halves % 8 - 4]  # a largest magnitude of 3.5, negative first
    for largest in (-8.0, 7.5, 7.0, 127.0, 127.5, 6.0):
        group = np.clip(halves * (4 if abs(largest) > 100 else 0.5), -abs(largest), abs(largest))
        group[5] = largest
        groups.append(group / 16)
    return np.concatenate(groups).astype(np.float32)


def _near_ties(rng: np.random.Generator, divisor: float, size: int, short: bool = False) -> np.ndarray:
    """Return a group whose scale is its largest magnitude over `divisor`, in bfloat16 if `short`."""
    largest = np.float32(rng.uniform(0.05, 0.1))
    scale = (
        float((largest / np.float32(divisor)).astype(ml_dtypes.bfloat16))
        if short
        else float(largest) / divisor
    )
    codes = rng.integers(-int(divisor) + 1, int(divisor) - 1, size)
    group = ((codes + 0.5) * scale).astype(np.float32)
    group[rng.integers(size)] = -largest
    return group


def gguf_blocks(x: np.ndarray) -> Arrays:
    """Return the blocks of gguf-py's quantizers."""
    import gguf

    types = {"q4_0": "Q4_0", "q8_0": "Q8_0", "tq2_0": "TQ2_0", "mxfp4_gguf": "MXFP4"}
    made: Arrays = {}
    for name, kind in types.items():
        # A largest magnitude of zero has no logarithm.
        with np.errstate(divide="ignore", invalid="ignore"):
            made[f"{name}/blocks"] = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
        made[f"{name}/decoded"] = gguf.quants.dequantize(
            made[f"{name}/blocks"], gguf.GGMLQuantizationType[kind]
        )
    return made


def torchao_tensors(x: np.ndarray) -> Arrays:
    """Return tensors of torchao's 8da4w, MX and NVFP4 recipes and of ParetoQ's and BitNet's quantizers."""
    import torch
    from torchao.prototype.mx_formats.kernels import unpack_uint4
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    weight = torch.from_numpy(x)
    made: Arrays = {}
    for name, mapping, block, low, high in (
        ("torchao_int4", MappingType.SYMMETRIC, (1, 32), -8, 7),
        ("torchao_int8_token", MappingType.ASYMMETRIC, (1, WIDTH), -128, 127),
    ):
        bounds: dict[str, Any] = {"quant_min": low, "quant_max": high}
        scale, zero = choose_qparams_affine(
            weight, mapping, block, target_dtype=torch.int8, zero_point_dtype=torch.int8, **bounds
        )
        codes = quantize_affine(weight, block, scale, zero, output_dtype=torch.int8, **bounds)
        made |= {f"{name}/codes": codes.numpy(), f"{name}/scale": scale.reshape(len(x), -1).numpy()}
        if mapping is MappingType.ASYMMETRIC:
            made[f"{name}/zero"] = zero.reshape(len(x), -1).numpy()
    for name, kind in (
        ("mxfp4", torch.float4_e2m1fn_x2),
        ("mxfp8_e4m3", torch.float8_e4m3fn),
        ("mxfp8_e5m2", torch.float8_e5m2),
    ):
        scale, data = to_mx(weight, kind, 32)
        patterns = unpack_uint4(data) if name == "mxfp4" else data.view(torch.uint8)
        made |= {
            f"{name}/codes": patterns.numpy().view(np.int8).reshape(x.shape),
            f"{name}/scale": _powers_of_two(scale),
        }
    weight = torch.from_numpy(of_one_size(x))
    tensor_scale = per_tensor_amax_to_scale(weight.abs().max())
    scale, data = nvfp4_quantize(weight, per_tensor_scale=tensor_scale)
    made |= {
        "nvfp4/codes": unpack_uint4(data).numpy().view(np.int8).reshape(weight.shape),
        "nvfp4/scale": scale.float().numpy(),
    }
    return made | {"nvfp4/tensor_scale": tensor_scale.numpy()} | _torchao_training(weight)


def _powers_of_two(scale: Any) -> np.ndarray:
    import torch

    exponents = scale.view(torch.uint8).numpy().astype(np.uint32)
    return np.where(exponents == 0, np.uint32(1 << 22), exponents << 23).view(np.float32)


def _torchao_training(weight: Any) -> Arrays:
    """Return codes for a scale from the caller: per row for the stretched grids, per tensor for BitNet."""
    from torchao.prototype.paretoq.models.utils_quant import StretchedElasticQuant
    from torchao.prototype.quantized_training.bitnet import get_bitnet_scale, quantize_bitnet_weight

    weight = weight[:4]
    alpha = weight.abs().amax(-1, keepdim=True)
    made: Arrays = {}
    for name, bits, divisor in (("stretched2_g32", 2, 4.0), ("stretched_ternary_row", 0, 1.5)):
        values = StretchedElasticQuant.apply(weight, alpha, bits, False)
        made |= {
            f"{name}/given_codes": (values / alpha * divisor).round().char().numpy(),
            f"{name}/given_scale": (alpha / divisor).numpy(),
        }
    scale = get_bitnet_scale(weight)
    return made | {
        "ternary_row/given_codes": quantize_bitnet_weight(weight, scale).numpy(),
        "ternary_row/given_scale": scale.numpy(),
    }


def compressed_tensors_arguments(x: np.ndarray) -> Arrays:
    """Return compressed-tensors' scales from observed minima and maxima, and its codes."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    weight = torch.from_numpy(x)
    made: Arrays = {}
    for name, bits, size in (("w4a16_g32", 4, 32), ("w4a16_g128", 4, 128), ("int8_row", 8, None)):
        shared = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
        arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=True, **shared)
        groups = weight.reshape(len(x), -1, size or WIDTH)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        codes = quantize(weight, scale, zero, arguments, dtype=torch.int8)
        made |= {f"{name}/codes": codes.numpy(), f"{name}/scale": scale.numpy()}
    return made


def onnxruntime_blocks(x: np.ndarray) -> Arrays:
    """Return the output of the kernel of MatMulNBits' default quantizer; its weights are [in, out]."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    rows = len(x)
    blocks = WIDTH // 32
    packed = np.zeros((rows, blocks, 16), np.uint8)
    scale = np.zeros((rows, blocks), np.float32)
    zeros = np.zeros((rows, blocks // 2), np.uint8)
    quantize_matmul_4bits(packed, np.ascontiguousarray(x.T), scale, zeros, 32, rows, WIDTH, True)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int8).reshape(x.shape) - 8
    return {"onnx_int4_b32/codes": codes, "onnx_int4_b32/scale": scale}


def ai_edge_quantizer_tensors(x: np.ndarray) -> Arrays:
    """Return the output of ai-edge-quantizer's min-max recipe for LiteRT."""
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as uniform
    from ai_edge_quantizer.qtyping import QuantGranularity, UniformQuantParams

    made: Arrays = {}
    rows = [("litert_int8_row", 8, None), ("litert_int4_row", 4, None)]
    for name, bits, size in rows + [(f"litert_int4_b{size}", 4, size) for size in (32, 64, 128, 256)]:
        groups = x.reshape(len(x), -1, size or WIDTH)
        granularity = QuantGranularity.CHANNELWISE if size is None else QuantGranularity[f"BLOCKWISE_{size}"]
        zero, scale = uniform.tensor_zp_scale_from_min_max(
            groups.min(-1), groups.max(-1), bits, True, granularity
        )
        parameters = UniformQuantParams(
            num_bits=bits,
            quantized_dimension=0 if size is None else 1,
            scale=scale,
            zero_point=zero,
            symmetric=True,
            block_size=size or 0,
        )
        # Blocks whose scale is too small for float16 are divided by zero there.
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = uniform.uniform_quantize(x, parameters, is_blockwise_quant=size is not None)
        made |= {f"{name}/codes": codes.astype(np.int8), f"{name}/scale": scale}
    return made


PACKAGES: dict[str, tuple[Callable[[np.ndarray], Arrays], tuple[str, ...]]] = {
    "gguf": (gguf_blocks, ("gguf", "numpy")),
    "torchao": (torchao_tensors, ("torchao", "torch")),
    "compressed-tensors": (compressed_tensors_arguments, ("compressed-tensors", "torch")),
    "onnxruntime": (onnxruntime_blocks, ("onnxruntime",)),
    "ai-edge-quantizer": (ai_edge_quantizer_tensors, ("ai-edge-quantizer", "numpy")),
}


def main(arguments: list[str]) -> int:
    """Return the number of differences."""
    chosen = [argument for argument in arguments if argument != "--check"] or list(PACKAGES)
    differences = 0
    if "--check" not in arguments:
        GOLDEN.mkdir(exist_ok=True)
        np.savez_compressed(GOLDEN / "numbers.npz", x=input_values())
    for package in chosen:
        make, distributions = PACKAGES[package]
        with np.load(GOLDEN / "numbers.npz") as file:
            made = make(file["x"])
        path = GOLDEN / f"{package}.npz"
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in distributions)
        if "--check" not in arguments:
            np.savez_compressed(path, made_by=np.array(versions), **made)
            print(path.name, versions)
            continue
        with np.load(path) as file:
            golden = {name: file[name] for name in file.files if name != "made_by"}
            wrong = sorted(
                name for name in golden.keys() | made.keys() if not _same(golden.get(name), made.get(name))
            )
            print(f"{package}: {len(wrong)} differences between {file['made_by']} and {versions}", *wrong)
        differences += len(wrong)
    return differences


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (
        a is not None
        and b is not None
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.tobytes() == b.tobytes()
    )


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
