"""Presets equal the packages that define their formats, at any optimisation level of the compiler."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.formats import blocks
from slmjax.formats.coding import Encoded, decode, encode, fake_quant
from slmjax.formats.presets import PRESETS
from slmjax.formats.spec import Granularity, ScaleType, Scaling
from tests.formats.make_golden import GOLDEN, PACKAGES, of_one_size

ROOT = Path(__file__).resolve().parent.parent.parent
# The compiler may change arithmetic only when it optimises; users' programs are optimised, tests' are not.
LEVELS = (0, 3)
NOT_MADE_BY_A_PACKAGE = {
    *(f"int{bits}_g32" for bits in range(2, 9)),
    *("ternary_g256", "stretched_ternary_g256", "binary_g32", "binary_row"),
}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


VALUES = load("numbers")["x"]
FILES = {package: load(package) for package in PACKAGES}


def names(package: str, ending: str) -> list[str]:
    return sorted(key.removesuffix(ending) for key in FILES[package] if key.endswith(ending))


def compiled(fn: Any, *arguments: Any, level: int) -> Any:
    arguments = jax.tree.map(jnp.asarray, arguments)
    return (
        jax.jit(fn)
        .lower(*arguments)
        .compile(compiler_options={"xla_backend_optimization_level": level})(*arguments)
    )


def input_of(name: str) -> np.ndarray:
    return of_one_size(VALUES) if PRESETS[name].is_two_level else VALUES


def encode_all(inputs: dict[str, Any], axis: int) -> dict[str, Encoded]:
    return {name: encode(x, PRESETS[name], axis=axis) for name, x in inputs.items()}


def test_every_preset_is_compared() -> None:
    compared = {key.split("/")[0] for package in PACKAGES for key in FILES[package] if "/" in key}
    assert compared | NOT_MADE_BY_A_PACKAGE == set(PRESETS)
    assert not compared & NOT_MADE_BY_A_PACKAGE


@pytest.mark.smoke
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("package", [package for package in PACKAGES if names(package, "/codes")])
def test_codes_and_scales(package: str, level: int) -> None:
    golden = FILES[package]
    inputs = {name: input_of(name) for name in names(package, "/codes")}
    for name, encoded in compiled(lambda x: encode_all(x, -1), inputs, level=level).items():
        np.testing.assert_array_equal(encoded.scale, golden[f"{name}/scale"], err_msg=name)
        if PRESETS[name].is_asymmetric:
            np.testing.assert_array_equal(encoded.zero, golden[f"{name}/zero"], err_msg=name)
        if PRESETS[name].is_two_level:
            assert encoded.tensor_scale == golden[f"{name}/tensor_scale"], name
        # With a scale that was rounded to zero, ai-edge-quantizer's codes are the ends of the range; all of
        # them represent zero.
        has_scale = np.repeat(golden[f"{name}/scale"] != 0, 256 // encoded.scale.shape[-1], axis=-1)
        np.testing.assert_array_equal(
            np.where(has_scale, encoded.codes, 0),
            np.where(has_scale, golden[f"{name}/codes"], 0),
            err_msg=name,
        )


@pytest.mark.parametrize("level", LEVELS)
def test_gguf_blocks(level: int) -> None:
    golden = FILES["gguf"]
    inputs = dict.fromkeys(names("gguf", "/blocks"), VALUES)
    for name, encoded in compiled(lambda x: encode_all(x, -1), inputs, level=level).items():
        container = blocks.container_for(PRESETS[name])
        np.testing.assert_array_equal(blocks.pack(encoded, container), golden[f"{name}/blocks"], err_msg=name)
        np.testing.assert_array_equal(decode(encoded, PRESETS[name]), golden[f"{name}/decoded"], err_msg=name)
        unpacked = blocks.unpack(golden[f"{name}/blocks"], container)
        np.testing.assert_array_equal(unpacked.codes, encoded.codes, err_msg=name)
        np.testing.assert_array_equal(unpacked.scale, encoded.scale, err_msg=name)


def test_codes_with_a_scale_from_the_caller() -> None:
    """ParetoQ's and BitNet's quantizers take their scale as an argument."""
    golden = FILES["torchao"]
    for name in names("torchao", "/given_codes"):
        scale = golden[f"{name}/given_scale"]
        granularity = Granularity.PER_CHANNEL if scale.ndim else Granularity.PER_TENSOR
        spec = dataclasses.replace(
            PRESETS[name], granularity=granularity, group_size=None, scale_type=ScaleType.FLOAT32
        )
        codes = encode(jnp.asarray(VALUES[:4]), spec, scale=jnp.asarray(scale.reshape(-1, 1))).codes
        np.testing.assert_array_equal(codes, golden[f"{name}/given_codes"], err_msg=name)


@pytest.mark.parametrize("level", LEVELS)
def test_inside_a_program(level: int) -> None:
    """In a loop over layers with a product and its gradient, values equal those of codes and scales."""
    chosen = {
        name: PRESETS[name]
        for name in (
            "q4_0",
            "q8_0",
            "torchao_int4",
            "torchao_int8_token",
            "w4a16_g32",
            "int8_row",
            "mxfp4_gguf",
        )
    }
    # layers, in, out
    stacked = jnp.asarray(VALUES[[0, 3, 8, 9, 10, 11, 13, 14]].reshape(2, 4, 256)).swapaxes(-1, -2)
    inputs = jnp.asarray(VALUES[:2])

    def loss(weights: Any, spec: Any) -> Any:
        def layer(total: Any, weight: Any) -> Any:
            rounded = fake_quant(weight, spec, axis=-2)
            straight_through = weight + jax.lax.stop_gradient(rounded - weight)
            return total + jnp.sum(jnp.tanh(inputs @ straight_through)), rounded

        return jax.lax.scan(layer, jnp.float32(0), weights)

    def program(weights: Any) -> Any:
        return {
            name: jax.value_and_grad(loss, has_aux=True)(weights, spec)[0][1] for name, spec in chosen.items()
        }

    decoded = compiled(program, stacked, level=level)
    encoded = compiled(
        lambda x: {name: encode(x, spec, axis=-2) for name, spec in chosen.items()}, stacked, level=level
    )
    for name, spec in chosen.items():
        np.testing.assert_array_equal(decoded[name], decode(encoded[name], spec, axis=-2), err_msg=name)
    for package in ("torchao", "compressed-tensors"):
        for name in set(names(package, "/codes")) & set(chosen):
            codes = FILES[package][f"{name}/codes"][[0, 3, 8, 9, 10, 11, 13, 14]].reshape(2, 4, 256)
            np.testing.assert_array_equal(encoded[name].codes, codes.swapaxes(-1, -2), err_msg=name)


def test_goldens_distinguish_reciprocals_from_divisions() -> None:
    """With the other operation some near-ties would go to another code."""
    chosen = (
        "q4_0",
        "q8_0",
        "torchao_int4",
        "torchao_int8_token",
        "w4a16_g32",
        "int8_row",
        "litert_int8_row",
        "litert_int4_b32",
    )
    other = {Scaling.RECIPROCAL: Scaling.DIVISION, Scaling.DIVISION: Scaling.RECIPROCAL}
    flipped = {
        name: dataclasses.replace(PRESETS[name], scaling=other[PRESETS[name].scaling]) for name in chosen
    }
    results = jax.jit(
        lambda x: {name: (encode(x, PRESETS[name]).codes, encode(x, flipped[name]).codes) for name in chosen}
    )(VALUES)
    for name, (ours, others) in results.items():
        assert np.sum(ours != others) > 3, name


@pytest.mark.nightly
@pytest.mark.parametrize("package", PACKAGES)
def test_packages_still_make_the_same(package: str) -> None:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"{package} is not installed: it comes with the extra `oracle`"
        )
    command = [sys.executable, "-m", "tests.formats.make_golden", "--check", package]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
