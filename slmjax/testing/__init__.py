"""Checks of a layer of one's own: what must hold for every token mixer, each as a number and its bound.

    from slmjax.testing import check_mixer
    check_mixer(AttentionConfig(num_heads=4))        # returns a report, or raises MixerError

Files in reading order:

- report.py: properties, their errors and bounds
- operations.py: the operations of a traced function, counted
- subject.py: a small model around a mixer, and the programs that its checks run
- properties.py: one function for each property
- training_step.py: a mixer in a train step
- mixers.py: `check_mixer`
"""

from slmjax.testing.mixers import Level, check_mixer
from slmjax.testing.report import Check, MixerError, Report

__all__ = ["Check", "Level", "MixerError", "Report", "check_mixer"]
