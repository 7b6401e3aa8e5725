"""What we export, loaded by transformers; and more configurations of each family than golden files hold.
Needs the oracle extra.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import slmjax
from slmjax.convert import hf_directory
from slmjax.convert.import_export import Target, export_model, import_model
from slmjax.models.canonical_form import canonical
from slmjax.models.parameterization import Parameterization
from tests.convert.cases import CASES
from tests.convert.make_golden import golden
from tests.convert.synthetic import VOCAB_SIZE, tokens, write_model
from tests.convert.test_families import OTHER_NAMES, decoded_logits, read_golden, tiny_tokenizer

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch and transformers, about themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# Changes that make another configuration of any family; those that a family has no word for are left out by
# its class.
CHANGES: dict[str, dict[str, Any]] = {
    "deep": {"num_hidden_layers": 6, "n_layer": 5, "max_window_layers": 3},
    "untied": {
        "tie_word_embeddings": False,
        "num_hidden_layers": 1,
        "n_layer": 1,
        "first_k_dense_replace": 0,
    },
    "tied": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-3,
        "norm_eps": 1e-3,
        "layer_norm_epsilon": 1e-3,
    },
}


GENERAL = (
    "num_hidden_layers",
    "tie_word_embeddings",
    "rms_norm_eps",
)  # keys that all but GPT-2 have, written or not


def changed(settings: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The settings, with what this family knows of the change."""
    is_gpt2 = "n_embd" in settings
    found = {
        name: value for name, value in change.items() if name in settings or (name in GENERAL and not is_gpt2)
    }
    # These families have another name for it, and would take this one for a key that they do not know.
    if {"norm_eps", "layer_norm_epsilon"} & settings.keys():
        found.pop("rms_norm_eps", None)
    if settings.get("num_attention_heads", 4) % found.get("num_key_value_heads", 1):
        del found["num_key_value_heads"]
    # A hybrid begins with a layer of each kind, and some libraries require both.
    if "linear_attention" in settings.get("layer_types", ()) and "num_hidden_layers" in found:
        found["num_hidden_layers"] = max(2, found["num_hidden_layers"])
    if "layer_types" in settings and "num_hidden_layers" in found:
        found["layer_types"] = (settings["layer_types"] * 6)[: found["num_hidden_layers"]]
        # transformers asks a layer with attention for the length of a text.
        if "full_attention" in settings["layer_types"] and "full_attention" not in found["layer_types"]:
            found["layer_types"][-1] = "full_attention"
    return settings | found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("gemma3_vision", "olmo2")])
def test_other_configurations_equal_transformers(case: str, change: str, tmp_path: Path) -> None:
    class_name, settings = CASES[case]
    found = golden(class_name, changed(settings, CHANGES[change]))
    write_model(tmp_path / "theirs", found["config"], found["shapes"])
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer(tmp_path))
    loaded = slmjax.load_model(tmp_path / "ours")
    ids = tokens(VOCAB_SIZE).astype(np.int32)
    np.testing.assert_allclose(
        jax.jit(slmjax.logits)(loaded.model, ids)[0], np.array(found["logits"]), atol=2e-4
    )
    np.testing.assert_allclose(decoded_logits(loaded, ids), np.array(found["logits"]), atol=2e-4)
    export_model(tmp_path / "ours", tmp_path / "back", to=Target.HF)
    theirs, back = (hf_directory.open_directory(tmp_path / name).config for name in ("theirs", "back"))
    assert canonical(theirs) == canonical(back)


@pytest.mark.parametrize("case", ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "granite4_hybrid"])
def test_one_expert_with_normalized_weights_equals_transformers(case: str, tmp_path: Path) -> None:
    class_name, settings = CASES[case]
    one = {"num_experts_per_tok": 1} | ({"norm_topk_prob": True} if case in ("qwen3_moe", "olmoe") else {})
    found = golden(class_name, settings | one)
    write_model(tmp_path / "theirs", found["config"], found["shapes"])
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer(tmp_path))
    loaded = slmjax.load_model(tmp_path / "ours")
    ids = tokens(VOCAB_SIZE).astype(np.int32)
    np.testing.assert_allclose(
        jax.jit(slmjax.logits)(loaded.model, ids)[0], np.array(found["logits"]), atol=2e-4
    )
    export_model(tmp_path / "ours", tmp_path / "back", to=Target.HF)
    theirs, back = (hf_directory.open_directory(tmp_path / name).config for name in ("theirs", "back"))
    assert canonical(theirs) == canonical(back)


def logits_of_transformers(directory: Path, ids: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))).logits[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_we_export(case: str, tmp_path: Path) -> None:
    found = read_golden(case)
    write_model(tmp_path / "theirs", found["config"], found["shapes"])
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer(tmp_path))
    written = export_model(tmp_path / "ours", tmp_path / "back", to=Target.HF)
    assert written.family == OTHER_NAMES.get(case, found["config"]["architectures"][0])
    np.testing.assert_allclose(
        logits_of_transformers(tmp_path / "back", tokens(VOCAB_SIZE)), np.array(found["logits"]), atol=2e-4
    )


def test_auto_classes_reproduce_a_run(tmp_path: Path, workplace: Path) -> None:
    """A model trained here, with its tokenizer: the same ids and the same logits. Qwen3 has no field for the
    multipliers of its parameterization.
    """
    import transformers

    from tests.one_layer import one_layer

    experiment = one_layer(workplace, tmp_path, steps=2)
    scaled = dataclasses.replace(
        experiment.model,
        parameterization=Parameterization.COMPLETEP,
        base_width=16,
        base_depth=2,
        base_head_dim=4,
    )
    experiment = dataclasses.replace(experiment, model=scaled)
    run = Path(slmjax.train(experiment).run_dir)
    export_model(run, tmp_path / "out", to=Target.HF)
    loaded = slmjax.load_model(run)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The quick brown fox: 'jumps'  over\n\n12,345 lazy dögs 🦊"
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(text)]
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text
    ours = jax.jit(slmjax.logits)(loaded.model, np.array([ids[:32]], np.int32))[0]
    np.testing.assert_allclose(
        logits_of_transformers(tmp_path / "out", np.array([ids[:32]])), ours, atol=2e-4
    )


def test_padding_of_tables_is_left_out(tmp_path: Path) -> None:
    """Rows that no token has would change the normaliser elsewhere."""
    found = read_golden("qwen3")
    write_model(tmp_path / "theirs", found["config"], found["shapes"])
    import_model(
        tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer(tmp_path), vocab_multiple=64
    )
    assert slmjax.load_model(tmp_path / "ours").params["embed/table"].shape[0] == 64
    export_model(tmp_path / "ours", tmp_path / "back", to=Target.HF)
    np.testing.assert_allclose(
        logits_of_transformers(tmp_path / "back", tokens(VOCAB_SIZE)), np.array(found["logits"]), atol=2e-4
    )


def test_golden_files_are_what_transformers_says_today() -> None:
    """To another release's rounding: where this fails, look whether the family changed, then make the files
    anew.
    """
    for case, (class_name, settings) in CASES.items():
        fresh = golden(class_name, settings)
        kept = read_golden(case)
        assert fresh["shapes"] == kept["shapes"], case
        np.testing.assert_allclose(fresh["logits"], kept["logits"], atol=1e-4, err_msg=case)
