"""Text to text: encode prompts, decode continuations as they grow, and cut them where a stop text begins."""

import dataclasses
import enum
from collections.abc import Callable, Sequence

from slmjax.checkpoints.loading import Loaded
from slmjax.data.detokenization import REPLACEMENT
from slmjax.data.tokenizers import Tokenizer
from slmjax.sampling.decoding import STEPS_PER_CALL, sample
from slmjax.sampling.settings import DEFAULT, SamplingConfig, check_prompts, length_limits, resolved_seeds

STREAMED_STEPS = 4  # tokens between two pieces of streamed text


class FinishReason(enum.Enum):
    """The reason why a continuation ended."""

    EOS = "eos"  # the model ended the document or its turn
    STOP = "stop"  # a stop text was generated
    LENGTH = "length"  # max_tokens was reached, or the context is full


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuation of one prompt."""

    text: str  # of the new tokens, without special tokens, up to a stop text
    tokens: tuple[int, ...]  # new tokens; the last may be an end token, or belong to the stop text
    # of each new token, in nats, under the model's distribution before temperature, penalty and filters
    logprobs: tuple[float, ...]
    prompt_tokens: tuple[int, ...]  # with BOS first if the model expects it
    reason: FinishReason
    seed: int  # reproduces this continuation from its prompt alone
    drafted: int = 0  # tokens that modules of the model drafted, with `draft_tokens`
    accepted: int = 0  # drafts that the model confirmed, as far as it went


def generate(
    loaded: Loaded,
    prompts: Sequence[str | Sequence[int]],
    *,
    config: SamplingConfig = DEFAULT,
    seeds: Sequence[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue each text; an empty one starts a document.

    Args:
      loaded: the model, from `load_model`.
      prompts: texts, or token ids, which are used unchanged: those of a conversation, from `encode_chat`.
      config: choice of tokens, and stop texts. A continuation ends at any end token of the tokenizer and at
        any stop text. A stop text that is the name of a special token stands for that token.
      seeds: one for each prompt (none: config.seed, config.seed + 1, ...).
      on_text: called with the index of a prompt and each new piece of its continuation. The pieces add up to
        `text`: no character is split, and text that may be part of a stop text is withheld until it is known.

    Raises:
      ValueError: the vocabulary cannot express a prompt, or the context is too short for `max_tokens`.
    """
    # All checks come before the model is compiled.
    encoded = encode_prompts(loaded, prompts, config=config)
    resolved = resolved_seeds(config, seeds, num_prompts=len(prompts))
    tokenizer = loaded.tokenizer
    # The name of a special token never appears in decoded text, so it is compared as an id.
    stop_ids = [
        id
        for stop in config.stop
        if (id := tokenizer.special_ids.get(stop)) is not None and id not in tokenizer.end_ids
    ]
    ends = (*tokenizer.end_ids, *stop_ids)
    stream = _TextStream(tokenizer, encoded, config.stop, ends, on_text)
    continued = sample(
        loaded.definition,
        loaded.params,
        loaded.buffers,
        encoded,
        config=config,
        eos_id=ends,
        seeds=resolved,
        watch=stream.watch if config.stop or on_text else None,
        steps_per_call=STREAMED_STEPS if on_text else STEPS_PER_CALL,
    )
    generations = []
    for index, (prompt, continuation) in enumerate(zip(encoded, continued, strict=True)):
        tokens, text, reason = _finished(prompt, continuation.tokens, tokenizer, config.stop, ends)
        stream.emit(index, text)
        # Tokens after a stop text are dropped, and so are their log-probabilities.
        logprobs = tuple(continuation.logprobs[: len(tokens)])
        generations.append(
            Generation(
                text=text,
                tokens=tuple(tokens),
                logprobs=logprobs,
                prompt_tokens=tuple(prompt),
                reason=reason,
                seed=resolved[index],
                drafted=continuation.drafted,
                accepted=continuation.accepted,
            )
        )
    return generations


