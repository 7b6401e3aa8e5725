"""A run that was trained quantized: its codes, learned scales among them, are what is exported and what the
engine computes with.
"""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import slmjax
from slmjax.checkpoints import loading
from slmjax.checkpoints.loading import changed_rows, load_with_codes
from slmjax.convert.gguf.container import read_gguf
from slmjax.convert.import_export import Target, export_model
from slmjax.convert.verify.export import verify_export
from slmjax.data.config import DataConfig, Split
from slmjax.data.tokenizers import ByteTokenizer
from slmjax.formats.presets import preset
from slmjax.models.parameterization import Parameterization
from slmjax.quantization.ptq.round_to_nearest import quantize_model
from slmjax.quantization.rules import QuantConfig, QuantPhase, QuantRule
from slmjax.training.experiment import RunConfig
from slmjax.training.optim import OptimConfig
from tests.convert.verify.models import QWEN

MUP = {"parameterization": Parameterization.MUP, "base_width": 32, "base_head_dim": 16}


@pytest.fixture(scope="module")
def run(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4-bit weights, 2-bit ones with learned scales in the feed-forward layer, tables padded; muP, whose
    multipliers of scores and logits become part of norms.
    """
    rules = (QuantRule(paths="ffn", weight=preset("int2_g32"), input=preset("q8_0")), *_w4a8())
    experiment = slmjax.Experiment(
        model=dataclasses.replace(QWEN, vocab_size=None, vocab_multiple=64, **MUP),
        quant=QuantConfig(phases=(QuantPhase(rules=rules),)),
        data=DataConfig(
            path=str(workplace / "text.txt"),
            split=Split.TAIL,
            heldout_fraction=0.1,
            sequence_length=32,
            batch_size=8,
        ),
        tokenizer=ByteTokenizer(),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        run=RunConfig(
            name="coded", directory=str(tmp_path_factory.mktemp("runs")), steps=6, sample_prompts=()
        ),
    )
    return Path(slmjax.train(experiment, console=Console(file=io.StringIO())).run_dir)


def _w4a8() -> tuple[QuantRule, ...]:
    return (QuantRule(paths=".", weight=preset("q4_0"), input=preset("q8_0")),)


def test_what_was_trained_is_what_the_engine_computes(run: Path, tmp_path: Path) -> None:
    written = export_model(run, tmp_path / "run.gguf", to=Target.GGUF)
    tensors = read_gguf(tmp_path / "run.gguf").tensors
    assert {tensor.type for tensor in tensors.values()} == {"Q4_0", "F32"} and len(written.notes) == 1
    assert tensors["token_embd.weight"].shape == (258, 64), "padding is left out, of codes too"
    loaded, coded = load_with_codes(run)
    # Twice as wide as the base: half the logits.
    np.testing.assert_allclose(
        tensors["output_norm.weight"].read(), 0.5 * loaded.params["final_norm/scale"], rtol=1e-6
    )
    numbers, encoded = coded["layers/0/ffn/up/weight"]
    assert numbers.spec == preset("int2_g32") and set(np.unique(encoded.codes)) <= {-1, 0, 1}
    found = verify_export(run, tmp_path / "run.gguf", max_tokens=96, window=24)
    assert found.holds and found.step == 6 and found.loss is not None
    assert found.loss.as_trained == pytest.approx(found.loss.ours, rel=1e-5), (
        "it is trained with inputs as llama.cpp rounds them"
    )
    assert abs(found.loss.difference) < 1e-4


def test_the_ordinary_way_loses_the_codes(run: Path, tmp_path: Path) -> None:
    """Decoded and rounded again on another grid, the 2-bit layer is another model, and is found to be."""
    quantize_model(run, tmp_path / "again", rules=_w4a8())
    export_model(tmp_path / "again", tmp_path / "again.gguf", to=Target.GGUF)
    found = verify_export(run, tmp_path / "again.gguf", max_tokens=24, window=24)
    assert not found.bytes_hold and not found.holds
    assert [one.name for one in found.tensors if not one.holds] == [
        f"blk.0.ffn_{name}.weight" for name in ("gate", "up", "down")
    ]


def test_codes_are_compared_with_those_of_training(run: Path) -> None:
    """A checkpoint keeps a sum for each row: one code, one scale and one table's row that differ are found as
    three rows.
    """
    loaded, coded = load_with_codes(run)
    rows = sum(encoded.codes.size // encoded.codes.shape[numbers.axis] for numbers, encoded in coded.values())
    assert changed_rows(loaded, coded) == (0, rows)
    for name, part, place in (
        ("layers/0/ffn/up/weight", "codes", (3, 1)),
        ("layers/0/mixer/key/weight", "scale", (0, 2)),
        ("embed/table", "codes", (7, 5)),
    ):
        numbers, encoded = coded[name]
        array = np.array(getattr(encoded, part))
        array[place] = array[place] + 1 if part == "codes" else np.nextafter(array[place], np.float32(1))
        coded[name] = numbers, dataclasses.replace(encoded, **{part: array})
    assert changed_rows(loaded, coded) == (3, rows)


def test_another_platform_is_told_of(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = run / "environment.json"
    before = environment.read_text()
    try:
        environment.write_text(json.dumps({**json.loads(before), "devices": ["TPU v6 lite"]}))
        written = export_model(run, tmp_path / "same.gguf", to=Target.GGUF)
        assert (
            "codes were computed on cpu and match those of training on TPU v6 lite: sums of"
            in written.notes[1]
        )
        monkeypatch.setattr(loading, "changed_rows", lambda loaded, coded: (3, 1200))
        written = export_model(run, tmp_path / "others.gguf", to=Target.GGUF)
        assert (
            "codes or scales of 3 of 1,200 rows differ from those of training: they were computed on cpu"
            in written.notes[1]
        )
        monkeypatch.setattr(loading, "changed_rows", lambda loaded, coded: None)
        written = export_model(run, tmp_path / "unknown.gguf", to=Target.GGUF)
        assert (
            "codes were computed on cpu, but the run was trained on TPU v6 lite, and its checkpoint does not"
            in written.notes[1]
        )
    finally:
        environment.write_text(before)
