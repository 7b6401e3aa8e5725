"""verify-export: three levels that hold for what was exported, and that name what was changed."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmjax.cli.quantizing import verify_export_command
from slmjax.convert.gguf.container import GgufFile, PendingTensor, read_gguf, write_gguf
from slmjax.convert.import_export import Target, WeightType, export_model
from slmjax.convert.verify.export import Verification, verify_export
from slmjax.convert.verify.loss_check import paired
from slmjax.data.config import DataConfig
from slmjax.formats.presets import preset
from slmjax.models.architecture import ModelConfig
from slmjax.quantization.ptq.round_to_nearest import quantize_model
from slmjax.quantization.rules import QuantRule
from tests.convert.verify.models import LLAMA, MOE, QWEN, TEXT, WIDE, write_untrained


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        TEXT + "Zoë's naïve façade: 3 €. " + TEXT, encoding="utf-8"
    )  # a window ends inside a character
    return str(path)


def made(directory: Path, config: ModelConfig, *pairs: tuple[str, str], **options: Any) -> tuple[Path, Path]:
    """A model, quantized where there are rules, and its file."""
    model = write_untrained(directory / "source", config)
    if pairs:
        rules = tuple(QuantRule(paths=paths, weight=preset(name)) for paths, name in pairs)
        model, source = directory / "model", model
        quantize_model(source, model, rules=rules)
    export_model(model, directory / "model.gguf", to=Target.GGUF, **options)
    return model, directory / "model.gguf"


def verified(model: Path, file: Path, text: str, *, max_tokens: int = 96) -> Verification:
    data = DataConfig(path=text, heldout_fraction=0.0)
    return verify_export(model, file, data=data, max_tokens=max_tokens, window=24)


@pytest.mark.parametrize(
    ("config", "pairs", "inputs"),
    [
        (LLAMA, (("embed|down", "q8_0"), (".", "q4_0")), {"Q8_0"}),
        (MOE, (("experts/up", "q8_0"), (".", "q4_0")), {"Q8_0", "F32"}),
        (WIDE, (("mixer", "tq2_0"), ("ffn", "mxfp4"), (".", "q8_0")), {"Q8_0", "Q8_K"}),
    ],
    ids=["llama", "moe", "wide"],
)
def test_what_was_exported_is_what_the_engine_computes(
    tmp_path: Path, text: str, config: ModelConfig, pairs: tuple[tuple[str, str], ...], inputs: set[str]
) -> None:
    found = verified(*made(tmp_path, config, *pairs), text)
    assert found.holds and found.bytes_hold and found.products_hold
    assert all(one.differing == 0 and not one.differing_codes for one in found.tensors)
    assert (
        sum(one.differing_codes is not None for one in found.tensors)
        == sum(one.type != "F32" for one in found.tensors)
        > 5
    )
    assert {one.input_type for one in found.products} == inputs
    assert sum(one.input_codes for one in found.products) > 0
    assert sum(one.flipped_codes for one in found.products) <= 1e-3 * sum(
        one.input_codes for one in found.products
    )
    assert all(one.error < 1e-6 for one in found.products), "looser bounds are what any order of sums keeps"
    loss = found.loss
    assert loss is not None and loss.tokens == 96 and loss.windows == 4
    assert abs(loss.difference) < 2e-3 < abs(loss.engine - loss.as_trained) + 2e-3, (
        "the engine quantizes activations, and slmjax does the same"
    )
    assert abs(loss.difference) < 0.2 * abs(loss.engine - loss.as_trained)
    assert loss.standard_error > 0 and loss.tolerance >= 2 * loss.floor >= 0


def test_full_precision_is_equal_to_a_millionth(tmp_path: Path, text: str) -> None:
    model, file = made(tmp_path, QWEN)
    found = verified(model, file, text, max_tokens=60)
    assert found.holds and found.loss is not None
    assert abs(found.loss.difference) < 1e-6 * found.loss.ours and found.loss.as_trained == pytest.approx(
        found.loss.ours, rel=1e-6
    )
    export_model(model, tmp_path / "half.gguf", to=Target.GGUF, dtype=WeightType.F16)
    half = verified(model, tmp_path / "half.gguf", text, max_tokens=4)
    assert not half.bytes_hold and not half.holds
    assert {one.type for one in half.tensors if not one.holds} == {"F16"}


# What was changed -------------------------------------------------------------------------------------------
def tampered(
    file: Path, out: Path, change: dict[str, Any], *, metadata: dict[str, Any] | None = None
) -> Path:
    """The file with other bytes of some tensors; None leaves a tensor out."""
    content: GgufFile = read_gguf(file)
    pending = []
    for name, tensor in content.tensors.items():
        raw = np.array(tensor.raw)
        if name in change:
            if change[name] is None:
                continue
            change[name](raw)
        values = (
            raw.view(np.float32).reshape(tensor.shape)
            if tensor.type == "F32"
            else raw.reshape(*tensor.shape[:-1], -1)
        )
        dtype = np.dtype(np.float32) if tensor.type == "F32" else tensor.type
        pending.append(
            PendingTensor(
                name=name, shape=tensor.shape, dtype=dtype, read=functools.partial(np.asarray, values)
            )
        )
    keys = {**content.metadata, **(metadata or {})}
    write_gguf(out, architecture=keys.pop("general.architecture"), metadata=keys, tensors=pending)
    return out


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(tmp_path_factory.mktemp("quantized"), QWEN, (".", "q4_0"))


def one_code(raw: np.ndarray) -> None:
    raw[2] ^= 0x10  # the first block's code of its 17th number


def test_a_changed_code_is_named_and_the_status_is_1(
    quantized: tuple[Path, Path], tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = quantized
    other = tampered(file, tmp_path / "other.gguf", {"blk.0.ffn_down.weight": one_code})
    options = [str(model), str(other), "--data", text, "--max-tokens", "8", "--window", "8"]
    assert verify_export_command(options) == 1
    printed = capsys.readouterr().out
    assert (
        "1 bytes     FAILS" in printed
        and "blk.0.ffn_down.weight (Q4_0): 1 of 6,144 values differ (1 codes, 0 scales)" in printed
    )
    assert (
        "2 products  FAILS" in printed
        and printed.count("blk.0.ffn_down.weight") == 2
        and "attn_q" not in printed
    )
    assert verify_export_command([str(model), str(file), *options[2:], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["holds"]
        and report["bytes_hold"]
        and report["tokenizer_holds"]
        and report["loss"]["tokens"] == 8
    )
    tokens = list(read_gguf(file).metadata["tokenizer.ggml.tokens"])
    tokens[70], tokens[71] = tokens[71], tokens[70]
    swapped = tampered(file, tmp_path / "swapped.gguf", {}, metadata={"tokenizer.ggml.tokens": tokens})
    assert verify_export_command([str(model), str(swapped), *options[2:]]) == 1
    printed = capsys.readouterr().out
    assert (
        "3 loss      holds" in printed
        and "4 tokenizer FAILS: 1 of" in printed
        and "tokenizer.ggml.tokens: 2 of 258 entries differ" in printed
    )


def test_scales_vectors_and_settings_are_compared(
    quantized: tuple[Path, Path], tmp_path: Path, text: str
) -> None:
    model, file = quantized
    change = {
        "blk.0.attn_k.weight": lambda raw: raw.__setitem__(0, raw[0] ^ 1),
        "output_norm.weight": lambda raw: raw.__setitem__(0, raw[0] ^ 1),
    }
    found = verified(model, tampered(file, tmp_path / "other.gguf", change), text, max_tokens=4)
    bad = {one.name: one for one in found.tensors if not one.holds}
    assert bad.keys() == change.keys() and bad["output_norm.weight"].differing_codes is None
    assert (bad["blk.0.attn_k.weight"].differing_codes, bad["blk.0.attn_k.weight"].differing_scales) == (0, 1)

    missing = verified(model, tampered(file, tmp_path / "missing.gguf", {"blk.0.attn_k.weight": None}), text)
    assert (
        [one.name for one in missing.tensors if one.is_missing] == ["blk.0.attn_k.weight"]
        and missing.loss is None
        and not missing.holds
    )
    key = "qwen3.attention.layer_norm_rms_epsilon"
    settings = verified(model, tampered(file, tmp_path / "settings.gguf", {}, metadata={key: 0.5}), text)
    assert "norm_eps" in settings.settings[0] and settings.loss is None and not settings.bytes_hold


def test_text_is_needed(quantized: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"has no config.json with its training data"):
        verify_export(*quantized)


def test_the_standard_error_is_that_of_windows() -> None:
    """Of windows of 10 tokens each, that of their means: 0.1, 0.3, 0.2 have 0.1/sqrt(3); and longer windows
    count for more.
    """
    mean, error = paired(np.array([1.0, 3.0, 2.0]), np.array([10, 10, 10]))
    assert (mean, error) == (pytest.approx(0.2), pytest.approx(0.1 / np.sqrt(3)))
    # 30 tokens of 0.1 and 10 of 0.5: 0.2; deviations -3 and 3 of the sums, over 40 tokens.
    mean, error = paired(np.array([3.0, 5.0]), np.array([30, 10]))
    assert (mean, error) == (pytest.approx(0.2), pytest.approx(np.sqrt(2 * 18) / 40))
    assert paired(np.array([1.0]), np.array([10])) == (0.1, 0.0)