def encode_prompts(
    loaded: Loaded, prompts: Sequence[str | Sequence[int]], *, config: SamplingConfig = DEFAULT
) -> list[list[int]]:
    """Return the tokens of prompts, with BOS first if the model expects it; ids are unchanged.

    Raises ValueError as `generate` does, before anything is computed.
    """
    # A string is a sequence of strings, so it would pass as one prompt per character.
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text, {prompts[:40]!r}: give a list of texts")
    of_texts = iter(loaded.tokenizer.prompt_batch([prompt for prompt in prompts if isinstance(prompt, str)]))
    encoded = [next(of_texts) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    check_prompts(encoded, vocab_size=loaded.config.known_vocab_size)
    if encoded:
        length_limits(encoded, max_tokens=config.max_tokens, context_length=loaded.config.context_length)
    return encoded


class _TextStream:
    """Follows growing continuations: passes on their text, and finds stop texts."""

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
        # Characters of each continuation that were passed on.
        self._num_emitted: dict[int, int] = {}

    def watch(self, index: int, tokens: list[int]) -> bool:
        """Return whether this continuation has reached a stop text."""
        text = _stable_text(self._tokenizer, self._prompts[index], _before_end(tokens, self._ends))
        cut = _stop_index(text, self._stops)
        # Later tokens may change earlier text of other detokenizers, so their text is passed on at the end.
        if self._tokenizer.detokenizer.is_incremental:
            self.emit(index, _certain(text, self._stops) if cut is None else text[:cut])
        return cut is not None

    def emit(self, index: int, text: str) -> None:
        """Pass on the part of this text that was not passed on yet."""
        num_emitted = self._num_emitted.get(index, 0)
        if self._on_text is not None and len(text) > num_emitted:
            self._on_text(index, text[num_emitted:])
            self._num_emitted[index] = len(text)


def _before_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens that are text, since an end token need not be a special token."""
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def _finished(
    prompt: list[int], tokens: list[int], tokenizer: Tokenizer, stops: Sequence[str], ends: Sequence[int]
) -> tuple[list[int], str, FinishReason]:
    """Return tokens, text and finish reason of a continuation, without tokens after a stop text."""

    def text_of(count: int) -> str:
        ids = _before_end(tokens[:count], ends)
        return (
            tokenizer.decode_continuation(prompt, ids)
            if count == len(tokens)
            else _stable_text(tokenizer, prompt, ids)
        )

    text = text_of(len(tokens))
    # The model is run several tokens at a time, so the stop text need not be at the end.
    if _stop_index(text, stops) is not None or (stops and not tokenizer.detokenizer.is_incremental):
        # Find the token that completed the stop text.
        for count in range(1, len(tokens) + 1):
            if (cut := _stop_index(text_of(count), stops)) is not None:
                return tokens[:count], text_of(count)[:cut], FinishReason.STOP
    if not tokens or tokens[-1] not in ends:
        return tokens, text, FinishReason.LENGTH
    return tokens, text, FinishReason.EOS if tokens[-1] in tokenizer.end_ids else FinishReason.STOP


def _stop_index(text: str, stops: Sequence[str]) -> int | None:
    """Return the index at which the first stop text begins; None if there is none."""
    indices = [index for stop in stops if (index := text.find(stop)) >= 0]
    return min(indices) if indices else None


def _stable_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that ids add to a prompt, without the U+FFFD of an incomplete last character."""
    text = tokenizer.decode_continuation(prompt, ids)
    return (
        text[:-1]
        if text.endswith(REPLACEMENT) and tokenizer.detokenizer.torn_bytes([*prompt, *ids])
        else text
    )


def _certain(text: str, stops: Sequence[str]) -> str:
    """Return the part of a stable text that more tokens cannot change.

    That is the text without the beginning of a stop text at its end.
    """
    num_withheld = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
    return text[: len(text) - num_withheld]
