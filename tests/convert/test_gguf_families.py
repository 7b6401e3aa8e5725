"""Every family in GGUF: llama.cpp computes from what we export what we compute, and what comes back is what
went out.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slmjax
from slmjax.checkpoints import safetensors_files
from slmjax.checkpoints.loading import read_config
from slmjax.convert.families import GGUF_FAMILIES, GGUF_NAMES, HF_FAMILIES, llama
from slmjax.convert.import_export import Target, WeightType, export_model, import_model
from slmjax.convert.source import choose_family
from slmjax.data.tokenizers import CharTokenizer
from slmjax.models.architecture import ModelConfig
from slmjax.models.canonical_form import canonical
from slmjax.models.ffn.mlp import ACTIVATIONS, Activation
from slmjax.models.layers import NormKind
from slmjax.models.rope import YarnScaling
from tests.convert import llama_cpp
from tests.convert.synthetic import VOCAB_SIZE, write_model
from tests.convert.test_families import read_golden
from tests.convert.test_import_export import change_tensors, mixer, odd

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ.,;:!?'-"
TEXT = ("It was a bright cold day in April, and the clocks were striking thirteen. " * 4)[:200]
# What llama.cpp has a name for, with what its code fixes.
NO_WINDOW: dict[str, Any] = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"hidden_act": "silu"},
    "mistral": NO_WINDOW,
    "mixtral": NO_WINDOW,
    "qwen2": NO_WINDOW | {"head_dim": 6},
    "qwen3": NO_WINDOW,
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True, "attention_bias": False},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {"query_pre_attn_scalar": 8},
    "olmo2": {},
    "olmo3": {"head_dim": 6},
    "phi3": NO_WINDOW,
    "phi4_mini": {},
    "smollm3": NO_WINDOW | {"mlp_bias": False},
    "granite": {},
    "granite4_micro": {},
    "granite4_hybrid": {"mamba_proj_bias": False},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gpt2": {},
    "lfm2": {"conv_bias": False, "head_dim": 6},
    # Multipliers are in the weights of these files.
    "falcon_h1": {
        **dict.fromkeys(("lm_head_multiplier", "embedding_multiplier", "key_multiplier"), 1.0),
        **dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier"), 1.0),
        **dict.fromkeys(("ssm_in_multiplier", "ssm_out_multiplier"), 1.0),
        "ssm_multipliers": None,
        "mlp_multipliers": None,
    },
    "mamba2": {"use_bias": False},
}
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
    config = read_golden(case)["config"]
    return (
        config
        | context
        | {
            name: value
            for name, value in CHANGES[case].items()
            if name != "use_sliding_window" or name in config
        }
    )


def shapes_of(case: str, shapes: dict[str, Any]) -> dict[str, Any]:
    if case == "smollm3":
        return {name: shape for name, shape in shapes.items() if not name.endswith("bias")}
    if case == "qwen3_moe":  # all layers with experts, none with biases
        kept = {
            name: shape
            for name, shape in shapes.items()
            if ".0.mlp." not in name and not name.endswith("bias")
        }
        return kept | {
            name.replace(".1.mlp.", ".0.mlp."): shape for name, shape in shapes.items() if ".1.mlp." in name
        }
    if case in ("mamba2", "granite4_hybrid"):
        return {name: shape for name, shape in shapes.items() if not name.endswith("proj.bias")}
    if case == "lfm2":
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("bias")}
        # Of heads of 6 dims, which are together as wide as the model.
        return {
            name: [6]
            if name.endswith("k_layernorm.weight") or name.endswith("q_layernorm.weight")
            else [{32: 24, 16: 12}.get(size, size) for size in shape]
            for name, shape in shapes.items()
        }
    if CHANGES[case].get("head_dim") == 6:  # as wide together as the model
        return {name: [{32: 24, 16: 12}.get(size, size) for size in shape] for name, shape in shapes.items()}
    return shapes


def log_probabilities(loaded: slmjax.Loaded, ids: list[int]) -> np.ndarray:
    return np.asarray(
        jax.nn.log_softmax(jax.jit(slmjax.logits)(loaded.model, np.array([ids], np.int32))[0]), np.float64
    )


def gelu_of_llama_cpp(x: jax.Array) -> jax.Array:
    """On CPU, llama.cpp looks GELU up in a table of float16: what goes in and what comes out is rounded."""
    rounded = (
        jax.nn.gelu(x.astype(jnp.float16).astype(jnp.float32), approximate=True)
        .astype(jnp.float16)
        .astype(x.dtype)
    )
    return jnp.where(x <= -10, 0, jnp.where(x >= 10, x, rounded))


@pytest.mark.parametrize("ours", cases(), indirect=True)
def test_llama_cpp_computes_the_same_and_nothing_is_lost(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(ours, tmp_path / "model.gguf", to=Target.GGUF)
    loaded = slmjax.load_model(ours)
    monkeypatch.setitem(ACTIVATIONS, Activation.GELU, gelu_of_llama_cpp)
    ids = loaded.tokenizer.prompt_ids(words())[: min(200, (loaded.config.learned_positions or 204) - 4)]
    found = llama_cpp.logprobs(tmp_path / "model.gguf", ids, vocab_size=VOCAB_SIZE)
    # At a boundary between two entries of that table, a difference of the last bit becomes one of the
    # table's.
    has_table = any(
        getattr(block.ffn, "activation", None) is Activation.GELU for block in loaded.config.blocks()
    )
    np.testing.assert_allclose(found, log_probabilities(loaded, ids), atol=4e-3 if has_table else 1e-3)

    import_model(tmp_path / "model.gguf", tmp_path / "back")
    assert canonical(read_config(tmp_path / "back")) == canonical(loaded.config)
    before, after = (
        safetensors_files.TensorFiles(path / safetensors_files.DIRECTORY)
        for path in (ours, tmp_path / "back")
    )
    assert after.names == before.names
    is_centered = loaded.config.norm_kind is NormKind.CENTERED_RMS
    for name in before.names:  # of a scale that is stored whole, the difference from one is rounded
        tolerance = 2e-7 if is_centered and name.endswith("scale") else 0.0
        # Stored as its exponential.
        tolerance = 3e-7 if name.endswith("log_decay_rate") else tolerance
        np.testing.assert_allclose(after.read(name), before.read(name), atol=tolerance, rtol=0, err_msg=name)
    again = slmjax.load_model(tmp_path / "back").tokenizer
    assert again.prompt_ids(words()) == loaded.tokenizer.prompt_ids(words())


def test_gemma_with_weights_as_they_are_at_first_equals_llama_cpp_as_it_is(tmp_path: Path) -> None:
    """Without copying its table: what is rounded there is small compared to what a model of usual weights
    computes.
    """
    golden = read_golden("gemma3")
    write_model(tmp_path / "theirs", config_of("gemma3"), golden["shapes"])

    def shrink(tensors: dict[str, np.ndarray]) -> None:
        tensors |= {name: 0.3 * array if array.ndim > 1 else array - 1 for name, array in tensors.items()}

    change_tensors(tmp_path / "theirs", shrink)
    CharTokenizer().build([LETTERS]).save(tmp_path / "characters")
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=tmp_path / "characters")
    export_model(tmp_path / "ours", tmp_path / "model.gguf", to=Target.GGUF)
    loaded = slmjax.load_model(tmp_path / "ours")
    ids = loaded.tokenizer.prompt_ids(words())[:200]
    found = llama_cpp.logprobs(tmp_path / "model.gguf", ids, vocab_size=VOCAB_SIZE)
    np.testing.assert_allclose(found, log_probabilities(loaded, ids), atol=1e-3)


@pytest.mark.parametrize("dtype", [WeightType.BF16, WeightType.F16])
@pytest.mark.parametrize("ours", ["llama_tied"], indirect=True)
def test_half_precision_is_read_by_both(ours: Path, tmp_path: Path, dtype: WeightType) -> None:
    written = export_model(ours, tmp_path / f"{dtype.value}.gguf", to=Target.GGUF, dtype=dtype)
    import_model(written.path, tmp_path / "back")
    stored = safetensors_files.TensorFiles(tmp_path / "back" / safetensors_files.DIRECTORY)
    assert stored.dtype("embed/table") == dtype.dtype and stored.dtype("final_norm/scale") == np.float32
    loaded = slmjax.load_model(tmp_path / "back")
    ids = loaded.tokenizer.prompt_ids(words())[:24]
    found = llama_cpp.logprobs(Path(written.path), ids, vocab_size=VOCAB_SIZE)
    np.testing.assert_allclose(
        found, log_probabilities(loaded, ids), atol=0.15
    )  # its products round their inputs too
    assert (tmp_path / f"{dtype.value}.model_card.md").is_file()
    with pytest.raises(ValueError, match="exists already"):
        export_model(ours, written.path, to=Target.GGUF)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (odd(mixer(window=5)), r"layer 0.mixer.window = 5"),
        (odd(mixer(scale=0.5)), r"not by 0.5"),
        (odd(mixer(rotary_dim=4)), r"all dims of all heads are rotated"),
        (
            odd(mixer(rope_scaling=YarnScaling(factor=2.0, original_context=16, whole_dims=False))),
            r"whole_dims = False",
        ),
        (odd(logit_softcap=3.0), r"logit_softcap = 3.0"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(model: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_family(model, (llama.GGUF,), format_name="GGUF", preferred=None)


def test_every_family_has_a_case() -> None:
    found = set()
    for case in CHANGES:
        config = config_of(case)
        family = next(family for family in HF_FAMILIES if family.architecture == config["architectures"][0])
        model = family.read(family.settings(config, where=case))
        preferred = GGUF_NAMES.get(family.architecture)
        found.add(
            choose_family(model, GGUF_FAMILIES, format_name="GGUF", preferred=preferred).family.architecture
        )
    assert found == {family.architecture for family in GGUF_FAMILIES}
