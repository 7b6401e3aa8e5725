"""The mixture-of-experts sibling of `nano`: 8 experts of which a token uses 2, about the same active
parameters.

slmjax train experiments/nano_moe.py
"""

import dataclasses

import slmjax
from slmjax.models import zoo
from slmjax.training import Experiment


def experiment() -> Experiment:
    """nano with its feed-forward layers replaced by experts."""
    nano = slmjax.load_experiment("nano")
    return dataclasses.replace(nano, model=zoo.nano_moe(), run=dataclasses.replace(nano.run, name="nano-moe"))
