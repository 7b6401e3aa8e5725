"""Documents, or parts of them, that a plan of rows leaves out because no token of them is scored. They are
logged before training.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from slmjax.data.packing import RowPlan, TokenizedDocuments
from slmjax.data.scored import is_all_scored

_NAMED_TOKENS = 24  # of a document, to name it by


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LeftOut:
    """Documents by their number in the shards, ascending."""

    whole: Int64[np.ndarray, " whole"]  # no row has any of it: no token is scored
    part: Int64[
        np.ndarray, " part"
    ]  # some of its unscored text is in no row, because the document is longer than one


def find_left_out(plan: RowPlan, shards: TokenizedDocuments) -> LeftOut:
    """The documents with unscored text that the rows of a plan do not hold whole."""
    is_partial = ~is_all_scored(shards.lengths, shards.num_scored)
    order = np.lexsort((plan.starts, plan.documents))
    documents = plan.documents[order]
    starts = plan.starts[order].astype(np.int64)
    ends = starts + plan.lengths[order]
    is_further = np.concatenate([[False], documents[1:] == documents[:-1]])
    # where the document's piece before ends
    before = np.where(is_further, np.concatenate([[0], ends[:-1]]), 0)
    num_inputs = np.zeros(len(shards), np.int64)
    np.add.at(num_inputs, documents, ends - np.maximum(starts, before))
    return LeftOut(
        whole=np.flatnonzero(is_partial & (num_inputs == 0)),
        part=np.flatnonzero(is_partial & (num_inputs > 0) & (num_inputs < shards.lengths - 1)),
    )


def describe_left_out(
    plan: RowPlan, shards: TokenizedDocuments, *, name: str, decode: Callable[[list[int]], str]
) -> list[str]:
    """One sentence for each kind of document that is left out, which counts them and names the first; none
    where nothing is.
    """
    found = find_left_out(plan, shards)

    def first(documents: np.ndarray) -> str:
        tokens = shards.tokens(int(documents[0]), stop=min(_NAMED_TOKENS, int(shards.lengths[documents[0]])))
        return f"the first is document {documents[0]}, which begins {decode(tokens[1:].tolist())!r}"

    said = []
    if len(found.whole):
        said.append(
            f"{name}: {len(found.whole)} of {len(shards)} documents have no token that is scored and are "
            f"left out; {first(found.whole)}"
        )
    if len(found.part):
        said.append(
            f"{name}: of {len(found.part)} of {len(shards)} documents some text that is not scored, such as "
            "the beginning of a long prompt,"
            f" is left out, as rows have {plan.sequence_length} tokens; {first(found.part)}. A longer "
            "data.sequence_length keeps more of it"
        )
    return said
