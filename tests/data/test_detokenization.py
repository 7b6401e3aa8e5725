"""Bytes become text as in Python's own decoder, and a text that grows is never shown otherwise than it
ends.
"""

import dataclasses

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from slmjax.checkpoints.loading import Loaded
from slmjax.data.tokenizers import ByteTokenizer, Tokenizer
from slmjax.models.architecture import BlockConfig, LayerGroup, ModelConfig
from slmjax.models.ffn.mlp import MlpConfig
from slmjax.models.mixers.attention import AttentionConfig
from slmjax.sampling import FinishReason, Generation, SamplingConfig, generate, text
from slmjax.sampling.decoding import Continuation
from tests.untrained import untrained

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
WORDS = ["▁Hi", "▁", "好", "n't", "##y", ".", "▁,"]


def _with_decoder(decoder: decoders.Decoder | None) -> Tokenizer:
    """BOS, EOS, 256 bytes by their hexadecimal names, and words."""
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, bos="<s>", eos="</s>")


def _byte_level_in_nfc() -> Tokenizer:
    """A vocabulary whose ids have no bytes of their own, since text is changed first; the bytes have ids as
    in ByteTokenizer.
    """
    backend = tokenizers.Tokenizer.from_str(ByteTokenizer().build(())._backend.to_str())
    backend.normalizer = normalizers.NFC()
    return Tokenizer(backend, bos="<|bos|>", eos="<|eos|>")


BYTE_FALLBACK = _with_decoder(decoders.Sequence(LLAMA))
OF_BYTES = {"bytes": ByteTokenizer().build(()), "byte_level": _byte_level_in_nfc(), "fallback": BYTE_FALLBACK}
# Bytes as they come: valid characters, parts of them, and what is never valid.
PARTS = [
    "你".encode(),
    "é".encode(),
    "😀".encode(),
    b"a",
    b"\xe4",
    b"\xbd",
    b"\xf0\x9f",
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"\xff",
    b"\xe2\x96\x81",
]
SEQUENCES = st.lists(st.one_of(st.sampled_from(PARTS), st.binary(max_size=2)), max_size=8).map(b"".join)


@settings(deadline=None, max_examples=60)
@given(raw=SEQUENCES, cut=st.integers(0, 12))
def test_bytes_are_decoded_as_by_python(raw: bytes, cut: int) -> None:
    expected = raw.decode("utf-8", "replace")
    for kind, tokenizer in OF_BYTES.items():
        ids = [2 + byte for byte in raw]
        # Of text that begins with a blank, such vocabularies strip it.
        assert tokenizer.decode(ids) == (expected.removeprefix(" ") if kind == "fallback" else expected), kind
        before = tokenizer.decode(ids[:cut])
        added = tokenizer.decode_continuation(ids[:cut], ids[cut:])
        assert before + added == tokenizer.decode(ids) or before[:-1] + added == tokenizer.decode(ids), (
            "the torn character comes again"
        )


def test_a_whole_character_before_a_torn_one_by_hand() -> None:
    for tokenizer in OF_BYTES.values():
        ids = [2 + byte for byte in (0xE4, 0xBD, 0xA0, 0xE5)]
        assert tokenizer.decode(ids) == "你\ufffd"
        assert tokenizer.decode_continuation(ids[:2], ids[2:]) == "你\ufffd"
        assert tokenizer.decode_continuation(ids, [2 + 0xA5, 2 + 0xBD, 2 + 0x21]) == "好!"
    # Bytes that spell the sign for blanks are this sign, a token of it is a blank.
    assert BYTE_FALLBACK.decode([2 + 0x41, 2 + 0xE2, 2 + 0x96, 2 + 0x81, 259]) == "A▁ "
    tails = [b"a", b"a\xe4", "你".encode(), b"\xf0\x9f\x98", b"\xbd\xbd", b"\xe0\x80", b"\xff", b""]
    for kind, tokenizer in OF_BYTES.items():
        torn = [tokenizer.detokenizer.torn_bytes([2 + byte for byte in raw]) for raw in tails]
        assert torn == [b"", b"\xe4", b"", b"\xf0\x9f\x98", b"", b"", b"", b""], kind


