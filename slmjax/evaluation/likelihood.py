"""Log-likelihood of continuations: what multiple choice and lm-eval both ask of a model.

    context, continuation = pair_tokens(tokenizer, "2 + 2 =", " 4")
    [found] = log_likelihoods(loaded, [(context, continuation)])        # found.logprob, found.is_greedy

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
    """What a model thinks of a continuation."""

    logprob: float  # nats, summed over the continuation's tokens
    is_greedy: bool  # each of its tokens was the likeliest
    num_tokens: int  # of the continuation
    truncated: int  # tokens of the context that found no room, from its beginning


def pair_tokens(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Tokens of a context, BOS first where the model wants it or nothing else comes first, and of what
    continues it, encoded as one text.

    A token that holds text of the continuation belongs to it, also where it begins in the context. White
    space at the end of the context counts to the continuation, as tokens begin with their space.
    """
    cut = len(context.rstrip())
    text = context + continuation
    tokens = tokenizer.encode_spans([text])[0]
    belongs = tokens.overlap_mask([(len(context[:cut].encode()), len(text.encode()))])
    return tokenizer.with_bos(tokens.ids[~belongs].tolist()), tokens.ids[belongs].tolist()


def log_likelihoods(
    loaded: Loaded, pairs: Sequence[Pair], *, batch_size: int = DEFAULT_BATCH_SIZE
) -> list[Likelihood]:
    """The likelihood of each continuation after its context, in the order given.

    A context that is too long loses its beginning.

    Raises:
      ValueError: a context has no token, or a continuation has none or more than the model's context holds.
    """
    room = loaded.config.context_length
    rows: list[tuple[list[int], int, int]] = []  # tokens, where the continuation begins, tokens cut away
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(
                f"pair {index} has {len(context)} tokens of context and {len(continuation)} to score: it "
                "needs both"
            )
        if len(continuation) > room:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, more than the model's "
                f"context_length={room}: shorten it"
            )
        cut = max(len(context) + len(continuation) - 1 - room, 0)  # the last token is a target alone
        rows.append(([*context[cut:], *continuation], len(context) - cut, cut))
    found: dict[int, Likelihood] = {}
    model = loaded.definition.merge(loaded.params, loaded.buffers)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        sums, greedy = jax.device_get(
            _scored(model, *_padded([rows[index] for index in part], batch_size=batch_size))
        )
        for row, index in enumerate(part):
            ids, start, cut = rows[index]
            found[index] = Likelihood(
                logprob=float(sums[row]),
                is_greedy=bool(greedy[row]),
                num_tokens=len(ids) - start,
                truncated=cut,
            )
    return [found[index] for index in range(len(rows))]


def refuse_nan(found: Sequence[Likelihood], *, where: str) -> None:
    """Raise ValueError, which begins with `where`, if a log-likelihood is NaN: every comparison with it is
    false.

    Negative infinity is no error: a continuation may have probability 0.
    """
    if any(math.isnan(one.logprob) for one in found):
        raise ValueError(
            f"{where}: a log-likelihood is NaN, so the answers cannot be compared: the model's weights or "
            "logits are not finite. "
            "Evaluate another checkpoint (--step)"
        )


def _padded(
    rows: Sequence[tuple[list[int], int, int]], *, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of a batch, which of their targets are scored, and lengths of the inputs; rows that are missing
    are padding.
    """
    longest = max(len(ids) for ids, _, _ in rows)
    length = max(SHORTEST, 1 << (longest - 2).bit_length())
    tokens = np.zeros((batch_size, length + 1), np.int32)
    scored = np.zeros((batch_size, length), bool)
    lengths = np.zeros((batch_size,), np.int32)
    for row, (ids, start, _) in enumerate(rows):
        tokens[row, : len(ids)] = ids
        scored[row, start - 1 : len(ids) - 1] = True
        lengths[row] = len(ids) - 1
    return tokens, scored, lengths


@jax.jit
def _scored(
    model: Decoder, tokens: Int[Array, "B T1"], scored: Bool[Array, "B T"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Sums of the targets' log-probabilities, and whether all were the likeliest; T1 is T + 1."""
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None, :], inputs.shape)
    output = model(inputs, segment_ids=(positions < lengths[:, None]).astype(jnp.int32), positions=positions)

    def row(xs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, wanted, counts = xs
        logits = losses.logits(hidden, output.head)[:, : output.head.vocab_size]
        chances = jnp.take_along_axis(logits, wanted[:, None], axis=1)[:, 0] - jax.nn.logsumexp(
            logits, axis=-1
        )
        return jnp.sum(jnp.where(counts, chances, 0.0)), jnp.all(
            (jnp.argmax(logits, axis=-1) == wanted) | ~counts
        )

    return jax.lax.map(row, (output.hidden, targets, scored))  # row by row: the logits of all would be large
