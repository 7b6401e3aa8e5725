"""An out-of-memory error with what was needed and what would need less."""

import logging
import traceback
from collections.abc import Callable

import jax

from slmjax.planning.memory import (
    ADVICE_SECONDS,
    Advice,
    OutOfMemory,
    advise,
    evaluation_changes,
    evaluation_memory,
    first_line,
    is_exhausted,
    step_memory,
    training_changes,
)
from slmjax.runner.session import Setup

log = logging.getLogger(__name__)


# The end of a run -------------------------------------------------------------------------------------------
def explained(
    error: BaseException,
    setup: Setup,
    *,
    doing: str,
    step: int = 0,
    is_resumed: bool = False,
    record: Callable[..., None] | None = None,
) -> OutOfMemory | None:
    """What to raise where `error` says that memory ran out; None where it does not, or where no advice can be
    had.

    With several processes the first one alone compiles; on GPUs compiling is an affair of all of them, which
    may not all be here, and the machine's own memory is not what a step on another device is compiled for.

    Args:
      doing: "training", "evaluation", or what else went on when it came.
      record: called with the kind and the values of a record for the log.
    """
    if not is_exhausted(error):
        return None
    values = {"step": step, "doing": doing, "said": first_line(error)}
    found = _advice(error, setup, doing=doing, is_resumed=is_resumed)
    available = (setup.mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if record is not None:
        record("out_of_memory", **values, available=available, **({} if found is None else found.record()))
    if found is None:
        return None
    return OutOfMemory(
        f"out of memory in {doing}, after step {step} "
        f"({first_line(error)})\n{found.text(available=available)}"
    )


def _advice(error: BaseException, setup: Setup, *, doing: str, is_resumed: bool) -> Advice | None:
    is_machine = isinstance(error, MemoryError) and jax.default_backend() != "cpu"
    is_shared = jax.process_count() > 1 and (jax.process_index() > 0 or jax.default_backend() == "gpu")
    if is_machine or is_shared:
        return None
    _release(error)
    log.info(
        "out of memory in %s: compiling what would need less, for up to about %.0f s", doing, ADVICE_SECONDS
    )
    measure, changes = (
        (evaluation_memory, evaluation_changes) if doing == "evaluation" else (step_memory, training_changes)
    )
    logger = logging.getLogger("slmjax")
    level = logger.level
    logger.setLevel(
        logging.WARNING
    )  # what modules say of how they compile is said of programs that will not run
    try:
        return advise(
            setup.experiment,
            vocab_size=setup.prepared.tokenizer.vocab_size,
            mesh=setup.mesh,
            measure=measure,
            changes=changes(setup.experiment, setup.mesh, is_resumed=is_resumed),
            seconds=ADVICE_SECONDS,
        )
    except Exception as other:  # whatever it is, it must not hide what happened
        log.warning("no advice: %s", other)
        return None
    finally:
        logger.setLevel(level)


def _release(error: BaseException | None) -> None:
    """Lets go of the arrays that the frames of an error still name: on a GPU the compiler wants some of that
    memory.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
