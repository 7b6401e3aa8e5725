"""Metrics of training between two lines of the log: tokens per second, utilisation, waiting, bits per byte.

    meter = Meter(flops_per_token=flops, peak_flops=peak, tokens=0, waiting=0.0)
    metrics = meter.measure(tokens=5120, waiting=0.1, nll=1.7e4, num_bytes=9e3)

`tokens` and `waiting` are totals since the session began; the metrics are of what was added since the last
line.
"""

import dataclasses
import math
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """Metrics since the last line of the log."""

    bits_per_byte: float  # of the last step; NaN if none of its scored tokens is text
    tokens_per_second: float  # without padding; NaN before the first full interval
    mfu: float | None  # model FLOPs utilisation, 0 to 1; None if the peak of the device is unknown
    data_wait_share: float  # fraction of the time that was spent waiting for data


class Meter:
    """Counts seconds and tokens of training, without compilation, evaluation and saving (see `leave_out`)."""

    def __init__(
        self,
        *,
        flops_per_token: float,
        peak_flops: float | None,
        tokens: int,
        waiting: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops_per_token = flops_per_token
        self._peak = peak_flops
        self._clock = clock
        self.tokens = 0
        self.seconds = 0.0
        self.waited = 0.0  # seconds, over the session
        self.restart(tokens=tokens, waiting=waiting)

    def restart(self, *, tokens: int, waiting: float) -> None:
        """Begin a new interval, since the time before does not show the pace of training."""
        self._since = self._clock()
        self._tokens_then = tokens
        self._waiting_then = waiting

    def leave_out(self, seconds: float) -> None:
        """Leave out seconds of this interval that were spent on something else."""
        # Moving the start of the interval leaves the seconds out of it.
        self._since += seconds

    def measure(self, *, tokens: int, waiting: float, nll: float, num_bytes: float) -> Throughput:
        """Return the metrics since the last line; `nll` (nats) and `num_bytes` are those of the last step."""
        now = self._clock()
        # Clocks may return equal times for fast steps.
        seconds = max(now - self._since, 1e-9)
        added = tokens - self._tokens_then
        waited = waiting - self._waiting_then
        self.tokens = self.tokens + added
        self.seconds = self.seconds + seconds
        self.waited = self.waited + waited
        self._since = now
        self._tokens_then = tokens
        self._waiting_then = waiting
        # The first interval of a session adds no tokens: its step compiles, and says nothing about the pace.
        rate = added / seconds if added > 0 else math.nan
        return Throughput(
            bits_per_byte=nll / math.log(2) / num_bytes if num_bytes > 0 else math.nan,
            tokens_per_second=rate,
            mfu=None if self._peak is None else rate * self._flops_per_token / self._peak,
            data_wait_share=min(waited / seconds, 1.0),
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of training over the session; 0 if nothing was measured."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def data_wait_share(self) -> float:
        """Fraction of the training time that was spent waiting for data, over the session."""
        return self.waited / max(self.seconds, 1e-9)
