"""How llama.cpp cuts text before byte-level BPE merges it, and the same as steps of the tokenizers library.

A GGUF file names the cuts (`tokenizer.ggml.pre`); a tokenizer.json spells them out. A step is the regular
expression that it isolates; each works on the pieces that the ones before it left. What `\\p{N}` and the
words of GPT-2 isolate has steps of its own in the library, `Digits` and `ByteLevel`, which files in use
prefer.

The expressions are those of the released tokenizers. llama.cpp approximates two of them: for gpt-4o and
tekken it takes every letter that is not ASCII for one of both cases, and combining marks for no part of a
word, so that words in scripts with combining marks, and words like "éÉ", are cut otherwise there than in the
model's own tokenizer, and here.
"""

import dataclasses
from typing import Any

from tokenizers import Regex, pre_tokenizers

from slmjax.config import near_names

_DIGIT = r"\p{N}"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
_QWEN2 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
_QWEN35 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _BLANKS
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_GPT4O = (
    rf"{_CASED[0]}{_SUFFIX}?|{_CASED[1]}{_SUFFIX}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _BLANKS,
)
# What llama.cpp does with a file that names nothing.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cuts:
    """One way to cut, and what else llama.cpp takes its name to mean."""

    steps: tuple[str, ...]  # regular expressions, each of which isolates what it matches
    # a piece that is a token is taken whole, whatever the merges: the library's ignore_merges
    takes_whole: bool = False
    adds_bos: bool = False  # where the file does not say whether BOS begins a text


KINDS: dict[tuple[str, ...], Cuts] = {
    # The first name of each is the one that is written.
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
    ): Cuts(steps=(_WORDS,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): Cuts(
        steps=(_DIGIT, _WORDS)
    ),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): Cuts(
        steps=(_LLAMA3,), takes_whole=True, adds_bos=True
    ),
    ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"): Cuts(steps=(_LLAMA3,)),
    ("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "solar-open", "grok-2", "kormo"): Cuts(
        steps=(_QWEN2,)
    ),
    ("qwen35",): Cuts(steps=(_QWEN35,)),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): Cuts(steps=(_GPT4O,)),
    ("tekken",): Cuts(steps=(_TEKKEN,), takes_whole=True, adds_bos=True),
    ("deepseek-v3", "hunyuan-dense"): Cuts(steps=_DEEPSEEK3),
    ("default",): Cuts(steps=_DEFAULT),
}
_CUTS = {name: cuts for names, cuts in KINDS.items() for name in names}
_NAMES = {(cuts.steps, cuts.takes_whole): names[0] for names, cuts in KINDS.items()}


def cuts_of(name: str) -> Cuts:
    """What a name in `tokenizer.ggml.pre` means. Raises ValueError that lists the known ones."""
    if name not in _CUTS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}, which is not known here.{near_names(name, _CUTS)} Known: "
            f"{', '.join(_CUTS)}"
        )
    return _CUTS[name]


def byte_level_steps(cuts: Cuts) -> pre_tokenizers.PreTokenizer:
    """The cuts, and then every byte as a character, as tokenizer.json files have it."""
    *early, last = cuts.steps
    steps: list[pre_tokenizers.PreTokenizer] = [_step(pattern) for pattern in early]
    if last != _WORDS:
        steps.append(_step(last))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last == _WORDS))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def cuts_name(specification: dict[str, Any], *, takes_whole: bool) -> str:
    """The name that llama.cpp has for the `pre_tokenizer` of a tokenizer.json. Raises ValueError where it has
    none that we know.
    """
    steps = specification["pretokenizers"] if specification["type"] == "Sequence" else [specification]
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    if (patterns, takes_whole) not in _NAMES:
        known = ", ".join(_NAMES.values())
        raise ValueError(
            f"this tokenizer.json cuts text by {list(patterns)} with ignore_merges {takes_whole}, for which "
            "no name of llama.cpp's is known"
            f" here, only for the cuts of {known}: export in Hugging Face's format, and convert that with "
            "llama.cpp's own script"
        )
    return _NAMES[patterns, takes_whole]


def _step(pattern: str) -> pre_tokenizers.PreTokenizer:
    return (
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == _DIGIT
        else pre_tokenizers.Split(Regex(pattern), "isolated")
    )


def _patterns(step: dict[str, Any]) -> list[str]:
    """The regular expressions that a step of a tokenizer.json isolates."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [_WORDS] if step["use_regex"] else []
    if kind == "Digits" and step["individual_digits"]:
        return [_DIGIT]
    # An expression that matches everything isolates its matches also where it is inverted and what lies
    # between them is removed.
    isolates = kind == "Split" and (step["behavior"], step["invert"]) in {
        ("Isolated", False),
        ("Removed", True),
    }
    if isolates and "Regex" in step["pattern"]:
        return [step["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")]
    raise ValueError(
        f"this tokenizer.json has the step {step}, which llama.cpp does not have: export in Hugging Face's "
        "format instead"
    )
