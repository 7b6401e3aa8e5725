"""Sampling: text that a model continues, from prompts of different lengths in one compiled call.

    sample(definition, params, buffers, [[bos, 17, 4]], config=SamplingConfig(), eos_id=1)   # token ids to token ids
    generate(loaded, ["def main("])                                                         # text to text

Prompts are padded on the right to a power of two and run through the model once (prefill), which fills the decoding state;
then a loop inside the same compiled function feeds one token per prompt and step, until every prompt has reached EOS or its
limit. The decoding state is whatever the mixers made it: it is only handed on. Lengths are rounded up, and temperature,
top-p, seed and limits are arguments, so that few combinations compile.

Dims: B prompts, S tokens of prompt and continuation together (a power of two), P tokens of the prefill, D model, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from slmjax import losses, sharding
from slmjax.checkpoint import Loaded
from slmjax.model import Decoder, Output
from slmjax.parameters import Definition

DEFAULT_MAX_TOKENS = 128
SMALLEST_LENGTH = 16  # shorter sequences are padded to it
NO_TOKEN = -1  # an EOS that no token equals


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. Temperature applies first, then top-k, then top-p."""

    max_tokens: int | None = None  # new tokens per prompt at most (none: 128, or fewer where the context is full)
    temperature: float = 0.8  # divides the logits; 0 takes the most likely token
    top_k: int | None = None  # only the k most likely tokens are drawn (none: all)
    top_p: float | None = None  # only the fewest tokens that together reach this probability are drawn (none: all)
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (the most likely token) or above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or none for all tokens, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is a probability above 0 and up to 1, or none, got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and 2**32 - 1, got {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuation of one prompt."""

    text: str  # of the new tokens alone, without special tokens
    tokens: tuple[int, ...]  # new tokens; the last is EOS where it was reached
    prompt_tokens: tuple[int, ...]  # BOS first
    finished: bool  # EOS was reached


def generate(loaded: Loaded, prompts: Sequence[str], *, config: SamplingConfig = SamplingConfig()) -> list[Generation]:
    """Continues each text; an empty one starts a document.

    Raises:
      ValueError: a prompt that the vocabulary cannot express, or that leaves no room for `max_tokens` in the context.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text, {prompts[:40]!r}: give a list of texts")
    tokenizer = loaded.tokenizer
    encoded = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(prompts)]
    continued = sample(loaded.definition, loaded.params, loaded.buffers, encoded, config=config, eos_id=tokenizer.eos_id)
    return [
        Generation(
            text=tokenizer.decode(tokens), tokens=tuple(tokens), prompt_tokens=tuple(prompt), finished=tokens[-1] == tokenizer.eos_id
        )
        for prompt, tokens in zip(encoded, continued, strict=True)
    ]


def sample(
    definition: Definition,
    params: Mapping[str, Array],
    buffers: Mapping[str, Array],
    prompts: Sequence[Sequence[int]],
    *,
    config: SamplingConfig = SamplingConfig(),
    eos_id: int | None,
) -> list[list[int]]:
    """New tokens for each prompt, EOS included where it was reached.

    A draw depends on the seed, the index of the prompt, the position and the prompt itself, not on the other prompts. With
    parameters on a mesh, call it under `jax.set_mesh`, on every process alike.

    Args:
      prompts: token ids, each beginning with BOS.
      eos_id: ends a continuation; None for none.

    Raises:
      ValueError: a prompt is empty, or holds an id that is none, or leaves no room for `max_tokens` in the context.
    """
    if not prompts:
        return []
    context, vocab_size = definition.config.context_length, definition.config.known_vocab_size
    longest = check_prompts(prompts, vocab_size=vocab_size)
    max_tokens = resolved_max_tokens(config.max_tokens, longest=longest, context_length=context)
    prefill_length = _power_of_two(longest)
    tokens = np.zeros((len(prompts), _power_of_two(longest + max_tokens)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    filled, ends = _continue(
        definition.merge(params, buffers), tokens, lengths,
        seed=np.uint32(config.seed), max_tokens=np.int32(max_tokens), eos_id=np.int32(NO_TOKEN if eos_id is None else eos_id),
        temperature=np.float32(config.temperature) if config.temperature > 0 else None,
        top_p=None if config.top_p in (None, 1.0) else np.float32(config.top_p),
        top_k=None if config.top_k is None or config.top_k >= vocab_size else config.top_k, prefill_length=prefill_length,
    )  # fmt: skip
    filled, ends = np.asarray(filled), np.asarray(ends)
    return [row[start:end].tolist() for row, start, end in zip(filled, lengths, ends, strict=True)]


def check_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int) -> int:
    """The length of the longest prompt. Raises ValueError for one that is empty or holds an id that is none."""
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} has no token: begin it with BOS")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}, and the vocabulary has {vocab_size}")
    return max(map(len, prompts))


