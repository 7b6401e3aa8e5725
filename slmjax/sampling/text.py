"""Text to text: prompts encoded, continuations decoded as they come, cut where a stop text begins."""

import dataclasses
import enum
from collections.abc import Callable, Sequence

from slmjax.checkpoint import Loaded
from slmjax.data.tokenizers import Tokenizer
from slmjax.sampling.decoding import STEPS_PER_CALL, sample
from slmjax.sampling.settings import DEFAULT, SamplingConfig, check_prompts, length_limits, resolved_seeds

STREAMED_STEPS = 4  # tokens between two pieces of text that are shown


class FinishReason(enum.Enum):
    """Why a continuation ended."""

    EOS = "eos"  # the model ended the document
    STOP = "stop"  # a stop text came
    LENGTH = "length"  # max_tokens, or the context is full


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuation of one prompt."""

    text: str  # of the new tokens alone, without special tokens, up to a stop text
    tokens: tuple[int, ...]  # new tokens; the last is EOS where it was reached, or belongs to the stop text
    logprobs: tuple[float, ...]  # nats, of each new token under the model's own distribution, whatever was drawn from
    prompt_tokens: tuple[int, ...]  # BOS first
    reason: FinishReason  # why it ended
    seed: int  # with which this prompt alone gives the same


def generate(
    loaded: Loaded,
    prompts: Sequence[str],
    *,
    config: SamplingConfig = DEFAULT,
    seeds: Sequence[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continues each text; an empty one starts a document.

    Args:
      loaded: the model, from `load_model`.
      prompts: texts.
      config: how tokens are chosen, and where a continuation stops.
      seeds: one for each prompt (none: config.seed, config.seed + 1, ...).
      on_text: told the index of a prompt and each piece of its continuation as it comes. The pieces make up `text`: none
        is torn within a character, and nothing that may belong to a stop text is told before it is known not to.

    Raises:
      ValueError: a prompt that the vocabulary cannot express, or that leaves no room for `max_tokens` in the context.
    """
    encoded = encode_prompts(loaded, prompts, config=config)
    drawn_by = resolved_seeds(config, seeds, num_prompts=len(prompts))
    listener = _Listener(loaded.tokenizer, encoded, config.stop, on_text)
    continued = sample(
        loaded.definition, loaded.params, loaded.buffers, encoded, config=config, eos_id=loaded.tokenizer.eos_id, seeds=drawn_by,
        watch=listener.watch if config.stop or on_text else None, steps_per_call=STREAMED_STEPS if on_text else STEPS_PER_CALL,
    )  # fmt: skip
    found = []
    for index, (prompt, one) in enumerate(zip(encoded, continued, strict=True)):
        tokens, text, reason = _finished(prompt, one.tokens, loaded.tokenizer, config.stop)
        listener.tell(index, text)
        logprobs = tuple(one.logprobs[: len(tokens)])
        found.append(
            Generation(text=text, tokens=tuple(tokens), logprobs=logprobs, prompt_tokens=tuple(prompt), reason=reason, seed=drawn_by[index])
        )
    return found


def encode_prompts(loaded: Loaded, prompts: Sequence[str], *, config: SamplingConfig = DEFAULT) -> list[list[int]]:
    """The tokens of prompts, BOS first. Raises ValueError as `generate` does, before anything is computed."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text, {prompts[:40]!r}: give a list of texts")
    encoded = [[loaded.tokenizer.bos_id, *ids] for ids in loaded.tokenizer.encode_batch(prompts)]
    check_prompts(encoded, vocab_size=loaded.config.known_vocab_size)
    if encoded:
        length_limits(encoded, max_tokens=config.max_tokens, context_length=loaded.config.context_length)
    return encoded


class _Listener:
    """Follows the continuations while they grow: tells their text, and sees stop texts."""

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], stops: Sequence[str], on_text: Callable[[int, str], None] | None
    ) -> None:
        self._tokenizer, self._prompts, self._stops, self._on_text = tokenizer, prompts, stops, on_text
        self._told: dict[int, int] = {}  # characters of each continuation

    def watch(self, index: int, tokens: list[int]) -> bool:
        """Whether this continuation has come to a stop text."""
        text = self._tokenizer.decode_continuation(self._prompts[index], tokens)
        cut = _stop_place(text, self._stops)
        self.tell(index, _certain(text, self._stops) if cut is None else text[:cut])
        return cut is not None

    def tell(self, index: int, text: str) -> None:
        """Tells what of this text was not told yet."""
        told = self._told.get(index, 0)
        if self._on_text is not None and len(text) > told:
            self._on_text(index, text[told:])
            self._told[index] = len(text)


def _finished(prompt: list[int], tokens: list[int], tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[list[int], str, FinishReason]:
    """Tokens, text and end of a continuation: tokens past the one that completed a stop text are dropped."""

    def text_of(count: int) -> str:
        return tokenizer.decode_continuation(prompt, tokens[:count])

    text = text_of(len(tokens))
    cut = _stop_place(text, stops)
    if cut is None:
        ended = bool(tokens) and tokens[-1] == tokenizer.eos_id
        return tokens, text, FinishReason.EOS if ended else FinishReason.LENGTH
    used = next(n for n in range(1, len(tokens) + 1) if _stop_place(text_of(n), stops) is not None)
    return tokens[:used], text[:cut], FinishReason.STOP


def _stop_place(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places) if places else None


def _certain(text: str, stops: Sequence[str]) -> str:
    """The part of a text that more tokens will not change: no torn character at its end, no beginning of a stop text."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]
