"""A pattern of a tokenizer.json that may take too long is refused; those of released models are not."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from slmjax.convert.gguf import pre_tokenizers as of_llama_cpp
from slmjax.data.patterns import SlowPattern, check_pattern, library_errors
from slmjax.data.tokenizers import ByteTokenizer, Tokenizer

# Of tiktoken (cl100k, o200k), Bloom, a split of digits in threes, T5, and what llama.cpp knows by name.
RELEASED = [
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\p{L}+|\s+",
    " {2,}",
    r"(?i:'s|'t)|(?>\p{L}+)x|[\]a]b{2,3}c|\x{41}\u0041\\",
    *(
        value
        for name, value in vars(of_llama_cpp).items()
        if isinstance(value, str) and name.startswith("_") and not name.startswith("__")
    ),
]
SLOW = [
    r"(a+)+b",
    r"(a*)*$",
    r"(?:a|a)*b",
    r"(?:a|ab|b)+c",
    r"(\w+\s?)+!",
    r"(?:a{1,3})+b",
    r"a*a*b",
    r"\s*\s+(?!\S)",
    r"(x+x+)+y",
    r"(?=(a+)+b)",
    r"(?:(?:a?){16}){2}a{30}b",
    r"((((a+)b?)c?)d?)*e",
    r"(a)\1",
    r"\g<1>(a)",
    r"(?<n>a)\k<n>",
    r"a{60000}",
    r"(?:(?:a{100}){100}){100}",
    r"(?~a)",
    r"(?x)a +",
    "(" * 200 + "a" + ")" * 200,
    r"(a",
    r"[a",
    r"a)",
]


@pytest.mark.parametrize("pattern", RELEASED)
def test_patterns_of_released_models_are_accepted(pattern: str) -> None:
    check_pattern(pattern)
    tokenizers.Regex(pattern)  # the library can read it, too


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_may_be_slow_are_refused(pattern: str) -> None:
    with pytest.raises(SlowPattern):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", [r"a+", r"(a+)+", r"(?:a+)++b", r"(?>(?:a+)+)b", r"a++b*c", r"x?a*b"])
def test_what_is_not_tried_again_is_accepted(pattern: str) -> None:
    check_pattern(pattern)


def test_the_library_gives_up_with_an_error_of_ours() -> None:
    """It raises a PanicException, which no `except Exception` catches."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"(a+)+b"), "isolated")
    with pytest.raises(ValueError, match=r"too long \(.*"), library_errors("too long"):
        backend.encode("a" * 60)


def test_a_tokenizer_file_with_such_a_pattern_is_refused(tmp_path: Path) -> None:
    ByteTokenizer().build([]).save(tmp_path)
    specification = json.loads((tmp_path / "tokenizer.json").read_text())
    slow = tokenizers.Regex(r"(a+)+b")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(slow, "x")])
    backend.pre_tokenizer = pre_tokenizers.Split(slow, "removed")
    backend.decoder = decoders.Replace(slow, "x")
    doubling = normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)
    parts = json.loads(backend.to_str())
    backend.normalizer = doubling
    cases = {part: {part: parts[part]} for part in ("normalizer", "pre_tokenizer", "decoder")}
    cases["times as long"] = {"normalizer": json.loads(backend.to_str())["normalizer"]}
    for message, change in cases.items():
        (tmp_path / "tokenizer.json").write_text(json.dumps({**specification, **change}))
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model": 1}', "\\xff", "[" * 100_000, '{"model": {}}'])
def test_a_damaged_tokenizer_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