# Streams ----------------------------------------------------------------------------------------------------
DECODERS = {
    "llama": decoders.Sequence(LLAMA),
    "metaspace": decoders.Metaspace(),
    "word_piece": decoders.WordPiece(),
    "joined_words": decoders.BPEDecoder(suffix="y"),
    "plain": None,
    "changes_text": decoders.Sequence(
        [*LLAMA, decoders.Replace(" ,", ",")]
    ),  # a blank may go when a comma follows
}
TOKENIZERS = {
    **{name: _with_decoder(decoder) for name, decoder in DECODERS.items()},
    "byte_level": _byte_level_in_nfc(),
}


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    block = BlockConfig(mixer=AttentionConfig(num_heads=1), ffn=MlpConfig(hidden_dim=4))
    config = ModelConfig(
        embed_dim=4, stack=(LayerGroup(pattern=(block,)),), context_length=64, vocab_size=280
    )
    return untrained(config, tokenizer=BYTE_FALLBACK, path=tmp_path_factory.mktemp("speaking"))


def streamed(
    loaded: Loaded,
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    stop: tuple[str, ...] = (),
) -> tuple[Generation, list[str]]:
    """The result of `generate` for these tokens, a few at a time, and the pieces that it passes on."""

    def speak(*_: object, watch: object, **__: object) -> list[Continuation]:
        assert callable(watch)
        ends = [*range(steps, len(ids), steps), len(ids)]
        generated = next((ids[:end] for end in ends if watch(0, ids[:end])), ids)
        return [Continuation(tokens=generated, logprobs=[0.0] * len(generated))]

    pieces: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(text, "sample", speak)
        result = generate(
            dataclasses.replace(loaded, own_tokenizer=tokenizer),
            [[0, 3]],
            config=SamplingConfig(max_tokens=40, stop=stop),
            on_text=lambda _, piece: pieces.append(piece),
        )[0]
    return result, pieces


TOKENS = st.lists(st.one_of(st.integers(258, 257 + len(WORDS)), SEQUENCES.map(list)), max_size=6)


def test_pieces_make_up_the_text(speaking: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    @settings(deadline=None, max_examples=20)
    @given(parts=TOKENS, steps=st.integers(1, 4), kind=st.sampled_from(sorted(TOKENIZERS)))
    def check(parts: list[int | list[int]], steps: int, kind: str) -> None:
        tokenizer = TOKENIZERS[kind]
        ids = [
            id for part in parts for id in ([part] if isinstance(part, int) else [2 + byte for byte in part])
        ]
        ids = [id for id in ids if id < tokenizer.vocab_size][:32] or [258 % tokenizer.vocab_size]
        result, pieces = streamed(speaking, tokenizer, ids, steps=steps, monkeypatch=monkeypatch)
        assert "".join(pieces) == result.text == tokenizer.decode_continuation([0, 3], ids), kind
        if len(result.text) > 1:
            stop = result.text[1:3]
            stopped, pieces = streamed(
                speaking, tokenizer, ids, steps=steps, monkeypatch=monkeypatch, stop=(stop,)
            )
            assert "".join(pieces) == stopped.text and stop not in stopped.text
            whole, _ = streamed(speaking, tokenizer, ids, steps=32, monkeypatch=monkeypatch, stop=(stop,))
            assert (stopped.text, stopped.tokens) == (whole.text, whole.tokens), (
                "the steps of a call decide nothing"
            )

    check()


def test_a_stop_text_is_found_before_a_torn_character(
    speaking: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [2 + byte for byte in "a你".encode() + b"\xe5"]
    result, pieces = streamed(speaking, BYTE_FALLBACK, ids, steps=1, monkeypatch=monkeypatch, stop=("你",))
    assert (result.text, result.reason, result.tokens) == (
        "a",
        FinishReason.STOP,
        tuple(ids[:4]),
    ) and pieces == ["a"]
