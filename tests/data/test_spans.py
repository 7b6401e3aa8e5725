"""Text in pieces has the ids of the joined text: pairs, likelihoods, and documents that are encoded in
windows.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from slmjax.data.config import DataConfig
from slmjax.data.preparation import prepare
from slmjax.data.shards import TokenShards
from slmjax.data.spans import TextTokens, WindowJoin, character_offsets, windows_of
from slmjax.data.tokenizers import BpeTokenizer, ByteTokenizer, CharTokenizer, FileTokenizer, Tokenizer
from slmjax.evaluation import pair_tokens

SPECIAL = ["<unk>", "<s>", "</s>"]
BLANK = "\u2581"


def prepending(kind: str) -> tokenizers.Tokenizer:
    """BPE that puts a blank before a text: as Llama 2 has it, with byte fallback, or by Metaspace."""
    names = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *f"{BLANK}Q:yesno",
        f"{BLANK}Q",
        "ye",
        "yes",
        f"{BLANK}yes",
    ]
    merges = [(BLANK, "Q"), ("y", "e"), ("ye", "s"), (BLANK, "yes")]
    model = models.BPE(
        vocab={name: id for id, name in enumerate(names)},
        merges=merges,
        byte_fallback=True,
        unk_token="<unk>",
    )
    backend = tokenizers.Tokenizer(model)
    if kind == "llama":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    parts = [
        decoders.Replace(BLANK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(SPECIAL)
    return backend


def saved(backend: tokenizers.Tokenizer, path: Path) -> FileTokenizer:
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    return FileTokenizer(path=str(path), bos="<s>", eos="</s>")


def shards_of(
    records: list[dict[str, str]], tokenizer: FileTokenizer | BpeTokenizer, path: Path, **changes: object
) -> TokenShards:
    (path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    data = DataConfig(path=str(path / "data.jsonl"), cache_dir=str(path / "cache"), heldout_fraction=0.0)
    return prepare(dataclasses.replace(data, **changes), tokenizer).train[0][0]


@pytest.mark.parametrize("kind", ["llama", "always", "first"])
def test_a_pair_has_the_ids_of_its_joined_text(kind: str, tmp_path: Path) -> None:
    backend = prepending(kind)
    name = backend.id_to_token
    pairs = [("Q:", "yes"), ("Q: ", "yes"), ("Q:", " yes"), ("Q:é", "éno"), ("Qy", "es")]
    records = [{"q": prompt, "a": completion} for prompt, completion in pairs]
    shards = shards_of(
        records, saved(backend, tmp_path / "tokenizer"), tmp_path, prompt_field="q", completion_field="a"
    )
    for document, (prompt, completion) in enumerate(pairs):
        expected = backend.encode(prompt + completion, add_special_tokens=False).ids
        assert shards.tokens(document).tolist() == [1, *expected, 2]
    scored = [[name(id) for id in shards.tokens(i)[shards.scored(i)]] for i in range(len(pairs))]
    assert [name(id) for id in shards.tokens(0)] == ["<s>", f"{BLANK}Q", ":", "yes", "</s>"]
    # A token that begins in the prompt and ends in the completion is scored; so are all the bytes it stands
    # for.
    assert scored == [
        ["yes", "</s>"],
        [f"{BLANK}yes", "</s>"],
        [f"{BLANK}yes", "</s>"],
        ["<0xC3>", "<0xA9>", "n", "o", "</s>"],
        ["yes", "</s>"],
    ]
    assert shards.scored_bytes.tolist() == [3, 4, 4, 4, 3] and shards.num_bytes.tolist() == [5, 6, 6, 8, 4]


def test_likelihoods_have_the_ids_of_the_joined_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(prepending("llama"), bos="<s>", eos="</s>")
    for context, continuation in [
        ("Q:", "yes"),
        ("Q: ", "yes"),
        ("Q:", " yes"),
        ("Qy", "es"),
        ("", "yes"),
        (" ", "yes"),
        ("Q:é", "é"),
    ]:
        before, after = pair_tokens(tokenizer, context, continuation)
        assert before[0] == 1 and [*before[1:], *after] == tokenizer.encode(context + continuation)
    assert pair_tokens(tokenizer, "Q:", "yes")[1] == tokenizer.encode("Q:yes")[-1:]


class TestWindows:
    @settings(deadline=None, max_examples=50)
    @given(text=st.text(st.characters(exclude_categories=["Cs"])), max_bytes=st.integers(16, 40))
    def test_cover_the_text_and_overlap(self, text: str, max_bytes: int) -> None:
        raw = text.encode()
        windows = windows_of(raw, max_bytes)
        assert windows[0][0] == 0 and windows[-1][1] == len(raw)
        assert all(len(raw[start:end].decode().encode()) <= max_bytes for start, end in windows)
        assert all(
            start < end_before < end
            for (_, end_before), (start, end) in zip(windows, windows[1:], strict=False)
        )
        assert character_offsets(text).tolist() == [
            len(text[:place].encode()) for place in range(len(text) + 1)
        ]

    @pytest.mark.parametrize("kind", ["llama", "always", "first", "byte-level", "digits"])
    def test_have_the_ids_of_the_whole(self, kind: str, tmp_path: Path) -> None:
        words = np.random.default_rng(0).choice(
            ["yes", "no", "Q:yes", " ", "\n\n", "grüße", "数", "1234567", "yyyyyyy"], 3000
        )
        text = " ".join(words)
        if kind in ("llama", "always", "first"):
            backend = prepending(kind)
        else:
            split = pre_tokenizers.Split(
                tokenizers.Regex(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\p{L}+|\s+"), "isolated"
            )
            backend = tokenizers.Tokenizer(models.BPE())
            steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "byte-level")]
            backend.pre_tokenizer = pre_tokenizers.Sequence([split, *steps] if kind == "digits" else steps)
            backend.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=SPECIAL,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            backend.train_from_iterator([text], trainer)
        assert len(text) > 12 * 1024
        shards = shards_of(
            [{"text": text}], saved(backend, tmp_path / "tokenizer"), tmp_path, max_document_bytes=1024
        )
        assert shards.tokens(0).tolist() == [1, *backend.encode(text, add_special_tokens=False).ids, 2]

    def test_that_disagree_are_encoded_as_one(self, tmp_path: Path) -> None:
        """Pairs of "aa" from the left: a window that begins at an odd place has others."""
        text = "a" * 5001
        config = BpeTokenizer(vocab_size=259)
        shards = shards_of([{"text": "x" + text}], config, tmp_path, max_document_bytes=1031)
        assert shards.tokens(0)[1:-1].tolist() == config.build(["x" + text]).encode("x" + text)

    def test_that_disagree_for_long_are_cut(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """So the memory is bounded. Each byte keeps its token, and a warning reports the cuts."""
        text = "x" + "a" * 20_000 + " the end"
        config = BpeTokenizer(vocab_size=259)
        shards = shards_of([{"text": text}], config, tmp_path, max_document_bytes=1031)
        tokenizer = config.build([text])
        ids = shards.tokens(0)[1:-1].tolist()
        assert tokenizer.decode(ids) == text
        assert 0 <= len(ids) - len(tokenizer.encode(text)) <= 4
        assert "cut in 2 places" in caplog.text


def test_windows_do_not_cut_the_marks_of_special_tokens() -> None:
    tokenizer = CharTokenizer().build(["abc de\n"]).add_tokens(["<|end|>"], special=True)
    text = tokenizer.marked_vocabulary.mark("abc de<|end|>\n" * 100)
    windows = windows_of(text.encode(), 256, marked=True)
    parts = [text.encode()[start:stop].decode() for start, stop in windows]
    # half a mark is text, which this vocabulary cannot express
    tokens = tokenizer.encode_spans(parts, marked=True)
    join = WindowJoin(windows, encode=lambda start, end: pytest.fail("windows disagree"))
    for of_window in tokens:
        join.add(of_window)
    assert len(windows) > 10
    assert join.ids().tolist() == tokenizer.encode_spans([text], marked=True)[0].ids.tolist()


def test_tokens_and_their_bytes_by_hand() -> None:
    ids, starts, ends = np.asarray([[0, 1, 2, 3, 4], [0, 0, 2, 2, 6], [0, 2, 5, 5, 7]], np.int32)
    tokens = TextTokens(ids=ids, starts=starts, ends=ends)
    assert tokens.overlap_mask([(0, 2)]).tolist() == [True, True, False, False, False]
    assert tokens.overlap_mask([(1, 3), (6, 9)]).tolist() == [False, True, True, True, True]
    assert tokens.overlap_mask([(5, 6)]).tolist() == tokens.overlap_mask([(3, 3)]).tolist() == [False] * 5
    assert tokens.num_bytes().tolist() == [0, 2, 3, 0, 2]
    of_bytes = ByteTokenizer().build([]).encode_spans(["aé"])[0]
    assert of_bytes.starts.tolist() == [0, 1, 2] and of_bytes.overlap_mask([(1, 3)]).tolist() == [
        False,
        True,
        True,
    ]
