"""Pre-tokenization: how llama.cpp splits text before byte-level BPE, as steps of the tokenizers library.

A GGUF file has a name for it (`tokenizer.ggml.pre`); a tokenizer.json has the steps. A step is a regular
expression whose matches are isolated; each step splits the pieces of the one before. For `\\p{N}` and the
words of GPT-2, the library has the steps `Digits` and `ByteLevel`, which released files use.

The expressions are those of the released tokenizers. llama.cpp approximates two of them: for gpt-4o and
tekken, it treats every non-ASCII letter as both upper and lower case, and combining marks as no part of a
word. It therefore splits words in scripts with combining marks, and words like "éÉ", differently from the
model's own tokenizer and from this module.
"""

import dataclasses
from typing import Any

from tokenizers import Regex, pre_tokenizers

from slmjax.config import near_names

_DIGIT = r"\p{N}"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Differences between these: how many digits a piece may have, and whether marks are letters.
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
_QWEN2 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
_QWEN35 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _BLANKS
# Modifier and other letters have no case, and count as both.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_GPT4O = (
    rf"{_CASED[0]}{_SUFFIX}?|{_CASED[1]}{_SUFFIX}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
# Chinese and Japanese characters are separated from other letters first.
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|""" + _BLANKS,
)
# For a file without a name.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenization:
    """A way to split text, and what else its name implies in llama.cpp."""

    steps: tuple[str, ...]  # regular expressions whose matches are isolated
    # a piece that is a token is not split further, whatever the merges: the library's ignore_merges
    takes_whole: bool = False
    adds_bos: bool = False  # default, if the file does not say whether texts start with BOS


KINDS: dict[tuple[str, ...], PreTokenization] = {
    # Exports use the first name of each.
    (
        "gpt-2",
        "phi-2",
        "olmo",
        "mpt",
        "jais",
        "mellum",
        "exaone4",
        "gigachat",
        "a.x-4.0",
        "trillion",
        "modern-bert",
        "granite-docling",
    ): PreTokenization(steps=(_WORDS,)),
    (
        "smollm",
        "starcoder",
        "refact",
        "command-r",
        "codeshell",
        "exaone",
        "minerva-7b",
        "mellum2",
    ): PreTokenization(steps=(_DIGIT, _WORDS)),
    (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
    ): PreTokenization(steps=(_LLAMA3,), takes_whole=True, adds_bos=True),
    ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"): PreTokenization(steps=(_LLAMA3,)),
    (
        "qwen2",
        "stablelm2",
        "deepseek-r1-qwen",
        "hunyuan",
        "megrez",
        "solar-open",
        "grok-2",
        "kormo",
    ): PreTokenization(steps=(_QWEN2,)),
    ("qwen35",): PreTokenization(steps=(_QWEN35,)),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): PreTokenization(steps=(_GPT4O,)),
    ("tekken",): PreTokenization(steps=(_TEKKEN,), takes_whole=True, adds_bos=True),
    ("deepseek-v3", "hunyuan-dense"): PreTokenization(steps=_DEEPSEEK3),
    ("default",): PreTokenization(steps=_DEFAULT),
}
_BY_NAME = {name: pre_tokenization for names, pre_tokenization in KINDS.items() for name in names}
# Several names have the same meaning: exports use the first.
_NAMES = {
    (pre_tokenization.steps, pre_tokenization.takes_whole): names[0]
    for names, pre_tokenization in KINDS.items()
}


def pre_tokenization_of(name: str) -> PreTokenization:
    """Return the meaning of a name in `tokenizer.ggml.pre`. Raises ValueError for unknown names."""
    if name not in _BY_NAME:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}, which is not supported.{near_names(name, _BY_NAME)} Supported: "
            f"{', '.join(_BY_NAME)}"
        )
    return _BY_NAME[name]


def byte_level_steps(pre_tokenization: PreTokenization) -> pre_tokenizers.PreTokenizer:
    """Return the steps, followed by the mapping of bytes to characters, as in tokenizer.json files."""
    # ByteLevel has GPT-2's expression built in, so that it replaces the last step where that is the same.
    *early, last = pre_tokenization.steps
    steps: list[pre_tokenizers.PreTokenizer] = [_step(pattern) for pattern in early]
    if last != _WORDS:
        steps.append(_step(last))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last == _WORDS))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def pre_tokenization_name(specification: dict[str, Any], *, takes_whole: bool) -> str:
    """Return llama.cpp's name for the `pre_tokenizer` of a tokenizer.json.

    Args:
      takes_whole: its `ignore_merges`.

    Raises:
      ValueError: no name is known.
    """
    steps = specification["pretokenizers"] if specification["type"] == "Sequence" else [specification]
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    # The closest name would split some texts differently, without any error.
    if (patterns, takes_whole) not in _NAMES:
        known = ", ".join(_NAMES.values())
        raise ValueError(
            f"this tokenizer.json splits text by {list(patterns)} with ignore_merges {takes_whole}, for "
            f"which slmjax knows no name in llama.cpp, only for {known}: export with --to hf, and convert "
            "that with llama.cpp's script"
        )
    return _NAMES[patterns, takes_whole]


def _step(pattern: str) -> pre_tokenizers.PreTokenizer:
    return (
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == _DIGIT
        else pre_tokenizers.Split(Regex(pattern), "isolated")
    )


def _patterns(step: dict[str, Any]) -> list[str]:
    """Return the regular expressions that a step of a tokenizer.json isolates."""
    kind = step["type"]
    # llama.cpp adds no space before a text in byte-level vocabularies.
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [_WORDS] if step["use_regex"] else []
    if kind == "Digits" and step["individual_digits"]:
        return [_DIGIT]
    # For an expression that matches everything, removing what lies between matches isolates them too.
    isolates = kind == "Split" and (step["behavior"], step["invert"]) in {
        ("Isolated", False),
        ("Removed", True),
    }
    # Some files have control characters where others have escapes of them.
    if isolates and "Regex" in step["pattern"]:
        return [step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")]
    raise ValueError(
        f"this tokenizer.json has the step {step}, which llama.cpp does not have: export with --to hf"
    )
