"""Tokenizers in GGUF files: ids as llama.cpp's for every kind, there and back, and what is refused."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from slmjax.convert.gguf.pre_tokenizers import KINDS, byte_level_steps, pre_tokenization_of
from slmjax.convert.gguf.tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    tokenizer_from_gguf,
    tokenizer_metadata,
)
from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from tests.convert.llama_cpp import tokenize, write_tiny_llama
from tests.convert.vocabularies import (
    BLANKS,
    MARKS,
    TEXTS,
    WORDS_BEYOND_ASCII,
    byte_level_metadata,
    encode,
    sentence_piece_metadata,
    write_directory,
)

# As llama.cpp -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", list(KINDS), ids=lambda names: names[0])
def test_byte_level_ids_are_llama_cpps(names: tuple[str, ...], tmp_path: Path) -> None:
    metadata = byte_level_metadata(names[0])
    tokenizer = tokenizer_from_gguf(metadata)
    path = tmp_path / "x.gguf"
    write_tiny_llama(path, metadata)
    for text in TEXTS if names[0] in WORDS_BEYOND_ASCII else [*TEXTS, MARKS]:
        ids = encode(tokenizer, text)
        assert ids == tokenize(path, text), text
        assert tokenizer.backend.decode(ids) == text
        assert [0] * tokenizer.adds_bos + ids == tokenize(path, text, add_special=True)
    assert encode(tokenizer, "<|bos|>a <|eos|> b", with_special=True) == tokenize(
        path, "<|bos|>a <|eos|> b", parse_special=True
    )
    assert (len(encode(tokenizer, " unmergeable")) == 1) == pre_tokenization_of(names[0]).takes_whole


def test_names_of_one_kind_and_of_others_cut_differently() -> None:
    """The texts tell the kinds apart: a kind under another's name would be noticed above."""
    pieces = {}
    for names, pre_tokenization in KINDS.items():
        backend = byte_level_steps(pre_tokenization)
        pieces[names[0]] = [
            tuple(piece for piece, _ in backend.pre_tokenize_str(text)) for text in [*TEXTS, MARKS]
        ]
    alike = [{a, b} for a in pieces for b in pieces if a < b and pieces[a] == pieces[b]]
    assert alike == [{"llama-bpe", "smaug-bpe"}]  # which differ in what they take whole


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no_prefix"])
def test_sentence_piece_ids_are_llama_cpps(prefix: bool, tmp_path: Path) -> None:
    metadata = {
        **sentence_piece_metadata(),
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.add_eos_token": not prefix,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    path = tmp_path / "x.gguf"
    write_tiny_llama(path, metadata)
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == (True, not prefix)
    for text in [*TEXTS[:-1], MARKS, "<0x41>", "▁ a"]:
        ids = encode(tokenizer, text)
        assert ids == tokenize(path, text), text
        assert [1, *ids] + [2] * tokenizer.adds_eos == tokenize(path, text, add_special=True)
        if "    " not in text and "▁" not in text:  # after a user-defined token, too, a blank is put first
            assert tokenizer.backend.decode(ids) == text
    for text in ("<s>a b<|turn|> c<|turn|>d    e</s>", " <s>", "<s> <s>", "<|turn|>\n\nx"):
        assert encode(tokenizer, text, with_special=True) == tokenize(path, text, parse_special=True)


def test_text_does_not_forge_control_tokens(tmp_path: Path) -> None:
    """llama.cpp merges "<" and "s>" to the control token; SentencePiece does not, nor do we."""
    path = tmp_path / "x.gguf"
    write_tiny_llama(path, sentence_piece_metadata())
    assert 1 in tokenize(path, "a<s>b")
    assert 1 not in encode(tokenizer_from_gguf(sentence_piece_metadata()), "a<s>b")


# Our own vocabularies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [BpeTokenizer(vocab_size=500), ByteTokenizer(), CharTokenizer()], ids=["bpe", "byte", "char"]
)
def test_vocabularies_made_here(config: Any, tmp_path: Path) -> None:
    tokenizer = config.build([BLANKS, topics["for"], topics["if"]])
    tokenizer.save(tmp_path)
    # three rows without a token
    metadata = tokenizer_metadata(tmp_path, adds_bos=True, num_rows=tokenizer.vocab_size + 3)
    assert metadata["tokenizer.ggml.token_type"][-4:] == [NORMAL, UNUSED, UNUSED, UNUSED]
    path = tmp_path / "x.gguf"
    write_tiny_llama(path, metadata)
    back = tokenizer_from_gguf(metadata)
    again = Tokenizer(back.backend, bos=back.bos or "", eos=back.eos or "")
    assert (back.bos, back.eos, back.unk, back.pad, back.adds_bos, back.adds_eos) == (
        "<|bos|>",
        "<|eos|>",
        None,
        None,
        True,
        False,
    )
    known = (
        text
        for text in TEXTS
        if not isinstance(config, CharTokenizer) or set(text) <= set(BLANKS + topics["for"])
    )
    for text in known:
        ids = tokenizer.encode(text)
        assert ids == again.encode(text) == tokenize(path, text)
        assert [0, *ids] == tokenize(path, text, add_special=True)
        assert again.decode(ids) == text
    if isinstance(config, CharTokenizer):
        with pytest.raises(ValueError, match="the character vocabulary has no '☂'"):
            again.encode("☂")


