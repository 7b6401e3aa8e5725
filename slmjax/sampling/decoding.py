"""Token ids to token ids: run the model on prompts, then token by token, several tokens per compiled call.

Prompts are padded on the right to a power of two and run through the model (prefill), which fills the
decoding state. Then each call feeds one token per prompt and step, until every prompt has reached an end or
its limit, or the call has made its number of steps. The decoding state belongs to the mixers and is only
passed on. Lengths are rounded up, and temperature, probabilities, seeds and limits are arguments, so that few
programs are compiled.

Dims: B prompts, S tokens of prompt and continuation together (a power of two).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from slmjax.models.architecture import LayerGroup
from slmjax.models.decoder import Decoder
from slmjax.models.definition import Definition, restack, unstack
from slmjax.quantization.fake_quantization import define_quantized, phases_of
from slmjax.sampling import speculation
from slmjax.sampling.progress import Progress, Readable, Rule, extended, readable
from slmjax.sampling.settings import DEFAULT, SamplingConfig, check_prompts, length_limits, resolved_seeds

SMALLEST_LENGTH = 16  # shorter sequences are padded to this length
PREFILL_CHUNK = 512  # prompt tokens that attend to the cache at a time: bounds the memory of their scores
STEPS_PER_CALL = 64  # tokens per compiled call
NO_TOKEN = -1  # an end that no token equals
UNROLLED_LAYERS = 16  # models of up to this many layers are unrolled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """The new tokens of a prompt."""

    tokens: list[int]  # new tokens; the last is EOS if it was reached
    # of each new token, under the model's distribution before penalty, temperature and filters
    logprobs: list[float]
    drafted: int = 0  # tokens that were drafted and verified, with `draft_tokens`
    accepted: int = 0  # drafts among the new tokens


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
    """Return new tokens for each prompt, with EOS if it was reached.

    `config.stop` is for `generate`, which works on text. A draw depends on the prompt, its seed and the
    position, not on the other prompts. With parameters on a mesh, call this under `jax.set_mesh`, on every
    process.

    Args:
      definition: the model.
      params: its parameters.
      buffers: its buffers.
      prompts: token ids, each with BOS first if the model expects it.
      config: choice of tokens.
      eos_id: a token that ends a continuation, or several; None for none.
      seeds: one for each prompt (none: config.seed, config.seed + 1, ...).
      watch: called every few steps with the index of each unfinished prompt and its new tokens; True ends it.
      steps_per_call: tokens per prompt between two calls of `watch`.

    Raises:
      ValueError: a prompt is empty, has an id outside the vocabulary, or the context is too short for
        `max_tokens`.
    """
    if not prompts:
        return []
    check_prompts(prompts, vocab_size=definition.config.known_vocab_size)
    num_drafts = _num_drafts(config, definition, prompts)
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
    # Powers of two keep the number of compiled programs small.
    tokens = _padded(prompts, _power_of_two(max(limits)))
    model = _for_decoding(definition, params, buffers)
    # Prefill also yields the first new token of every prompt.
    progress, values = _prefill(
        model,
        rule,
        tokens,
        starts,
        prefill_length=_power_of_two(int(starts.max())),
        num_drafts=num_drafts,
    )
    while True:
        # One transfer per call: waiting for the device after every token would be slow.
        read = jax.device_get(values)
        continuations = _continuations(read, starts)
        stopped = [
            bool(is_done) or (watch is not None and watch(i, continuations[i].tokens))
            for i, is_done in enumerate(read[3])
        ]
        if all(stopped):
            return continuations
        progress, values = _continue(model, rule, progress, np.asarray(stopped), np.int32(steps_per_call))


def _continuations(values: Sequence[np.ndarray], starts: np.ndarray) -> list[Continuation]:
    """Return the new tokens of each prompt from the values of `readable`."""
    tokens, logprobs, ends, _, drafted, accepted = values
    return [
        Continuation(
            tokens=tokens[row, start:end].tolist(),
            logprobs=logprobs[row, start:end].tolist(),
            drafted=int(drafted[row]),
            accepted=int(accepted[row]),
        )
        for row, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _num_drafts(config: SamplingConfig, definition: Definition, prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens are drafted at a time; 0 to decode without drafts.

    Raises:
      ValueError: the model has too few modules.
    """
    if config.draft_tokens is None:
        return 0
    further = definition.config.multi_token
    num_modules = 0 if further is None else further.num_tokens
    if config.draft_tokens > num_modules:
        raise ValueError(
            f"draft_tokens={config.draft_tokens}, and the model has {num_modules} modules that predict "
            "tokens after the next one: ask for at most that many, or train a model with model.multi_token"
        )
    # Each module begins with a pair of tokens of the prompt: the last one needs as many as there are modules.
    return min(config.draft_tokens, *map(len, prompts))


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
    def unless_neutral(value: float | None) -> np.float32 | None:
        return None if value in (None, 1.0) else np.float32(value)

    # A fixed number of end tokens per shape; a value that no token has stands for none.
    ends = [eos_id] if isinstance(eos_id, int) else eos_id
    return Rule(
        seeds=np.asarray(seeds, np.uint32),
        limits=limits,
        end_ids=np.asarray(ends or [NO_TOKEN], np.int32),
        temperature=np.float32(config.temperature) if config.temperature > 0 else None,
        top_p=unless_neutral(config.top_p),
        min_p=None if config.min_p is None else np.float32(config.min_p),
        penalty=unless_neutral(config.repetition_penalty),
        top_k=None if config.top_k is None or config.top_k >= vocab_size else config.top_k,
    )


