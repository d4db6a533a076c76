"""Recorded runs: small experiments that anyone can repeat, and the files of results that the chapters quote.

`python -m kexue_utils.training run NAME` repeats one; `load(NAME)` gives a chapter its results.
"""

from kexue_utils.training.intervals import bootstrap_interval, paired_difference, t_interval
from kexue_utils.training.recorder import Experiment, load

__all__ = ["Experiment", "bootstrap_interval", "load", "paired_difference", "t_interval"]
