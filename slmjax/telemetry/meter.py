"""What a run's steps come to between two lines of its log: pace, utilisation, waiting, bits per byte.

    meter = Meter(flops_per_token=flops, peak_flops=peak, tokens=0, waiting=0.0)
    figures = meter.measure(tokens=5120, waiting=0.1, nll=1.7e4, num_bytes=9e3)

`tokens` and `waiting` are totals so far; what is measured is what was added since the last line.
"""

import dataclasses
import math
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured since the last line."""

    bits_per_byte: float  # of the step itself; NaN where its scored tokens stand for no text
    tokens_per_second: float  # fed, padding left out; NaN where there is nothing to measure by yet
    mfu: float | None  # model FLOPs utilisation, 0 to 1; None where the device's peak is not known
    data_wait_share: float  # of the time, spent waiting for data


class Meter:
    """Seconds and tokens of training: compilation, evaluation and saving are left out by those who do it
    (`leave_out`).
    """

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
        self.waited = 0.0  # of all that was measured
        self.restart(tokens=tokens, waiting=waiting)

    def restart(self, *, tokens: int, waiting: float) -> None:
        """What went before says nothing about the pace."""
        self._since = self._clock()
        self._tokens_then = tokens
        self._waiting_then = waiting

    def leave_out(self, seconds: float) -> None:
        """Seconds since the last line that were spent on something else."""
        self._since += seconds

    def measure(self, *, tokens: int, waiting: float, nll: float, num_bytes: float) -> Throughput:
        """Figures since the last line; `nll` (nats) and `num_bytes` are those of the step itself."""
        now = self._clock()
        seconds = max(now - self._since, 1e-9)
        added = tokens - self._tokens_then
        waited = waiting - self._waiting_then
        self.tokens = self.tokens + added
        self.seconds = self.seconds + seconds
        self.waited = self.waited + waited
        self._since = now
        self._tokens_then = tokens
        self._waiting_then = waiting
        rate = added / seconds if added > 0 else math.nan
        return Throughput(
            bits_per_byte=nll / math.log(2) / num_bytes if num_bytes > 0 else math.nan,
            tokens_per_second=rate,
            mfu=None if self._peak is None else rate * self._flops_per_token / self._peak,
            data_wait_share=min(waited / seconds, 1.0),
        )

    @property
    def tokens_per_second(self) -> float:
        """Over all that was measured; 0 if nothing was."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def data_wait_share(self) -> float:
        """Over all that was measured."""
        return self.waited / max(self.seconds, 1e-9)
