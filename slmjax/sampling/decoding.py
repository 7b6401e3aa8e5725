"""Token ids to token ids: the model run on prompts, then token by token, a few dozen to a compiled call.

Prompts are padded on the right to a power of two and run through the model (prefill), which fills the
decoding state; then each call feeds one token per prompt and step, until every prompt has reached an end or
its limit, or the call's number of steps. The decoding state is whatever the mixers made it: it is only handed
on. Lengths are rounded up, and temperature, probabilities, seeds and limits are arguments, so that few
combinations compile.

Dims: B prompts, E tokens that end a continuation, S tokens of prompt and continuation together (a power of
two), P tokens of the prefill, D model, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slmjax import losses
from slmjax.models.architecture import LayerGroup
from slmjax.models.decoder import Decoder, Output
from slmjax.models.definition import Definition, define, restack, unstack
from slmjax.parallel import communication
from slmjax.sampling.choice import next_tokens, penalised
from slmjax.sampling.settings import DEFAULT, SamplingConfig, check_prompts, length_limits, resolved_seeds

SMALLEST_LENGTH = 16  # shorter sequences are padded to it
PREFILL_CHUNK = 512  # prompt tokens that see the cache at once: bounds the memory of their scores
STEPS_PER_CALL = 64  # tokens between two looks at what has come
NO_TOKEN = -1  # an end that no token equals
UNROLLED_LAYERS = 16  # up to so many layers decode without a loop over them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """What followed a prompt."""

    tokens: list[int]  # new tokens; the last is EOS where it was reached
    logprobs: list[
        float
    ]  # of each new token, under the model's own distribution: no penalty, temperature or filter


def sample(
    definition: Definition,
    params: Mapping[str, Array],
    buffers: Mapping[str, Array],
    prompts: Sequence[Sequence[int]],
    *,
    config: SamplingConfig = DEFAULT,
    eos_id: int | Sequence[int] | None,
    seeds: Sequence[int] | None = None,
    watch: Callable[[int, list[int]], bool] | None = None,
    steps_per_call: int = STEPS_PER_CALL,
) -> list[Continuation]:
    """New tokens for each prompt, EOS included where it was reached; `config.stop` is for `generate`, which
    knows text.

    A draw depends on the prompt, its seed and the position, not on the other prompts. With parameters on a
    mesh, call it under `jax.set_mesh`, on every process alike.

    Args:
      prompts: token ids, each beginning with BOS where the model wants it.
      eos_id: ends a continuation, or each of several does; None for none.
      seeds: one for each prompt (none: config.seed, config.seed + 1, ...).
      watch: told the index of each unfinished prompt and its new tokens after every few steps; True ends it.
      steps_per_call: tokens per prompt between two such looks.

    Raises:
      ValueError: a prompt is empty, or holds an id that is none, or leaves no room for `max_tokens` in the
        context.
    """
    if not prompts:
        return []
    check_prompts(prompts, vocab_size=definition.config.known_vocab_size)
    starts = np.asarray([len(prompt) for prompt in prompts], np.int32)
    limits = length_limits(
        prompts, max_tokens=config.max_tokens, context_length=definition.config.context_length
    )
    rule = _rule(
        config,
        seeds=resolved_seeds(config, seeds, num_prompts=len(prompts)),
        limits=np.asarray(limits, np.int32),
        eos_id=eos_id,
        vocab_size=definition.config.known_vocab_size,
    )
    tokens = _padded(prompts, _power_of_two(max(limits)))
    model = _for_decoding(definition, params, buffers)
    progress, seen = _prefill(model, rule, tokens, starts, prefill_length=_power_of_two(int(starts.max())))
    while True:
        filled, logprobs, ends, done = jax.device_get(seen)
        found = [
            Continuation(tokens=row[start:end].tolist(), logprobs=chances[start:end].tolist())
            for row, chances, start, end in zip(filled, logprobs, starts, ends, strict=True)
        ]
        stopped = [
            bool(over) or (watch is not None and watch(i, found[i].tokens)) for i, over in enumerate(done)
        ]
        if all(stopped):
            return found
        progress, seen = _continue(model, rule, progress, np.asarray(stopped), np.int32(steps_per_call))


def _padded(prompts: Sequence[Sequence[int]], length: int) -> np.ndarray:
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens


def _rule(
    config: SamplingConfig,
    *,
    seeds: Sequence[int],
    limits: np.ndarray,
    eos_id: int | Sequence[int] | None,
    vocab_size: int,
) -> "Rule":
    def asked(value: float | None) -> np.float32 | None:
        return None if value in (None, 1.0) else np.float32(value)

    ends = [eos_id] if isinstance(eos_id, int) else eos_id
    return Rule(
        seeds=np.asarray(seeds, np.uint32),
        limits=limits,
        end_ids=np.asarray(ends or [NO_TOKEN], np.int32),
        temperature=np.float32(config.temperature) if config.temperature > 0 else None,
        top_p=asked(config.top_p),
        min_p=None if config.min_p is None else np.float32(config.min_p),
        penalty=asked(config.repetition_penalty),
        top_k=None if config.top_k is None or config.top_k >= vocab_size else config.top_k,
    )


def _power_of_two(length: int) -> int:
    return max(SMALLEST_LENGTH, 1 << (length - 1).bit_length())


# The model for decoding -------------------------------------------------------------------------------------
def _for_decoding(
    definition: Definition, params: Mapping[str, Array], buffers: Mapping[str, Array]
) -> Decoder:
    """The model, its layers taken apart where they are few.

    In a stack every token would copy the caches of all layers: they go into the loop over layers as one array
    and come out of it as another. Weights that have formats are decoded once.
    """
    params, definition = definition.decode(params)
    if definition.config.num_layers > UNROLLED_LAYERS or all(
        segment.repeats == 1 for segment in definition.config.stack
    ):
        return definition.merge(params, buffers)
    apart = _apart(definition.config)
    return apart.merge(*_taken_apart(definition.config, dict(params), dict(buffers)))


@functools.cache
def _apart(config: Any) -> Definition:
    """The same model with every repeat as a segment of its own."""
    stack = tuple(
        LayerGroup(pattern=segment.pattern) for segment in config.stack for _ in range(segment.repeats)
    )
    return define(dataclasses.replace(config, stack=stack))


@functools.partial(jax.jit, static_argnums=0)
def _taken_apart(
    config: Any, params: dict[str, Array], buffers: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    apart = _apart(config)

    def move(tree: dict[str, Array], like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
        return restack(apart.config, unstack(config, tree), like=like)

    return move(params, apart.params), move(buffers, apart.buffers)


# Inside the compiled program --------------------------------------------------------------------------------
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["seeds", "limits", "end_ids", "temperature", "top_p", "min_p", "penalty"],
    meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How tokens are chosen and where a continuation ends: the config's settings as arguments of a compiled
    function.

    The fields are typed `Any` because this is a pytree; None stands for what is not asked for.
    """

    seeds: Any  # UInt32[Array, " B"]
    limits: Any  # Int32[Array, " B"]: tokens that each row may reach, its prompt included
    end_ids: Any  # Int32[Array, " E"]: each of these tokens ends a continuation
    temperature: Any  # Float32[Array, ""], None for the most likely token
    top_p: Any  # Float32[Array, ""] | None
    min_p: Any  # Float32[Array, ""] | None
    penalty: Any  # Float32[Array, ""] | None
    top_k: int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What changes from one token to the next. The fields are typed `Any` because this is a pytree."""

    tokens: Any  # Int32[Array, "B S"]: prompts, and what has been added to them
    logprobs: Any  # Float32[Array, "B S"]: of what has been added
    lengths: Any  # Int32[Array, " B"]: tokens so far
    done: Any  # Bool[Array, " B"]
    state: Any  # the model's decoding state, of all tokens but the newest
    used: Any  # Bool[Array, "B V"] | None: tokens that are there already, where they are penalised


Seen = tuple[Array, Array, Array, Array]


def _seen(progress: Progress) -> Seen:
    """Tokens, log-probabilities, lengths and ends, whole on every process, so that each can read them."""
    rows = (None, None)
    row = (None,)
    return (
        communication.constrain(progress.tokens, rows),
        communication.constrain(progress.logprobs, rows),
        communication.constrain(progress.lengths, row),
        communication.constrain(progress.done, row),
    )


def _extended(progress: Progress, rule: Rule, output: Output, hidden: Float[Array, "B D"]) -> Progress:
    """Adds to each prompt that is not done the token that follows its last hidden state."""
    num_prompts, capacity = progress.tokens.shape
    rows = jnp.arange(num_prompts)
    logits = losses.logits(hidden, output.head)[:, : output.head.vocab_size]
    wanted = logits if progress.used is None else penalised(logits, progress.used, penalty=rule.penalty)
    keys = jax.vmap(lambda seed, length: jax.random.fold_in(jax.random.key(seed), length))(
        rule.seeds, progress.lengths
    )
    new = next_tokens(
        wanted, keys, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p, min_p=rule.min_p
    )
    logprobs = jnp.take_along_axis(logits, new[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    places = jnp.where(progress.done, capacity, progress.lengths)  # out of range for what is done: dropped
    grown = jnp.where(progress.done, progress.lengths, progress.lengths + 1)
    return Progress(
        tokens=progress.tokens.at[rows, places].set(new, mode="drop"),
        logprobs=progress.logprobs.at[rows, places].set(logprobs, mode="drop"),
        lengths=grown,
        done=progress.done | jnp.any(new[:, None] == rule.end_ids[None, :], axis=1) | (grown >= rule.limits),
        state=output.state,
        used=None if progress.used is None else progress.used.at[rows, new].set(True),
    )


@functools.partial(jax.jit, static_argnames="prefill_length")
def _prefill(
    model: Decoder, rule: Rule, tokens: Int[Array, "B S"], lengths: Int[Array, " B"], *, prefill_length: int
) -> tuple[Progress, Seen]:
    """The prompts run through the model, and the first new token of each."""
    num_prompts, capacity = tokens.shape
    state = model.init_state(num_prompts, max_length=capacity)
    hidden = None
    output = None
    for first in range(0, prefill_length, PREFILL_CHUNK):
        part = tokens[:, first : min(first + PREFILL_CHUNK, prefill_length)]
        positions = jnp.broadcast_to(first + jnp.arange(part.shape[1])[None, :], part.shape)
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
        rows = {"segment_ids": segment_ids, "positions": positions, "max_lengths": rule.limits}
        output = model(part, **rows, state=state)
        state = output.state
        index = lengths - 1 - first
        last = jnp.take_along_axis(
            output.hidden, jnp.clip(index, 0, part.shape[1] - 1)[:, None, None], axis=1
        )[:, 0]
        hidden = last if hidden is None else jnp.where((index >= 0)[:, None], last, hidden)
    assert output is not None and hidden is not None, prefill_length
    used = None
    if rule.penalty is not None:
        used = jnp.zeros((num_prompts, output.head.vocab_size), bool)
        real = jnp.arange(capacity)[None, :] < lengths[:, None]
        used = used.at[jnp.arange(num_prompts)[:, None], jnp.where(real, tokens, output.head.vocab_size)].set(
            True, mode="drop"
        )
    progress = Progress(
        tokens=jnp.asarray(tokens),
        logprobs=jnp.zeros(tokens.shape, jnp.float32),
        lengths=jnp.asarray(lengths),
        done=jnp.zeros((num_prompts,), bool),
        state=state,
        used=used,
    )
    progress = _extended(progress, rule, output, hidden)
    return progress, _seen(progress)


@functools.partial(jax.jit, donate_argnames="progress")
def _continue(
    model: Decoder, rule: Rule, progress: Progress, stopped: Bool[Array, " B"], num_steps: Int[Array, ""]
) -> tuple[Progress, Seen]:
    """At most so many more tokens for each prompt that is not done."""

    def step(carry: tuple[Progress, Array]) -> tuple[Progress, Array]:
        progress, count = carry
        positions = progress.lengths[:, None] - 1
        newest = jnp.take_along_axis(progress.tokens, positions, axis=1)
        segment_ids = jnp.where(progress.done, 0, 1)[:, None]  # what is done is padding
        rows = {"segment_ids": segment_ids, "positions": positions, "max_lengths": rule.limits}
        output = model(newest, **rows, state=progress.state)
        return _extended(progress, rule, output, output.hidden[:, 0]), count + 1

    def goes_on(carry: tuple[Progress, Array]) -> Bool[Array, ""]:
        return (carry[1] < num_steps) & ~jnp.all(carry[0].done)

    progress = dataclasses.replace(progress, done=progress.done | stopped)
    progress, _ = jax.lax.while_loop(goes_on, step, (progress, jnp.int32(0)))
    return progress, _seen(progress)
