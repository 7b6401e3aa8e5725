"""Tokenized documents held in memory: what packing, pipeline and windows read, without files."""

import hashlib
from collections.abc import Sequence

import numpy as np

BOS = 0
EOS = 1
TOKENS_PER_DOCUMENT = 1000  # ids of `numbered` encode document and position


class InMemoryDocuments:
    """Documents given as lists of ids, BOS and EOS included."""

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        *,
        num_bytes: Sequence[int],
        prompt_lengths: Sequence[int] | None = None,
        scored: Sequence[Sequence[bool]] | None = None,
        scored_bytes: Sequence[int] | None = None,
    ):
        self.documents = [np.asarray(document, np.int32) for document in documents]
        self.lengths = np.asarray([len(document) for document in documents], np.int32)
        self.num_bytes = np.asarray(num_bytes, np.int32)
        prompts = prompt_lengths or [0] * len(documents)
        flags = scored or [
            [i >= max(prompt, 1) for i in range(len(d))] for d, prompt in zip(documents, prompts, strict=True)
        ]
        self.flags = [np.asarray(of_document, bool) for of_document in flags]
        self.num_scored = np.asarray([of_document.sum() for of_document in self.flags], np.int32)
        self.scored_bytes = np.asarray(num_bytes if scored_bytes is None else scored_bytes, np.int32)

    @property
    def hash(self) -> str:
        arrays = [*self.documents, self.lengths, self.num_bytes, self.scored_bytes, *self.flags]
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, document: int, *, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.documents[document][start:stop].copy()

    def scored(self, document: int, *, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.flags[document][start:stop].copy()


def numbered(
    lengths: Sequence[int],
    *,
    bytes_per_token: int = 3,
    prompt_lengths: Sequence[int] | None = None,
    scored: Sequence[Sequence[bool]] | None = None,
) -> InMemoryDocuments:
    """Documents of these lengths whose token i > 0 of document d is 1000 * (d + 1) + i; the first is BOS."""
    documents = [
        [BOS, *(TOKENS_PER_DOCUMENT * (d + 1) + i for i in range(1, length))]
        for d, length in enumerate(lengths)
    ]
    num_bytes = [bytes_per_token * max(length - 2, 0) for length in lengths]
    made = InMemoryDocuments(documents, num_bytes=num_bytes, prompt_lengths=prompt_lengths, scored=scored)
    made.scored_bytes[:] = [bytes_per_token * max(int(flags[:-1].sum()), 0) for flags in made.flags]
    return made
