"""Rounding to nearest: what is written is what the rules say, the best clip is the best, and every command
opens it.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slmjax
from slmjax.checkpoints.loading import read_parameters
from slmjax.checkpoints.safetensors_files import ModelFiles
from slmjax.cli.quantizing import quantize_command
from slmjax.formats.coding import decode, encode, scale_of
from slmjax.formats.presets import preset
from slmjax.models.definition import define_for_inference, inference_config
from slmjax.quantization.estimators import FACTORS
from slmjax.quantization.fake_quantization import define_quantized, weight_formats
from slmjax.quantization.ptq.round_to_nearest import Clip, nearest, quantize_model, with_best_clip
from slmjax.quantization.rules import QuantPhase, QuantRule, quant_of
from tests.convert.verify.models import MOE, QWEN, TEXT, words, write_untrained


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("plain") / "source", MOE)


def logits(loaded: slmjax.Loaded) -> np.ndarray:
    return np.asarray(jax.jit(slmjax.logits)(loaded.model, jnp.asarray([words().encode(TEXT[:24])])))


def test_a_quantized_directory_computes_what_training_with_its_rules_does(
    source: Path, tmp_path: Path
) -> None:
    """Bit for bit: weights of experts, embedding and head, inputs and caches; nothing is rounded twice."""
    rules = (
        QuantRule(paths="attention|mixer/value", weight=None),
        *quant_of("q4_0+q8_0+q8_0").phases[0].rules,
    )
    quantize_model(source, tmp_path / "out", rules=rules)
    loaded = slmjax.load_model(tmp_path / "out")
    trained = define_for_inference(jax.tree.map(lambda x: x, MOE))
    config = inference_config(loaded.config)
    quantized = define_quantized(config, loaded.quant_phases)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (trained.params, trained.buffers),
    )
    _, params, buffers = read_parameters(source, MOE, *like)
    assert weight_formats(quantized) and loaded.quant_phases == (QuantPhase(rules=rules),)
    rounded = jax.jit(quantized.transform)(params)
    for name, array in loaded.params.items():
        np.testing.assert_array_equal(array, rounded[name], err_msg=name)
    model = quantized.merge_transformed(rounded, buffers)
    wanted = np.asarray(jax.jit(slmjax.logits)(model, jnp.asarray([words().encode(TEXT[:24])])))
    np.testing.assert_array_equal(logits(loaded), wanted)
    assert np.abs(wanted - logits(slmjax.load_model(source))).max() > 1e-3, "it is rounded at all"
    files = ModelFiles(tmp_path / "out")
    assert (
        "layers/0/mixer/value/weight" not in files.formats
        and "layers/0/ffn/router/weight" not in files.formats
    )
    assert files.encoded("layers/0/ffn/experts/down").codes.shape == (4, 32, 64)


# The best clip ----------------------------------------------------------------------------------------------
def test_one_far_number_is_cut_off() -> None:
    """int2 with steps of the largest magnitude loses all but the outlier; half of that keeps both."""
    x = np.zeros((32, 1), np.float32)
    x[:, 0] = np.where(np.arange(32) % 2, 0.5, -0.5)
    x[3] = 1.0
    spec = preset("int2_g32")
    plain, _, before = nearest(jnp.asarray(x), spec, 0)
    best, _, after = with_best_clip(jnp.asarray(x), spec, 0)
    assert np.asarray(plain.scale).item() == 1.0 and np.asarray(best.scale).item() < 0.56
    # 16 of -0.5 and 15 of 0.5, half a step away from two codes each, with scale 1; with 0.54 they are 0.04
    # off, and the outlier is 0.46.
    assert float(before) == pytest.approx(31 * 0.25 / 32)
    assert float(after) < 0.01
    np.testing.assert_array_equal(np.asarray(best.codes)[:4, 0], [-1, 1, -1, 1])


@pytest.mark.parametrize("name", ["q4_0", "torchao_int8_token"])
def test_the_best_of_all_factors_is_found_for_each_group(name: str) -> None:
    spec = preset(name)
    x = jnp.asarray(np.random.default_rng(5).standard_t(3, size=(64, 6)), jnp.float32)
    tried = [encode(x, spec, axis=0)] + [
        encode(x, spec, axis=0, scale=scale_of(x, spec, axis=0) * factor) for factor in FACTORS
    ]
    groups = np.asarray(tried[0].scale).shape[0]
    errors = np.stack(
        [
            np.square(np.asarray(decode(one, spec, axis=0)) - x)
            .reshape(groups, -1, 6)
            .sum(1, dtype=np.float64)
            for one in tried
        ]
    )
    found, before, after = jax.jit(with_best_clip, static_argnums=(1, 2))(x, spec, 0)
    own = (
        np.square(np.asarray(decode(found, spec, axis=0)) - x).reshape(groups, -1, 6).sum(1, dtype=np.float64)
    )
    np.testing.assert_allclose(own, errors.min(0), rtol=1e-4)
    assert float(before) == pytest.approx(errors[0].sum() / x.size, rel=1e-5)
    assert float(after) == pytest.approx(errors.min(0).sum() / x.size, rel=1e-4)
    assert after < 0.97 * before


# The command ------------------------------------------------------------------------------------------------
def test_the_command_tells_sizes_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_untrained(tmp_path / "source", QWEN)
    options = ["--rule", "embed=q8_0", "--rule", "mixer=none", "--format", "q4_0", "--clip", "search"]
    assert quantize_command([str(source), str(tmp_path / "out"), *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    matrices = {one["path"]: one for one in told["matrices"]}
    assert {path: one["format"] for path, one in matrices.items()} == {
        "embed/table": "q8_0",
        "layers/0/ffn/gate/weight": "q4_0",
        "layers/0/ffn/up/weight": "q4_0",
        "layers/0/ffn/down/weight": "q4_0",
    }
    down = matrices["layers/0/ffn/down/weight"]
    assert (down["numbers"], down["bytes"]) == (96 * 64, 96 * 64 // 32 * 18)
    assert all(one["error"] < one["nearest_error"] < 0.01 * one["power"] for one in matrices.values())
    plain = ModelFiles(source).read("layers/0/ffn/down/weight").astype(np.float64)
    error = np.square(ModelFiles(tmp_path / "out").read("layers/0/ffn/down/weight") - plain).mean()
    assert down["error"] == pytest.approx(error, rel=1e-4) and told["error"] < told["nearest_error"]
    rest = told["parameters"] - sum(one["numbers"] for one in matrices.values())
    assert told["bytes"] == sum(one["bytes"] for one in matrices.values()) + 4 * rest

    assert quantize_command([str(source), str(tmp_path / "again"), "--format", "int3_g32"]) == 0
    assert "int3_g32: 8 matrices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"--format q4_0, or --rule"),
        (["--format", "q4_1"], r"no number format 'q4_1'.*Did you mean"),
        (["--rule", "q4_0"], r"--rule is REGEX=FORMAT"),
        (["--rule", "mixer=q4_0+q8_0+q8_0"], r"caches, which are not parameters"),
        (
            ["--rule", "experts=q4_0", "--format", "q8_0"],
            r"the rule for 'experts' never applies to a parameter",
        ),
        (["--format", "tq2_0"], r"embed/table is 64 wide, which tq2_0 cannot hold"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, options: list[str], message: str) -> None:
    source = write_untrained(tmp_path / "source", QWEN)
    with pytest.raises(ValueError, match=message):
        quantize_command([str(source), str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    quantize_model(
        write_untrained(tmp_path / "source", QWEN),
        tmp_path / "out",
        rules=(QuantRule(paths="ffn", weight=preset("q4_0")),),
    )
    formats = tmp_path / "out" / "weights" / "formats.json"
    known: dict[str, Any] = json.loads(formats.read_text())
    formats.write_text(json.dumps({**known, "embed/table": known["layers/0/ffn/up/weight"]}))
    with pytest.raises(ValueError, match=r"has embed/table in codes, and the files lack"):
        slmjax.load_model(tmp_path / "out")
    formats.write_text("{")
    with pytest.raises(ValueError, match=r"formats.json .*copy it again"):
        slmjax.load_model(tmp_path / "out")


def test_a_quantized_model_can_be_rounded_again(source: Path, tmp_path: Path) -> None:
    """What is rounded is what it multiplies with: to the same format it stays as it is, without the
    search.
    """
    rules = (QuantRule(paths="ffn", weight=preset("q4_0")),)
    quantize_model(source, tmp_path / "once", rules=rules)
    again = quantize_model(tmp_path / "once", tmp_path / "twice", rules=rules, clip=Clip.NONE)
    assert again.error == 0
    first = ModelFiles(tmp_path / "once")
    second = ModelFiles(tmp_path / "twice")
    for name in first.formats:
        np.testing.assert_array_equal(first.read(name), second.read(name))
