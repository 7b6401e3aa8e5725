"""What a model expects around text, as the files beside a tokenizer.json say it: BOS, ends, a chat template.

    conventions = read_conventions(directory)                       # tokenizer_config.json and
    chat_template.jinja bos = begin_token(option=None, conventions=conventions, model=None, eos=eos,
    vocabulary=vocabulary, ...) post_processor_for(post_processor, bos="<s>", bos_id=1, adds_bos=True)     #
    the form that Hugging Face's libraries go by

A tokenizer.json has its own way to say that a text begins with BOS, the post-processor; `add_bos_token` in
tokenizer_config.json is another. Where both are there, the latter is meant.

Which token is BOS, and which is EOS, is decided by the first of these that names one:
1. the user's option (`--tokenizer.bos`, `--tokenizer.eos`);
2. `bos_token` or `eos_token` of tokenizer_config.json. As in transformers, an explicit null means that there
is none, and no
   other token is taken for it because of its name;
3. `bos_token_id` or `eos_token_id` of the model's configuration;
4. the first of the usual names that the vocabulary has, where tokenizer_config.json does not mention the
token. Where there is no BOS, documents begin with EOS, which separates them (lm-eval does the same), and
files say that there is none. Where there is no EOS, one must be named: documents end with it. Padding and
unknown tokens are what tokenizer_config.json names (null: none), since nothing here needs them. Reports name
the tokens that were used and which rule chose them (`SpecialToken`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.config import near_names

BOS = "<|bos|>"
EOS = "<|eos|>"
_BEGINS = "document_begin_token"
_SOURCES = "special_token_sources"  # keys of tokenizer_config.json that slmjax alone reads
_USUAL = ""  # stands for the first of the usual names
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# What vocabularies in use call them, tried in this order.
USUAL_NAMES = {
    "bos": (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>", "[CLS]"),
    "eos": (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<|im_end|>", "[SEP]"),
}
OPTION = "named by the user"
USUAL_NAME = "first of the usual names in the vocabulary"
OWN_NAME = "made by slmjax"
STAND_IN = "EOS, since the tokenizer has no BOS"
# All that slmjax wrote before it wrote down whether a text begins with BOS. What it trains always does.
_WRITTEN_BEFORE = {"bos_token", "eos_token", "clean_up_tokenization_spaces", "tokenizer_class"}


# And before it wrote which token stands in for BOS: then that was the first of the usual names.
_WRITTEN_EARLIER = {
    *_WRITTEN_BEFORE,
    "unk_token",
    "pad_token",
    "add_bos_token",
    "end_tokens",
    "chat_template",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialToken:
    """A token with a role, and why it is that one."""

    name: str
    id: int
    source: str  # what named it, in words: one of the rules above

    def text(self) -> str:
        """In words: '<s>', id 1 (bos_token of tokenizer_config.json)."""
        return f"{self.name!r}, id {self.id} ({self.source})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conventions:
    """Names of tokens are as given: the vocabulary may not have them."""

    bos: str | None = None  # begins a text
    eos: str | None = None  # ends one
    unk: str | None = None
    pad: str | None = None
    ends: tuple[str, ...] = ()  # other tokens that end a text or a turn
    has_bos: bool = True  # False where the file says that the model has no BOS token
    has_eos: bool = True  # False where the file says that the model has no EOS token
    # begins a document where the model has no BOS; None where the file does not say
    begins: str | None = None
    # why the tokens "bos" and "eos" are these, where it is known
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adds_bos: bool | None = None  # whether a text begins with BOS; None where the file does not say
    chat_template: str | None = None  # Jinja source


def read_conventions(directory: Path) -> Conventions:
    """What the files in a directory say; all defaults where there are none.

    Raises:
      ValueError: tokenizer_config.json is damaged.
    """
    path = directory / CONFIG_FILE
    template = directory / TEMPLATE_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError(f"it is {type(config).__name__}, and must be an object")
    except ValueError as error:
        raise ValueError(
            f"{path} is broken ({error}): repair it, or delete it and name bos and eos"
        ) from error
    adds_bos = config.get("add_bos_token")
    ends = config.get("end_tokens")
    sources = config.get(_SOURCES)
    return Conventions(
        **{kind: _content(config.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")},
        ends=tuple(
            name for name in map(_content, ends if isinstance(ends, list) else ()) if name is not None
        ),
        has_bos=config.get("bos_token", "") is not None,
        has_eos=config.get("eos_token", "") is not None,
        begins=_content(config.get(_BEGINS)) or (_USUAL if _is_written_earlier(config) else None),
        sources={kind: source for kind, source in sources.items() if isinstance(source, str)}
        if isinstance(sources, dict)
        else {},
        adds_bos=adds_bos
        if isinstance(adds_bos, bool)
        else True
        if config.keys() == _WRITTEN_BEFORE
        else None,
        chat_template=template.read_text(encoding="utf-8")
        if template.is_file()
        else _template(config.get("chat_template")),
    )


def write_conventions(directory: Path, conventions: Conventions) -> None:
    """Writes tokenizer_config.json, which holds the chat template too."""
    names = {
        f"{kind}_token": getattr(conventions, kind)
        for kind in ("unk", "pad")
        if getattr(conventions, kind) is not None
    }
    config = {
        "bos_token": conventions.bos if conventions.has_bos else None,
        "eos_token": conventions.eos,
        **({} if conventions.has_bos else {_BEGINS: conventions.bos}),
        _SOURCES: dict(conventions.sources),
        **names,
        "add_bos_token": conventions.adds_bos,
        **({"end_tokens": list(conventions.ends)} if conventions.ends else {}),
        **({} if conventions.chat_template is None else {"chat_template": conventions.chat_template}),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    (directory / TEMPLATE_FILE).unlink(
        missing_ok=True
    )  # of what was there before: it would win over the one just written


def _content(value: Any) -> str | None:
    """The name of a token, which is a string or {"content": string}."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def _template(value: Any) -> str | None:
    """A template, or the one named "default" in a list of {"name": ..., "template": ...}."""
    if isinstance(value, list):
        value = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
    found = value.get("default") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def end_token(
    *,
    option: str | None,
    conventions: Conventions,
    model: int | None,
    vocabulary: Mapping[str, int],
    special: Sequence[str],
    file: Path,
) -> SpecialToken:
    """EOS by the rules above.

    Args:
      option: a name that the user gives.
      conventions: what the files beside the vocabulary say.
      model: the id in the model's configuration.
      vocabulary: ids by name.
      special: names of special tokens, for the message.
      file: the tokenizer.json, for the message.

    Raises:
      ValueError: a name that is given is not in the vocabulary, or nothing names a token; it lists the
        candidates.
    """
    _check_option("eos", option, vocabulary=vocabulary, special=special, file=file)
    chosen = _named("eos", option, conventions.eos, model, conventions=conventions, vocabulary=vocabulary)
    if chosen is None and conventions.has_eos:
        chosen = _usual("eos", vocabulary)
    if chosen is None:
        why = (
            "no EOS token under a usual name"
            if conventions.has_eos
            else f"the eos_token of {CONFIG_FILE} is null, so there is no EOS"
        )
        raise ValueError(f"{file}: {why}. Name one with --tokenizer.eos: {list(special[:40])}")
    return chosen


