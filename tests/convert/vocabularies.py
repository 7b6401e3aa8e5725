"""Texts that tokenizers disagree on, and vocabularies in which every disagreement shows in the ids."""

import functools
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from slmjax.convert.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, GgufTokenizer

BLANKS = (
    "Two  blanks   three    four\ttab\t\ttabs \n new\n\nlines\r\n\r\n \n \n  end   \n"
    "    def f(x):\n        return x\n\n"
)
ENGLISH = (
    "It's we'LL they'Ve I'M don't D'accord 'tis 'S 'd. CamelCaseHTTPServer iPhone XMLhttp <html>&amp; "
    "a_b-c/d\\e|f~g`h^i //// ----"
)
DIGITS = "1 12 123 1234 12345678 3.14159 1,000,000 x2y33 ½ ² Ⅷ ٣٤٥ १२३ $100+€5=£3 e-5"
CODE = (
    "x=1;y='a''b' \"q\" (paren) [br] {cur} if x != 1e-5 else # comment\n"
    "\t\tfor i in range(10):\n\t\t\tprint(i)\n"
)
OTHERS = "Straße Привет мир 中文字符,混排abc 日本語テキスト 한국어 עברית العربية " + (
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ©®™ \u00a0nbsp\u2003em\u3000wide\u0085nel\u200bzero"
)
MARKS = "e\u0301 हिन्दी नमस्ते বাংলা ไทย éÉ ÀÉÎõü naïve"  # llama.cpp cuts these otherwise for two kinds
EDGES = [
    "",
    " ",
    "   ",
    "\n",
    " lead",
    "  lead",
    "a",
    "'s",
    "trailing  ",
    " unmergeable",
    "text is text: <s> </s> <|bos|>",
]
TEXTS = [
    BLANKS,
    ENGLISH,
    DIGITS,
    CODE,
    OTHERS,
    topics["for"],
    BLANKS + ENGLISH + DIGITS + CODE + OTHERS,
    *EDGES,
]
WORDS_BEYOND_ASCII = ("gpt-4o", "tekken")


def encode(tokenizer: GgufTokenizer, text: str, *, with_special: bool = False) -> list[int]:
    tokenizer.backend.encode_special_tokens = not with_special
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


def write_directory(directory: Path, backend: tokenizers.Tokenizer, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@functools.cache
def wild_merges() -> tuple[list[str], list[str]]:
    """Tokens and merges of BPE that was trained on uncut text: they cross every border, so that each cut
    shows in the ids.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        min_frequency=1,
        max_token_length=12,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, MARKS] * 2, trainer)
    model = json.loads(backend.to_str())["model"]
    # No merge makes the last one: only kinds that take whole pieces find it.
    return [*sorted(model["vocab"], key=model["vocab"].get), "Ġunmergeable"], [
        " ".join(pair) for pair in model["merges"]
    ]


def byte_level_metadata(pre: str) -> dict[str, Any]:
    """What a GGUF file says of the wild merges, cut as `pre` says."""
    tokens, merges = wild_merges()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL] + [NORMAL] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@functools.cache
def sentence_piece_metadata() -> dict[str, Any]:
    """SentencePiece's kind of vocabulary: bytes, words with scores, characters, and tokens of every type."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=700, min_frequency=2, max_token_length=10, show_progress=False)
    backend.train_from_iterator([ENGLISH, CODE, BLANKS, topics["for"], topics["if"]], trainer)
    vocabulary = backend.get_vocab()
    words = sorted((token for token in vocabulary if len(token) > 1), key=lambda token: vocabulary[token])
    pieces = [*words, *sorted(token for token in vocabulary if len(token) == 1)]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *pieces,
        "s>",
        "<|turn|>",
        "    ",
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL]
        + [BYTE] * 256
        + [NORMAL] * (len(pieces) + 1)
        + [CONTROL, USER_DEFINED],
        "tokenizer.ggml.scores": [0.0] * 259 + [float(-rank) for rank in range(len(pieces) + 1)] + [0.0, 0.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
