"""What a model expects around text, from the files next to a tokenizer.json: BOS, end tokens, template.

    conventions = read_conventions(directory)       # tokenizer_config.json and chat_template.jinja
    bos = begin_token(option=None, conventions=conventions, model=None, eos=eos, vocabulary=vocabulary, ...)
    post_processor_for(post_processor, bos="<s>", bos_id=1, adds_bos=True)    # what Hugging Face libraries
    use

The post-processor of a tokenizer.json can add BOS to a text; `add_bos_token` in tokenizer_config.json is
another way to specify it. If both are present, the latter counts.

BOS and EOS are each chosen by the first of these rules that names a token:
1. the user's option (`--tokenizer.bos`, `--tokenizer.eos`);
2. `bos_token` or `eos_token` of tokenizer_config.json. As in transformers, an explicit null means that there
   is none, and no other token is chosen because of its name;
3. `bos_token_id` or `eos_token_id` of the model's configuration;
4. the first of the usual names in the vocabulary, if tokenizer_config.json does not mention the token.

A chat model may name as BOS the token that begins a turn, and begin no text with it. Documents then begin
with the token that separated documents in pre-training, if the vocabulary has one, else with EOS
(`separator`).

Without BOS, documents begin with EOS, which separates them (as in lm-eval), and the files record that there
is no BOS. Without EOS, one must be named: documents end with it. Padding and unknown tokens are those of
tokenizer_config.json (null: none), since slmjax needs neither. Reports give the tokens and the rule that
chose them (`SpecialToken`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.config import near_names
from slmjax.stored_json import read_object

BOS = "<|bos|>"
EOS = "<|eos|>"
_BEGINS = "document_begin_token"
_SOURCES = "special_token_sources"  # a key of tokenizer_config.json that slmjax alone reads
_USUAL = ""  # stands for the first of the usual names
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# The names in common vocabularies, in the order in which they are tried.
USUAL_NAMES = {
    "bos": (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>", "[CLS]"),
    "eos": (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<|im_end|>", "[SEP]"),
}
OPTION = "named by the user"
USUAL_NAME = "first of the usual names in the vocabulary"
OWN_NAME = "made by slmjax"
SEPARATOR = "separates documents, since the model's BOS begins turns of a chat and no text"
STAND_IN = "EOS, since the tokenizer has no BOS"
# The keys that slmjax wrote before it recorded whether a text begins with BOS. For models it trains, it does.
_WRITTEN_BEFORE = {"bos_token", "eos_token", "clean_up_tokenization_spaces", "tokenizer_class"}


# The keys before it recorded the token that replaces BOS: that was the first of the usual names.
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
    """A token with a role, and the rule that chose it."""

    name: str
    id: int
    source: str  # the rule above that named it

    def text(self) -> str:
        """Return a description: '<s>', id 1 (bos_token of tokenizer_config.json)."""
        return f"{self.name!r}, id {self.id} ({self.source})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conventions:
    """Special tokens and settings of a model's files. The vocabulary may not have these tokens."""

    bos: str | None = None  # begins a text
    eos: str | None = None  # ends one
    unk: str | None = None
    pad: str | None = None
    ends: tuple[str, ...] = ()  # further tokens that end a text or a turn
    has_bos: bool = True  # False if the file specifies that there is no BOS
    has_eos: bool = True  # False if the file specifies that there is no EOS
    # begins a document, if not BOS; None if the file does not specify it
    begins: str | None = None
    # the rules that chose "bos" and "eos", if known
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adds_bos: bool | None = None  # a text begins with BOS; None if the file does not specify it
    chat_template: str | None = None  # Jinja source


def read_conventions(directory: Path) -> Conventions:
    """Return the conventions in the files of a directory; the defaults if there are none.

    Raises:
      ValueError: tokenizer_config.json is damaged.
    """
    path = directory / CONFIG_FILE
    template = directory / TEMPLATE_FILE
    remedy = "repair it, or delete it and name bos and eos"
    config = read_object(path, remedy=remedy) if path.is_file() else {}
    adds_bos = config.get("add_bos_token")
    ends = config.get("end_tokens")
    sources = config.get(_SOURCES)
    written_before = config.keys() == _WRITTEN_BEFORE
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
        adds_bos=adds_bos if isinstance(adds_bos, bool) else written_before or None,
        chat_template=_template_text(template)
        if template.is_file()
        else _template(config.get("chat_template")),
    )


def _template_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at {error.start}): repair it, or delete it"
        ) from error


