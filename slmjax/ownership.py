"""Whether this process may still write to a run: asked between steps and before each save.

    with owned_by(claim.require):       # a function that raises where the run now belongs to another process
        train(experiment)

Workers of a study hold claims, which another worker takes over once they have expired
(`studies/claims.py`). A worker that was paused meanwhile must stop, and write nothing more. A run that nobody
claims belongs to its process.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

# Of a thread: several of them may train members of studies.
_check: ContextVar[Callable[[bool], None] | None] = ContextVar("ownership", default=None)


@contextlib.contextmanager
def owned_by(check: Callable[[bool], None]) -> Iterator[None]:
    """Context in which `require_ownership` calls `check`, with whether the answer must be up to date."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def require_ownership(*, now: bool = False) -> None:
    """Raise what the check of `owned_by` raises, if the run belongs to another process by now.

    Args:
      now: ask the file system. Otherwise the newest answer counts, so that it can be asked at every step.
    """
    if (check := _check.get()) is not None:
        check(now)
