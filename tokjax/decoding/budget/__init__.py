"""Budget Guidance: a learned length predictor steers thinking to end within a budget."""

from tokjax.decoding.budget.gamma import (
    Reliability,
    finish_probability,
    fit_gamma,
    gamma_nll,
    guided_logits,
    mean_length,
    mode_length,
)
from tokjax.decoding.budget.guided import (
    BudgetGuided,
    BudgetGuidedParams,
    budget_guided,
    raw_at_guided_steps,
)
from tokjax.decoding.budget.predictor import LengthPredictor, load, save
from tokjax.decoding.budget.traces import concise, newline_tokens, remaining_lengths
from tokjax.decoding.budget.training import (
    TrainedPredictor,
    evaluate_predictor,
    predicted_gammas,
    train_predictor,
)

__all__ = [
    "BudgetGuided",
    "BudgetGuidedParams",
    "LengthPredictor",
    "Reliability",
    "TrainedPredictor",
    "budget_guided",
    "concise",
    "evaluate_predictor",
    "finish_probability",
    "fit_gamma",
    "gamma_nll",
    "guided_logits",
    "load",
    "mean_length",
    "mode_length",
    "newline_tokens",
    "predicted_gammas",
    "raw_at_guided_steps",
    "remaining_lengths",
    "save",
    "train_predictor",
]
