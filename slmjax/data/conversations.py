"""Conversations as training text: the text of the chat template, and the bytes of it that are answers.

    rendered = render_conversation(tokenizer, messages)
    tokenizer.encode_spans([rendered.text], marked=True)   # the ids of `generate --chat` for these messages
    rendered.answers                                       # bytes of each answer with the token that ends it

To find an answer, the beginnings of the conversation are rendered: up to the answer, with the prompt for it,
and through it. Each must be a beginning of the complete text. Otherwise the answer in training is not the one
that the model would be asked for. Some templates write earlier turns differently when later ones follow, for
example without the reasoning of all answers but the last: with them one can train on the last answer alone. A
template with `generation` blocks marks its answers itself.
"""

import dataclasses
import enum
import re
from collections.abc import Sequence

from slmjax.data.chat import ChatText, Message
from slmjax.data.marks import SpecialNames
from slmjax.data.spans import Span
from slmjax.data.tokenizers import Tokenizer

_ANSWERING = "assistant"


class ScoredTurns(enum.Enum):
    """The answers of a conversation that are scored."""

    ALL = "all"  # every answer
    LAST = "last"  # the last answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderedConversation:
    """The text of a conversation."""

    text: str  # with the marks of special tokens
    answers: list[Span]  # bytes of the text that are scored
    ended_by: int | None  # id of the special token that ends the last answer
    ends_open: bool  # no special token ends the last answer, and no text follows it


def render_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    turns: ScoredTurns = ScoredTurns.ALL,
    names: SpecialNames = SpecialNames.TEXT,
) -> RenderedConversation:
    """Return the text of a conversation and its answers.

    An answer ends with the special token after it, without the line break that many templates write after
    that.

    Raises:
      ValueError: there is no answer, the template fails on the messages, or its text does not show where the
        answers are.
    """
    from slmjax.data import template_process

    check_messages(messages)
    indices = [index for index, message in enumerate(messages) if message["role"] == _ANSWERING]
    if not indices:
        raise ValueError(
            f"the conversation has no message of the role {_ANSWERING!r}: nothing of it would be trained on"
        )
    chat = ChatText(tokenizer, messages, names=names)
    # A template that marks its answers is believed, and needs no rendering of beginnings.
    if template_process.marks_answers(tokenizer.chat_template or ""):
        text, answers = _marked_answers(chat)
        answers = [(start, _through_end_of_turn(tokenizer, text, start, end)) for start, end in answers]
    else:
        text = chat.render(add_generation_prompt=False)
        chosen = indices if turns is ScoredTurns.ALL else indices[-1:]
        answers = [_answer(chat, text, index, num_messages=len(messages)) for index in chosen]
    answers = answers if turns is ScoredTurns.ALL else answers[-1:]
    lasts = [tokenizer.marked_vocabulary.last_mark(text[start:end]) for start, end in answers]
    ends = [
        # An answer ends after its last special token. The line break that many templates write after it
        # belongs to the next turn.
        end if last is None else start + last[1]
        for (start, end), last in zip(answers, lasts, strict=True)
    ]
    # EOS ends the conversation only if the template has no end token of its own there.
    ended_by = None if lasts[-1] is None else lasts[-1][0]
    return RenderedConversation(
        text=text,
        answers=[
            (len(text[:start].encode()), len(text[:end].encode()))
            for (start, _), end in zip(answers, ends, strict=True)
        ],
        ended_by=ended_by,
        ends_open=ended_by is None and not text[ends[-1] :].strip(),
    )


def check_messages(messages: object) -> None:
    """Raise ValueError unless these are messages: a list, not empty, of objects with a role."""
    well_formed = isinstance(messages, list | tuple) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    )
    if not messages or not well_formed:
        raise ValueError(
            'messages must be a list of objects like {"role": "user", "content": "..."}, and not empty'
        )


def _answer(chat: ChatText, text: str, index: int, *, num_messages: int) -> Span:
    """Return the characters of the answer in message `index`."""
    if index == 0:
        raise ValueError("the conversation begins with an answer: put the message that it answers before it")
    # The text up to the answer, with the prompt for it, and the text through the answer.
    before = chat.render(index, add_generation_prompt=True)
    through = text if index + 1 == num_messages else chat.render(index + 1, add_generation_prompt=False)
    # Both must be beginnings of the complete text, or training and generation see different prompts.
    if text.startswith(before) and text.startswith(through) and len(through) >= len(before):
        return len(before), len(through)
    if text.startswith(chat.render(index, add_generation_prompt=False)) and not text.startswith(before):
        raise ValueError(
            f"the chat template begins the answer in message {index + 1} otherwise than its prompt for an "
            "answer, so that training would differ from generation: give the template generation blocks"
        )
    raise ValueError(
        f"the chat template writes the first {index + 1} of these {num_messages} messages otherwise when "
        "others follow, so that their answer is not what the model would be asked for: train on last "
        "answers alone with --data.scored-turns last"
    )


def _marked_answers(chat: ChatText) -> tuple[str, list[Span]]:
    """Return the text, and the characters of the answers in the template's `generation` blocks."""
    from slmjax.data.template_process import ANSWER_BEGINS, ANSWER_ENDS

    parts = re.split(
        f"({ANSWER_BEGINS}|{ANSWER_ENDS})", chat.render(add_generation_prompt=False, answers_marked=True)
    )
    if parts[1::2] != [ANSWER_BEGINS, ANSWER_ENDS] * (len(parts) // 4) or len(parts) < 5:
        raise ValueError(
            "the chat template has no answer of this conversation in a generation block, or one block in "
            "another"
        )
    ends = [0]
    for part in parts[::2]:
        ends.append(ends[-1] + len(part))
    # The parts with odd numbers are the answers.
    return "".join(parts[::2]), [(ends[i], ends[i + 1]) for i in range(1, len(ends) - 1, 2)]


def _through_end_of_turn(tokenizer: Tokenizer, text: str, start: int, end: int) -> int:
    """Return the end of an answer, with the special token after it if it has none at its end.

    The model must learn to generate that token.
    """
    vocabulary = tokenizer.marked_vocabulary
    is_ended = vocabulary.last_mark(text[start:end]) is not None
    return end if is_ended else vocabulary.end_of_mark(text, end) or end
