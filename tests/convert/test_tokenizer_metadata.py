"""From a directory with tokenizer.json to the keys of a GGUF file: Hugging Face's layouts, conventions, and
what is refused.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from slmjax.convert.gguf.pre_tokenizers import pre_tokenization_name
from slmjax.convert.gguf.tokenizer import USER_DEFINED, tokenizer_from_gguf, tokenizer_metadata
from slmjax.data.tokenizers import ByteTokenizer
from tests.convert.llama_cpp import tokenize, write_tiny_llama
from tests.convert.vocabularies import (
    TEXTS,
    byte_level_metadata,
    encode,
    sentence_piece_metadata,
    write_directory,
)

# Hugging Face's layouts -------------------------------------------------------------------------------------


def split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMOLLM = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.mark.parametrize(
    ("step", "takes_whole", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (SMOLLM, False, "smollm"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "smaug-bpe"),
        (split(LLAMA3, "removed", invert=True), False, "smaug-bpe"),
        (split(LLAMA3.replace(r"\r", "\r").replace(r"\n", "\n")), True, "llama-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), False, "qwen2"),
    ],
)
def test_cuts_have_llama_cpps_names(step: pre_tokenizers.PreTokenizer, takes_whole: bool, name: str) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = step
    assert (
        pre_tokenization_name(json.loads(backend.to_str())["pre_tokenizer"], takes_whole=takes_whole) == name
    )


@pytest.mark.parametrize(
    ("normalizer", "step", "prefix"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True),
        (None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False), True),
        (None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False), False),
        (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    ],
    ids=["llama2", "llama2_new", "no_prefix", "gemma"],
)
def test_layouts_of_sentence_piece(normalizer: Any, step: Any, prefix: bool, tmp_path: Path) -> None:
    backend = tokenizer_from_gguf(sentence_piece_metadata()).backend
    backend.normalizer = normalizer
    backend.pre_tokenizer = step
    write_directory(tmp_path, backend, bos_token="<s>", eos_token={"content": "</s>", "special": True})
    metadata = tokenizer_metadata(tmp_path, adds_bos=True, num_rows=backend.get_vocab_size())
    assert metadata["tokenizer.ggml.add_space_prefix"] == prefix
    backend.encode_special_tokens = True
    again = tokenizer_from_gguf(metadata)
    is_new = prefix and normalizer is None  # puts no blank before one
    for text in TEXTS:
        if "    " not in text and not (is_new and text.startswith(" ")):
            assert encode(again, text) == backend.encode(text, add_special_tokens=False).ids


def test_a_token_that_is_found_in_prepared_text(tmp_path: Path) -> None:
    """Gemma's runs of blanks: Hugging Face looks for "▁▁" after blanks became "▁", llama.cpp for two blanks
    before.
    """
    backend = tokenizer_from_gguf(
        {**sentence_piece_metadata(), "tokenizer.ggml.add_space_prefix": False}
    ).backend
    backend.add_tokens([AddedToken("▁▁▁", normalized=True, special=False)])
    write_directory(tmp_path, backend, bos_token="<s>", eos_token="</s>")
    metadata = tokenizer_metadata(tmp_path, adds_bos=True, num_rows=backend.get_vocab_size())
    id = backend.token_to_id("▁▁▁")
    assert (metadata["tokenizer.ggml.tokens"][id], metadata["tokenizer.ggml.token_type"][id]) == (
        "   ",
        USER_DEFINED,
    )
    write_tiny_llama(tmp_path / "x.gguf", metadata)
    ids = encode(tokenizer_from_gguf(metadata), "a   b")
    assert (
        ids == backend.encode("a   b", add_special_tokens=False).ids == tokenize(tmp_path / "x.gguf", "a   b")
    )
    assert id in ids


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "GemmaTokenizer"])
def test_tokenizers_of_transformers(name: str, tmp_path: Path) -> None:
    """What transformers saves for its own classes becomes a GGUF whose ids llama.cpp and transformers agree
    on.
    """
    transformers = importlib.import_module("transformers")
    source = (
        byte_level_metadata("gpt-2")
        if name in ("GPT2Tokenizer", "Qwen2Tokenizer")
        else sentence_piece_metadata()
    )
    model = json.loads(tokenizer_from_gguf(source).backend.to_str())["model"]
    model["vocab"].pop("    ", None)  # the last one, which is no token that merges make
    bos, eos = ("<|bos|>", "<|eos|>") if source is not sentence_piece_metadata() else ("<s>", "</s>")
    names = {
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "unk_token": eos if source is not sentence_piece_metadata() else "<unk>",
    }
    theirs = getattr(transformers, name)(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], **names
    )
    theirs.chat_template = "{{ messages[0]['content'] }}"
    theirs.save_pretrained(tmp_path)
    metadata = tokenizer_metadata(
        tmp_path, adds_bos=name in ("LlamaTokenizer", "GemmaTokenizer"), num_rows=len(theirs)
    )
    assert metadata["tokenizer.chat_template"] == theirs.chat_template
    write_tiny_llama(tmp_path / "x.gguf", metadata)
    for text in TEXTS:
        if "<s>" not in text and not (name == "LlamaTokenizer" and text.startswith(" ")):
            assert (
                tokenize(tmp_path / "x.gguf", text) == theirs(text, add_special_tokens=False)["input_ids"]
            ), text


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`small(backend_change, **config)`: the metadata of a byte vocabulary that was changed first."""

    def build(
        change: Callable[[tokenizers.Tokenizer], object] = lambda backend: None, **config: Any
    ) -> dict[str, Any]:
        backend = ByteTokenizer().build([])._backend
        change(backend)
        write_directory(tmp_path, backend, **{"bos_token": "<|bos|>", "eos_token": "<|eos|>", **config})
        return tokenizer_metadata(tmp_path, adds_bos=True, num_rows=270)

    return build


