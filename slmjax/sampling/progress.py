"""The state of decoding inside compiled programs: the settings as arrays, and what changes with every token.

Dims: B prompts, E tokens that end a continuation, S tokens of prompt and continuation together, D model, V
vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slmjax import losses
from slmjax.models.decoder import Output
from slmjax.parallel import communication
from slmjax.sampling.choice import next_tokens, penalised


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["seeds", "limits", "end_ids", "temperature", "top_p", "min_p", "penalty"],
    meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The settings of sampling as arguments of a compiled function.

    The fields are typed `Any` because this is a pytree; None leaves a setting out.
    """

    seeds: Any  # UInt32[Array, " B"]
    limits: Any  # Int32[Array, " B"]: largest number of tokens of each row, its prompt included
    end_ids: Any  # Int32[Array, " E"]: each of these tokens ends a continuation
    temperature: Any  # Float32[Array, ""], None for the most likely token
    top_p: Any  # Float32[Array, ""] | None
    min_p: Any  # Float32[Array, ""] | None
    penalty: Any  # Float32[Array, ""] | None
    top_k: int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """The state that changes with every token. The fields are typed `Any` because this is a pytree."""

    tokens: Any  # Int32[Array, "B S"]: prompts with their new tokens
    logprobs: Any  # Float32[Array, "B S"]: of the new tokens
    lengths: Any  # Int32[Array, " B"]: tokens so far
    done: Any  # Bool[Array, " B"]
    state: Any  # decoding state of the model, for all tokens but the newest
    used: Any  # Bool[Array, "B V"] | None: tokens of the text so far, if they are penalised
    drafting: Any = None  # speculation.Drafting, where modules of the model draft
    drafted: Any = None  # Int32[Array, " B"]: drafts that were verified so far, with `drafting`
    accepted: Any = None  # Int32[Array, " B"]: drafts that became new tokens, with `drafting`


Readable = tuple[Array, Array, Array, Array, Array, Array]


def readable(progress: Progress) -> Readable:
    """Return what the host reads, replicated, so that every process can.

    Tokens, log-probabilities, lengths, ends, and the numbers of verified and of accepted drafts.
    """
    rows = (None, None)
    row = (None,)
    none = jnp.zeros_like(progress.lengths)
    return (
        communication.constrain(progress.tokens, rows),
        communication.constrain(progress.logprobs, rows),
        communication.constrain(progress.lengths, row),
        communication.constrain(progress.done, row),
        communication.constrain(none if progress.drafted is None else progress.drafted, row),
        communication.constrain(none if progress.accepted is None else progress.accepted, row),
    )


def extended(progress: Progress, rule: Rule, output: Output, hidden: Float[Array, "B D"]) -> Progress:
    """Append to each unfinished prompt the token that follows its last hidden state."""
    num_prompts, capacity = progress.tokens.shape
    rows = jnp.arange(num_prompts)
    logits = losses.logits(hidden, output.head)[:, : output.head.vocab_size]
    adjusted = logits if progress.used is None else penalised(logits, progress.used, penalty=rule.penalty)
    new = next_tokens(
        adjusted,
        position_keys(rule, progress.lengths),
        temperature=rule.temperature,
        top_k=rule.top_k,
        top_p=rule.top_p,
        min_p=rule.min_p,
    )
    logprobs = logprobs_of(logits, new)
    # An index out of range drops the token of a finished prompt.
    indices = jnp.where(progress.done, capacity, progress.lengths)
    lengths = jnp.where(progress.done, progress.lengths, progress.lengths + 1)
    return dataclasses.replace(
        progress,
        tokens=progress.tokens.at[rows, indices].set(new, mode="drop"),
        logprobs=progress.logprobs.at[rows, indices].set(logprobs, mode="drop"),
        lengths=lengths,
        done=progress.done | is_end(rule, new) | (lengths >= rule.limits),
        state=output.state,
        used=None if progress.used is None else progress.used.at[rows, new].set(True),
    )


def position_keys(rule: Rule, positions: Int[Array, " B"]) -> Any:
    """Return a key for each prompt and position, so that draws do not depend on other prompts or calls."""
    return jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        rule.seeds, positions
    )


def logprobs_of(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    """Return the log-probabilities of tokens: those of the model, whatever the filters."""
    return jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)


def is_end(rule: Rule, tokens: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Return which tokens end a continuation."""
    return jnp.any(tokens[:, None] == rule.end_ids[None, :], axis=1)
