"""A study whose arms are sharded, have experts, accumulate gradients, and are exported and imported."""

import dataclasses
from pathlib import Path

import pytest

from slmjax.convert.import_export import Target, export_model, import_model
from slmjax.models.ffn.moe import MoeConfig
from slmjax.parallel.mesh import MeshConfig
from slmjax.studies import Ablation, Arm, Derivation, Derived, Study, run_ablation
from slmjax.training.experiment import Experiment, FileTokenizer, FromModel
from tests.one_layer import one_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reimported(Derivation):
    """An export for Hugging Face libraries, imported again."""

    def make(self, model: Path, out: Path) -> None:
        exported = out.with_name("exported")
        export_model(model, exported, to=Target.HF)
        import_model(exported, out)


@pytest.mark.nightly
@pytest.mark.composes("mesh", "experts", "accumulation", "import or export", "studies")
def test_arms_on_meshes_with_experts_and_from_imported_models(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmjax.runner.trainer.write_page", lambda run: None)
    base = one_layer(workplace, tmp_path, steps=2, ema_decay=None, accumulation_steps=2)
    # Two microbatches of eight devices.
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, batch_size=16))
    changes = {"model.stack.0.pattern.0.mixer.window": None, "mesh": MeshConfig(fsdp=4, tensor=2)}

    def continued(seed: int, run: Path) -> Experiment:
        tokenizer = FileTokenizer(path=str(run / "tokenizer"))
        return dataclasses.replace(base, init=FromModel(path=str(run)), tokenizer=tokenizer)

    experts = MoeConfig(num_experts=4, num_selected=2, hidden_dim=32)
    arms = (
        Arm(name="dense", changes=changes),
        Derived(name="imported", source="dense", derivation=Reimported()),
        Arm(name="trained on", after="imported", experiment=continued, changes=changes),
        Arm(
            name="experts",
            changes=changes
            | {"model.stack.0.pattern.0.ffn": experts, "mesh": MeshConfig(data=2, fsdp=2, expert=2)},
        ),
    )
    study = Study(name="composed", base=base, arms=arms, seeds=(3,), baseline="dense")
    file = tmp_path / "composed.py"
    file.write_text("")
    ablation = Ablation(file=file, size="small", studies=(study,), directory=tmp_path / "study")
    (outcome,) = run_ablation(ablation)
    bits = {member.arm: member.metric_value("bits_per_byte") for member in outcome.members}
    assert not outcome.failed and len(bits) == 4, outcome.members
    assert bits["imported"] == pytest.approx(bits["dense"], rel=1e-5)
    # Two more steps of a model that had two.
    trained_on = bits["trained on"]
    dense = bits["dense"]
    assert trained_on is not None and dense is not None and trained_on < dense
    assert outcome.findings.is_matched and len(outcome.findings.comparisons) == 3
