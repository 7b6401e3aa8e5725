"""What llama.cpp decides by the depth of a model, by names and by numbers that are zero: it computes what is
said here, or is refused.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slmjax
from slmjax.checkpoints.loading import read_config
from slmjax.convert.families import gemma2, gemma3, granite
from slmjax.convert.family import Family, read_settings
from slmjax.convert.gguf.container import read_gguf
from slmjax.convert.gguf.stripped_spaces import name_for, name_notes, stripping_tokens
from slmjax.convert.gguf.tokenizer import CONTROL, USER_DEFINED, tokenizer_from_gguf, tokenizer_metadata
from slmjax.convert.gguf_model import TOLERANCE, family_and_config, tokenizer_notes
from slmjax.convert.import_export import Target, export_model, import_model
from slmjax.convert.source import choose_family
from slmjax.data.tokenizers import ByteTokenizer, CharTokenizer
from slmjax.models.canonical_form import canonical
from slmjax.models.ffn.mlp import ACTIVATIONS, Activation
from tests.convert import llama_cpp
from tests.convert.synthetic import VOCAB_SIZE, write_model
from tests.convert.test_families import read_golden
from tests.convert.test_gguf_families import (
    LETTERS,
    config_of,
    gelu_of_llama_cpp,
    log_probabilities,
    shapes_of,
)
from tests.convert.test_gguf_models import rewrite
from tests.convert.vocabularies import encode, sentence_piece_metadata, write_directory

# Sizes that llama.cpp names by their number of layers. All but the last of each Gemma are named only, and
# compute nothing else.
DEPTHS = {
    "gemma2": (26, 42, 46),
    "gemma3": (18, 26, 34, 48, 62),
    "llama": (16, 22, 32, 80),
    "qwen2": (24, 28, 48),
    "qwen3": (28, 36, 64),
    "qwen3_moe": (48, 94),
    "olmo2": (16, 64),
    "olmo3": (32, 64),
    "phi3": (24, 32, 40),
    "smollm3": (36,),
    "granite": (32, 40),
    "gpt_oss": (24, 36),
    "gpt2": (12, 24, 36, 48),
    "mixtral": (32, 56),
}
LARGEST = (
    ("gemma2", 46),
    ("gemma3", 62),
)  # of which llama.cpp scales scores by width over heads: one code, so one in every run


def deep_model(case: str, num_layers: int, directory: Path, **values: Any) -> Path:
    """A model of a family's golden case, as llama.cpp can say it, with this many layers; imported, with a
    vocabulary of characters.
    """
    named = {
        "num_hidden_layers": num_layers,
        "n_layer": num_layers,
        "layer_types": None,
        "no_rope_layers": None,
    }
    config = config_of(case)
    config |= {name: value for name, value in named.items() if name in config} | values
    shapes = shapes_of(case, read_golden(case)["shapes"])
    for name in [
        name for name in shapes if re.search(r"\.(layers|h)\.0\.", name)
    ]:  # all layers have what layer 0 has
        shapes |= {
            re.sub(r"(layers|h)\.0\.", rf"\1.{layer}.", name): shapes[name] for layer in range(num_layers)
        }
    write_model(directory / "theirs", config, shapes)
    CharTokenizer().build([LETTERS]).save(directory / "characters")
    import_model(directory / "theirs", directory / "ours", tokenizer=directory / "characters")
    return directory / "ours"


# Depths -----------------------------------------------------------------------------------------------------
def scale_of(case: str, num_layers: int) -> dict[str, Any]:
    """The score scale that llama.cpp has for a Gemma of this depth: by the width over the heads (24 over 4)
    in the largest.
    """
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
def test_depths_that_llama_cpp_names(
    case: str, num_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = deep_model(case, num_layers, tmp_path, **scale_of(case, num_layers))
    export_model(ours, tmp_path / "model.gguf", to=Target.GGUF)
    import_model(tmp_path / "model.gguf", tmp_path / "back")
    back = slmjax.load_model(tmp_path / "back")
    assert canonical(back.config) == canonical(read_config(ours))
    monkeypatch.setitem(ACTIVATIONS, Activation.GELU, gelu_of_llama_cpp)
    ids = back.tokenizer.prompt_ids("It was a day")
    found = llama_cpp.logprobs(tmp_path / "model.gguf", ids, vocab_size=VOCAB_SIZE)
    differences = np.abs(found - log_probabilities(back, ids))
    # At the entries of llama.cpp's GELU table, single differences grow from layer to layer; another scale of
    # scores gives 0.4 on average.
    has_table = case.startswith("gemma") or case == "gpt2"
    assert (differences.mean() if has_table else differences.max()) < 5e-3


@pytest.mark.parametrize(
    ("family", "case", "num_layers"), [(gemma2.GGUF, "gemma2", 46), (gemma3.GGUF, "gemma3", 62)]
)
def test_a_scale_that_llama_cpp_would_replace_is_refused(family: Family, case: str, num_layers: int) -> None:
    hf = {"gemma2": gemma2.HF, "gemma3": gemma3.HF}[case]
    config = config_of(case) | {
        "num_hidden_layers": num_layers,
        "layer_types": None,
        "query_pre_attn_scalar": 8,
    }
    # 1 over the root of 8, the dims of a head, as at other depths
    model = read_settings(hf, config, where=case)
    with pytest.raises(
        ValueError,
        match=rf"every model of {num_layers} layers for Gemma . 27B.*0.408248.*\(24 // 4\).*has 0.353553",
    ):
        choose_family(model, (family,), format_name="GGUF", preferred=None)
    shallower = read_settings(hf, config | {"num_hidden_layers": num_layers - 1}, where=case)
    choose_family(shallower, (family,), format_name="GGUF", preferred=None)


# The settings of the releases' own files, and one over the root of query_pre_attn_scalar in their
# config.json: 144 and 168.
RELEASED = {
    "gemma2": {
        "block_count": 46,
        "embedding_length": 4608,
        "attention.head_count": 32,
        "attention.head_count_kv": 16,
    },
    "gemma3": {
        "block_count": 62,
        "embedding_length": 5376,
        "attention.head_count": 32,
        "attention.head_count_kv": 16,
    },
}


@pytest.mark.parametrize(("family", "scalar"), [(gemma2.GGUF, 144), (gemma3.GGUF, 168)])
def test_the_largest_gemmas_are_imported_with_their_scale(family: Family, scalar: int) -> None:
    keys = RELEASED[family.architecture] | {
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "vocab_size": 256_000,
        "feed_forward_length": 36_864,
        "context_length": 8192,
        "attention.sliding_window": 4096,
    }
    model = read_settings(family, keys, where="a file")
    mixers: list[Any] = [block.mixer for block in model.blocks()]
    assert {mixer.scale for mixer in mixers} == {scalar**-0.5}
    assert family.write(model)["block_count"] == model.num_layers


# Names ------------------------------------------------------------------------------------------------------
CHAT = "<|user|>\n ab<|end|>  <|user|>\tc</s>\n\nd<s> e<unk> f<|endoftext|>\n g"


def phi3_vocabulary(**metadata: Any) -> dict[str, Any]:
    """A vocabulary with the special tokens of Phi-3's, as a GGUF file has it."""
    found = dict(sentence_piece_metadata())
    added = {"<|endoftext|>": CONTROL, "<|user|>": CONTROL, "<|end|>": USER_DEFINED}
    return found | {
        "tokenizer.ggml.tokens": [*found["tokenizer.ggml.tokens"], *added],
        "tokenizer.ggml.token_type": [*found["tokenizer.ggml.token_type"], *added.values()],
        "tokenizer.ggml.scores": [*found["tokenizer.ggml.scores"], *[0.0] * len(added)],
        **metadata,
    }


