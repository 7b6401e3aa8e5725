"""No text yields the id of a special token, whatever the model type of the vocabulary."""

import functools
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
CHARACTERS = "ab </s>unkpd|eo"
SPELLING = st.lists(
    st.sampled_from([*SPECIAL, "<|eos|>", "<|bos|>", "a", "b", " ", "</", "s>", "<", ">"]), max_size=8
).map("".join)
Build = Callable[[], tuple[tokenizers.Tokenizer, dict[str, str]]]


def _ids(names: list[str]) -> dict[str, int]:
    return {name: id for id, name in enumerate(dict.fromkeys([*SPECIAL, *names]))}


def _unigram() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    pieces = [(name, 0.0) for name in SPECIAL] + [
        (character, -2.0) for character in dict.fromkeys(CHARACTERS)
    ]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Fuse()
    return backend, {}


def _word_level() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    backend = tokenizers.Tokenizer(models.WordLevel(_ids(["a", "b"]), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("</s>", "isolated")
    return backend, {}


def _word_piece() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    pieces = [*CHARACTERS, *(f"##{character}" for character in CHARACTERS)]
    backend = tokenizers.Tokenizer(models.WordPiece(_ids(pieces), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("</s>", "isolated")
    return backend, {}


MERGES = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>"), ("</s>", "a")]


def _bpe(**options: bool) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    names = [*CHARACTERS, "</", "s>", "</s>a"]
    backend = tokenizers.Tokenizer(models.BPE(vocab=_ids(names), merges=MERGES, unk_token="<unk>", **options))
    backend.decoder = decoders.Fuse()
    return backend, {}


def _found_in_any_text() -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """EOS is an added token that is not marked special, and another such token is no role's."""
    alphabet = {character: id for id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.add_tokens(["</s>", "<unk>", "<pad>"])
    return backend, {"pad": "<pad>"}


KINDS: dict[str, Build] = {
    "unigram": _unigram,
    "word_level": _word_level,
    "word_piece": _word_piece,
    "bpe": _bpe,
    "bpe_of_whole_words": functools.partial(_bpe, ignore_merges=True),
    "byte_level_with_added_tokens": _found_in_any_text,
}


def _tokenizer(kind: str, *, marked: bool) -> Tokenizer:
    backend, roles = KINDS[kind]()
    if marked and kind != "byte_level_with_added_tokens":
        backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, bos="<s>", eos="</s>", pad=roles.get("pad"))


ALL = {f"{kind}{marked}": _tokenizer(kind, marked=marked) for kind in KINDS for marked in (False, True)}
OWN = {
    "bytes": ByteTokenizer().build(()),
    "trained": BpeTokenizer(vocab_size=300).build(["a<|eos|>b</s><s> " * 9]),
    "characters": CharTokenizer().build([CHARACTERS]),
}
LOSSLESS = ("unigram", "bpe", "byte_level")


@settings(deadline=None, max_examples=40)
@given(text=SPELLING)
def test_no_text_yields_a_special_token(text: str) -> None:
    for kind, tokenizer in {**ALL, **OWN}.items():
        ids = tokenizer.encode(text)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids), kind
        if tokenizer.pad is not None:
            assert tokenizer.special_ids.get(tokenizer.pad, -1) not in ids
        if kind in OWN or kind.startswith(LOSSLESS):
            assert tokenizer.decode(ids) == text, kind
    for kind in ("unigramTrue", "bpeTrue"):
        assert not set(ALL[kind].special_ids.values()) & set(ALL[kind].encode(text)), (
            "no character is unknown, so <unk> is text too"
        )


def test_the_text_of_an_end_is_encoded_by_what_is_left() -> None:
    """By hand: the pieces of the text, without the token of that name."""
    names = [[ALL[kind].name_of(id) for id in ALL[kind].encode("a</s>b")] for kind in ALL]
    assert names[:2] == [["a", "<", "/", "s", ">", "b"]] * 2
    assert names[2:4] == [["a", "<unk>", "b"]] * 2  # a vocabulary of whole words has nothing else
    assert names[4:6] == [["a", "<", "##/", "##s", "##>", "b"]] * 2
    assert names[6:10] == [["a", "</", "s>", "b"]] * 4
    assert names[10] == ["a", "<", "/", "s", ">", "b"]
    for tokenizer in ALL.values():
        assert tokenizer.encode_with_special("</s>") == [tokenizer.eos_id], "a template's tokens stay special"


def test_an_added_token_without_a_role_is_found_in_text() -> None:
    tokenizer = ALL["byte_level_with_added_tokensTrue"]
    assert [tokenizer.name_of(id) for id in tokenizer.encode("<unk><pad>")] == [
        "<unk>",
        "<",
        "p",
        "a",
        "d",
        ">",
    ]


def test_unknown_text_never_becomes_bos_or_eos() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel(_ids(["a"]), unk_token="</s>"))
    with pytest.raises(
        ValueError, match="'</s>' for text that it cannot express, and that token begins or ends documents"
    ):
        Tokenizer(backend, bos="<s>", eos="</s>").encode("b")
    without = tokenizers.Tokenizer(models.Unigram([(name, 0.0) for name in [*SPECIAL, "a"]]))
    with pytest.raises(ValueError, match="cannot express the text, and has no unknown token"):
        Tokenizer(without, bos="<s>", eos="</s>").encode("b")
    assert Tokenizer(without, bos="<s>", eos="</s>").encode("aa") == [4, 4]