def _power_of_two(length: int) -> int:
    return max(SMALLEST_LENGTH, 1 << (length - 1).bit_length())


# The model for decoding -------------------------------------------------------------------------------------
def _for_decoding(
    definition: Definition, params: Mapping[str, Array], buffers: Mapping[str, Array]
) -> Decoder:
    """Return the model, with its layers unstacked if they are few.

    With stacked layers every token would copy the caches of all layers: they enter the loop over layers as
    one array and leave it as another. Weights with formats are dequantized once.
    """
    params, definition = definition.transform_once(params)
    # Unrolling many layers would take long to compile.
    if definition.config.num_layers > UNROLLED_LAYERS or all(
        group.repeats == 1 for group in definition.config.stack
    ):
        return definition.merge(params, buffers)
    phases = phases_of(definition)
    unstacked = _unstacked_definition(definition.config, phases)
    return unstacked.merge(*_unstacked(definition.config, phases, dict(params), dict(buffers)))


@functools.cache
def _unstacked_definition(config: Any, phases: Any) -> Definition:
    """Return the definition of the same model with every repeat in its own layer group."""
    stack = tuple(LayerGroup(pattern=group.pattern) for group in config.stack for _ in range(group.repeats))
    return define_quantized(dataclasses.replace(config, stack=stack), phases)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unstacked(
    config: Any, phases: Any, params: dict[str, Array], buffers: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    unstacked = _unstacked_definition(config, phases)

    def move(tree: dict[str, Array], like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
        return restack(unstacked.config, unstack(config, tree), like=like)

    return move(params, unstacked.params), move(buffers, unstacked.buffers)


# Compiled programs ------------------------------------------------------------------------------------------
@functools.partial(jax.jit, static_argnames=("prefill_length", "num_drafts"))
def _prefill(
    model: Decoder,
    rule: Rule,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    *,
    prefill_length: int,
    num_drafts: int,
) -> tuple[Progress, Readable]:
    """Run the prompts through the model, and return the state with the first new token of each."""
    num_prompts, capacity = tokens.shape
    state = model.init_state(num_prompts, max_length=capacity)
    hidden = None
    output = None
    chunks = []
    for first in range(0, prefill_length, PREFILL_CHUNK):
        part = tokens[:, first : min(first + PREFILL_CHUNK, prefill_length)]
        positions = jnp.broadcast_to(first + jnp.arange(part.shape[1])[None, :], part.shape)
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
        row_inputs = {"segment_ids": segment_ids, "positions": positions, "max_lengths": rule.limits}
        output = model(part, **row_inputs, state=state)
        state = output.state
        chunks.append(output.hidden)
        # The last token of each prompt is in one of the chunks.
        index = lengths - 1 - first
        # Prompts that end in another chunk read a wrong position here, which the next line discards.
        last = jnp.take_along_axis(
            output.hidden, jnp.clip(index, 0, part.shape[1] - 1)[:, None, None], axis=1
        )[:, 0]
        hidden = last if hidden is None else jnp.where((index >= 0)[:, None], last, hidden)
    assert output is not None and hidden is not None, prefill_length
    used = None
    if rule.penalty is not None:
        used = jnp.zeros((num_prompts, output.head.vocab_size), bool)
        # Padding is not part of the text, so it is not penalised.
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
    progress = extended(progress, rule, output, hidden)
    if num_drafts:
        progress = speculation.begin(
            model, rule, progress, chunks, num_drafts=num_drafts, prefill_length=prefill_length
        )
    return progress, readable(progress)


@functools.partial(jax.jit, donate_argnames="progress")
def _continue(
    model: Decoder, rule: Rule, progress: Progress, stopped: Bool[Array, " B"], num_steps: Int[Array, ""]
) -> tuple[Progress, Readable]:
    """Run the model up to `num_steps` times, for one token of each unfinished prompt, or with drafts more."""

    def step(carry: tuple[Progress, Array]) -> tuple[Progress, Array]:
        progress, count = carry
        if progress.drafting is not None:
            return speculation.advance(model, rule, progress), count + 1
        positions = progress.lengths[:, None] - 1
        newest = jnp.take_along_axis(progress.tokens, positions, axis=1)
        # A finished prompt feeds padding.
        segment_ids = jnp.where(progress.done, 0, 1)[:, None]
        row_inputs = {"segment_ids": segment_ids, "positions": positions, "max_lengths": rule.limits}
        output = model(newest, **row_inputs, state=progress.state)
        return extended(progress, rule, output, output.hidden[:, 0]), count + 1

    def is_unfinished(carry: tuple[Progress, Array]) -> Bool[Array, ""]:
        return (carry[1] < num_steps) & ~jnp.all(carry[0].done)

    # Prompts that the caller stopped, for example at a stop text.
    progress = dataclasses.replace(progress, done=progress.done | stopped)
    progress, _ = jax.lax.while_loop(is_unfinished, step, (progress, jnp.int32(0)))
    return progress, readable(progress)
