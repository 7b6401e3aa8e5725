"""Conversations as the text, and the tokens, that a chat model was trained on.

    messages = [{"role": "user", "content": "Hello"}]
    render_chat(template, messages, bos_token="<s>", eos_token="</s>")     # -> text
    encode_chat(loaded.tokenizer, messages)                                # -> ids, which `generate` takes as a prompt

The model's own template makes the text. Names of special tokens become these wherever they stand in it, as they do in
Hugging Face's transformers: in a message too.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from slmjax.data.tokenizers import Tokenizer

Message = Mapping[str, Any]  # "role" and "content", and what else the template reads


def render_chat(
    template: str, messages: Sequence[Message], *, bos_token: str | None = None, eos_token: str | None = None,
    add_generation_prompt: bool = True, **extra: Any,
) -> str:  # fmt: skip
    """The text of a conversation.

    Args:
      template: Jinja source, as a model's tokenizer_config.json or chat_template.jinja holds it. It is not trusted.
      messages: with "role" and "content" each, plain data throughout.
      bos_token: what the template may write before the conversation; none for a model without.
      eos_token: what it may write after a turn.
      add_generation_prompt: end with what comes before an answer.
      extra: further variables of the template, such as `tools`, or a switch that it knows.

    Raises:
      ValueError: there is no message, one is no plain data, or the template fails or refuses the conversation.
    """
    from slmjax.data import templates  # jinja2, which only chats need

    if not messages:
        raise ValueError("a conversation needs a message: give one with a role and a content")
    tokens = {name: token for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None}
    # A key without a value is as good as none to transformers, and templates count on it.
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    values = {"messages": plain, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **tokens, **extra}
    try:
        values = json.loads(json.dumps(values))  # a template gets nothing that can do anything
    except (TypeError, ValueError) as error:
        raise ValueError(f"a conversation must be plain data, as JSON is: {error}") from error
    try:
        return templates.render(template, values)
    except Exception as error:  # a template can go wrong in every way that a program can
        reason = f"{type(error).__name__}: {error}" if type(error).__module__ == "builtins" else str(error)
        raise ValueError(f"the model's chat template fails on this conversation: {reason}") from error


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any) -> list[int]:
    """The ids of a conversation, BOS where the template writes it.

    Raises:
      ValueError: the tokenizer has no chat template, or as `render_chat`.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "this model has no chat template: it continues plain text. If it was trained on conversations, put their template into "
            "chat_template.jinja in its directory tokenizer/"
        )
    named = {"unk_token": tokenizer.unk, "pad_token": tokenizer.pad}
    text = render_chat(
        tokenizer.chat_template, messages, bos_token=tokenizer.bos if tokenizer.has_bos else None, eos_token=tokenizer.eos,
        add_generation_prompt=add_generation_prompt, **{name: token for name, token in named.items() if token is not None}, **extra,
    )  # fmt: skip
    return tokenizer.encode_with_special(text) or [tokenizer.bos_id]