@pytest.mark.parametrize("name", ["My-PHI3-student", "phi-3", "student", None])
def test_blanks_beside_special_tokens_are_those_of_llama_cpp(name: str | None, tmp_path: Path) -> None:
    """On import by the name in the file, which decides in llama.cpp; on export by the tokens."""
    metadata = phi3_vocabulary() | ({} if name is None else {"general.name": name})
    tokenizer = tokenizer_from_gguf(metadata)
    llama_cpp.write_tiny_llama(tmp_path / "theirs.gguf", metadata)
    expected = encode(tokenizer, CHAT, with_special=True)
    assert expected == llama_cpp.tokenize(tmp_path / "theirs.gguf", CHAT, parse_special=True)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_directory(tmp_path / "words", tokenizer.backend, **config)
    written = tokenizer_metadata(
        tmp_path / "words", adds_bos=True, num_rows=len(metadata["tokenizer.ggml.tokens"])
    )
    follows = name not in ("student", None)
    assert written.get("general.name") == ("phi-3" if follows else None)
    assert encode(tokenizer_from_gguf(written), CHAT, with_special=True) == expected
    plain = encode(tokenizer_from_gguf(phi3_vocabulary()), CHAT, with_special=True)
    assert (len(expected) < len(plain)) == follows


def test_the_name_of_a_file_changes_nothing(tmp_path: Path) -> None:
    """Byte tokens lack what llama.cpp wants of a Phi-3, and it did not load a file that was called like
    one.
    """
    ByteTokenizer().build([]).save(tmp_path / "words")
    llama_cpp.write_tiny_llama(
        tmp_path / "tiny.gguf", tokenizer_metadata(tmp_path / "words", adds_bos=True, num_rows=258)
    )
    import_model(tmp_path / "tiny.gguf", tmp_path / "ours")
    paths = [tmp_path / "my-phi3-student.gguf", tmp_path / "other.gguf"]
    notes = [export_model(tmp_path / "ours", path, to=Target.GGUF).notes for path in paths]
    assert paths[0].read_bytes() == paths[1].read_bytes() and notes == [(), ()]
    assert not any("phi3" in str(value) for value in read_gguf(paths[0]).metadata.values())
    text = "<|bos|> a"
    ids = llama_cpp.tokenize(paths[0], text, parse_special=True)
    assert ids == slmjax.load_model(tmp_path / "ours").tokenizer.encode_with_special(text)


