"""Checks that all processes of a run do the same: they compare values, and share their errors.

    require_same({"optim": {"lr": 3e-4}}, remedy="Start all processes with the same command")
    data = in_all_processes(lambda: prepare(...), activity="preparing the data")

Processes that differ would train on together with different rates, or wait for each other forever in
different collectives. Every process calls each of these functions, in the same order; a single process
communicates with none.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from slmjax.config import differences

T = TypeVar("T")
_MOST_NAMED = 5  # differing values in a message


class Disagreement(ValueError):
    """Processes of a run have different values; the message names them."""


def require_same(values: Mapping[str, Any], *, remedy: str) -> None:
    """Check that all processes have the same JSON values.

    Args:
      values: a tree of them; its dotted paths are the names in the message.
      remedy: what to do if they differ, a sentence.

    Raises:
      Disagreement: in every process, if any of them differs; the message names the first differing paths,
        with each value and the processes that have it.
    """
    if jax.process_count() == 1:
        return
    _check_devices()
    text = json.dumps(values, sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    # Digests have one size, as a collective needs. The values themselves are sent only if they differ.
    digests = multihost_utils.process_allgather(digest)
    if (digests == digests[0]).all():
        return
    raise Disagreement(f"the processes of this run differ: {disagreement(_gather(values))}. {remedy}")


def _check_devices() -> None:
    # Known without communication, which needs as many devices in every process.
    owners = [device.process_index for device in jax.devices()]
    counts = [{"number of devices": owners.count(rank)} for rank in range(jax.process_count())]
    if text := disagreement(counts):
        raise Disagreement(f"the processes of this run differ: {text}. Start all of them on as many devices")


def disagreement(values: list[Any]) -> str:
    """Return a text that names the paths in which the values of the processes differ."""
    paths = [path for other in values[1:] for path, _ in differences(values[0], other)]
    named = [_of_each(path, values) for path in dict.fromkeys(paths)]
    further = f"; and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return "; ".join(named[:_MOST_NAMED]) + further


def _of_each(path: str, values: list[Any]) -> str:
    """Return a text such as "optim.lr is 0.1 (process 0), 0.2 (processes 1, 2)"."""
    changes = [dict(differences(values[0], value)) for value in values]
    first = next(pairs[path][0] for pairs in changes if path in pairs)
    ranks: dict[str, list[int]] = {}
    for rank, pairs in enumerate(changes):
        own = pairs[path][1] if path in pairs else first
        ranks.setdefault(json.dumps(own), []).append(rank)
    return f"{path} is " + ", ".join(f"{text} ({_processes(them)})" for text, them in ranks.items())


def _processes(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def in_all_processes(action: Callable[[], T], *, activity: str) -> T:
    """Run an action that may fail, and return its result if it succeeded in all processes.

    Otherwise the processes where it succeeded would wait for those where it failed.

    Args:
      action: it may communicate only if it does so in every process, also where it fails.
      activity: for the message, such as "preparing the data".

    Raises:
      Exception: where the action failed, its error.
      ValueError: elsewhere; the message has the errors of the others.
    """
    if jax.process_count() == 1:
        return action()
    result: Any = None
    error: Exception | SystemExit | None = None
    try:
        result = action()
    except (Exception, SystemExit) as raised:
        error = raised
    has_failed = multihost_utils.process_allgather(np.asarray([error is not None], np.uint8))
    if not has_failed.any():
        return result
    text = "its output says why" if isinstance(error, SystemExit) else str(error)
    errors = _gather(None if error is None else text)
    if error is not None:
        raise error
    texts = [f"process {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
    raise ValueError(f"{activity} failed in another process: {'; '.join(texts)}")


def _gather(value: Any) -> list[Any]:
    """Return the JSON values of all processes, in their order."""
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # Arrays of a collective have the same shape in every process, so texts are padded to the longest.
    lengths = multihost_utils.process_allgather(np.asarray([encoded.size], np.int32))[:, 0]
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: encoded.size] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]
