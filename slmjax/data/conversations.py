"""Conversations as training text: what the chat template makes of them, and which bytes of it are answers.

    rendered = render_conversation(tokenizer, messages)
    tokenizer.encode_spans([rendered.text], marked=True)        # the ids of `generate --chat` for the same
    messages rendered.answers                                            # bytes of each answer, with the
    token that ends it

Where an answer stands is found by rendering beginnings of the conversation: up to the answer, with what asks
for one, and through it. Each must be a beginning of the whole, for only then is an answer in training what
the model would be asked for. A template that writes earlier turns otherwise once later ones follow (as those
that drop the reasoning of all answers but the last) can be trained on the last answer alone. A template with
`generation` blocks says itself which text is an answer, and is taken at its word.
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

    ALL = "all"  # each
    LAST = "last"  # the last one


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderedConversation:
    """The text of a conversation."""

    text: str  # with the marks of special tokens
    answers: list[Span]  # bytes of the text that are scored
    ended_by: int | None  # id of the special token that ends the last answer
    ends_open: bool  # none does, and nothing comes after the last answer


def render_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    turns: ScoredTurns = ScoredTurns.ALL,
    names: SpecialNames = SpecialNames.TEXT,
) -> RenderedConversation:
    """Return the text of a conversation and its answers.

    An answer ends with the special token behind it, without the line end that many templates write after
    that.

    Raises:
      ValueError: there is no answer, the template fails on the messages, or what it makes does not show where
        answers stand.
    """
    from slmjax.data import templates

    check_messages(messages)
    places = [place for place, message in enumerate(messages) if message["role"] == _ANSWERING]
    if not places:
        raise ValueError(
            f"the conversation has no message of the role {_ANSWERING!r}, so that nothing of it would be "
            "trained on"
        )
    chat = ChatText(tokenizer, messages, names=names)
    if templates.marks_answers(tokenizer.chat_template or ""):
        text, answers = _marked_answers(chat)
        answers = [(start, _through_end_of_turn(tokenizer, text, start, end)) for start, end in answers]
    else:
        text = chat.render(add_generation_prompt=False)
        chosen = places if turns is ScoredTurns.ALL else places[-1:]
        answers = [_answer(chat, text, place, num_messages=len(messages)) for place in chosen]
    answers = answers if turns is ScoredTurns.ALL else answers[-1:]
    lasts = [tokenizer.marked_vocabulary.last_mark(text[start:end]) for start, end in answers]
    ends = [
        end if last is None else start + last[1] for (start, end), last in zip(answers, lasts, strict=True)
    ]
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
    """Raise ValueError for what is no conversation: a list of objects with a role, and not empty."""
    well_formed = isinstance(messages, list | tuple) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    )
    if not messages or not well_formed:
        raise ValueError(
            'messages must be a list of objects like {"role": "user", "content": "..."}, and not empty'
        )


def _answer(chat: ChatText, text: str, place: int, *, num_messages: int) -> Span:
    """Characters of the answer that message `place` is."""
    if place == 0:
        raise ValueError("the conversation begins with an answer: put the message that it answers before it")
    before = chat.render(place, add_generation_prompt=True)
    through = text if place + 1 == num_messages else chat.render(place + 1, add_generation_prompt=False)
    if text.startswith(before) and text.startswith(through) and len(through) >= len(before):
        return len(before), len(through)
    if text.startswith(chat.render(place, add_generation_prompt=False)) and not text.startswith(before):
        reason = f"begins the answer in message {place + 1} otherwise than it asks for one"
        raise ValueError(
            f"the chat template {reason}, so that training would not be on what is generated: give it "
            "generation blocks"
        )
    raise ValueError(
        f"the chat template writes the first {place + 1} of these {num_messages} messages otherwise when "
        "others follow, so that an answer"
        " of the whole is not what the model would be asked for: train on last answers alone with "
        "--data.scored-turns last"
    )


def _marked_answers(chat: ChatText) -> tuple[str, list[Span]]:
    """The text, and the characters of the answers, which the template has put into `generation` blocks."""
    from slmjax.data.templates import ANSWER_BEGINS, ANSWER_ENDS

    parts = re.split(
        f"({ANSWER_BEGINS}|{ANSWER_ENDS})", chat.render(add_generation_prompt=False, answers_marked=True)
    )
    if parts[1::2] != [ANSWER_BEGINS, ANSWER_ENDS] * (len(parts) // 4) or len(parts) < 5:
        raise ValueError(
            "the chat template puts no answer of this conversation into a generation block, or one into "
            "another"
        )
    ends = [0]
    for part in parts[::2]:
        ends.append(ends[-1] + len(part))
    # Of the texts 0, 1, 2, ... each odd one is an answer.
    return "".join(parts[::2]), [(ends[i], ends[i + 1]) for i in range(1, len(ends) - 1, 2)]


def _through_end_of_turn(tokenizer: Tokenizer, text: str, start: int, end: int) -> int:
    """The end of an answer with the special token behind it, if the answer has none at its end: the model has
    to say it.
    """
    vocabulary = tokenizer.marked_vocabulary
    is_ended = vocabulary.last_mark(text[start:end]) is not None
    return end if is_ended else vocabulary.end_of_mark(text, end) or end