def write_conventions(directory: Path, conventions: Conventions) -> None:
    """Write tokenizer_config.json, with the chat template in it."""
    names = {
        f"{kind}_token": getattr(conventions, kind)
        for kind in ("unk", "pad")
        if getattr(conventions, kind) is not None
    }
    config = {
        "bos_token": conventions.bos if conventions.has_bos else None,
        "eos_token": conventions.eos,
        # A token in place of BOS is stored under a key that other libraries ignore.
        **({} if conventions.begins is None else {_BEGINS: conventions.begins}),
        _SOURCES: dict(conventions.sources),
        **names,
        "add_bos_token": conventions.adds_bos,
        **({"end_tokens": list(conventions.ends)} if conventions.ends else {}),
        **({} if conventions.chat_template is None else {"chat_template": conventions.chat_template}),
        "clean_up_tokenization_spaces": False,
        # The class of transformers that reads any tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    # A template file from before would override the template just written.
    (directory / TEMPLATE_FILE).unlink(missing_ok=True)


def _content(value: Any) -> str | None:
    """Return the name of a token, which is a string or {"content": string}."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def _template(value: Any) -> str | None:
    """Return a template, or the one named "default" in a list of {"name": ..., "template": ...}."""
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    template = value.get("default") if isinstance(value, dict) else value
    return template if isinstance(template, str) else None


def end_token(
    *,
    option: str | None,
    conventions: Conventions,
    model: int | None,
    vocabulary: Mapping[str, int],
    special: Sequence[str],
    file: Path,
) -> SpecialToken:
    """Return EOS by the rules above.

    Args:
      option: the name in the user's option.
      conventions: from the files next to the vocabulary.
      model: the id in the model's configuration.
      vocabulary: ids by name.
      special: names of special tokens, for error messages.
      file: the tokenizer.json, for error messages.

    Raises:
      ValueError: the option is not in the vocabulary, or no rule names a token; the message lists candidates.
    """
    _check_option("eos", option, vocabulary=vocabulary, special=special, file=file)
    chosen = _named("eos", option, conventions.eos, model, conventions=conventions, vocabulary=vocabulary)
    # An explicit null rules out the usual names.
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
    """Return the first token of documents by the rules above: BOS, or EOS in its place.

    Arguments and errors are those of `end_token`.
    """
    _check_option("bos", option, vocabulary=vocabulary, special=special, file=file)
    chosen = _named("bos", option, conventions.bos, model, conventions=conventions, vocabulary=vocabulary)
    if chosen is None and not conventions.has_bos:
        # The file names the token that slmjax used in place of BOS when it saved the tokenizer.
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


def separator(
    bos: SpecialToken,
    *,
    eos: SpecialToken,
    conventions: Conventions,
    special: Sequence[str],
    vocabulary: Mapping[str, int],
) -> SpecialToken:
    """Return the first token of documents for a model that adds no BOS: still BOS, unless it begins turns.

    Args:
      bos: the token that `begin_token` has chosen.
      eos: the token that ends documents.
      conventions: of the model; its chat template shows which tokens begin and end turns.
      special: names of special tokens.
      vocabulary: ids by name.
    """
    template = conventions.chat_template or ""
    # The file of an earlier import names the token already.
    if conventions.begins and conventions.begins in vocabulary:
        source = conventions.sources.get("bos", SEPARATOR)
        return SpecialToken(name=conventions.begins, id=vocabulary[conventions.begins], source=source)
    # A template that does not name the token may write it as `bos_token`, before the first turn.
    if bos.source == OPTION or bos.name not in template:
        return bos
    usual = (name for name in USUAL_NAMES["eos"] if name in special and name not in template)
    name = next(usual, eos.name)
    return SpecialToken(name=name, id=vocabulary[name], source=SEPARATOR)


def _named(
    kind: str,
    option: str | None,
    configured: str | None,
    model: int | None,
    *,
    conventions: Conventions,
    vocabulary: Mapping[str, int],
) -> SpecialToken | None:
    """Return the token that the option, tokenizer_config.json or the model's configuration names."""
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
    # Recognised by its keys, because those versions wrote no version number.
    is_ours = (
        {"add_bos_token", "clean_up_tokenization_spaces", "tokenizer_class"}
        <= config.keys()
        <= _WRITTEN_EARLIER
    )
    return is_ours and config.get("tokenizer_class") == "PreTrainedTokenizerFast"


def begins_with_bos(post_processor: Mapping[str, Any] | None, *, bos: str) -> bool:
    """Return whether the post-processor of a tokenizer.json adds BOS to a text."""
    firsts = [
        step["single"][0]
        for step in _steps(post_processor)
        if step["type"] == "TemplateProcessing" and step["single"]
    ]
    # A template for pairs begins as that for single texts does.
    return any("SpecialToken" in first and first["SpecialToken"]["id"] == bos for first in firsts)


def post_processor_for(
    current: Mapping[str, Any] | None, *, bos: str, bos_id: int, adds_bos: bool
) -> Mapping[str, Any] | None:
    """Return a post-processor that adds BOS to a text or does not; `current` if it is right already."""
    if begins_with_bos(current, bos=bos) == adds_bos:
        return current
    # Only templates add tokens. Other steps, such as those for byte-level offsets, stay.
    steps = [step for step in _steps(current) if step["type"] != "TemplateProcessing"]
    if adds_bos:
        first, second = (
            [_piece("SpecialToken", bos, type_id), _piece("Sequence", name, type_id)]
            for type_id, name in enumerate("AB")
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
