"""Quantized parameters in GGUF: blocks hold the very codes and scales, wherever a family's rules move
them.
"""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.checkpoints.safetensors_files import ModelFiles, StoredFormat
from slmjax.checkpoints.stored_model import LocalModel, open_local_model
from slmjax.convert.families import GGUF_FAMILIES, phi3
from slmjax.convert.family import BoundRule, Rule, bind
from slmjax.convert.gguf.container import GgufFile, read_gguf
from slmjax.convert.gguf.tensor_codes import blocks_of, container_of
from slmjax.convert.import_export import Target, WeightType, export_model, import_model
from slmjax.convert.source import choose_family
from slmjax.formats.coding import Encoded, decode, encode
from slmjax.formats.presets import preset
from slmjax.models.architecture import ModelConfig
from slmjax.quantization.ptq.round_to_nearest import quantize_model
from slmjax.quantization.rules import QuantRule
from tests.convert.verify.models import LLAMA, MOE, QWEN, WIDE, write_untrained

EXPECTED = {"q4_0": "Q4_0", "q8_0": "Q8_0", "tq2_0": "TQ2_0", "mxfp4": "MXFP4", "int8_row": "Q8_0"}


def rules(*pairs: tuple[str, str | None]) -> tuple[QuantRule, ...]:
    return tuple(
        QuantRule(paths=paths, weight=None if name is None else preset(name)) for paths, name in pairs
    )


def exported(
    directory: Path, config: ModelConfig, *pairs: tuple[str, str | None], **options: Any
) -> tuple[Path, GgufFile, Any]:
    """The quantized model's directory, the file made of it, and what `export_model` says of it."""
    source = write_untrained(directory / "source", config)
    quantize_model(source, directory / "quantized", rules=rules(*pairs))
    written = export_model(directory / "quantized", directory / "model.gguf", to=Target.GGUF, **options)
    return directory / "quantized", read_gguf(directory / "model.gguf"), written


def bound_of(config: ModelConfig) -> list[BoundRule]:
    return choose_family(config, GGUF_FAMILIES, format_name="GGUF", preferred=None, tolerance=5e-7).rules


CASES = {
    "llama": (LLAMA, (("embed", "q8_0"), ("layers/1/.*/down", None), (".", "q4_0")), 2),
    "moe": (MOE, (("experts/down", "q8_0"), (".", "q4_0")), 2),
    "wide": (WIDE, (("mixer", "tq2_0"), ("ffn", "mxfp4"), (".", "q8_0")), 37),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.composes("experts", "quantization", "import or export")
def test_blocks_are_what_the_gguf_package_packs(tmp_path: Path, case: str) -> None:
    """Rounding to nearest in a preset is GGUF's own quantizer, so that its bytes of the plain weights are
    ours of the codes.
    """
    config, pairs, file_type = CASES[case]
    quantized, file, written = exported(tmp_path, config, *pairs)
    plain = open_local_model(tmp_path / "source")
    coded = open_local_model(quantized)
    types = set()
    for one in bound_of(config):
        tensor = file.tensors[one.theirs[0]]
        formats = {coded.formats[name].spec for name in one.ours if name in coded.formats}
        numbers = one.write([plain.read(name) for name in one.ours])[0]
        if not formats:
            assert tensor.type == "F32", tensor.name
            np.testing.assert_array_equal(tensor.read(), numbers, err_msg=tensor.name)
            continue
        (spec,) = formats
        kind = gguf.GGMLQuantizationType[next(EXPECTED[name] for name in EXPECTED if preset(name) == spec)]
        types.add(kind.name)
        assert tensor.type == kind.name, tensor.name
        theirs = gguf.quants.quantize(np.ascontiguousarray(numbers), kind)
        if kind.name != "MXFP4":  # whose zero has two codes
            np.testing.assert_array_equal(tensor.raw, theirs.reshape(-1), err_msg=tensor.name)
        decoded = one.write([coded.read(name) for name in one.ours])[0]
        np.testing.assert_array_equal(
            gguf.quants.dequantize(theirs, kind).reshape(decoded.shape), decoded, err_msg=tensor.name
        )
    assert len(types) >= 2 and ("output.weight" in file.tensors) == (case == "llama"), (
        "a tied table is one tensor"
    )
    assert (
        file.metadata["general.file_type"] == file_type and file.metadata["general.quantization_version"] == 2
    )
    assert written.bytes == sum(tensor.raw.size for tensor in file.tensors.values())
    assert written.parameters == sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values())
    assert "codes and scales are written as trained" in written.notes[0] and all(
        name in written.notes[0] for name in types
    )


def test_scales_of_rows_are_repeated_in_every_block(tmp_path: Path) -> None:
    """Symmetric int8 with one scale a row, in float16, is no format of GGUF, and Q8_0 holds it."""
    spec = dataclasses.replace(preset("litert_int8_row"), scale_type=preset("q8_0").scale_type)
    source = write_untrained(tmp_path / "source", QWEN)
    quantize_model(source, tmp_path / "rows", rules=(QuantRule(paths="ffn/up", weight=spec),))
    export_model(tmp_path / "rows", tmp_path / "rows.gguf", to=Target.GGUF)
    tensor = read_gguf(tmp_path / "rows.gguf").tensors["blk.0.ffn_up.weight"]
    encoded = encode(jnp.asarray(ModelFiles(source).read("layers/0/ffn/up/weight")), spec, axis=-2)
    assert tensor.type == "Q8_0" and tensor.shape == (96, 64)
    np.testing.assert_array_equal(tensor.read(), np.asarray(decode(encoded, spec, axis=-2)).T)
    blocks = tensor.raw.reshape(96, 2, 34)
    np.testing.assert_array_equal(blocks[:, 0, :2], blocks[:, 1, :2])