def begin_token(
    *,
    option: str | None,
    conventions: Conventions,
    model: int | None,
    eos: SpecialToken,
    vocabulary: Mapping[str, int],
    special: Sequence[str],
    file: Path,
) -> SpecialToken:
    """Return the first token of documents by the rules above: BOS or its stand-in. Arguments and errors as
    `end_token`.
    """
    _check_option("bos", option, vocabulary=vocabulary, special=special, file=file)
    chosen = _named("bos", option, conventions.bos, model, conventions=conventions, vocabulary=vocabulary)
    if chosen is None and not conventions.has_bos:
        begins = conventions.begins
        if begins is not None and begins in vocabulary:
            source = conventions.sources.get("bos", f"{_BEGINS} of {CONFIG_FILE}")
            return SpecialToken(name=begins, id=vocabulary[begins], source=source)
        stand_in = SpecialToken(name=eos.name, id=eos.id, source=STAND_IN)
        return stand_in if conventions.begins != _USUAL else _usual("bos", vocabulary) or stand_in
    chosen = chosen or _usual("bos", vocabulary)
    if chosen is None:
        raise ValueError(
            f"{file}: no BOS token under a usual name. Name one with --tokenizer.bos: {list(special[:40])}"
        )
    return chosen


def _named(
    kind: str,
    option: str | None,
    configured: str | None,
    model: int | None,
    *,
    conventions: Conventions,
    vocabulary: Mapping[str, int],
) -> SpecialToken | None:
    """The token that an option, tokenizer_config.json or the model's configuration names."""
    if option is not None:
        return SpecialToken(name=option, id=vocabulary[option], source=OPTION)
    if configured is not None and configured in vocabulary:
        source = conventions.sources.get(kind, f"{kind}_token of {CONFIG_FILE}")
        return SpecialToken(name=configured, id=vocabulary[configured], source=source)
    name = next((name for name, id in vocabulary.items() if id == model), None)
    if name is not None:
        return SpecialToken(
            name=name, id=vocabulary[name], source=f"{kind}_token_id of the model's configuration"
        )
    return None


