"""Quality estimation of translations without references, learned from synthetic errors (DCSQE).

A generator translates close to references, the alignment says which words are not the reference's,
another model's ranks say how bad they are, a dependency tree widens them to phrases, and an encoder
with two heads learns tags and scores from that.

Reference: "Alleviating Distribution Shift in Synthetic Data for Machine Translation Quality
Estimation", arXiv 2502.19941.
"""

from tokjax.finetuning.quality_estimation.estimator import (
    Example,
    QEBatch,
    QualityEstimator,
    ScoreScale,
    qe_batch,
    qe_example,
)
from tokjax.finetuning.quality_estimation.metrics import score_metrics, tag_metrics
from tokjax.finetuning.quality_estimation.phrases import (
    WEIGHTS,
    Parser,
    Span,
    conllu_parser,
    covered,
    error_spans,
    sentence_score,
    span_severities,
)
from tokjax.finetuning.quality_estimation.synthesis import (
    Judged,
    Pair,
    Synthesis,
    read_synthetic,
    write_synthetic,
)
from tokjax.finetuning.quality_estimation.tags import (
    Severity,
    edited_words,
    severities,
    word_severities,
)
from tokjax.finetuning.quality_estimation.training import (
    Prediction,
    TrainedEstimator,
    balanced_ok_weight,
    evaluate_estimator,
    predict,
    train_estimator,
)
from tokjax.finetuning.quality_estimation.translators import ReferencedSearch, Translator

__all__ = [
    "WEIGHTS",
    "Example",
    "Judged",
    "Pair",
    "Parser",
    "Prediction",
    "QEBatch",
    "QualityEstimator",
    "ReferencedSearch",
    "ScoreScale",
    "Severity",
    "Span",
    "Synthesis",
    "TrainedEstimator",
    "Translator",
    "balanced_ok_weight",
    "conllu_parser",
    "covered",
    "edited_words",
    "error_spans",
    "evaluate_estimator",
    "predict",
    "qe_batch",
    "qe_example",
    "read_synthetic",
    "score_metrics",
    "sentence_score",
    "severities",
    "span_severities",
    "tag_metrics",
    "train_estimator",
    "word_severities",
    "write_synthetic",
]
