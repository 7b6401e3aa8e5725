"""Every family of GGUF in blocks: nothing that its rules do to a tensor is lost on codes, and llama.cpp
computes from them what we do.
"""

from pathlib import Path
from typing import Any

import pytest

from slmjax.convert.families import HF_FAMILIES
from slmjax.convert.import_export import Target, export_model
from slmjax.convert.verify.export import verify_export
from slmjax.data.config import DataConfig
from slmjax.formats.presets import preset
from slmjax.models.architecture import ModelConfig
from slmjax.quantization.ptq.round_to_nearest import quantize_model
from slmjax.quantization.rules import QuantRule
from tests.convert.test_gguf_families import CHANGES, config_of
from tests.convert.verify.models import TEXT, words, write_untrained

# Wide enough for blocks of 32.
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "shared_intermediate_size": 32,
    "n_embd": 64,
    "n_inner": 96,
    "n_positions": 128,
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 32},
    "phi4_mini": {"hidden_size": 32, "head_dim": 8},
}  # 5 heads; factors of so many pairs
IN_EVERY_RUN = ("gemma3", "phi3")


def wide_config(case: str) -> ModelConfig:
    config = config_of(case)
    changed = (
        {name: value for name, value in WIDE.items() if name in config}
        | OWN.get(case, {})
        | {"vocab_size": words().vocab_size}
    )
    family = next(family for family in HF_FAMILIES if family.architecture == config["architectures"][0])
    return family.read(family.settings(config | changed, where=case))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in IN_EVERY_RUN else pytest.mark.nightly) for case in CHANGES],
)
def test_a_family_in_blocks(case: str, tmp_path: Path) -> None:
    source = write_untrained(tmp_path / "source", wide_config(case))
    rules = (
        QuantRule(paths="embed|head", weight=preset("q8_0")),
        QuantRule(paths=".", weight=preset("q4_0")),
    )
    quantize_model(source, tmp_path / "model", rules=rules)
    written = export_model(tmp_path / "model", tmp_path / "model.gguf", to=Target.GGUF)
    (tmp_path / "text.txt").write_text(TEXT)
    data = DataConfig(path=str(tmp_path / "text.txt"), heldout_fraction=0.0)
    found = verify_export(tmp_path / "model", written.path, data=data, max_tokens=48, window=24)
    assert found.bytes_hold, [one for one in found.tensors if not one.holds]
    assert {one.type for one in found.tensors} == {"Q4_0", "Q8_0", "F32"}
    assert found.products_hold, [one for one in found.products if not one.holds]
    # Of so few tokens one flipped code is seen; gemma and gpt2 have GELU, for which llama.cpp has a table of
    # float16.
    assert found.loss is not None and abs(found.loss.difference) < 5e-3
