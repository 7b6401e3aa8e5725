"""Self-speculative decoding: modules of the model draft tokens, and the model verifies them in one step.

    progress = begin(model, rule, progress, hidden, num_drafts=2, prefill_length=64)   # after the prefill
    progress = advance(model, rule, progress)                    # from 1 to 3 more tokens for each prompt

A draft is accepted with the probability min(1, p / q), where q is the distribution that it was drawn from and
p that of the model, both after penalty, temperature and filters. The first rejected one is replaced by a draw
from max(p - q, 0), normalised; if none is rejected, a further token is drawn from p. New tokens then follow p
(Leviathan et al. 2023, https://arxiv.org/abs/2211.17192). Greedily, a draft is accepted if it is the most
likely token: the result is that of decoding without drafts, up to the rounding of the computation, which may
decide between nearly equal logits.

A rejected draft leaves nothing behind. Caches with a slot for each position forget the positions of rejected
drafts. Any other state, such as that of a recurrence or of a window, cannot take a token back: the step is
then computed again from the state before it, with the accepted tokens alone, unless all were accepted.

Module k, from 1, has a state of its own. With L known tokens it has read the positions up to L - 1 - k, of
which the last one predicts the token L. For a draft it reads k - 1 more, with the drafts of modules before.

Dims: B prompts, K drafts, T = K + 1 tokens of a step, P tokens of the prefill, D model, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from slmjax import losses
from slmjax.models.decoder import Decoder, Output
from slmjax.models.mixers.attention import KvCache
from slmjax.models.mixers.latent import LatentCache
from slmjax.sampling.choice import filtered_logits, penalised
from slmjax.sampling.progress import Progress, Rule, is_end, logprobs_of, position_keys

# Folded into the key of a position, for its three draws.
DRAFT = 1
ACCEPT = 2
REPLACE = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting:
    """The modules' part of the decoding state. The fields are typed `Any` because this is a pytree."""

    hidden: Any  # of each module, Float[Array, "B D"]: at the last position that it has read
    states: Any  # of each module, its decoding state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafts:
    """The drafts of a step, with the logits that they were drawn from."""

    tokens: Int[Array, "B K"]
    logits: list[Float[Array, "B V"]] | None  # None for the most likely tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The new tokens of a step: of each prompt the first `counts`."""

    tokens: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    counts: Int[Array, " B"]  # 0 for finished prompts
    num_drafts: Int[Array, " B"]  # drafts that were verified
    num_accepted: Int[Array, " B"]
    has_ended: Bool[Array, " B"]


# Beginning --------------------------------------------------------------------------------------------------
def begin(
    model: Decoder,
    rule: Rule,
    progress: Progress,
    chunks: Sequence[Float[Array, "B _ D"]],
    *,
    num_drafts: int,
    prefill_length: int,
) -> Progress:
    """Return the progress with modules that have read the prompts.

    Args:
      progress: with the first new token of each prompt.
      chunks: the final hidden states of the prompts, in parts along time.
      num_drafts: number of modules that draft, at most the tokens of the shortest prompt.
      prefill_length: tokens of all chunks, P.
    """
    num_prompts, capacity = progress.tokens.shape
    rows = jnp.arange(num_prompts)
    known = progress.lengths[:, None]
    # Positions whose next token would lie behind the array are padding for the module.
    tokens = jnp.pad(progress.tokens, ((0, 0), (0, num_drafts)))
    last_hidden = []
    states = []
    for module in range(1, num_drafts + 1):
        state = model.init_further_state(module - 1, num_prompts, max_length=capacity)
        outputs = []
        first = 0
        for chunk in chunks:
            positions = jnp.broadcast_to(first + jnp.arange(chunk.shape[1])[None, :], chunk.shape[:2])
            hidden, _, state = model.further(
                module - 1,
                chunk,
                tokens[:, first + module : first + module + chunk.shape[1]],
                segment_ids=(positions + module < known).astype(jnp.int32),
                positions=positions,
                state=state,
                max_lengths=rule.limits,
            )
            outputs.append(hidden)
            first += chunk.shape[1]
        assert first == prefill_length, (first, prefill_length)
        # The next module reads what this one returns.
        chunks = outputs
        last_hidden.append(jnp.concatenate(outputs, axis=1)[rows, progress.lengths - 1 - module])
        states.append(state)
    none = jnp.zeros_like(progress.lengths)
    return dataclasses.replace(
        progress, drafting=Drafting(hidden=last_hidden, states=states), drafted=none, accepted=none
    )


