"""What a model expects around text, as the files beside a tokenizer.json say it: BOS, ends, a chat template.

    conventions = read_conventions(directory)                       # tokenizer_config.json and chat_template.jinja
    post_processor_for(post_processor, bos="<s>", bos_id=1, adds_bos=True)     # the form that Hugging Face's libraries go by

A tokenizer.json has its own way to say that a text begins with BOS, the post-processor; `add_bos_token` in
tokenizer_config.json is another. Where both are there, the latter is meant.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmjax.config import near_names

BOS, EOS = "<|bos|>", "<|eos|>"
CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
# What vocabularies in use call them, tried in this order.
USUAL_NAMES = {
    "bos": (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|endoftext|>", "[CLS]"),
    "eos": (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "<|im_end|>", "[SEP]"),
}
# All that slmjax wrote before it wrote down whether a text begins with BOS. What it trains always does.
_WRITTEN_BEFORE = {"bos_token", "eos_token", "clean_up_tokenization_spaces", "tokenizer_class"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conventions:
    """Names of tokens are as given: the vocabulary may not have them."""

    bos: str | None = None  # begins a text
    eos: str | None = None  # ends one
    unk: str | None = None
    pad: str | None = None
    ends: tuple[str, ...] = ()  # other tokens that end a text or a turn
    has_bos: bool = True  # False where the file says that the model has no BOS token
    adds_bos: bool | None = None  # whether a text begins with BOS; None where the file does not say
    chat_template: str | None = None  # Jinja source


def read_conventions(directory: Path) -> Conventions:
    """What the files in a directory say; all defaults where there are none.

    Raises:
      ValueError: tokenizer_config.json is damaged.
    """
    path, template = directory / CONFIG_FILE, directory / TEMPLATE_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError(f"it is {type(config).__name__}, and must be an object")
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}): repair it, or delete it and name bos and eos") from error
    adds_bos = config.get("add_bos_token")
    ends = config.get("end_tokens")
    return Conventions(
        **{kind: _content(config.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")},
        ends=tuple(name for name in map(_content, ends if isinstance(ends, list) else ()) if name is not None),
        has_bos=config.get("bos_token", "") is not None,
        adds_bos=adds_bos if isinstance(adds_bos, bool) else True if config.keys() == _WRITTEN_BEFORE else None,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else _template(config.get("chat_template")),
    )


def write_conventions(directory: Path, conventions: Conventions) -> None:
    """Writes tokenizer_config.json, which holds the chat template too."""
    names = {f"{kind}_token": getattr(conventions, kind) for kind in ("unk", "pad") if getattr(conventions, kind) is not None}
    config = {
        "bos_token": conventions.bos if conventions.has_bos else None,
        "eos_token": conventions.eos,
        **names,
        "add_bos_token": conventions.adds_bos,
        **({"end_tokens": list(conventions.ends)} if conventions.ends else {}),
        **({} if conventions.chat_template is None else {"chat_template": conventions.chat_template}),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    (directory / TEMPLATE_FILE).unlink(missing_ok=True)  # of what was there before: it would win over the one just written


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


def special_name(
    kind: str, *, given: str | None, configured: str | None, vocabulary: Mapping[str, int], special: Sequence[str], file: Path
) -> str:
    """The name of the BOS or EOS token. Raises ValueError that lists the candidates."""
    if given is not None and given not in vocabulary:
        raise ValueError(f"{file} has no token {given!r} for {kind}.{near_names(given, special)} Its special tokens: {list(special[:40])}")
    for name in (given, configured, *USUAL_NAMES[kind]):
        if name is not None and name in vocabulary:
            return name
    raise ValueError(f"{file}: no {kind.upper()} token under a usual name. Name one with --tokenizer.{kind}: {list(special[:40])}")


def begins_with_bos(post_processor: Mapping[str, Any] | None, *, bos: str) -> bool:
    """Whether the post-processor of a tokenizer.json puts BOS before a text."""
    firsts = [step["single"][0] for step in _steps(post_processor) if step["type"] == "TemplateProcessing" and step["single"]]
    return any("SpecialToken" in first and first["SpecialToken"]["id"] == bos for first in firsts)


def post_processor_for(found: Mapping[str, Any] | None, *, bos: str, bos_id: int, adds_bos: bool) -> Mapping[str, Any] | None:
    """The post-processor that puts BOS before a text, or does not; `found` where it does as it should."""
    if begins_with_bos(found, bos=bos) == adds_bos:
        return found
    steps = [step for step in _steps(found) if step["type"] != "TemplateProcessing"]
    if adds_bos:
        first, second = ([_piece("SpecialToken", bos, place), _piece("Sequence", name, place)] for place, name in enumerate("AB"))
        tokens = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
        steps.append({"type": "TemplateProcessing", "single": first, "pair": [*first, *second], "special_tokens": tokens})
    return None if not steps else steps[0] if len(steps) == 1 else {"type": "Sequence", "processors": steps}


def _piece(kind: str, id: str, type_id: int) -> dict[str, Any]:
    return {kind: {"id": id, "type_id": type_id}}


def _steps(post_processor: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if post_processor is None:
        return []
    return list(post_processor["processors"]) if post_processor["type"] == "Sequence" else [post_processor]
