"""Cost of a model: sizes and FLOPs computed from its config; time, memory and energy measured here.

    measure_efficiency(loaded).decode_tokens_per_second

FLOPs are those of `models/zoo/costs.py`; times are medians over rounds of greedy decoding.
"""

import dataclasses
import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from slmjax.checkpoints.loading import Loaded
from slmjax.models import zoo
from slmjax.sampling import SamplingConfig, sample
from slmjax.telemetry.peak_memory import peak_bytes

ROUNDS = 5
NEW_TOKENS = 64
ENERGY_SECONDS = 10.0  # of decoding, at least: the counters are read about once a second
JOULES_PER_KWH = 3.6e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Costs of a model for one sequence at a time."""

    parameters: int
    active_parameters: int  # parameters that one token uses: of the experts, only the selected ones
    bytes_by_dtype: dict[str, int]  # of the loaded parameters
    forward_flops_per_token: float  # at the context length
    training_flops_per_token: float  # forward and backward
    # decoding state of a full context, divided by its length, in the dtype of the computation
    cache_bytes_per_token: float
    cache_bytes: int  # decoding state of a full context
    prompt_tokens: int  # of the prompt that is timed
    time_to_first_token: float  # seconds, median
    decode_tokens_per_second: float  # after the first, median; NaN if it is too short to measure
    peak_memory_bytes: int  # of the device; of the whole process on a CPU
    energy_joules_per_token: float | None  # of decoding, by codecarbon; None if not measured


def measure_efficiency(
    loaded: Loaded, *, energy: bool = False, prompt_tokens: int | None = None
) -> Efficiency:
    """Measure a model on one device, with greedy decoding after random tokens.

    Args:
      loaded: the model, from `load_model`.
      energy: measure energy as well, for about ten seconds (the `energy` extra). Codecarbon estimates from
        the processor's rated power what it cannot read from the machine's counters.
      prompt_tokens: length of the prompt (none: half of the context, at most 512).

    Raises:
      ValueError: the prompt leaves no space in the context, or energy is measured without codecarbon.
    """
    config = loaded.config
    tracker = _energy_tracker() if energy else None  # a missing package raises before the measurements
    # The rest of a short context is for decoding.
    length = min(config.context_length // 2, 512) if prompt_tokens is None else prompt_tokens
    if not 1 <= length < config.context_length - 1:
        raise ValueError(
            f"prompt_tokens={length} must be from 1 to {config.context_length - 2}, to leave space in the "
            "context"
        )
    new_tokens = min(NEW_TOKENS, config.context_length - length)
    # The time hardly depends on the tokens; random ones also spread over the experts.
    prompt = np.random.default_rng(0).integers(0, config.known_vocab_size, length).tolist()

    def decode(count: int, prompt: Sequence[int] = prompt) -> float:
        started = time.perf_counter()
        settings = SamplingConfig(temperature=0.0, max_tokens=count)
        # Without an EOS, so that every round decodes the same number of tokens.
        sample(loaded.definition, loaded.params, loaded.buffers, [prompt], config=settings, eos_id=None)
        return time.perf_counter() - started

    # One shape for the prompt alone and one for decoding: neither compilation is timed.
    for count in (1, new_tokens):
        decode(count)  # compiles
    # Medians, since a first round or another process may take long.
    first = statistics.median(decode(1) for _ in range(ROUNDS))
    total = statistics.median(decode(new_tokens) for _ in range(ROUNDS))
    costs = zoo.describe(config)
    dims = config.layer_dims()
    cache = zoo.state_size(config, length=config.context_length).bytes(np.dtype(dims.dtype).itemsize)
    sizes: dict[str, int] = {}
    for leaf in loaded.params.values():
        sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + leaf.size * leaf.dtype.itemsize
    # Tiny models take less time for a token than the measurement varies by: then there is no speed.
    decoding = total - first if new_tokens > 1 and total > first else math.nan
    return Efficiency(
        parameters=costs.parameters,
        active_parameters=costs.active_parameters,
        bytes_by_dtype=sizes,
        # A backward pass has two products for each one of the forward pass.
        forward_flops_per_token=costs.inference_flops_per_token,
        training_flops_per_token=costs.training_flops_per_token,
        cache_bytes_per_token=cache / config.context_length,
        cache_bytes=cache,
        prompt_tokens=length,
        time_to_first_token=first,
        # The first token is part of the prompt's time, and is subtracted from both.
        decode_tokens_per_second=(new_tokens - 1) / decoding,
        peak_memory_bytes=peak_bytes(jax.devices()[:1]),
        energy_joules_per_token=None
        if tracker is None
        else _energy(tracker, functools.partial(decode, prompt=prompt[:1]), new_tokens),
    )


def _energy_tracker() -> Any:
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError as error:
        raise ValueError(
            f"energy needs codecarbon, which is not installed ({error}): pip install 'slmjax[energy]'"
        ) from error
    # codecarbon logs messages before it reads its log_level.
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    # The country is required. It only changes grams of carbon, which are not reported here.
    return OfflineEmissionsTracker(
        country_iso_code="USA",
        save_to_file=False,
        log_level="error",
        measure_power_secs=1,
        allow_multiple_runs=True,
    )


def _energy(tracker: Any, decode: Callable[[int], float], new_tokens: int) -> float:
    """Return joules per new token after a prompt of one token."""
    num_decoded = 0
    decode(new_tokens)  # compiles
    tracker.start()
    started = time.perf_counter()
    # Counters are coarse: a single round could fall between two readings.
    while time.perf_counter() - started < ENERGY_SECONDS:
        decode(new_tokens)
        num_decoded += new_tokens
    tracker.stop()
    return float(tracker.final_emissions_data.energy_consumed) * JOULES_PER_KWH / num_decoded