# There and back ---------------------------------------------------------------------------------------------


def there_and_back(metadata: dict[str, Any], directory: Path) -> dict[str, Any]:
    tokenizer = tokenizer_from_gguf(metadata)
    config = {f"{role}_token": getattr(tokenizer, role) for role in ("bos", "eos", "unk", "pad")}
    write_directory(directory, tokenizer.backend, **config, chat_template=tokenizer.chat_template)
    return tokenizer_metadata(
        directory, adds_bos=tokenizer.adds_bos, num_rows=len(metadata["tokenizer.ggml.tokens"])
    )


@pytest.mark.parametrize("names", list(KINDS), ids=lambda names: names[0])
def test_byte_level_there_and_back(names: tuple[str, ...], tmp_path: Path) -> None:
    metadata = byte_level_metadata(names[-1])
    metadata["tokenizer.ggml.token_type"][300:302] = [USER_DEFINED, CONTROL]
    metadata["tokenizer.chat_template"] = "{{ messages }}"
    written = there_and_back(metadata, tmp_path)
    added = {
        "tokenizer.ggml.add_bos_token": pre_tokenization_of(names[0]).adds_bos,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert written == {
        **metadata,
        **added,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.pre": names[0],
    }


def test_sentence_piece_there_and_back(tmp_path: Path) -> None:
    written = there_and_back(sentence_piece_metadata(), tmp_path)
    changed = {key for key, value in sentence_piece_metadata().items() if written[key] != value}
    assert changed == {"tokenizer.ggml.scores"}  # which are numbered again, in the same order
    assert written["tokenizer.ggml.add_space_prefix"] is True
    first = tokenizer_from_gguf(sentence_piece_metadata())
    second = tokenizer_from_gguf(written)
    assert first.backend.to_str() == second.backend.to_str()


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer.ggml.model": "t5"},
            "tokenizer.ggml.model is 't5'; supported are 'gpt2' and 'llama'",
        ),
        (
            {"tokenizer.ggml.pre": "llama-bqe"},
            "'llama-bqe', which is not supported. Did you mean 'llama-bpe'.*Supported: gpt-2, phi-2",
        ),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "has 2 entries, 1 of them distinct"),
        ({"tokenizer.ggml.merges": ["zz zz"]}, "merges does not fit"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000, but there are"),
        ({"tokenizer.ggml.model": "llama"}, "scores has 0 entries"),
    ],
)
def test_metadata_that_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf({**byte_level_metadata("gpt-2"), **change})
