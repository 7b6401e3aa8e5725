"""model.json: the architecture and its phases of quantization, as files of earlier versions had them."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmjax.checkpoints.model_file import model_json, read_config, read_quant_phases, write_model_file
from slmjax.config import fingerprint, from_json, to_json
from slmjax.formats.presets import preset
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.quantization.estimators import LearnedScale
from slmjax.quantization.rules import QuantPhase, QuantRule, quant_of
from slmjax.training.experiment import Experiment
from slmjax.training.recipes import load_experiment

BLOCK = BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=8), ffn=MlpConfig(hidden_dim=32))
CONFIG = ModelConfig(embed_dim=16, stack=(LayerGroup(pattern=(BLOCK,), repeats=2),), vocab_size=40)
PHASES = (
    QuantPhase(rules=(QuantRule(paths=".", weight=preset("q8_0")),), step=2),
    QuantPhase(rules=(QuantRule(paths=".", weight=preset("int3_g32"), estimator=LearnedScale()),), step=4),
)


@pytest.mark.parametrize("phases", [(), PHASES], ids=["floating point", "two phases"])
def test_the_file_has_both(tmp_path: Path, phases: tuple[QuantPhase, ...]) -> None:
    write_model_file(tmp_path, CONFIG, phases=phases)
    assert read_config(tmp_path) == CONFIG and read_quant_phases(tmp_path) == phases
    assert json.loads((tmp_path / "model.json").read_text()) == model_json(CONFIG, phases=phases)


def test_phases_stand_where_the_model_had_them_as_a_field(tmp_path: Path) -> None:
    """So that files are the same in both directions; a file without the field is of floating point."""
    file = tmp_path / "model.json"
    field = to_json(quant_of("q4_0+q8_0").phases[0])
    file.write_text(json.dumps({**to_json(CONFIG), "quant": [field]}))
    assert read_config(tmp_path) == CONFIG and read_quant_phases(tmp_path) == quant_of("q4_0+q8_0").phases
    assert model_json(CONFIG, phases=read_quant_phases(tmp_path)) == json.loads(file.read_text())
    file.write_text(json.dumps(to_json(CONFIG)))
    assert read_config(tmp_path) == CONFIG and read_quant_phases(tmp_path) == ()


def test_damage_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a run directory nor an imported model"):
        read_quant_phases(tmp_path)
    file = tmp_path / "model.json"
    for text in ("[]", "{", json.dumps({**to_json(CONFIG), "quant": [{"rules": 3}]})):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"model.json.*[Cc]opy it again"):
            read_quant_phases(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model["stack"][0].update(repeats=10**9), "1,000,000,000 layers"),
        (lambda model: model["stack"][0]["pattern"][0].update(num_loops=10**9), "2,000,000,000 layers"),
        (lambda model: model["stack"].extend(model["stack"] * 128), "129 blocks"),
        (lambda model: model.update(embed_dim=10**12), "embed_dim is 1,000,000,000,000"),
        (
            lambda model: model["stack"][0]["pattern"][0]["ffn"].update(hidden_dim=2**31),
            "ffn.hidden_dim is 2,147,483,648",
        ),
        (lambda model: model.update(vocab_size=10**400), "vocab_size is an integer of 1,329 bits"),
        (lambda model: model["stack"][0]["pattern"][0]["mixer"].update(type={}), "type: {} is not one of"),
    ],
    ids=["repeats", "loops", "blocks", "width", "hidden", "digits", "type"],
)
def test_sizes_are_bounded_before_anything_is_built(
    change: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path
) -> None:
    """A model.json from elsewhere must not take minutes, or all memory, before it is refused."""
    model = to_json(CONFIG)
    change(model)
    (tmp_path / "model.json").write_text(json.dumps(model))
    started = time.process_time()
    with pytest.raises(ValueError, match="model.json.*[Cc]opy it again") as refused:
        read_config(tmp_path)
    assert reason in str(refused.value) and time.process_time() - started < 5


def test_configs_of_before_are_read_with_their_fingerprints() -> None:
    """The two were printed by the last version whose models had a field `quant`."""
    experiment = load_experiment("nano")
    fields = to_json(experiment)
    assert "quant" not in fields["model"]
    fields["model"]["quant"] = []
    assert from_json(Experiment, fields) == experiment
    assert fingerprint(CONFIG) == "437c4747c8fa5b91"
    assert fingerprint(experiment) == "f3bcaa71be4fc853"