def test_what_names_do_is_said_on_import() -> None:
    assert name_notes({"general.name": "Llama"}) == []
    assert (
        "as in llama.cpp, its special tokens strip the spaces after them"
        in name_notes(phi3_vocabulary(**{"general.name": "Phi-3 mini"}))[0]
    )
    odd = {"general.name": "Phi3", "tokenizer.ggml.tokens": ["<s>"]}
    assert "does not load it without a token <unk>" in name_notes(odd)[0]
    added = [{"content": "<a>", "rstrip": True, "lstrip": False}]
    assert name_for(added, {"<a>", "</s>"}) is None and stripping_tokens(added) == ["<a>"]


@pytest.mark.parametrize(
    ("num_layers", "pre", "is_told"), [(40, "tekken", True), (39, "tekken", False), (40, "qwen2", False)]
)
def test_a_chat_template_that_llama_cpp_adds_is_told(
    num_layers: int, pre: str, is_told: bool, tmp_path: Path
) -> None:
    """By the depth and the vocabulary alone; a server that has such a file renders chats by a template of
    Mistral's.
    """
    ByteTokenizer().build([]).save(tmp_path)
    words = {"tokenizer.ggml.pre": pre}
    notes = list(tokenizer_notes(tmp_path, words, num_layers=num_layers))
    assert any("mistakes a model of 40 layers" in note for note in notes) == is_told
    assert not list(
        tokenizer_notes(
            tmp_path, words | {"tokenizer.chat_template": "{{ messages }}"}, num_layers=num_layers
        )
    )


# Zeros ------------------------------------------------------------------------------------------------------
def granite_file(directory: Path, **metadata: Any) -> Path:
    """A small Granite as a file, with other metadata; None takes a key away."""
    ours = deep_model("granite", 2, directory)
    export_model(ours, directory / "model.gguf", to=Target.GGUF)
    file = read_gguf(directory / "model.gguf")
    return rewrite(
        file,
        directory / "odd.gguf",
        {},
        **{f"granite.{name.replace('__', '.')}": value for name, value in metadata.items()},
    )


def test_a_multiplier_of_zero_is_one_that_is_not_there(tmp_path: Path) -> None:
    """As in llama.cpp; and `rope.scaling.finetuned` says that there are no positions."""
    names = ("attention__scale", "embedding_scale", "residual_scale")
    paths = [
        granite_file(tmp_path / str(value), **dict.fromkeys(names, value), rope__scaling__finetuned=False)
        for value in (0.0, None)
    ]
    import_model(paths[0], tmp_path / "back")
    loaded = slmjax.load_model(tmp_path / "back")
    assert [family_and_config(path, read_gguf(path))[1] for path in paths] == [loaded.config] * 2
    mixer: Any = next(loaded.config.blocks()).mixer
    assert (mixer.scale, mixer.rope_base) == (None, None)
    assert (loaded.config.embed_multiplier, loaded.config.residual_multiplier) == (1.0, 1.0)
    ids = loaded.tokenizer.prompt_ids("It was a day")
    found = llama_cpp.logprobs(paths[0], ids, vocab_size=VOCAB_SIZE)
    np.testing.assert_allclose(found, log_probabilities(loaded, ids), atol=1e-3)
    written = choose_family(
        canonical(loaded.config), (granite.GGUF,), format_name="GGUF", preferred=None, tolerance=TOLERANCE
    )
    assert written.settings["rope.scaling.finetuned"] is False


def test_logits_over_zero_and_multipliers_that_llama_cpp_would_leave_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logit_scale is 0.0, but it is a divisor"):
        import_model(granite_file(tmp_path, logit_scale=0.0), tmp_path / "back")
    config = config_of("granite")
    for key, name in (("residual_multiplier", "residual_scale"), ("attention_multiplier", "attention.scale")):
        model = read_settings(granite.HF, config | {key: 0.0}, where="granite")
        with pytest.raises(ValueError, match=rf"takes a multiplier of 0 as absent, but {name} is 0.0"):
            choose_family(model, (granite.GGUF,), format_name="GGUF", preferred=None)
        choose_family(model, (granite.HF,), format_name="Hugging Face", preferred=None)
