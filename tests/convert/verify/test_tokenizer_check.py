"""The tokenizer of an exported file is compared with the model's, key by key and by the ids that llama.cpp
gives.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from slmjax.convert.gguf.tokenizer import tokenizer_metadata
from slmjax.convert.verify.tokenizer_check import (
    TEXTS,
    TokenizerCheck,
    compare_ids,
    compare_metadata,
    known_limit,
    vocabulary_texts,
)
from slmjax.data.tokenizers import BpeTokenizer, Tokenizer
from tests.convert.llama_cpp import write_tiny_llama

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ROWS = 330  # of the embedding table, which is padded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = (
        BpeTokenizer(vocab_size=300)
        .build([*TEXTS, "the quick brown fox, the quicker fox " * 5])
        .add_tokens(["<|im_end|>"], special=True)
    )
    return Tokenizer(made._backend, bos=made.bos, eos=made.eos, ends=["<|im_end|>"], chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer.save(tmp_path_factory.mktemp("tokenizer"))
    return tmp_path_factory.getbasetemp() / "tokenizer0"


def checked(tokenizer: Tokenizer, directory: Path, file: Path, **change: Any) -> TokenizerCheck:
    """The check of a file of one layer, whose metadata are changed; with the engine, where it may load the
    file.
    """
    written = {
        **tokenizer_metadata(directory, adds_bos=True, num_rows=ROWS),
        **{f"tokenizer.{key}": value for key, value in change.items()},
    }
    metadata = {key: value for key, value in written.items() if value is not None}
    check = compare_metadata(metadata, directory, tokenizer, num_rows=ROWS)
    if not check.can_load:
        return check
    write_tiny_llama(file, metadata)
    return compare_ids(check, file, tokenizer, context=64)


def test_what_is_written_holds(tokenizer: Tokenizer, directory: Path, tmp_path: Path) -> None:
    check = checked(tokenizer, directory, tmp_path / "model.gguf")
    assert check.holds and not check.differences and not check.differing_texts
    assert check.keys > 8 and check.texts == len(TEXTS) + len(vocabulary_texts(tokenizer)) + 4 > 30


def test_swapped_tokens_and_another_bos_are_named(
    tokenizer: Tokenizer, directory: Path, tmp_path: Path
) -> None:
    tokens = list(tokenizer_metadata(directory, adds_bos=True, num_rows=ROWS)["tokenizer.ggml.tokens"])
    a = tokens.index("a")
    b = tokens.index("b")
    tokens[a], tokens[b] = tokens[b], tokens[a]
    swapped = checked(tokenizer, directory, tmp_path / "swapped.gguf", **{"ggml.tokens": tokens})
    first = f"entry {min(a, b)} is {tokens[min(a, b)]!r} in the file"
    assert (
        not swapped.holds
        and len(swapped.differences) == 1
        and "2 of 330 entries differ" in swapped.differences[0]
    )
    assert first in swapped.differences[0]
    one = next(one for one in swapped.differing_texts if one.text == "a")
    assert (one.ours, one.engine, one.reason) == ((a,), (b,), None), "the engine says so too"

    other = checked(tokenizer, directory, tmp_path / "bos.gguf", **{"ggml.bos_token_id": 5})
    assert not other.holds and other.differences == (
        "tokenizer.ggml.bos_token_id: 5 in the file, 0 in the model",
    )
    assert [(one.engine[0], one.ours[0]) for one in other.differing_texts] == [(5, 0)] * 2, (
        "the texts to which the engine adds BOS"
    )


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("ggml.add_bos_token", False, "add_bos_token: False in the file, True in the model"),
        ("ggml.add_eos_token", True, "add_eos_token: True in the file, False in the model"),
        ("ggml.eot_token_id", None, "eot_token_id: absent in the file, 300 in the model"),
        ("ggml.pre", "qwen2", "pre: 'qwen2' in the file, 'gpt-2' in the model"),
        ("ggml.model", "llama", "model: 'llama' in the file, 'gpt2' in the model"),
        ("ggml.merges", [], "merges: 0 entries in the file, 42 in the model"),
        (
            "ggml.token_type",
            [1] * ROWS,
            "token_type: 32 of 330 entries differ; entry 0 is 1 in the file, 3 in the model",
        ),
        ("chat_template", "{{ 1 }}", "chat_template: '{{ 1 }}' in the file"),
        ("ggml.fim_pre_token_id", 7, "fim_pre_token_id: 7 in the file, absent in the model"),
    ],
)
def test_each_key_is_compared(
    tokenizer: Tokenizer, directory: Path, key: str, value: Any, difference: str
) -> None:
    metadata = {**tokenizer_metadata(directory, adds_bos=True, num_rows=ROWS), f"tokenizer.{key}": value}
    check = compare_metadata(
        {name: one for name, one in metadata.items() if one is not None}, directory, tokenizer, num_rows=ROWS
    )
    assert not check.holds and len(check.differences) == 1 and difference in check.differences[0]
    assert check.can_load == (key not in ("ggml.pre", "ggml.model", "ggml.merges"))


def test_limits_of_the_engine_are_told_and_are_no_fault_of_the_file(tokenizer: Tokenizer) -> None:
    assert known_limit(tokenizer, "e\u0301", [5]) is None
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.normalizer = normalizers.NFC()
    composing = Tokenizer(backend, bos=tokenizer.bos, eos=tokenizer.eos)
    assert "NFC" in str(known_limit(composing, "e\u0301", [5])) and known_limit(composing, "é", [5]) is None
    assert "special tokens" in str(known_limit(tokenizer, "<|im_end|>", [300]))
    words = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1}))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    assert "starts with one" in str(known_limit(Tokenizer(words, bos="<s>", eos="<s>"), " a", [1]))
    check = TokenizerCheck(keys=1, differences=(), can_load=True, texts=1, differing_texts=())
    assert check.holds and not dataclasses.replace(check, differences=("a",)).holds
