"""What llama.cpp decides by the depth of a model, by names and by numbers that are zero: it computes what is said here, or is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slmjax
from slmjax import layers
from slmjax.convert.directory import Target, export_model, import_model
from slmjax.convert.families import gemma2, gemma3
from slmjax.convert.family import Family, read_settings
from slmjax.convert.source import express
from slmjax.data.tokenizers import CharTokenizer
from slmjax.layers import Activation
from tests.convert import llama_cpp
from tests.convert.synthetic import VOCAB_SIZE, write_model
from tests.convert.test_families import read_golden
from tests.convert.test_gguf_families import LETTERS, config_of, gelu_of_llama_cpp, log_probabilities, shapes_of

# Sizes that llama.cpp names by their number of layers. All but the last of each Gemma are named only, and compute nothing else.
DEPTHS = {
    "gemma2": (26, 42, 46), "gemma3": (18, 26, 34, 48, 62), "llama": (16, 22, 32, 80), "qwen2": (24, 28, 48), "qwen3": (28, 36, 64),
    "qwen3_moe": (48, 94), "olmo2": (16, 64), "olmo3": (32, 64), "phi3": (24, 32, 40), "smollm3": (36,), "granite": (32, 40),
    "gpt_oss": (24, 36), "gpt2": (12, 24, 36, 48), "mixtral": (32, 56),
}  # fmt: skip
LARGEST = (("gemma2", 46), ("gemma3", 62))  # of which llama.cpp scales scores by width over heads: one code, so one in every run


def deep_model(case: str, num_layers: int, directory: Path, **values: Any) -> Path:
    """A model of a family's golden case, as llama.cpp can say it, with this many layers; imported, with a vocabulary of characters."""
    named = {"num_hidden_layers": num_layers, "n_layer": num_layers, "layer_types": None, "no_rope_layers": None}
    config = config_of(case)
    config |= {name: value for name, value in named.items() if name in config} | values
    shapes = shapes_of(case, read_golden(case)["shapes"])
    for name in [name for name in shapes if re.search(r"\.(layers|h)\.0\.", name)]:  # all layers have what layer 0 has
        shapes |= {re.sub(r"(layers|h)\.0\.", rf"\1.{layer}.", name): shapes[name] for layer in range(num_layers)}
    write_model(directory / "theirs", config, shapes)
    CharTokenizer().build([LETTERS]).save(directory / "characters")
    import_model(directory / "theirs", directory / "ours", tokenizer=directory / "characters")
    return directory / "ours"


# Depths ---------------------------------------------------------------------------------------------------------------
def scale_of(case: str, num_layers: int) -> dict[str, Any]:
    """The score scale that llama.cpp has for a Gemma of this depth: by the width over the heads (24 over 4) in the largest."""
    if not case.startswith("gemma"):
        return {}
    return {"query_pre_attn_scalar": 6 if (case, num_layers) in LARGEST else 8}


@pytest.mark.parametrize(
    ("case", "num_layers"),
    [
        pytest.param(case, depth, marks=() if (case, depth) == LARGEST[0] else pytest.mark.nightly)
        for case, depths in DEPTHS.items()
        for depth in depths
    ],
)
def test_depths_that_llama_cpp_names(case: str, num_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = deep_model(case, num_layers, tmp_path, **scale_of(case, num_layers))
    export_model(ours, tmp_path / "model.gguf", to=Target.GGUF)
    import_model(tmp_path / "model.gguf", tmp_path / "back")
    loaded, back = slmjax.load_model(ours), slmjax.load_model(tmp_path / "back")
    assert next(back.config.blocks()).mixer.scale in (None, next(loaded.config.blocks()).mixer.scale)
    monkeypatch.setitem(layers.ACTIVATIONS, Activation.GELU, gelu_of_llama_cpp)
    ids = loaded.tokenizer.prompt_ids("It was a day")
    found = llama_cpp.logprobs(tmp_path / "model.gguf", ids, vocab_size=VOCAB_SIZE)
    differences = np.abs(found - log_probabilities(back, ids))
    # At the entries of llama.cpp's GELU table, single differences grow from layer to layer; another scale of scores gives 0.4 on average.
    has_table = case.startswith("gemma") or case == "gpt2"
    assert (differences.mean() if has_table else differences.max()) < 5e-3


@pytest.mark.parametrize(("family", "case", "num_layers"), [(gemma2.GGUF, "gemma2", 46), (gemma3.GGUF, "gemma3", 62)])
def test_a_scale_that_llama_cpp_would_replace_is_refused(family: Family, case: str, num_layers: int) -> None:
    hf = {"gemma2": gemma2.HF, "gemma3": gemma3.HF}[case]
    config = config_of(case) | {"num_hidden_layers": num_layers, "layer_types": None, "query_pre_attn_scalar": 8}
    model = read_settings(hf, config, where=case)  # 1 over the root of 8, the dims of a head, as at other depths
    with pytest.raises(ValueError, match=rf"every model of {num_layers} layers for Gemma . 27B.*0.408248.*\(24 // 4\).*has 0.353553"):
        express(model, (family,), format_name="GGUF", preferred=None)
    shallower = read_settings(hf, config | {"num_hidden_layers": num_layers - 1}, where=case)
    express(shallower, (family,), format_name="GGUF", preferred=None)


# The settings of the releases' own files, and one over the root of query_pre_attn_scalar in their config.json: 144 and 168.
RELEASED = {
    "gemma2": {"block_count": 46, "embedding_length": 4608, "attention.head_count": 32, "attention.head_count_kv": 16},
    "gemma3": {"block_count": 62, "embedding_length": 5376, "attention.head_count": 32, "attention.head_count_kv": 16},
}


@pytest.mark.parametrize(("family", "scalar"), [(gemma2.GGUF, 144), (gemma3.GGUF, 168)])
def test_the_largest_gemmas_are_imported_with_their_scale(family: Family, scalar: int) -> None:
    keys = RELEASED[family.architecture] | {
        "attention.key_length": 128, "attention.value_length": 128, "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": 256_000,
        "feed_forward_length": 36_864, "context_length": 8192, "attention.sliding_window": 4096,
    }  # fmt: skip
    model = read_settings(family, keys, where="a file")
    assert {block.mixer.scale for block in model.blocks()} == {scalar**-0.5}
    express(model, (family,), format_name="GGUF", preferred=None)
