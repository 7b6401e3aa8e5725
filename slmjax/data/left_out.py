"""Documents, or parts of them, that are in no row because no token of them is scored.

They are logged before training.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from slmjax.data.packing import RowPlan, TokenizedDocuments
from slmjax.data.scored import is_all_scored

_NAMED_TOKENS = 24  # tokens of a document that identify it in a message


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LeftOut:
    """Documents by their number in the shards, ascending."""

    entirely: Int64[np.ndarray, " entirely"]  # no part is in a row: no token is scored
    partly: Int64[np.ndarray, " partly"]  # some unscored text is in no row: the document is longer than a row


def find_left_out(plan: RowPlan, shards: TokenizedDocuments) -> LeftOut:
    """Return the documents with unscored text that the rows of a plan do not contain completely."""
    is_partial = ~is_all_scored(shards.lengths, shards.num_scored)
    # Pieces in the order of their documents and starts, since rows mix documents.
    order = np.lexsort((plan.starts, plan.documents))
    documents = plan.documents[order]
    starts = plan.starts[order].astype(np.int64)
    ends = starts + plan.lengths[order]
    is_further = np.concatenate([[False], documents[1:] == documents[:-1]])
    # The end of the document's previous piece, since pieces of running text may overlap.
    before = np.where(is_further, np.concatenate([[0], ends[:-1]]), 0)
    num_inputs = np.zeros(len(shards), np.int64)
    # `np.add.at` adds up repeated indices, which `+=` would not.
    np.add.at(num_inputs, documents, ends - np.maximum(starts, before))
    return LeftOut(
        entirely=np.flatnonzero(is_partial & (num_inputs == 0)),
        partly=np.flatnonzero(is_partial & (num_inputs > 0) & (num_inputs < shards.lengths - 1)),
    )


def describe_left_out(
    plan: RowPlan, shards: TokenizedDocuments, *, name: str, decode: Callable[[list[int]], str]
) -> list[str]:
    """Return a sentence for each kind of document that is left out, with its count and the first one."""
    left_out = find_left_out(plan, shards)

    def first(documents: np.ndarray) -> str:
        tokens = shards.tokens(int(documents[0]), stop=min(_NAMED_TOKENS, int(shards.lengths[documents[0]])))
        return f"the first is document {documents[0]}, which begins {decode(tokens[1:].tolist())!r}"

    sentences = []
    if len(left_out.entirely):
        sentences.append(
            f"{name}: {len(left_out.entirely)} of {len(shards)} documents have no token that is scored and "
            f"are left out; {first(left_out.entirely)}"
        )
    if len(left_out.partly):
        sentences.append(
            f"{name}: of {len(left_out.partly)} of {len(shards)} documents some text that is not scored, "
            f"such as the beginning of a long prompt, is left out, since rows have {plan.sequence_length} "
            f"tokens; {first(left_out.partly)}. A longer data.sequence_length keeps more of it"
        )
    return sentences