def test_conventions_of_a_directory(small: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    def add(backend: tokenizers.Tokenizer) -> None:
        backend.add_special_tokens(["<|im_end|>"])

    metadata = small(
        add, pad_token="<|eos|>", end_tokens=["<|eos|>", "<|im_end|>"], chat_template="in the settings"
    )
    tokenizer = tokenizer_from_gguf(metadata)
    assert (tokenizer.pad, tokenizer.end_of_turn, tokenizer.chat_template) == (
        "<|eos|>",
        "<|im_end|>",
        "in the settings",
    )
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "the default"}]
    assert small(chat_template=named)["tokenizer.chat_template"] == "the default"
    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert small(chat_template="in the settings")["tokenizer.chat_template"] == "in a file"
    assert (
        tokenizer_from_gguf({k: v for k, v in metadata.items() if "eot" not in k}).end_of_turn == "<|im_end|>"
    )  # by its name


# What is refused --------------------------------------------------------------------------------------------


def set_up(**attributes: Any) -> Callable[[tokenizers.Tokenizer], None]:
    def change(backend: tokenizers.Tokenizer) -> None:
        for name, value in attributes.items():
            setattr(backend, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (set_up(model=models.Unigram([("a", 0.0)])), {}, "of type Unigram"),
        (set_up(normalizer=normalizers.Lowercase()), {}, "has a normalizer"),
        (
            set_up(pre_tokenizer=pre_tokenizers.Whitespace()),
            {},
            "'Whitespace'.*which llama.cpp does not have",
        ),
        (set_up(pre_tokenizer=split("[a-c]+")), {}, "knows no name in llama.cpp"),
        (
            set_up(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
            {},
            "which llama.cpp does not have",
        ),
        (set_up(decoder=decoders.WordPiece()), {}, "neither byte-level"),
        (lambda backend: backend.add_tokens([AddedToken("<m>", lstrip=True)]), {}, "'<m>' strips spaces"),
        (
            lambda backend: backend.add_tokens([f"<{i}>" for i in range(20)]),
            {},
            "ids up to 277, but the embedding table has 270 rows",
        ),
        (lambda backend: backend.add_tokens(["[PAD269]"]), {}, r"several tokens that are '\[PAD269\]'"),
        (set_up(), {"eos_token": None}, "has no eos_token"),
        (set_up(), {"bos_token": None}, "has no bos_token"),
        (set_up(), {"pad_token": "<pad>"}, r"names \['<pad>'\], which tokenizer.json does not have"),
    ],
)
def test_directories_that_are_refused(
    change: Callable[[tokenizers.Tokenizer], object],
    config: dict[str, Any],
    message: str,
    small: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(ValueError, match=message):
        small(change, **config)


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        (
            [("a", "b"), ("ab", "c")],
            r"the merges lack \('a', 'bc'\), which llama.cpp would merge to 'abc'",
        ),
        ([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")], "'abc' are not consecutive"),
    ],
)
def test_merges_that_scores_do_not_express(
    merges: list[tuple[str, str]], message: str, tmp_path: Path
) -> None:
    vocabulary = {token: id for id, token in enumerate(["<s>", "</s>", "a", "b", "c", "ab", "bc", "abc"])}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[*merges, *([("b", "c")] if len(merges) == 2 else [])],
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<s>", "</s>"])
    write_directory(tmp_path, backend, bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match=message):
        tokenizer_metadata(tmp_path, adds_bos=True, num_rows=8)


def test_a_vocabulary_without_every_byte(tmp_path: Path) -> None:
    vocabulary = {token: id for id, token in enumerate(["<s>", "</s>", "a", "<0x00>", "<0x02>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.add_special_tokens(["<s>", "</s>"])
    write_directory(tmp_path, backend, bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="lacks <0x01>: llama.cpp fails"):
        tokenizer_metadata(tmp_path, adds_bos=True, num_rows=5)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no .*tokenizer.json"):
        tokenizer_metadata(tmp_path, adds_bos=True, num_rows=8)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        tokenizer_metadata(tmp_path, adds_bos=True, num_rows=8)
