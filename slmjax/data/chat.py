"""Conversations as the text, and the tokens, that a chat model was trained on.

    messages = [{"role": "user", "content": "Hello"}]
    render_chat(template, messages, bos_token="<s>", eos_token="</s>")     # -> text
    encode_chat(loaded.tokenizer, messages)                                # -> ids, a prompt for `generate`

The model's own template makes the text. The special tokens that it writes become these tokens. Their names in
a message are text, so that no message can end a turn or begin another one.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from slmjax.data.marks import MarkedVocabulary, SpecialNames
from slmjax.data.tokenizers import Tokenizer

Message = Mapping[str, Any]  # "role" and "content", and what else the template reads


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    add_generation_prompt: bool = True,
    answers_marked: bool = False,
    **extra: Any,
) -> str:
    """Return the text of a conversation.

    Args:
      template: Jinja source, as in a model's tokenizer_config.json or chat_template.jinja. It is not trusted.
      messages: each with "role" and "content", plain data throughout.
      bos_token: the token that the template may write before the conversation; None for a model without one.
      eos_token: the token that the template may write after a turn.
      add_generation_prompt: end with the text that comes before an answer.
      answers_marked: put the marks of `template_process` around the text of `generation` blocks.
      extra: further variables of the template, such as `tools` or a switch that it knows.

    Raises:
      ValueError: there are no messages, a message is not plain data, or the template fails or refuses the
        conversation.
    """
    # Imported here because only chats need jinja2.
    from slmjax.data import template_process

    if not messages:
        raise ValueError("a conversation needs a message: give one with a role and a content")
    tokens = {
        name: token
        for name, token in (("bos_token", bos_token), ("eos_token", eos_token))
        if token is not None
    }
    # transformers drops keys without a value, and templates rely on it.
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    values = {
        "messages": plain,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **tokens,
        **extra,
    }
    try:
        return template_process.render(template, values, answers_marked=answers_marked)
    except template_process.TemplateFailed as error:
        raise ValueError(f"the model's chat template fails on this conversation: {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a conversation must be plain data, as in JSON: {error}") from error


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any
) -> list[int]:
    """Return the ids of a conversation, with BOS where the template writes it.

    Raises:
      ValueError: the tokenizer has no chat template, or as `render_chat`.
    """
    text = ChatText(tokenizer, messages, extra=extra).render(add_generation_prompt=add_generation_prompt)
    # An empty text stands for BOS, since a model needs at least one token.
    return tokenizer.encode_spans([text], marked=True)[0].ids.tolist() or [tokenizer.bos_id]


class ChatText:
    """The text of a conversation or of its beginning, with the marks of special tokens (`marks.py`).

    Args:
      tokenizer: whose template, tokens and marks are used.
      messages: as in `render_chat`.
      names: whether the names of special tokens in messages stand for these.
      extra: further variables of the template.

    Raises:
      ValueError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        names: SpecialNames = SpecialNames.TEXT,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "this model has no chat template: it continues plain text. If it was trained on "
                "conversations, put their template into chat_template.jinja in its directory tokenizer/"
            )
        self._template = tokenizer.chat_template
        tokens = {
            "bos": tokenizer.named_bos,
            "eos": tokenizer.eos,
            "unk": tokenizer.unk,
            "pad": tokenizer.pad,
        }
        self._tokens = {f"{name}_token": token for name, token in tokens.items() if token is not None}
        # Names are hidden before rendering and shown after marking, so that only the template's own names
        # become marks.
        self._vocabulary = tokenizer.marked_vocabulary
        self._hidden = _HiddenNames(self._vocabulary)
        self._messages = list(messages)
        self._extra = dict(extra or {})
        if names is SpecialNames.TEXT:
            self._messages = self._hidden.hide(self._messages)
            self._extra = self._hidden.hide(self._extra)

    def render(
        self, num_messages: int | None = None, *, add_generation_prompt: bool, answers_marked: bool = False
    ) -> str:
        """Return the text of the first `num_messages` messages. Raises ValueError as `render_chat`."""
        text = render_chat(
            self._template,
            self._messages[:num_messages],
            add_generation_prompt=add_generation_prompt,
            answers_marked=answers_marked,
            **self._tokens,
            **self._extra,
        )
        return self._hidden.show(self._vocabulary.mark(text))


class _HiddenNames:
    """Replaces the names of special tokens in messages by digits while a template renders them.

    A template may change text in any way, but digits usually pass unchanged.
    """

    def __init__(self, vocabulary: MarkedVocabulary) -> None:
        self._vocabulary = vocabulary
        # Random, so that no message can contain these digits by design.
        self._drawn = f"{secrets.randbelow(10**24):024d}"
        self._names: list[str] = []

    def hide(self, value: Any) -> Any:
        """Return plain data with digits for the names in its texts."""
        if isinstance(value, str):
            return self._vocabulary.names.sub(self._digits, value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        """Return the text with the names again. Raises ValueError where the template has cut one in two."""
        shown = re.sub(rf"{self._drawn}(\d{{6}})", lambda match: self._names[int(match[1])], text)
        # A part of the digits is left over if the template has cut, padded or repeated inside of them.
        if self._drawn[:12] in shown or self._drawn[12:] in shown:
            raise ValueError(
                "the model's chat template cuts a message inside the name of a special token, "
                f"{self._names[0]!r}"
            )
        return shown

    def _digits(self, match: re.Match[str]) -> str:
        self._names.append(match[0])
        return f"{self._drawn}{len(self._names) - 1:06d}"
