"""Attention as a generalised, parametrised naive Bayes.

Source: 《Naive Bayes is all you need ?》, Jianlin Su, https://kexue.fm/archives/9648
"""

from .attention_lm import AttentionPool, SkipGramAttentionLM, SkipGramExperts, additive_scores
from .latent import dirac_limit_coefficient, softmax_laplacian
from .ngram import NGramNaiveBayes
from .pooling import (
    combine_log_probs,
    in_context_posterior,
    kl_divergence,
    log_normalize,
    pool_objective,
    strict_naive_bayes,
)
from .worlds import NaiveBayesWorld, conditionals_by_enumeration, exact_nb_world, posterior_by_enumeration

__all__ = [
    "AttentionPool",
    "NGramNaiveBayes",
    "NaiveBayesWorld",
    "SkipGramAttentionLM",
    "SkipGramExperts",
    "additive_scores",
    "combine_log_probs",
    "conditionals_by_enumeration",
    "dirac_limit_coefficient",
    "exact_nb_world",
    "in_context_posterior",
    "kl_divergence",
    "log_normalize",
    "pool_objective",
    "posterior_by_enumeration",
    "softmax_laplacian",
    "strict_naive_bayes",
]