def resolved_max_tokens(asked: int | None, *, longest: int, context_length: int) -> int:
    """How many tokens are made at most. Raises ValueError where the context has no room for them."""
    room = context_length - longest
    if room < (asked or 1):
        way_out = f"ask for at most {room}" if room > 0 else f"shorten it to {context_length - 1} or fewer"
        raise ValueError(
            f"a prompt of {longest} tokens (BOS included) and max_tokens={asked or 1} are more than the model's "
            f"context_length={context_length}: {way_out}"
        )
    return min(DEFAULT_MAX_TOKENS, room) if asked is None else asked


def _power_of_two(length: int) -> int:
    return max(SMALLEST_LENGTH, 1 << (length - 1).bit_length())


# Inside the compiled program ------------------------------------------------------------------------------------------
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What changes from one token to the next."""

    tokens: Int[Array, "B S"]  # prompts, and what has been added to them
    lengths: Int[Array, " B"]  # tokens so far
    done: Bool[Array, " B"]
    state: Any  # the model's decoding state, of all tokens but the newest


@functools.partial(jax.jit, static_argnames=("prefill_length", "top_k"))
def _continue(
    model: Decoder,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    *,
    seed: UInt[Array, ""],
    max_tokens: Int[Array, ""],
    eos_id: Int[Array, ""],
    temperature: Float[Array, ""] | None,
    top_p: Float[Array, ""] | None,
    top_k: int | None,
    prefill_length: int,
) -> tuple[Int[Array, "B S"], Int[Array, " B"]]:
    """Prompts with their continuations, and the length of each."""
    num_prompts, capacity = tokens.shape
    limits = lengths + max_tokens
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(num_prompts))

    def extend(progress: Progress, output: Output, index: Int[Array, " B"]) -> Progress:
        """Adds to each prompt the token that follows its hidden state at `index`."""
        hidden = jnp.take_along_axis(output.hidden, index[:, None, None], axis=1)[:, 0]
        logits = losses.logits(hidden, output.head)[:, : output.head.vocab_size]
        draws = jax.vmap(jax.random.fold_in)(keys, progress.lengths)
        new = next_tokens(logits, draws, temperature=temperature, top_k=top_k, top_p=top_p)
        places = jnp.where(progress.done, capacity, progress.lengths)  # out of range for what is done: dropped
        written = progress.tokens.at[jnp.arange(num_prompts), places].set(new, mode="drop")
        grown = jnp.where(progress.done, progress.lengths, progress.lengths + 1)
        done = progress.done | (new == eos_id) | (grown >= limits)
        return Progress(tokens=written, lengths=grown, done=done, state=output.state)

    def step(progress: Progress) -> Progress:
        positions = progress.lengths[:, None] - 1
        newest = jnp.take_along_axis(progress.tokens, positions, axis=1)
        segment_ids = jnp.where(progress.done, 0, 1)[:, None]  # what is done is padding
        output = model(newest, segment_ids=segment_ids, positions=positions, state=progress.state)
        return extend(progress, output, jnp.zeros((num_prompts,), jnp.int32))

    positions = jnp.broadcast_to(jnp.arange(prefill_length)[None, :], (num_prompts, prefill_length))
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    state = model.init_state(num_prompts, max_length=capacity)
    prefilled = model(tokens[:, :prefill_length], segment_ids=segment_ids, positions=positions, state=state)
    progress = Progress(tokens=tokens, lengths=lengths, done=jnp.zeros((num_prompts,), bool), state=prefilled.state)
    progress = extend(progress, prefilled, lengths - 1)
    progress = jax.lax.while_loop(lambda progress: ~jnp.all(progress.done), step, progress)
    # Whole on every process, so that each can read it.
    return sharding.constrain(progress.tokens, (None, None)), sharding.constrain(progress.lengths, (None,))


def next_tokens(
    logits: Float[Array, "B V"],
    keys: Any,
    *,
    temperature: float | Float[Array, ""] | None,
    top_k: int | None,
    top_p: float | Float[Array, ""] | None,
) -> Int[Array, " B"]:
    """One token for each row of logits, drawn with the key of the row; the most likely one where temperature is None."""
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = filtered_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def filtered_logits(
    logits: Float[Array, "B V"],
    *,
    temperature: float | Float[Array, ""],
    top_k: int | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Float[Array, "B V"]:
    """Logits of the distribution that is drawn from: divided by the temperature, -inf for tokens that are never drawn.

    Of equal logits the lower id counts as the more likely, as `argmax` has it, so that exactly k remain. Top-p
    (https://arxiv.org/abs/1904.09751) looks at the probabilities that top-k has left, and keeps at least one token.
    """
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature  # no overflow, however cold
    if top_k is None and top_p is None:
        return scaled
    order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)
    ranks = jnp.argsort(order, axis=-1)
    kept = ranks < (scaled.shape[-1] if top_k is None else top_k)
    if top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
        by_rank = jnp.take_along_axis(probabilities, order, axis=-1)
        before = jnp.cumsum(by_rank, axis=-1) - by_rank
        kept &= jnp.take_along_axis(before, ranks, axis=-1) < top_p
    return jnp.where(kept, scaled, -jnp.inf)
