"""Thinking in steps: an attempt whose confidence suffices is the answer, others are refined."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tokjax.decoding.confidence.policies import MeanEntropy, Policy, Signal
from tokjax.decoding.confidence.thoughts import Thoughts
from tokjax.decoding.engine import decode
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError, DataError

Ids = Sequence[int]
Refine = Callable[[list[int], list[list[int]]], Ids]


def with_attempt(before: Ids = (), behind: Ids = (), *, end: Iterable[int] = ()) -> Refine:
    """Returns the refinement whose prompt is the question and the latest attempt.

    >>> with_attempt(before=[8], behind=[9], end=[0])([1, 2], [[5, 0], [6, 7, 0]])
    [1, 2, 8, 6, 7, 9]

    Args:
        before: ids between the two.
        behind: ids that ask for a better one.
        end: ids that end an attempt and are left out (EOS).
    """
    ends = set(end)

    def refine(prompt: list[int], attempts: list[list[int]]) -> list[int]:
        attempt = [i for i in attempts[-1] if i not in ends]
        return [*prompt, *before, *attempt, *behind]

    return refine


def again(prompt: list[int], attempts: list[list[int]]) -> list[int]:
    """Returns the prompt as it is: further steps are independent samples, to be voted on."""
    del attempts
    return prompt


def think(
    model: Any,
    params: Any,
    prompts: Sequence[Ids],
    policy: Policy,
    *,
    max_new_tokens: int,
    steps: int = 4,
    refine: Refine | None = None,
    signal: Signal | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Thoughts:
    """Returns every attempt of a schedule of steps that a confident one ends early.

    Behind each step, rows that the policy stops are done; the others go on with the prompt that
    `refine` makes. Rows still going are gathered, so a step costs what its own rows need; the last
    batch is filled up with rows of one token, so that nothing is compiled for their number. An
    attempt depends on its prompt, the seed, the row and the step alone, so a policy changes only
    how many are made.

    Args:
        model: a `Transformer`, or any `Predictor` whose parameters are not of single rows.
        params: its parameters.
        prompts: ids.
        policy: which rows are done; see `stop_below`.
        max_new_tokens: of one attempt.
        steps: most attempts of a prompt.
        refine: (prompt, attempts so far) -> ids of the next step's prompt; default
            `with_attempt()`. `again` makes further independent samples, for `majority`.
        signal: what the policy judges; default `MeanEntropy()`.
        batch_size: rows decoded at a time; default all prompts, at most 16.
        seed: of all randomness.
        options: of `decode`: transform, sampler, stop.

    Raises:
        ConfigError: a setting is impossible, or a step's prompt leaves no room for its attempt.
        DataError: an id is not in the vocabulary.

    Reference: "Think Just Enough: Sequence-Level Entropy as a Confidence Signal for LLM
    Reasoning", arXiv 2510.08146.
    """
    rows = [[int(i) for i in prompt] for prompt in prompts]
    size = min(16, len(rows)) if batch_size is None else batch_size
    if not rows or steps < 1 or size < 1:
        raise ConfigError(
            f"{len(rows)} prompts, steps={steps} and batch_size={size} must all be at least 1"
        )
    taken = {"record", "samples", "seeds", "key"} & set(options)
    if taken:
        raise ConfigError(f"{sorted(taken)[0]} is set by `think` itself: leave it out")
    refine = with_attempt() if refine is None else refine
    signal = MeanEntropy() if signal is None else signal
    thoughts = Thoughts([[] for _ in rows], [[] for _ in rows], [[] for _ in rows], steps)
    going = list(range(len(rows)))
    for step in range(1, steps + 1):
        asked = {b: _ids(refine, rows[b], thoughts.attempts[b], step) for b in going}
        stopped: set[int] = set()
        for first in range(0, len(going), size):
            batch = going[first : first + size]
            fill = size - len(batch)
            try:
                generation = decode(
                    model,
                    params,
                    Prompts.of([*(asked[b] for b in batch), *[asked[batch[0]]] * fill]),
                    max_new_tokens=np.array([max_new_tokens] * len(batch) + [1] * fill),
                    seeds=_seeds(seed, step, [*batch, *[0] * fill]),
                    record=signal.record,
                    **options,
                )
            except (ConfigError, DataError) as error:
                raise type(error)(f"in step {step} (prompts {batch}): {error}") from error
            values = np.asarray(signal(generation), np.float64)
            for b, attempt, value in zip(batch, generation.rows(), values, strict=False):
                thoughts.attempts[b].append(attempt)
                thoughts.signals[b].append(float(value))
                thoughts.prompt_tokens[b].append(len(asked[b]))
            done = policy(values[: len(batch)], step)
            stopped |= {b for b, is_done in zip(batch, done, strict=True) if is_done}
        going = [b for b in going if b not in stopped]
        if not going:
            break
    return thoughts


def _ids(refine: Refine, prompt: list[int], attempts: list[list[int]], step: int) -> list[int]:
    return prompt if step == 1 else [int(i) for i in refine(prompt, attempts)]


def _seeds(seed: int, step: int, rows: list[int]) -> np.ndarray:
    """Returns a seed for each row and step that does not depend on the batch."""
    made = [np.random.SeedSequence([seed, step, row]).generate_state(1)[0] for row in rows]
    return np.array(made, np.uint32)
