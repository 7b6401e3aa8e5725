"""`Result`: how a run ended, as result.json and the caller of `train` have it."""

import dataclasses
import logging

import numpy as np

from slmjax.evaluation.bits_per_byte import EvalResult
from slmjax.evaluation.document_sums import DOCUMENT_SUMS, write_document_sums
from slmjax.telemetry.report import write_report
from slmjax.telemetry.run_directory import RunDirectory

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run: the fields of result.json."""

    # "finished", "interrupted", "diverged", or "not_saved": the last state or this result could not be saved
    status: str
    loss: float  # nats per token, on the text that `measured_on` names
    bits_per_byte: float  # on the same text
    # "held-out text", "part of the held-out text" (if cut short), "the completions of" them, with ", after
    # step N" if of an earlier step, or "the last training batch"
    measured_on: str
    perplexity: float
    best_loss: float | None  # lowest of the evaluations on `best_measured_on`, the last step's included
    best_step: int | None  # its checkpoint is kept in addition to the newest
    # bits per byte of gzip -9 and xz -9 for the same text (its first 16 MB); empty if only part was scored
    compressors: dict[str, float]
    run_tokens: int  # scored targets trained on, in all sessions of the run
    run_seconds: float | None  # wall time of all sessions; None if the log does not have them all
    session_tokens: int  # scored targets trained on in this session
    session_seconds: float  # wall time of this session, from start to result
    session_tokens_per_second: float  # fed, padding left out, over the training steps of this session
    parameters: int
    step: int
    session_data_wait_share: float  # fraction of this session's training time spent waiting for data
    # steps of all sessions that changed nothing because something was not finite, or no token was scored
    skipped: int
    run_dir: str
    commit: str | None
    session_seconds_by_category: dict[str, float]
    samples: list[str]
    # fraction of the held-out text's bytes that the tokenizer loses: above 0, bits per byte are too low
    lost_text: float = 0.0
    best_measured_on: str | None = None  # the text of `best_loss`, worded as in `measured_on`
    # loss of the last step on the part of the held-out text of `best_loss`; None if that was all of it
    part_loss: float | None = None
    log_lines_lost: int = 0  # records of this session that a full disk kept from log.jsonl
    # runs that were trained in the same program in this session: its seconds are those of all of them
    population: int = 1
    # most memory on a device, on a CPU resident memory of the process; of all of them for a population. None
    # where an earlier run of the process hides it
    session_peak_memory_bytes: int | None = None


def write_result(run: RunDirectory, result: Result, *, resume: str) -> Result:
    """Write result.json. Where it cannot be written, the result says so, as nothing on disk does."""
    try:
        run.write_json("result.json", dataclasses.asdict(result))
    except OSError as error:
        log.error(
            "result.json could NOT be written (%s). Free disk space, then write it with: %s",
            error.strerror or error,
            resume,
        )
        return dataclasses.replace(result, status="not_saved")
    return result


def write_page(run: RunDirectory) -> None:
    """Write the run's page, where the extra that draws it is installed. A run does not fail for its page."""
    try:
        write_report(run.path)
    except OSError as error:
        log.warning("report.html could not be written: %s", error.strerror or error)
    except Exception as error:
        log.info("no report.html: %s", error)


def write_heldout_documents(run: RunDirectory, evaluation: EvalResult) -> None:
    """Write the loss of each held-out document, for studies. A run does not fail for this file."""
    sums = evaluation.document_sums
    # Of a run that diverged there is nothing to compare.
    if sums is None or not np.isfinite(sums.nats).all():
        return
    try:
        write_document_sums(sums, run.path)
    except OSError as error:
        log.warning("%s could not be written: %s", DOCUMENT_SUMS, error.strerror or error)