def _usual(kind: str, vocabulary: Mapping[str, int]) -> SpecialToken | None:
    name = next((name for name in USUAL_NAMES[kind] if name in vocabulary), None)
    return None if name is None else SpecialToken(name=name, id=vocabulary[name], source=USUAL_NAME)


def _check_option(
    kind: str, option: str | None, *, vocabulary: Mapping[str, int], special: Sequence[str], file: Path
) -> None:
    if option is not None and option not in vocabulary:
        raise ValueError(
            f"{file} has no token {option!r} for {kind}.{near_names(option, special)} Its special tokens: "
            f"{list(special[:40])}"
        )


def _is_written_earlier(config: Mapping[str, Any]) -> bool:
    """Return whether slmjax wrote the file, before it wrote which token stands in for BOS."""
    is_ours = (
        {"add_bos_token", "clean_up_tokenization_spaces", "tokenizer_class"}
        <= config.keys()
        <= _WRITTEN_EARLIER
    )
    return is_ours and config.get("tokenizer_class") == "PreTrainedTokenizerFast"


def begins_with_bos(post_processor: Mapping[str, Any] | None, *, bos: str) -> bool:
    """Whether the post-processor of a tokenizer.json puts BOS before a text."""
    firsts = [
        step["single"][0]
        for step in _steps(post_processor)
        if step["type"] == "TemplateProcessing" and step["single"]
    ]
    return any("SpecialToken" in first and first["SpecialToken"]["id"] == bos for first in firsts)


def post_processor_for(
    found: Mapping[str, Any] | None, *, bos: str, bos_id: int, adds_bos: bool
) -> Mapping[str, Any] | None:
    """The post-processor that puts BOS before a text, or does not; `found` where it does as it should."""
    if begins_with_bos(found, bos=bos) == adds_bos:
        return found
    steps = [step for step in _steps(found) if step["type"] != "TemplateProcessing"]
    if adds_bos:
        first, second = (
            [_piece("SpecialToken", bos, place), _piece("Sequence", name, place)]
            for place, name in enumerate("AB")
        )
        tokens = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
        steps.append(
            {
                "type": "TemplateProcessing",
                "single": first,
                "pair": [*first, *second],
                "special_tokens": tokens,
            }
        )
    return None if not steps else steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}


def _piece(kind: str, id: str, type_id: int) -> dict[str, Any]:
    return {kind: {"id": id, "type_id": type_id}}


def _steps(post_processor: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if post_processor is None:
        return []
    return list(post_processor["processors"]) if post_processor["type"] == "Sequence" else [post_processor]
