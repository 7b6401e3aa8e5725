"""Text to text: prompts encoded, continuations decoded as they come, cut where a stop text begins."""

import dataclasses
import enum
from collections.abc import Callable, Sequence

from slmjax.checkpoints.loading import Loaded
from slmjax.data.detokenization import REPLACEMENT
from slmjax.data.tokenizers import Tokenizer
from slmjax.sampling.decoding import STEPS_PER_CALL, sample
from slmjax.sampling.settings import DEFAULT, SamplingConfig, check_prompts, length_limits, resolved_seeds

STREAMED_STEPS = 4  # tokens between two pieces of text that are shown


class FinishReason(enum.Enum):
    """Why a continuation ended."""

    EOS = "eos"  # the model ended the document or its turn
    STOP = "stop"  # a stop text came
    LENGTH = "length"  # max_tokens, or the context is full


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuation of one prompt."""

    text: str  # of the new tokens alone, without special tokens, up to a stop text
    tokens: tuple[
        int, ...
    ]  # new tokens; the last is an end where one was reached, or belongs to the stop text
    logprobs: tuple[
        float, ...
    ]  # nats, of each new token under the model's own distribution, whatever was drawn from
    prompt_tokens: tuple[int, ...]  # BOS first where the model wants it
    reason: FinishReason  # why it ended
    seed: int  # with which this prompt alone gives the same


def generate(
    loaded: Loaded,
    prompts: Sequence[str | Sequence[int]],
    *,
    config: SamplingConfig = DEFAULT,
    seeds: Sequence[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continues each text; an empty one starts a document.

    Args:
      loaded: the model, from `load_model`.
      prompts: texts, or token ids, which are taken as they are: those of a conversation, from `encode_chat`.
      config: how tokens are chosen, and where a continuation stops: at any end that the tokenizer knows, and
        at texts. A stop text that is the name of a special token stands for that token.
      seeds: one for each prompt (none: config.seed, config.seed + 1, ...).
      on_text: told the index of a prompt and each piece of its continuation as it comes. The pieces make up
        `text`: none is torn within a character, and nothing that may belong to a stop text is told before it
        is known not to.

    Raises:
      ValueError: a prompt that the vocabulary cannot express, or that leaves no room for `max_tokens` in the
        context.
    """
    encoded = encode_prompts(loaded, prompts, config=config)
    drawn_by = resolved_seeds(config, seeds, num_prompts=len(prompts))
    tokenizer = loaded.tokenizer
    stop_ids = [
        id
        for stop in config.stop
        if (id := tokenizer.special_ids.get(stop)) is not None and id not in tokenizer.end_ids
    ]
    ends = (*tokenizer.end_ids, *stop_ids)
    listener = _Listener(tokenizer, encoded, config.stop, ends, on_text)
    continued = sample(
        loaded.definition,
        loaded.params,
        loaded.buffers,
        encoded,
        config=config,
        eos_id=ends,
        seeds=drawn_by,
        watch=listener.watch if config.stop or on_text else None,
        steps_per_call=STREAMED_STEPS if on_text else STEPS_PER_CALL,
    )
    found = []
    for index, (prompt, one) in enumerate(zip(encoded, continued, strict=True)):
        tokens, text, reason = _finished(prompt, one.tokens, tokenizer, config.stop, ends)
        listener.tell(index, text)
        logprobs = tuple(one.logprobs[: len(tokens)])
        found.append(
            Generation(
                text=text,
                tokens=tuple(tokens),
                logprobs=logprobs,
                prompt_tokens=tuple(prompt),
                reason=reason,
                seed=drawn_by[index],
            )
        )
    return found


def encode_prompts(
    loaded: Loaded, prompts: Sequence[str | Sequence[int]], *, config: SamplingConfig = DEFAULT
) -> list[list[int]]:
    """The tokens of prompts, BOS first where the model wants it; ids stay as they are.

    Raises ValueError as `generate` does, before anything is computed.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text, {prompts[:40]!r}: give a list of texts")
    of_texts = iter(loaded.tokenizer.prompt_batch([prompt for prompt in prompts if isinstance(prompt, str)]))
    encoded = [next(of_texts) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    check_prompts(encoded, vocab_size=loaded.config.known_vocab_size)
    if encoded:
        length_limits(encoded, max_tokens=config.max_tokens, context_length=loaded.config.context_length)
    return encoded


class _Listener:
    """Follows the continuations while they grow: tells their text, and sees stop texts."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[str],
        ends: Sequence[int],
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._stops = stops
        self._ends = ends
        self._on_text = on_text
        self._told: dict[int, int] = {}  # characters of each continuation

    def watch(self, index: int, tokens: list[int]) -> bool:
        """Whether this continuation has come to a stop text."""
        text = _stable_text(self._tokenizer, self._prompts[index], _before_end(tokens, self._ends))
        cut = _stop_place(text, self._stops)
        if self._tokenizer.detokenizer.is_incremental:
            self.tell(index, _certain(text, self._stops) if cut is None else text[:cut])
        return cut is not None

    def tell(self, index: int, text: str) -> None:
        """Tells what of this text was not told yet."""
        told = self._told.get(index, 0)
        if self._on_text is not None and len(text) > told:
            self._on_text(index, text[told:])
            self._told[index] = len(text)


def _before_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens that are text: an end need not be a special token."""
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def _finished(
    prompt: list[int], tokens: list[int], tokenizer: Tokenizer, stops: Sequence[str], ends: Sequence[int]
) -> tuple[list[int], str, FinishReason]:
    """Tokens, text and end of a continuation: tokens past the one that completed a stop text are dropped."""

    def text_of(count: int) -> str:
        ids = _before_end(tokens[:count], ends)
        return (
            tokenizer.decode_continuation(prompt, ids)
            if count == len(tokens)
            else _stable_text(tokenizer, prompt, ids)
        )

    text = text_of(len(tokens))
    if _stop_place(text, stops) is not None or (stops and not tokenizer.detokenizer.is_incremental):
        for count in range(1, len(tokens) + 1):
            if (cut := _stop_place(text_of(count), stops)) is not None:
                return tokens[:count], text_of(count)[:cut], FinishReason.STOP
    if not tokens or tokens[-1] not in ends:
        return tokens, text, FinishReason.LENGTH
    return tokens, text, FinishReason.EOS if tokens[-1] in tokenizer.end_ids else FinishReason.STOP


def _stop_place(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places) if places else None


def _stable_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ids add to a prompt, without the U+FFFD of a character that further ids may complete."""
    text = tokenizer.decode_continuation(prompt, ids)
    return (
        text[:-1]
        if text.endswith(REPLACEMENT) and tokenizer.detokenizer.torn_bytes([*prompt, *ids])
        else text
    )


def _certain(text: str, stops: Sequence[str]) -> str:
    """The part of a stable text that more tokens will not change: without the beginning of a stop text at its
    end.
    """
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]
