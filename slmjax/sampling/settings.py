"""Settings of sampling, and the checks of prompts."""

import dataclasses
from collections.abc import Sequence

from slmjax.config import added_field

DEFAULT_MAX_TOKENS = 128
LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Choice of the next token: penalty, temperature, top-k, top-p, min-p, in this order."""

    # largest number of new tokens per prompt (none: 128, or fewer if the context is full)
    max_tokens: int | None = None
    temperature: float = 0.8  # divides the logits; 0 takes the most likely token
    top_k: int | None = None  # draw only from the k most likely tokens (none: all)
    # draw only from the fewest tokens that together have this probability (none: all)
    top_p: float | None = None
    # draw only from tokens at least this many times as likely as the most likely one (none: all)
    min_p: float | None = None
    # for tokens of the text so far: positive logits are divided by it, others multiplied (none: 1)
    repetition_penalty: float | None = None
    seed: int = 0  # random seed of the first prompt; that of the next prompt is one more, and so on
    # tokens that the modules of model.multi_token draft, and the model verifies, at a time (none: no drafts)
    draft_tokens: int | None = added_field(None, before=None)
    stop: tuple[str, ...] = ()  # texts that end a continuation, which does not include them

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (the most likely token) or above, got {self.temperature}"
            )
        if self.draft_tokens is not None and self.draft_tokens < 1:
            raise ValueError(
                f"draft_tokens must be at least 1, or none to decode without drafts, got {self.draft_tokens}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or none for all tokens, got {self.top_k}")
        for name in ("top_p", "min_p"):
            if (value := getattr(self, name)) is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name} is a probability above 0 and up to 1, or none, got {value}")
        if self.repetition_penalty is not None and not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                "repetition_penalty must be above 0 (1 changes nothing, 1.1 is usual), got "
                f"{self.repetition_penalty}"
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed must lie between 0 and 2**32 - 1, got {self.seed}")
        if "" in self.stop:
            raise ValueError("stop has an empty text, which every text contains: leave it out")


DEFAULT = SamplingConfig()


def resolved_seeds(config: SamplingConfig, seeds: Sequence[int] | None, *, num_prompts: int) -> list[int]:
    """Return the seed of each prompt.

    Raises:
        ValueError: the number of seeds is not that of the prompts, or a seed is out of range.
    """
    if seeds is None:
        # Consecutive seeds wrap around at the largest one.
        return [(config.seed + index) % (LARGEST_SEED + 1) for index in range(num_prompts)]
    if len(seeds) != num_prompts:
        raise ValueError(
            f"got {len(seeds)} seeds for {num_prompts} prompts: give one for each prompt, or none"
        )
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"a seed must lie between 0 and 2**32 - 1, got {seed}")
    return list(seeds)


def check_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int) -> None:
    """Raise ValueError for a prompt that is empty or has an id outside the vocabulary."""
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} has no tokens: begin it with BOS")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}, and the vocabulary has "
                f"{vocab_size}"
            )


def length_limits(
    prompts: Sequence[Sequence[int]], *, max_tokens: int | None, context_length: int
) -> list[int]:
    """Return the greatest length of each prompt with its continuation.

    Raises:
        ValueError: the context is too short for a prompt and its new tokens.
    """
    # The longest prompt decides, since all prompts of a call share max_tokens.
    longest = max(map(len, prompts))
    available = context_length - longest
    if available < (max_tokens or 1):
        way_out = (
            f"ask for at most {available}"
            if available > 0
            else f"shorten it to {context_length - 1} or fewer"
        )
        raise ValueError(
            f"a prompt of {longest} tokens (BOS included) and max_tokens={max_tokens or 1} are more than the "
            f"model's context_length={context_length}: {way_out}"
        )
    return [min(len(prompt) + (max_tokens or DEFAULT_MAX_TOKENS), context_length) for prompt in prompts]
