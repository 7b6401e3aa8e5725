"""The uncertainty of a study's held-out text, compared with that of its seeds.

    text_uncertainty(question, members)            # for each comparison whose runs keep the loss by document
    little_text_notes(members)                     # caveats

Seeds say how the difference would vary with other seeds on the same text; documents say how it would vary
with other text of the same kind. It follows from both which is worth buying: more seeds or more text.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from slmjax.data import provenance
from slmjax.data.splitting import HELDOUT, little_text_note
from slmjax.evaluation.document_sums import DocumentSums, read_document_sums
from slmjax.studies.questions import Pair, Question
from slmjax.studies.statistics.documents import DifferenceSources, difference_sources
from slmjax.studies.study import FINISHED, Member

log = logging.getLogger(__name__)

# Metrics that are a sum over documents, divided by a sum over documents.
_METRICS = ("bits_per_byte", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextUncertainty:
    """The uncertainty of one comparison by source."""

    arm: str
    against: str
    seeds: tuple[int, ...]  # whose runs keep the loss of each document
    num_documents: int  # of the text; in more than 1,024 they are grouped
    sources: DifferenceSources


def text_uncertainty(question: Question, members: Sequence[Member]) -> tuple[TextUncertainty, ...]:
    """Return the uncertainty by seeds and by held-out text of each comparison.

    Comparisons are left out if the metric is no mean over documents, if fewer than two seeds of both arms
    have the loss of each document (runs of earlier versions have none), or if these are of different texts.
    """
    if question.metric not in _METRICS:
        return ()
    sums: dict[tuple[str, int], DocumentSums] = {}
    for member in members:
        if member.status == FINISHED and (read := _sums_of(member)) is not None:
            sums[member.arm, member.seed] = read
    results = (_uncertainty(question, sums, pair) for pair in question.pairs)
    return tuple(result for result in results if result is not None)


def _sums_of(member: Member) -> DocumentSums | None:
    if not (run_dir := member.result.get("run_dir")):
        return None
    try:
        return read_document_sums(str(run_dir))
    except ValueError as error:
        # The verdicts do not depend on this file.
        log.warning("%s", error)
        return None


def _uncertainty(
    question: Question, sums: Mapping[tuple[str, int], DocumentSums], pair: Pair
) -> TextUncertainty | None:
    seeds = tuple(seed for seed in question.seeds if all((arm, seed) in sums for arm in pair))
    if len(seeds) < 2:
        return None
    first = sums[pair[0], seeds[0]]
    rows = [[sums[arm, seed] for seed in seeds] for arm in pair]
    is_bits = question.metric == "bits_per_byte"
    weights = first.bytes if is_bits else first.tokens
    for each in (each for row in rows for each in row):
        is_same = each.is_same_text(first) and (is_bits or np.array_equal(each.tokens, first.tokens))
        if not is_same:
            return None
    # One document, or text without bytes, shows no noise of its text.
    if len(weights) < 2 or weights.sum() <= 0:
        return None
    scale = 1 / math.log(2) if is_bits else 1.0
    arm, against = (scale * np.stack([each.nats for each in row]) for row in rows)
    return TextUncertainty(
        arm=pair[0],
        against=pair[1],
        seeds=seeds,
        num_documents=first.num_documents,
        sources=difference_sources(
            arm, against, weights.astype(np.float64), confidence=question.rules.confidence
        ),
    )


def little_text_notes(members: Sequence[Member]) -> list[str]:
    """Return a note for each source of which far less is held out than its runs asked for."""
    # The first member of an arm stands for all: their text is the same.
    first = {member.arm: member for member in reversed(members) if member.status == FINISHED}
    notes = (note for member in first.values() for note in _little_text(member))
    return list(dict.fromkeys(notes))


def _little_text(member: Member) -> Iterator[str]:
    directory = Path(str(member.result.get("run_dir", "")))
    try:
        record = provenance.read_record(directory) or []
        settings = provenance.read_settings(directory).get("data") or {}
    except (ValueError, FileNotFoundError) as error:
        log.warning("%s", error)
        return
    fraction = settings.get("heldout_fraction")
    for entry in record:
        held_out = entry.get(HELDOUT)
        # Runs of early versions recorded less.
        if held_out is None or not isinstance(fraction, float):
            continue
        sizes = {"held_out": held_out["bytes"], "total": held_out["bytes"] + entry["bytes"]}
        if note := little_text_note(entry["source"], **sizes, fraction=fraction):
            yield f"{note}."
