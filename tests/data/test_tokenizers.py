"""Every tokenizer round-trips text, keeps special-token text as text, and knows the bytes of its tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, Tokenizer
from slmjax.data.vocabulary import LONGEST_WORD, sample_of, with_short_words

TEXTS = [
    "def main(arguments):\n    return arguments\n" * 3,
    "the quick brown fox, the quicker fox and the quickest " * 3,
    "grüße an ☃ \U0001f600 <|eos|> <|bos|>",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # all of Unicode but surrogates


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return BpeTokenizer(vocab_size=300).build(TEXTS)


def test_training_is_deterministic_whatever_the_order(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 300
    assert BpeTokenizer(vocab_size=300).build(TEXTS).hash == bpe.hash
    assert BpeTokenizer(vocab_size=300).build(TEXTS[::-1]).hash == bpe.hash
    assert BpeTokenizer(vocab_size=299).build(TEXTS).hash != bpe.hash


def test_training_reads_a_bounded_sample_whatever_the_order() -> None:
    documents = [f"document {i} {chr(97 + i) * 40}" for i in range(20)]
    config = BpeTokenizer(vocab_size=270, training_bytes=200)
    assert (
        config.build(documents).hash
        == config.build(documents[::-1]).hash
        == config.build(documents[7:] + documents[:7]).hash
    )
    assert config.build(documents).hash != BpeTokenizer(vocab_size=270).build(documents).hash


def test_vocabulary_must_hold_the_bytes() -> None:
    with pytest.raises(ValueError, match="at least 258"):
        BpeTokenizer(vocab_size=257)


def test_bytes_by_hand() -> None:
    tokenizer = ByteTokenizer().build([])
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 0, 1)
    assert tokenizer.encode("aé\0") == [2 + 97, 2 + 0xC3, 2 + 0xA9, 2]
    assert tokenizer.decode_bytes([0, 2 + 0xFF, 2 + 65, 1]) == b"\xffA"
    assert tokenizer.decode([0, 2 + 0xFF, 2 + 65, 1]) == "\ufffdA"
    assert tokenizer.token_bytes.tolist() == [0, 0] + [1] * 256


def test_characters_by_hand() -> None:
    tokenizer = CharTokenizer().build(["ba", "é<b"])
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("<abé") == [2, 3, 4, 5]  # in code point order
    assert tokenizer.token_bytes.tolist() == [0, 0, 1, 1, 1, 2]
    assert tokenizer.decode_bytes([0, 5, 2, 1]) == "é<".encode()
    assert tokenizer.decode([0, 5, 2, 1]) == "é<"
    with pytest.raises(ValueError, match="has no 'c', 'ü', only the 4 characters"):
        tokenizer.encode("abcü")


@settings(deadline=None, max_examples=60)
@given(text=ANY_TEXT)
def test_any_text_round_trips(bpe: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, ByteTokenizer().build([]), CharTokenizer().build([text])):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.token_bytes is not None
        assert tokenizer.token_bytes[np.asarray(ids, int)].sum() == len(text.encode())
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("text", ["<|eos|>", "a<|bos|>b", "\ufeffx", "x\0y", "e\u0301\u200d", "  \r\n\t "])
def test_awkward_text_stays_as_it_is(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text
    assert not {0, 1} & set(bpe.encode(text))


def test_lone_surrogates_are_no_text(bpe: Tokenizer) -> None:
    with pytest.raises(ValueError, match="unpaired surrogate at character 1"):
        bpe.encode("a\udcff")


def test_save_and_load(bpe: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (bpe, ByteTokenizer().build([]), CharTokenizer().build(TEXTS)):
        tokenizer.save(tmp_path / "saved")
        loaded = Tokenizer.load(tmp_path / "saved")
        assert loaded.hash == tokenizer.hash
        assert loaded.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
        assert np.array_equal(loaded.token_bytes, tokenizer.token_bytes)


def test_exported_vocabulary_adds_no_blank(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    specification = json.loads((tmp_path / "tokenizer.json").read_text())
    assert specification["pre_tokenizer"] == {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    assert [token["content"] for token in specification["added_tokens"]] == ["<|bos|>", "<|eos|>"]


# Tokenizers of others ---------------------------------------------------------------------------------------


def foreign(tmp_path: Path, *, special: list[str], **parts: object) -> Path:
    """A byte-level tokenizer.json with these special tokens; `parts` are set on it."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.enable_truncation(4)
    backend.enable_padding()
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_bos_and_eos_are_found(tmp_path: Path) -> None:
    path = foreign(tmp_path, special=["<pad>", "<s>", "</s>", "<|endoftext|>"])
    result = FileTokenizer(path=str(path)).build([])
    assert (result.bos_id, result.eos_id) == (257, 258)
    named = FileTokenizer(path=str(path / "tokenizer.json"), bos="<|endoftext|>", eos="<pad>").build([])
    assert (named.bos_id, named.eos_id) == (259, 256)
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": None, "eos_token": {"content": "<|endoftext|>"}})
    )
    configured = FileTokenizer(path=str(path)).build([])
    assert (configured.bos_id, configured.eos_id) == (259, 259), (
        "no <s>: the file specifies that there is no BOS"
    )


