"""`nano` with sliding windows: three of its four layers see the last 64 tokens, one sees all.

slmjax train experiments/nano_window.py
"""

import dataclasses

import slmjax
from slmjax.models import zoo
from slmjax.training import Experiment


def experiment() -> Experiment:
    """Return nano with windows in most of its layers."""
    nano = slmjax.load_experiment("nano")
    return dataclasses.replace(
        nano, model=zoo.nano_window(), run=dataclasses.replace(nano.run, name="nano-window")
    )
