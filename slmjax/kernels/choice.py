"""What every choice of a form goes by, and its line in the log."""

import functools
import logging
import os

logger = logging.getLogger("slmjax.kernels")


@functools.cache
def announce(choice: str) -> None:
    """Logs a choice the first time that it is made."""
    logger.info(choice)


def allows_fused() -> bool:
    """Whether fused kernels may be picked: unless SLMJAX_FUSED is off."""
    return os.environ.get("SLMJAX_FUSED", "on") != "off"
