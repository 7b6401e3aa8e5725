"""Out-of-memory errors with the memory that was needed and the options that need less.

with explaining_out_of_memory(setup, activity=lambda: "training"):
    ...
"""

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from slmjax.planning.memory import (
    ADVICE_SECONDS,
    Advice,
    OutOfMemory,
    advise,
    evaluation_changes,
    evaluation_memory,
    first_line,
    is_out_of_memory,
    step_memory,
    training_changes,
)
from slmjax.runner.setup import Setup

log = logging.getLogger(__name__)


@contextmanager
def explaining_out_of_memory(
    setup: Setup,
    *,
    activity: Callable[[], str],
    step: Callable[[], int] = lambda: 0,
    is_resumed: bool = False,
    record: Callable[..., None] | None = None,
) -> Iterator[None]:
    """Replace an out-of-memory error by `OutOfMemory` with advice; let other errors pass.

    The caller should hold no arrays, because on a GPU the compiler needs their memory.

    Args:
      activity: returns "training", "evaluation", or what else the session is doing.
      step: returns the number of steps done.
      is_resumed: a resumed run keeps its model, so no change of it is advised.
      record: called with the kind and the values of a record for the log.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = activity()
        advice = _advise(error, setup, activity=what, is_resumed=is_resumed)
        # The CPU backend has no such statistics.
        available = (setup.mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
        # Recorded before it is raised, so that the log has the reason even where the output of a job is lost.
        if record is not None:
            values = {} if advice is None else advice.record()
            record(
                "out_of_memory",
                step=step(),
                doing=what,
                error=first_line(error),
                available=available,
                **values,
            )
        if advice is None:
            raise
        raise OutOfMemory(
            f"out of memory in {what}, after step {step()} ({first_line(error)})\n"
            f"{advice.text(available=available)}"
        ) from error


def _advise(error: BaseException, setup: Setup, *, activity: str, is_resumed: bool) -> Advice | None:
    """Return options that need less memory; None where this process cannot compile them."""
    # The memory of the host is not what a step on another device is compiled for.
    is_of_host = isinstance(error, MemoryError) and jax.default_backend() != "cpu"
    # One process is enough to compile; on GPUs all of them must, and they may not all have failed.
    is_shared = jax.process_count() > 1 and (jax.process_index() > 0 or jax.default_backend() == "gpu")
    if is_of_host or is_shared:
        return None
    _release(error)
    log.info(
        "out of memory in %s: compiling what would need less, for up to about %.0f s",
        activity,
        ADVICE_SECONDS,
    )
    is_evaluation = activity == "evaluation"
    changes = evaluation_changes if is_evaluation else training_changes
    # Modules log how they compile, and these programs will not run.
    logger = logging.getLogger("slmjax")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        return advise(
            setup.experiment,
            vocab_size=setup.prepared.tokenizer.vocab_size,
            mesh=setup.mesh,
            measure=evaluation_memory if is_evaluation else step_memory,
            changes=changes(setup.experiment, setup.mesh, is_resumed=is_resumed),
            seconds=ADVICE_SECONDS,
        )
    # Whatever fails here, it must not hide the error that is to be explained.
    except Exception as other:
        log.warning("no advice: %s", other)
        return None
    finally:
        logger.setLevel(level)


def _release(error: BaseException | None) -> None:
    """Free the arrays that the frames of an error still name."""
    # A traceback keeps its frames, and they keep their locals. Clearing them lets the arrays go.
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
