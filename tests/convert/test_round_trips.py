"""Every family through import and export: nothing is lost on the way in and out, and released
configurations are the zoo's models.
"""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.checkpoints import safetensors_files
from slmjax.convert import hf_directory
from slmjax.convert.families import HF_FAMILIES
from slmjax.convert.family import read_settings
from slmjax.convert.import_export import Target, WeightType, export_model, import_model
from slmjax.models import zoo
from slmjax.models.canonical_form import canonical, differences
from tests.convert.synthetic import write_model
from tests.convert.test_families import GOLDEN, MARKED_CASES, OTHER_NAMES, read_golden, tiny_tokenizer


def exported_name(name: str) -> str:
    """The name of a tensor without a vision tower; of OLMo Hybrid, transformers saves a norm by two names."""
    name = name.replace("language_model.", "")
    return re.sub(r"(layers\.[13]\.)feedforward_layer_norm", r"\1post_attention_layernorm", name)


@pytest.mark.parametrize("case", MARKED_CASES)
def test_nothing_is_lost_by_import_and_export(case: str, tmp_path: Path) -> None:
    """The same tensors bit for bit, and a configuration that means the same; in the same family."""
    golden = read_golden(case)
    write_model(tmp_path / "theirs", golden["config"], golden["shapes"])
    found = hf_directory.open_directory(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer(tmp_path))
    written = export_model(tmp_path / "ours", tmp_path / "back", to=Target.HF)
    assert written.family == OTHER_NAMES.get(case, golden["config"]["architectures"][0])
    assert canonical(hf_directory.open_directory(tmp_path / "back").config) == canonical(found.config)
    before = safetensors_files.TensorFiles(tmp_path / "theirs")
    after = safetensors_files.TensorFiles(tmp_path / "back")
    names = {
        exported_name(name): name
        for name in before.names
        if not name.startswith(("vision_", "multi_", "model.visual."))
    }
    assert set(after.names) == set(names)
    for name in after.names:
        np.testing.assert_array_equal(after.read(name), before.read(names[name]), err_msg=name)


def test_export_in_half_precision_rounds_once(tmp_path: Path) -> None:
    golden = read_golden("llama_tied")
    write_model(tmp_path / "theirs", golden["config"], golden["shapes"])
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer(tmp_path))
    export_model(tmp_path / "ours", tmp_path / "half", to=Target.HF, dtype=WeightType.BF16)
    before = safetensors_files.TensorFiles(tmp_path / "theirs")
    after = safetensors_files.TensorFiles(tmp_path / "half")
    for name in before.names:
        np.testing.assert_array_equal(after.read(name), before.read(name).astype(jnp.bfloat16))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


RELEASED = json.loads((GOLDEN.parent / "released.json").read_text())


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_are_the_zoos_models(name: str) -> None:
    """The files as they were released, older spellings and all, from memory: no key is refused, and each
    means what the zoo says.
    """
    family = next(
        family for family in HF_FAMILIES if family.architecture == RELEASED[name]["architectures"][0]
    )
    found = read_settings(family, RELEASED[name], where=name)
    if name in zoo.ARCHITECTURES:
        assert differences(canonical(zoo.ARCHITECTURES[name]()), canonical(found)) == []