def test_decoded_numbers_where_they_are_asked_for(tmp_path: Path) -> None:
    quantized, file, written = exported(tmp_path, QWEN, (".", "q4_0"), dtype=WeightType.F32)
    assert {tensor.type for tensor in file.tensors.values()} == {"F32"} and file.metadata[
        "general.file_type"
    ] == 0
    assert "general.quantization_version" not in file.metadata
    assert "8 quantized parameters are written dequantized, in float32" in written.notes[0]
    stored = ModelFiles(quantized)
    np.testing.assert_array_equal(file.tensors["token_embd.weight"].read(), stored.read("embed/table"))

    to_hf = export_model(quantized, tmp_path / "hf", to=Target.HF)
    assert "quantized parameters are written dequantized" in to_hf.notes[0]
    import_model(tmp_path / "hf", tmp_path / "back")
    back = ModelFiles(tmp_path / "back")
    for name in ("embed/table", "layers/0/mixer/key/weight"):
        np.testing.assert_array_equal(back.read(name), stored.read(name))


# Blocks that tensors made of several parameters need --------------------------------------------------------
def phi_own(**names: str | None) -> tuple[BoundRule, LocalModel]:
    """Queries, keys and values that Phi-3 joins, in formats of their own, and the rule that joins them."""
    shapes = {"query": (64, 32), "key": (64, 16), "value": (64, 16)}
    arrays = {
        f"mixer/{name}/weight": np.random.default_rng(1).normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    specs = {f"mixer/{name}/weight": preset(format) for name, format in names.items() if format is not None}

    def encoded(name: str) -> Encoded:
        return encode(jnp.asarray(arrays[name]), specs[name], axis=-2)

    def read(name: str) -> np.ndarray:
        return np.asarray(decode(encoded(name), specs[name], axis=-2))

    local_model = LocalModel(
        path=Path("."),
        config=QWEN,
        read=read,
        dtype=lambda _: np.dtype(np.float32),
        family=None,
        step=None,
        encoded=encoded,
        formats={name: StoredFormat(spec=spec, axis=-2) for name, spec in specs.items()},
    )
    rule = next(rule for rule in phi3.GGUF_LAYER if "mixer/query/weight" in rule.ours)
    return BoundRule(
        rule=rule,
        ours=list(rule.ours),
        theirs=["attn_qkv.weight"],
        shapes=[arrays[name].shape for name in rule.ours],
    ), local_model


def test_joined_parameters_share_the_blocks_that_hold_all() -> None:
    one, local_model = phi_own(query="q4_0", key="q8_0", value="int3_g32")
    assert container_of(one, local_model) == "Q8_0"
    numbers = gguf.quants.dequantize(blocks_of(one, local_model, "Q8_0"), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(numbers, np.concatenate([local_model.read(name).T for name in one.ours]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"query": "q4_0", "key": "q4_0", "value": None},
            r"joins mixer/value/weight, in floating point, and mixer/query/weight, quantized",
        ),
        (
            {"query": "q4_0", "key": "mxfp4", "value": "q4_0"},
            r"joins MXFP4 and Q4_0: give .* the same format",
        ),
        (
            {"query": "nvfp4", "key": "nvfp4", "value": "nvfp4"},
            r"mixer/query/weight fits no block type of GGUF: nvfp4 .*--dtype f32",
        ),
    ],
)
def test_what_no_blocks_hold_together_is_refused(names: dict[str, str | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        container_of(*phi_own(**names))


def test_scales_that_are_no_float16_are_refused_by_name(tmp_path: Path) -> None:
    source = write_untrained(tmp_path / "source", QWEN)
    quantize_model(source, tmp_path / "wide", rules=rules(("ffn/up", "w4a16_g32")))
    with pytest.raises(
        ValueError, match=r"layers/0/ffn/up/weight does not fit Q4_0: .* not float16 values.*--dtype f32"
    ):
        export_model(tmp_path / "wide", tmp_path / "wide.gguf", to=Target.GGUF)
    assert not list(tmp_path.glob("wide.gguf*"))


def test_a_rule_that_computes_with_numbers_is_found_out() -> None:
    """A scale that is stored whole: the numbers of its tensor are not those of any codes."""
    weight = np.random.default_rng(2).normal(size=(64, 32)).astype(np.float32)
    spec = preset("q4_0")
    encoded: Encoded = encode(jnp.asarray(weight), spec, axis=-2)
    local_model = dataclasses.replace(
        phi_own()[1],
        read=lambda _: np.asarray(decode(encoded, spec, axis=-2)),
        encoded=lambda _: encoded,
        formats={"up": StoredFormat(spec=spec, axis=-2)},
    )
    moved = Rule(
        ours=("up",), theirs=("up",), read=lambda arrays, _: arrays, write=lambda arrays: [arrays[0].T]
    )
    one = BoundRule(rule=moved, ours=["up"], theirs=["ffn_up.weight"], shapes=[(64, 32)])
    assert blocks_of(one, local_model, "Q4_0").shape == (32, 36)
    centered = dataclasses.replace(moved, write=lambda arrays: [arrays[0].T + 1])
    with pytest.raises(ValueError, match=r"ffn_up.weight|up does not fit Q4_0"):
        blocks_of(dataclasses.replace(one, rule=centered), local_model, "Q4_0")


def test_every_family_is_bound_to_tensors_one_by_one() -> None:
    """What `_pending` relies on: a rule of GGUF makes one tensor."""
    assert all(
        len(one.theirs) == 1
        for config in (LLAMA, QWEN, MOE)
        for one in bind(_family(config).tensor_map_for(config), config)
    )


def _family(config: ModelConfig) -> Any:
    return choose_family(config, GGUF_FAMILIES, format_name="GGUF", preferred=None, tolerance=5e-7).family
