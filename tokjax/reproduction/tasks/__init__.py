"""Tasks that small models learn in minutes and whose answers can be verified."""

from tokjax.reproduction.tasks.chains import (
    ANSWER,
    LINE_END,
    THINK,
    Chains,
    Question,
    given_answer,
    run_on_chains,
)

__all__ = ["ANSWER", "LINE_END", "THINK", "Chains", "Question", "given_answer", "run_on_chains"]
