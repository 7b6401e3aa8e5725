"""Log-likelihood of continuations, for multiple choice and lm-eval.

    context, continuation = pair_tokens(tokenizer, "2 + 2 =", " 4")
    [likelihood] = log_likelihoods(loaded, [(context, continuation)])   # likelihood.logprob, .is_greedy

Rows are sorted by length and padded to powers of two, so that few shapes compile.

Dims: B rows, T positions, D model, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from slmjax import losses
from slmjax.checkpoints.loading import Loaded
from slmjax.data.tokenizers import Tokenizer
from slmjax.models.decoder import Decoder

SHORTEST = 16  # positions of a row
DEFAULT_BATCH_SIZE = 16

Pair = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Log-likelihood of a continuation."""

    logprob: float  # nats, summed over the continuation's tokens
    is_greedy: bool  # each of its tokens is the likeliest
    num_tokens: int  # of the continuation
    truncated: int  # tokens cut from the beginning of the context, to fit the model


def pair_tokens(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Return the tokens of a context and of its continuation, encoded as one text.

    The context starts with BOS if the model uses it, or if it would be empty. A token that contains text of
    the continuation belongs to it, even if it starts in the context. White space at the end of the context
    counts as continuation, since tokens start with their space.
    """
    # Encoded as one text, so that the tokens are those the model saw in training.
    cut = len(context.rstrip())
    text = context + continuation
    tokens = tokenizer.encode_spans([text])[0]
    belongs = tokens.overlap_mask([(len(context[:cut].encode()), len(text.encode()))])
    return tokenizer.with_bos(tokens.ids[~belongs].tolist()), tokens.ids[belongs].tolist()


def log_likelihoods(
    loaded: Loaded, pairs: Sequence[Pair], *, batch_size: int = DEFAULT_BATCH_SIZE
) -> list[Likelihood]:
    """Return the log-likelihood of each continuation after its context, in the order of `pairs`.

    A context that is too long is cut at its beginning.

    Raises:
      ValueError: a context has no token, or a continuation has none or more than the model's context holds.
    """
    context_length = loaded.config.context_length
    rows: list[tuple[list[int], int, int]] = []  # tokens, start of the continuation, number of tokens cut
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(
                f"pair {index} has {len(context)} tokens of context and {len(continuation)} to score: it "
                "needs both"
            )
        if len(continuation) > context_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, more than the model's "
                f"{context_length=}: shorten it"
            )
        cut = max(len(context) + len(continuation) - 1 - context_length, 0)  # the last token is only a target
        rows.append(([*context[cut:], *continuation], len(context) - cut, cut))
    likelihoods: dict[int, Likelihood] = {}
    model = loaded.definition.merge(loaded.params, loaded.buffers)
    # Rows of similar length share a batch, so that little is padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        sums, greedy = jax.device_get(
            _scored(model, *_padded([rows[index] for index in part], batch_size=batch_size))
        )
        for row, index in enumerate(part):
            ids, start, cut = rows[index]
            likelihoods[index] = Likelihood(
                logprob=float(sums[row]),
                is_greedy=bool(greedy[row]),
                num_tokens=len(ids) - start,
                truncated=cut,
            )
    return [likelihoods[index] for index in range(len(rows))]


def refuse_nan(likelihoods: Sequence[Likelihood], *, where: str) -> None:
    """Raise ValueError if a log-likelihood is NaN, since every comparison with it would be false.

    Negative infinity is allowed: a continuation may have probability 0.

    Args:
      likelihoods: the values to check.
      where: beginning of the message.
    """
    if any(math.isnan(likelihood.logprob) for likelihood in likelihoods):
        raise ValueError(
            f"{where}: a log-likelihood is NaN, so the answers cannot be compared: the model's weights or "
            "logits are not finite. Evaluate another checkpoint (--step)"
        )


def _padded(
    rows: Sequence[tuple[list[int], int, int]], *, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens of a batch, the mask of scored targets, and lengths; missing rows are padding."""
    longest = max(len(ids) for ids, _, _ in rows)
    # A power of two, so that few shapes are compiled.
    length = max(SHORTEST, 1 << (longest - 2).bit_length())
    # The last batch is filled with empty rows, so that it needs no other program.
    tokens = np.zeros((batch_size, length + 1), np.int32)
    scored = np.zeros((batch_size, length), bool)
    lengths = np.zeros((batch_size,), np.int32)
    for row, (ids, start, _) in enumerate(rows):
        tokens[row, : len(ids)] = ids
        # Targets are one position before their tokens.
        scored[row, start - 1 : len(ids) - 1] = True
        lengths[row] = len(ids) - 1
    return tokens, scored, lengths


@jax.jit
def _scored(
    model: Decoder, tokens: Int[Array, "B T1"], scored: Bool[Array, "B T"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Return sums of the targets' log-probabilities, and whether all are the likeliest; T1 is T + 1."""
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None, :], inputs.shape)
    output = model(inputs, segment_ids=(positions < lengths[:, None]).astype(jnp.int32), positions=positions)

    def row(xs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, row_targets, is_scored = xs
        # Padding rows of the head are no tokens, and must not take probability.
        logits = losses.logits(hidden, output.head)[:, : output.head.vocab_size]
        target_logits = jnp.take_along_axis(logits, row_targets[:, None], axis=1)[:, 0]
        logprobs = target_logits - jax.nn.logsumexp(logits, axis=-1)
        # The first of equal logits, as in greedy decoding.
        is_likeliest = jnp.argmax(logits, axis=-1) == row_targets
        return jnp.sum(jnp.where(is_scored, logprobs, 0.0)), jnp.all(is_likeliest | ~is_scored)

    # Row by row: the logits of the whole batch would be large.
    return jax.lax.map(row, (output.hidden, targets, scored))
