"""Recommendation: codes of items, and models that write the codes of the next one (DiscRec, TIGER).

Interactions are read and split (`interactions`), items get codes from their embeddings (`rqvae`,
`codes`), an encoder-decoder learns which codes come next (`recommender`, `training`), and a beam
search among the codes recommends.

Reference: "DiscRec: Disentangled Semantic-Collaborative Modeling for Generative Recommendation",
arXiv 2506.15576.
"""

from tokjax.recsys.codes import ItemCodes, unique_codes
from tokjax.recsys.disentangled import Disentangled, item_mask
from tokjax.recsys.interactions import (
    Histories,
    Interactions,
    Split,
    leave_one_out,
    read_interactions,
    read_texts,
)
from tokjax.recsys.recommender import Recommender, RecommenderConfig, RecommenderPredictor
from tokjax.recsys.rqvae import RQVAE, CodesConfig, TrainedCodes, train_codes
from tokjax.recsys.training import (
    FitConfig,
    TrainedRecommender,
    evaluate_recommender,
    recommend,
    train_recommender,
)

__all__ = [
    "RQVAE",
    "CodesConfig",
    "Disentangled",
    "FitConfig",
    "Histories",
    "Interactions",
    "ItemCodes",
    "Recommender",
    "RecommenderConfig",
    "RecommenderPredictor",
    "Split",
    "TrainedCodes",
    "TrainedRecommender",
    "evaluate_recommender",
    "item_mask",
    "leave_one_out",
    "read_interactions",
    "read_texts",
    "recommend",
    "train_codes",
    "train_recommender",
    "unique_codes",
]
