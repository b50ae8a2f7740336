"""Search: over tokens in one compiled loop, and over whole continuations or their steps by calls
of a `Generator`.
"""

from tokjax.decoding.search.attraction import attraction
from tokjax.decoding.search.beam import beam_search
from tokjax.decoding.search.best_of_n import (
    Accepted,
    BestOfN,
    best_of_n,
    best_of_n_kl_bound,
    best_of_n_law,
    pass_at_k,
    rejection_sampling,
)
from tokjax.decoding.search.contrastive_search import (
    contrastive_search,
    contrastive_search_scores,
)
from tokjax.decoding.search.drawing import Cost, Drawn, Generator, each, row_seed
from tokjax.decoding.search.guided_by_gut import (
    GutSearch,
    confident_vote,
    gut_search,
    repeats_word,
)
from tokjax.decoding.search.hypotheses import Beams, LengthPenalty, gnmt, power
from tokjax.decoding.search.mbr import Choice, bleu, chrf, exact_match, mbr, pairwise, unigram_f1
from tokjax.decoding.search.step_rules import (
    aggregate,
    effective_sample_size,
    puct,
    rebase_allocation,
    systematic_resampling,
)
from tokjax.decoding.search.stepwise import (
    Particles,
    Path,
    StepSearch,
    particle_filter,
    rebase,
    step_beam,
)
from tokjax.decoding.search.stochastic_beam import StochasticBeams, stochastic_beam_search
from tokjax.decoding.search.texts import answers_of_texts, scores_of_texts
from tokjax.decoding.search.value import token_values, value_scorer
from tokjax.decoding.search.voting import SelfConsistency, Vote, self_consistency, vote

__all__ = [
    "Accepted",
    "Beams",
    "BestOfN",
    "Choice",
    "Cost",
    "Drawn",
    "Generator",
    "GutSearch",
    "LengthPenalty",
    "Particles",
    "Path",
    "SelfConsistency",
    "StepSearch",
    "StochasticBeams",
    "Vote",
    "aggregate",
    "answers_of_texts",
    "attraction",
    "beam_search",
    "best_of_n",
    "best_of_n_kl_bound",
    "best_of_n_law",
    "bleu",
    "chrf",
    "confident_vote",
    "contrastive_search",
    "contrastive_search_scores",
    "each",
    "effective_sample_size",
    "exact_match",
    "gnmt",
    "gut_search",
    "mbr",
    "pairwise",
    "particle_filter",
    "pass_at_k",
    "power",
    "puct",
    "rebase",
    "rebase_allocation",
    "rejection_sampling",
    "repeats_word",
    "row_seed",
    "scores_of_texts",
    "self_consistency",
    "step_beam",
    "stochastic_beam_search",
    "systematic_resampling",
    "token_values",
    "unigram_f1",
    "value_scorer",
    "vote",
]