# A step -----------------------------------------------------------------------------------------------------
def advance(model: Decoder, rule: Rule, progress: Progress) -> Progress:
    """Append to each unfinished prompt the accepted ones of K drafts, and one more token."""
    drafts = _draft(model, rule, progress)
    num_tokens = drafts.tokens.shape[1] + 1
    capacity = progress.tokens.shape[1]
    rows = jnp.arange(progress.tokens.shape[0])[:, None]
    newest = jnp.take_along_axis(progress.tokens, progress.lengths[:, None] - 1, axis=1)
    steps = jnp.arange(num_tokens)[None, :]
    positions = progress.lengths[:, None] - 1 + steps
    # A token that nothing may follow is not needed, and might be outside the context.
    is_fed = ~progress.done[:, None] & (positions <= rule.limits[:, None] - 2)
    run = functools.partial(
        model,
        jnp.concatenate([newest, drafts.tokens], axis=1),
        positions=positions,
        max_lengths=rule.limits,
        state=progress.state,
    )
    output = run(segment_ids=is_fed.astype(jnp.int32))
    verdict = _verify(rule, progress, drafts, output)
    is_new = steps < verdict.counts[:, None]
    # An index out of range drops what is no new token.
    indices = jnp.where(is_new, progress.lengths[:, None] + steps, capacity)
    lengths = progress.lengths + verdict.counts
    # The state of a finished prompt is not read again.
    done = progress.done | verdict.has_ended | (lengths >= rule.limits)
    used = progress.used
    if used is not None:
        used = used.at[rows, jnp.where(is_new, verdict.tokens, used.shape[1])].set(True, mode="drop")
    if is_rewindable(output.state, capacity):
        state = rewound(output.state, lengths - 1)
    else:
        is_complete = jnp.all(done | jnp.all(is_new == is_fed, axis=1))
        state = jax.lax.cond(
            is_complete,
            lambda: output.state,
            lambda: run(segment_ids=(is_fed & is_new).astype(jnp.int32)).state,
        )
    return dataclasses.replace(
        progress,
        tokens=progress.tokens.at[rows, indices].set(verdict.tokens, mode="drop"),
        logprobs=progress.logprobs.at[rows, indices].set(verdict.logprobs, mode="drop"),
        lengths=lengths,
        done=done,
        state=state,
        used=used,
        drafting=_read(model, rule, progress, verdict, output.hidden),
        drafted=progress.drafted + verdict.num_drafts,
        accepted=progress.accepted + verdict.num_accepted,
    )


def _draft(model: Decoder, rule: Rule, progress: Progress) -> Drafts:
    """Return a draft of each module. What modules read for it stays in no state."""
    drafting = progress.drafting
    head = model.make_head()
    used = progress.used
    lengths = progress.lengths
    is_active = (~progress.done).astype(jnp.int32)[:, None]
    tokens: list[Array] = []
    distributions: list[Array] = []
    before: Array | None = None  # [B, k - 2, D]: what the module before has returned for drafts
    for module, last in enumerate(drafting.hidden, 1):
        hidden = last
        if module > 1:
            inputs = drafting.hidden[module - 2][:, None]
            if before is not None:
                inputs = jnp.concatenate([inputs, before], axis=1)
            before, _, _ = model.further(
                module - 1,
                inputs,
                jnp.stack(tokens, axis=1),
                segment_ids=jnp.broadcast_to(is_active, inputs.shape[:2]),
                positions=lengths[:, None] - module + jnp.arange(module - 1)[None, :],
                state=drafting.states[module - 1],
                max_lengths=rule.limits,
            )
            assert before is not None
            hidden = before[:, -1]
        adjusted = _adjusted(rule, losses.logits(hidden, head)[:, : head.vocab_size], used)
        if rule.temperature is None:
            new = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
        else:
            keys = _draw_keys(rule, lengths + module - 1, DRAFT)
            new = jax.vmap(jax.random.categorical)(keys, adjusted).astype(jnp.int32)
            distributions.append(adjusted)
        tokens.append(new)
        used = _with_used(used, new)
    return Drafts(tokens=jnp.stack(tokens, axis=1), logits=distributions or None)


def _verify(rule: Rule, progress: Progress, drafts: Drafts, output: Output) -> Verdict:
    """Return the new tokens: accepted drafts, then one that replaces a rejected one or follows them all."""
    num_drafts = drafts.tokens.shape[1]
    vocab_size = output.head.vocab_size
    used = progress.used
    new = []
    logprobs = []
    accepted = []
    for index in range(num_drafts + 1):
        logits = losses.logits(output.hidden[:, index], output.head)[:, :vocab_size]
        adjusted = _adjusted(rule, logits, used)
        draft = drafts.tokens[:, min(index, num_drafts - 1)]
        if rule.temperature is None:
            token = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
            is_accepted = token == draft
        else:
            proposal = None if drafts.logits is None or index == num_drafts else drafts.logits[index]
            token, is_accepted = _draw(rule, adjusted, proposal, draft, progress.lengths + index)
        new.append(token)
        accepted.append(is_accepted)
        logprobs.append(logprobs_of(logits, token))
        used = _with_used(used, draft)
    tokens = jnp.stack(new, axis=1)
    # Accepted are the drafts before the first that is not.
    leading = jnp.cumprod(jnp.stack(accepted[:-1], axis=1).astype(jnp.int32), axis=1)
    available = jnp.where(progress.done, 0, rule.limits - progress.lengths)
    counts = jnp.minimum(1 + jnp.sum(leading, axis=1), available)
    ends = jnp.stack([is_end(rule, token) for token in new], axis=1)
    ends &= jnp.arange(num_drafts + 1)[None, :] < counts[:, None]
    has_ended = jnp.any(ends, axis=1)
    # Nothing follows the first token that ends a continuation.
    counts = jnp.where(has_ended, jnp.argmax(ends, axis=1).astype(counts.dtype) + 1, counts)
    return Verdict(
        tokens=tokens,
        logprobs=jnp.stack(logprobs, axis=1),
        counts=counts,
        num_drafts=jnp.minimum(num_drafts, available),
        num_accepted=jnp.minimum(jnp.sum(leading, axis=1), counts),
        has_ended=has_ended,
    )


