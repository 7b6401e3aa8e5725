"""Says once in the log which form of a computation was picked."""

import functools
import logging

logger = logging.getLogger("slmjax.kernels")


@functools.cache
def announce(choice: str) -> None:
    """Logs a choice the first time that it is made."""
    logger.info(choice)
