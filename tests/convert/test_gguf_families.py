"""Every family in GGUF: llama.cpp computes from what we export what we compute, and what comes back is what went out."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import slmjax
from slmjax import weights
from slmjax.architecture import ModelConfig
from slmjax.checkpoint import read_config
from slmjax.convert.canonical_form import canonical
from slmjax.convert.directory import Target, WeightType, export_model, import_model
from slmjax.convert.families import GGUF_FAMILIES, HF_FAMILIES, llama
from slmjax.convert.settings import Settings
from slmjax.convert.source import express
from slmjax.data.tokenizers import CharTokenizer
from slmjax.layers import NormKind
from slmjax.rope import YarnScaling
from tests.convert import llama_cpp
from tests.convert.synthetic import VOCAB_SIZE, write_model
from tests.convert.test_directory import mixer, odd
from tests.convert.test_families import read_golden

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ.,;:!?'-"
TEXT = ("It was a bright cold day in April, and the clocks were striking thirteen. " * 4)[:200]
# What llama.cpp has a name for, with what its code fixes.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {}, "llama_tied": {"hidden_act": "silu"}, "mistral": {"sliding_window": None}, "mixtral": {"sliding_window": None}, "qwen2": {
        "use_sliding_window": False, "layer_types": None}, "qwen3": {"use_sliding_window": False, "layer_types": None},
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True, "attention_bias": False}, "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {"query_pre_attn_scalar": 8}, "olmo2": {}, "olmo3": {}, "phi3": {"sliding_window": None}, "phi4_mini": {}, "smollm3": {
        "use_sliding_window": False, "layer_types": None, "mlp_bias": False}, "granite": {}, "granite4_micro": {}, "gpt_oss": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "gpt2": {},
}  # fmt: skip
IN_EVERY_RUN = ("llama", "qwen3", "gemma3", "mixtral", "gpt_oss")


def cases() -> list[Any]:
    return [pytest.param(case, marks=() if case in IN_EVERY_RUN else pytest.mark.nightly) for case in CHANGES]


def words() -> str:
    return "".join(character for character in TEXT if character in LETTERS)


@pytest.fixture
def ours(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of the case, changed to what GGUF can say, with a vocabulary of characters."""
    golden = read_golden(request.param)
    write_model(tmp_path / "theirs", config_of(request.param), shapes_of(request.param, golden["shapes"]))
    CharTokenizer().build([LETTERS]).save(tmp_path / "characters")
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tmp_path / "characters")
    return tmp_path / "ours"


def config_of(case: str) -> dict[str, Any]:
    """llama.cpp's server cuts what is longer than the context."""
    context = {} if case == "gpt2" else {"max_position_embeddings": 512}
    return read_golden(case)["config"] | context | CHANGES[case]


def shapes_of(case: str, shapes: dict[str, Any]) -> dict[str, Any]:
    if case == "smollm3":
        return {name: shape for name, shape in shapes.items() if not name.endswith("bias")}
    if case == "qwen3_moe":  # all layers with experts, none with biases
        kept = {name: shape for name, shape in shapes.items() if ".0.mlp." not in name and not name.endswith("bias")}
        return kept | {name.replace(".1.mlp.", ".0.mlp."): shape for name, shape in shapes.items() if ".1.mlp." in name}
    return shapes


def log_probabilities(loaded: slmjax.Loaded, ids: list[int]) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jax.jit(slmjax.logits)(loaded.model, np.array([ids], np.int32))[0]), np.float64)


@pytest.mark.parametrize("ours", cases(), indirect=True)
def test_llama_cpp_computes_the_same_and_nothing_is_lost(ours: Path, tmp_path: Path) -> None:
    export_model(ours, tmp_path / "model.gguf", to=Target.GGUF)
    loaded = slmjax.load_model(ours)
    ids = loaded.tokenizer.prompt_ids(words())[: min(200, loaded.config.learned_positions or 200)]
    found = llama_cpp.logprobs(tmp_path / "model.gguf", ids, vocab_size=VOCAB_SIZE)
    np.testing.assert_allclose(found, log_probabilities(loaded, ids), atol=1e-3)

    import_model(tmp_path / "model.gguf", tmp_path / "back")
    assert canonical(read_config(tmp_path / "back")) == canonical(loaded.config)
    before, after = (weights.TensorFiles(path / weights.DIRECTORY) for path in (ours, tmp_path / "back"))
    assert after.names == before.names
    is_centered = loaded.config.norm_kind is NormKind.CENTERED_RMS
    for name in before.names:  # of a scale that is stored whole, the difference from one is rounded
        tolerance = 2e-7 if is_centered and name.endswith("scale") else 0.0
        np.testing.assert_allclose(after.read(name), before.read(name), atol=tolerance, rtol=0, err_msg=name)
    again = slmjax.load_model(tmp_path / "back").tokenizer
    assert again.prompt_ids(words()) == loaded.tokenizer.prompt_ids(words())


@pytest.mark.parametrize("dtype", [WeightType.BF16, WeightType.F16])
@pytest.mark.parametrize("ours", ["llama_tied"], indirect=True)
def test_half_precision_is_read_by_both(ours: Path, tmp_path: Path, dtype: WeightType) -> None:
    written = export_model(ours, tmp_path / f"{dtype.value}.gguf", to=Target.GGUF, dtype=dtype)
    import_model(written.path, tmp_path / "back")
    stored = weights.TensorFiles(tmp_path / "back" / weights.DIRECTORY)
    assert stored.dtype("embed/table") == dtype.dtype and stored.dtype("final_norm/scale") == np.float32
    loaded = slmjax.load_model(tmp_path / "back")
    ids = loaded.tokenizer.prompt_ids(words())[:24]
    found = llama_cpp.logprobs(Path(written.path), ids, vocab_size=VOCAB_SIZE)
    np.testing.assert_allclose(found, log_probabilities(loaded, ids), atol=0.15)  # its products round their inputs too
    assert (tmp_path / f"{dtype.value}.model_card.md").is_file()
    with pytest.raises(ValueError, match="is there already"):
        export_model(ours, written.path, to=Target.GGUF)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (odd(mixer(window=5)), r"layer 0.window = 5"),
        (odd(mixer(scale=0.5)), r"not by 0.5"),
        (odd(mixer(rope_fraction=0.5)), r"all dims of all heads are rotated"),
        (odd(mixer(rope_scaling=YarnScaling(factor=2.0, original_context=16, whole_dims=False))), r"whole_dims = False"),
        (odd(logit_softcap=3.0), r"logit_softcap = 3.0"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(model: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        express(model, (llama.GGUF,), format_name="GGUF", preferred=None)


def test_every_family_has_a_case() -> None:
    found = set()
    for case in CHANGES:
        config = config_of(case)
        family = next(family for family in HF_FAMILIES if family.architecture == config["architectures"][0])
        found.add(express(family.read(Settings(config, where=case)), GGUF_FAMILIES, format_name="GGUF", preferred=None).family.architecture)
    assert found == {family.architecture for family in GGUF_FAMILIES}