def test_nothing_is_cut_or_padded(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(path=str(foreign(tmp_path, special=["<s>", "</s>"]))).build([])
    assert [len(ids) for ids in tokenizer.encode_batch(["abcdefgh", "a"])] == [8, 1]


def test_missing_bos_lists_the_candidates(tmp_path: Path) -> None:
    path = str(foreign(tmp_path, special=["<start>", "<stop>"]))
    with pytest.raises(
        ValueError, match=r"no EOS token under a usual name.*--tokenizer\.eos: \['<start>', '<stop>'\]"
    ):
        FileTokenizer(path=path).build([])
    with pytest.raises(
        ValueError, match=r"no BOS token under a usual name.*--tokenizer\.bos: \['<start>', '<stop>'\]"
    ):
        FileTokenizer(path=path, eos="<stop>").build([])
    with pytest.raises(ValueError, match="no token '<strat>' for bos. Did you mean '<start>'"):
        FileTokenizer(path=path, bos="<strat>", eos="<stop>").build([])
    assert FileTokenizer(path=path, bos="<start>", eos="<stop>").build([]).bos_id == 256


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no .*tokenizer.json"):
        FileTokenizer(path=str(tmp_path)).build([])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json that the tokenizers library can read"):
        FileTokenizer(path=str(tmp_path)).build([])


def test_bytes_are_exact_or_not_given(tmp_path: Path) -> None:
    special = ["<s>", "</s>"]
    plain = FileTokenizer(path=str(foreign(tmp_path, special=special))).build([])
    assert plain.token_bytes is not None and plain.token_bytes.tolist() == [1] * 256 + [0, 0]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+| "), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert (
        FileTokenizer(path=str(foreign(tmp_path, special=special, pre_tokenizer=split))).build([]).token_bytes
        is not None
    )
    changes = {
        "normalizer": normalizers.NFC(),  # changes the text
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True),  # adds a blank
        "decoder": decoders.Fuse(),
    }
    for name, part in changes.items():
        inexact = FileTokenizer(path=str(foreign(tmp_path, special=special, **{name: part}))).build([])
        assert inexact.token_bytes is None
        with pytest.raises(ValueError, match="use decode"):
            inexact.decode_bytes([1])
    swallowing = tokenizers.AddedToken("<tab>", lstrip=True, special=False)
    path = foreign(tmp_path, special=special)
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_tokens([swallowing])
    backend.save(str(path / "tokenizer.json"))
    assert FileTokenizer(path=str(path)).build([]).token_bytes is None


def test_a_continuation_keeps_the_space_before_its_first_word(bpe: Tokenizer, tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "\u2581Hello": 2, "\u2581world": 3}
    words = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.add_special_tokens(["<s>", "</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path, bos="<s>", eos="</s>")
    assert loaded.decode([3]) == "world"
    assert (
        loaded.decode_continuation([0, 2], [3, 3, 1]) == " world world"
        and loaded.decode_continuation([0], [3]) == "world"
    )
    ids = bpe.encode("the quick")
    assert bpe.decode_continuation(ids[:2], ids[2:]) == bpe.decode(ids[2:])


def test_words_to_learn_from_are_bounded() -> None:
    """A word of megabytes would take hours to learn from; no other word is cut."""
    usual = "def main(arguments):\n" + " ".join("ab1.,ä" * 40 for _ in range(50)) + " " * 200
    assert list(with_short_words([usual, ""])) == [usual, ""]
    for character in ("a", "7", "-", "_-", " ", "数"):
        text = f"one two {character * 100_000}! three"
        pieces = list(with_short_words([text]))
        assert "".join(pieces) == text and len(pieces) > 300
        words = [
            word for piece in pieces for word, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str(piece)
        ]
        assert max(len(word) for word in words) <= 3 * (LONGEST_WORD + 1)  # three bytes for one character
    text = "abc" * 400_000
    tokenizer = BpeTokenizer(vocab_size=270).build([text])
    assert tokenizer.decode(tokenizer.encode(text[:1000])) == text[:1000]


def test_a_text_longer_than_the_sample_is_cut() -> None:
    assert sample_of(["ä" * 10], 5) == ["ää"]
    assert len(sample_of(["a", "b" * 10], 5)) == 1
