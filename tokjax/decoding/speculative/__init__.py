"""Speculative decoding: several tokens in one pass of the target, by its own law."""

from tokjax.decoding.speculative.acceptance import (
    Acceptance,
    Grouping,
    disjoint_groups,
    exact,
    exact_match,
    grouped,
    relative_threshold,
    typical_acceptance,
)
from tokjax.decoding.speculative.blocks import BlockPredictor, ModelBlocks, Written
from tokjax.decoding.speculative.drafters import Draft, Drafter, early_exit, prompt_lookup
from tokjax.decoding.speculative.loop import SpeculativeGeneration
from tokjax.decoding.speculative.persona_judge import persona_judge, persona_prompts
from tokjax.decoding.speculative.speculative import speculative_decode
from tokjax.decoding.speculative.verify import Verdict, speculative_verify

__all__ = [
    "Acceptance",
    "BlockPredictor",
    "Draft",
    "Drafter",
    "Grouping",
    "ModelBlocks",
    "SpeculativeGeneration",
    "Verdict",
    "Written",
    "disjoint_groups",
    "early_exit",
    "exact",
    "exact_match",
    "grouped",
    "persona_judge",
    "persona_prompts",
    "prompt_lookup",
    "relative_threshold",
    "speculative_decode",
    "speculative_verify",
    "typical_acceptance",
]
