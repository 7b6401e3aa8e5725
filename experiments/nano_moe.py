"""`nano` with a mixture of experts: 8 experts, 2 per token, about the same active parameters.

slmjax train experiments/nano_moe.py
"""

import dataclasses

import slmjax
from slmjax.models import zoo
from slmjax.training import Experiment


def experiment() -> Experiment:
    """Return nano with its feed-forward layers replaced by experts."""
    nano = slmjax.load_experiment("nano")
    return dataclasses.replace(nano, model=zoo.nano_moe(), run=dataclasses.replace(nano.run, name="nano-moe"))