def _draw(
    rule: Rule,
    logits: Float[Array, "B V"],
    proposal: Float[Array, "B V"] | None,
    draft: Int[Array, " B"],
    positions: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Return a token of the distribution of `logits`, and whether it is the draft, drawn from `proposal`."""
    keys = _draw_keys(rule, positions, REPLACE)
    if proposal is None:
        token = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        return token, jnp.zeros(token.shape, bool)
    p = jax.nn.softmax(logits, axis=-1)
    q = jax.nn.softmax(proposal, axis=-1)
    p_draft, q_draft = (jnp.take_along_axis(x, draft[:, None], axis=1)[:, 0] for x in (p, q))
    uniform = jax.vmap(jax.random.uniform)(_draw_keys(rule, positions, ACCEPT))
    # u < p / q, without a division: the draft was drawn, so that q is above 0.
    is_accepted = uniform * q_draft < p_draft
    # Where p equals q nothing remains, and nothing is rejected either, but by rounding: then p stands in.
    rest = jnp.maximum(p - q, 0.0)
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)
    other = jax.vmap(jax.random.categorical)(keys, jnp.log(rest)).astype(jnp.int32)
    return jnp.where(is_accepted, draft, other), is_accepted


def _read(
    model: Decoder, rule: Rule, progress: Progress, verdict: Verdict, hidden: Float[Array, "B T D"]
) -> Drafting:
    """Return the states of the modules after they have read the verified tokens.

    Args:
      hidden: the decoder's at the newest token and the drafts.
    """
    drafting = progress.drafting
    rows = jnp.arange(hidden.shape[0])
    steps = jnp.arange(hidden.shape[1])[None, :]
    segment_ids = (steps < verdict.counts[:, None]).astype(jnp.int32)
    last = jnp.maximum(verdict.counts - 1, 0)
    last_hidden = []
    states = []
    inputs = hidden
    for module, (before, state) in enumerate(zip(drafting.hidden, drafting.states, strict=True), 1):
        outputs, _, state = model.further(
            module - 1,
            inputs,
            verdict.tokens,
            segment_ids=segment_ids,
            positions=progress.lengths[:, None] - module + steps,
            state=state,
            max_lengths=rule.limits,
        )
        is_unfinished = (verdict.counts > 0)[:, None]
        last_hidden.append(jnp.where(is_unfinished, outputs[rows, last], before))
        states.append(state)
        # One position earlier, with the same tokens: the next module reads one token further.
        inputs = jnp.concatenate([before[:, None], outputs[:, :-1]], axis=1)
    return Drafting(hidden=last_hidden, states=states)


# Parts ------------------------------------------------------------------------------------------------------
def _adjusted(rule: Rule, logits: Float[Array, "B V"], used: Array | None) -> Float[Array, "B V"]:
    """Return the logits that a token is drawn from."""
    if used is not None:
        logits = penalised(logits, used, penalty=rule.penalty)
    if rule.temperature is None:
        return logits
    return filtered_logits(
        logits, temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p, min_p=rule.min_p
    )


def _draw_keys(rule: Rule, positions: Int[Array, " B"], draw: int) -> Any:
    return jax.vmap(lambda key: jax.random.fold_in(key, draw))(position_keys(rule, positions))


def _with_used(used: Array | None, tokens: Int[Array, " B"]) -> Array | None:
    return None if used is None else used.at[jnp.arange(tokens.shape[0]), tokens].set(True)


# Taking tokens back -----------------------------------------------------------------------------------------
def _is_cache(node: Any) -> bool:
    return isinstance(node, KvCache | LatentCache)


def is_rewindable(state: Any, capacity: int) -> bool:
    """Return whether a decoding state consists of caches with a slot for each of `capacity` positions."""
    return all(
        _is_cache(node) and node.positions.shape[-1] == capacity
        for node in jax.tree.leaves(state, is_leaf=_is_cache)
    )


def rewound(state: Any, lengths: Int[Array, " B"]) -> Any:
    """Return a state of caches (`is_rewindable`) without the tokens at positions from `lengths` on."""

    def rewind(cache: Any) -> Any:
        # Layers of a group are stacked in front.
        limits = jnp.expand_dims(lengths[:, None], tuple(range(cache.positions.ndim - 2)))
        return dataclasses.replace(
            cache, segment_ids=jnp.where(cache.positions < limits, cache.segment_ids, 0)
        )

    return jax.tree.map(rewind, state, is_leaf=_is_cache)
