"""Text that a tokenizer loses is measured, refused, and shown with every metric that depends on it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from slmjax.cli.evaluating import _text_rows
from slmjax.config import to_json
from slmjax.data import lost_text
from slmjax.data.config import DataConfig
from slmjax.data.lost_text import (
    LostText,
    LostTextMeter,
    check_lost_text,
    lost_characters,
    lost_fraction,
    lost_note,
)
from slmjax.data.preparation import prepare
from slmjax.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer
from slmjax.evaluation import evaluate
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from tests.untrained import untrained

TEXT = ("ab" + "é你xyz" * 23) + "ab"  # hand count: 4 bytes of 4 + 8 * 23 are in the vocabulary
LOST = 8 * 23 / (4 + 8 * 23)


def dropping(directory: Path, **parts: Any) -> Path:
    """A vocabulary of two letters without an unknown token: other characters vanish."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "a": 2, "b": 3}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("ab", "isolated")
    backend.decoder = decoders.Fuse()
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.add_special_tokens(["<s>", "</s>"])
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize(
    ("text", "decoded", "lost"),
    [
        ("Größe", "Größe", {}),
        ("Größe", "gröe", {"G": 1, "ß": 1}),
        (
            "a\n\nb c",
            "a b c",
            {"\n": 2, " ": 1},
        ),  # a newline became a blank: the decoded text does not show which blank it was
        ("ab c", "a b c", {" ": 1}),
        ("it's", "it ' s", {}),  # blanks that the text has none of
        ("e\u0301", "é", {"e": 1, "\u0301": 1}),
        ("", "a", {}),
    ],
)
def test_lost_characters_by_hand(text: str, decoded: str, lost: dict[str, int]) -> None:
    assert lost_characters(text, decoded) == lost


def test_what_normalizers_and_unknown_tokens_lose_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    cases = {
        "lowercased": (
            dropping(tmp_path / "lower", normalizer=lower),
            " ABab",
            LostText(measured=5, lost=5, characters=" ABab"),
        ),
        "dropped": (dropping(tmp_path / "dropped"), "abéé", LostText(measured=6, lost=4, characters="é")),
        "kept": (dropping(tmp_path / "kept"), "abab", LostText(measured=4)),
    }
    for name, (path, text, expected) in cases.items():
        tokenizer = Tokenizer.load(path)
        meter = LostTextMeter(tokenizer, sample=False)
        meter.add(text.encode(), [0, *tokenizer.encode(text), 1])
        assert meter.result() == expected, name
    exact = LostTextMeter(ByteTokenizer().build(()), sample=False)
    exact.add(b"abc", [5])
    assert exact.result() == LostText() and exact.result().fraction == 0, (
        "a vocabulary that keeps every byte costs nothing"
    )
    assert lost_fraction([LostText(measured=10, lost=5), LostText(measured=30, lost=1), LostText()]) == 6 / 40
    sampled = LostTextMeter(Tokenizer.load(cases["kept"][0]), sample=True)
    monkeypatch.setattr(lost_text, "_SAMPLED_FIRST", 1000)
    for _ in range(40):
        sampled.add(b"ab" * 50, [2, 3] * 50)
    assert sampled.result().measured == 1100, "all of the first bytes, then a sixteenth"


def test_a_tokenizer_that_loses_text_is_refused_or_marked(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = {
        "path": str(tmp_path / "text.txt"),
        "heldout_fraction": 0.0,
        "cache_dir": str(tmp_path / "cache"),
        "sequence_length": 8,
    }
    tokenizer = FileTokenizer(path=str(dropping(tmp_path / "tokenizer")))
    with pytest.raises(
        ValueError, match=rf"loses {LOST:.1%} of the bytes.*most often 'é'.*--data.max-lost-text 1"
    ):
        prepare(DataConfig(**options), tokenizer)
    data = DataConfig(**options, max_lost_text=1.0)
    ((shards, _),) = prepare(data, tokenizer).train
    assert shards.manifest.lost_text.fraction == LOST

    block = BlockConfig(mixer=AttentionConfig(num_heads=1), ffn=MlpConfig(hidden_dim=4))
    config = ModelConfig(embed_dim=4, stack=(LayerGroup(pattern=(block,)),), context_length=8, vocab_size=4)
    built = tokenizer.build(())
    built.save(tmp_path / "tokenizer")
    loaded = untrained(config, tokenizer=built, path=tmp_path)
    actual = evaluate(loaded, data=data)
    assert actual.lost_text == LOST and actual.tokens == 5
    # The issue's fault: five tokens' bits over all bytes of the text look like a very good model.
    assert (
        actual.bits_per_byte == pytest.approx(actual.loss * 5 / math.log(2) / len(TEXT.encode()))
        and actual.bits_per_byte < 0.2
    )
    assert lost_note(LOST) in actual.text() and actual.metrics()["lost_text"] == LOST
    rows = {
        row[0].strip(): row
        for row in _text_rows({"text": to_json(dataclasses.replace(actual, document_sums=None))})
    }
    assert rows["not comparable"][1] == f"{LOST:.2%}"
    assert rows["documents begin with"][1:] == ("'<s>'", "id 0, first of the usual names in the vocabulary")
    assert rows["documents end with"][1] == "'</s>'"


def test_old_configs_allow_what_they_allowed() -> None:
    from slmjax.config import from_json

    written = to_json(DataConfig())
    del written["max_lost_text"]
    assert from_json(DataConfig, written).max_lost_text == 1.0 and DataConfig().max_lost_text == 0.001
    check_lost_text(LostText(measured=1000, lost=1), 0.001, source_name="x")
    with pytest.raises(ValueError, match="loses 0.2%"):
        check_lost_text(LostText(measured=1000, lost=2, characters="a"), 0.001, source_name="x")
