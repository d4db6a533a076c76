"""The experiments of the chapter on naive Bayes and attention: text (live and recorded), length, depth."""

from kexue_utils.attention.naive_bayes_attention.experiments.depth import DEPTH
from kexue_utils.attention.naive_bayes_attention.experiments.lengths import LENGTHS
from kexue_utils.attention.naive_bayes_attention.experiments.text import (
    PYDOC,
    SYMPY,
    attention_bits,
    counted_bits,
    pydoc_split,
    reliability,
)

__all__ = ["DEPTH", "LENGTHS", "PYDOC", "SYMPY", "attention_bits", "counted_bits", "pydoc_split", "reliability"]
