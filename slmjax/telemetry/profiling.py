"""A profiler trace of a few steps of a run, on the devices and on the host.

with Profile(directory, first_step=0, last_step=1000, num_steps=5) as profile:
    for step in range(1, 1001):
        with profile.annotated(step):
            ...                             # the step
        if profile.turns_after(step):
            ...                             # wait for the devices
            profile.turn()                  # starts after the second step, stops `num_steps` later
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

log = logging.getLogger(__name__)

# Steps of a session before the trace: the first compiles, the second may wait for work of the first.
LEFT_OUT = 2


class Profile:
    """Traces up to `num_steps` steps from step `first_step` + 3 on; none if `num_steps` is None.

    Each process writes into its own directory. Leaving the context stops a running trace.
    """

    def __init__(
        self,
        directory: Path,
        *,
        first_step: int,
        last_step: int,
        num_steps: int | None,
    ) -> None:
        self._directory = directory
        # The step after which the trace begins.
        self._begin = first_step + LEFT_OUT
        self._end = min(self._begin + (num_steps or 0), last_step)
        # The last step that was traced.
        self._last = self._begin
        self.is_running = False
        # A short run cannot have the first steps left out and the requested number traced.
        if num_steps is not None and last_step - self._begin < num_steps:
            left = max(last_step - self._begin, 0)
            log.warning(
                "profile: only %d of %d steps can be traced, the first %d of a session are left out",
                left,
                num_steps,
                LEFT_OUT,
            )

    def turns_after(self, step: int) -> bool:
        """Return whether the trace starts or stops after this step."""
        return self._begin < self._end and step in (self._begin, self._end)

    def turn(self) -> None:
        """Start or stop the trace. The devices must have finished all steps so far."""
        self._stop() if self.is_running else self._start()

    def annotated(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a step, which gives the trace its number."""
        if not self.is_running:
            return contextlib.nullcontext()
        self._last = step
        # The name "train" lets the trace viewer group events by step.
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        # Tracing every Python call would slow down the host whose time is measured.
        options.python_tracer_level = 0
        # A name of its own, so that a resumed run does not overwrite an earlier trace.
        options.session_id = f"from-step-{self._begin + 1}"
        with self._tolerating_errors():
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True, profiler_options=options)
            self.is_running = True

    def _stop(self) -> None:
        self.is_running = False
        with self._tolerating_errors():
            jax.profiler.stop_trace()
            log.info("profile of steps %d to %d in %s", self._begin + 1, self._last, self._directory)
            log.info(
                "to view it: `xprof --port 8791 %s` (pip install xprof), or open "
                "%s/plugins/profile/*/perfetto_trace.json.gz in Perfetto (ui.perfetto.dev)",
                self._directory,
                self._directory,
            )

    @contextlib.contextmanager
    def _tolerating_errors(self) -> Iterator[None]:
        """Warn about an error instead of raising it: a failed trace must not end the run."""
        try:
            yield
        except Exception as error:
            log.warning("no profile in %s: %s", self._directory, error)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_running:
            self._stop()
