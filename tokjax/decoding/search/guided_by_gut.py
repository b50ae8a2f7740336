"""A search over steps guided by the model's own confidence and by new tokens; no verifier.

Reference: "Guided by Gut: Efficient Test-Time Scaling with Reinforced Intrinsic Confidence",
arXiv 2505.20325. `tokjax.rl.guided_by_gut` has the reward that makes confidence trustworthy.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokjax.decoding.prompts import Prompts
from tokjax.decoding.search.drawing import Cost, Generator, Ids, at_least_one, each
from tokjax.decoding.search.stepwise import Path, Turns
from tokjax.decoding.search.voting import Answer, Vote, vote
from tokjax.errors import ConfigError, DataError, nearest

_VETO = -100.0  # what takes the place of novelty in a candidate that goes in circles
_HOWS = ("majority", "sum", "mean")


def novelty(step: Sequence[int], known: Iterable[int]) -> float:
    """Returns the share of a step's tokens that are not known yet; 0 of an empty step.

    >>> round(novelty([5, 6, 5], {6}), 4)
    0.6667

    Args:
        step: ids, those that occur several times counted as often.
        known: ids of the prompt and of what came before the step.
    """
    known = set(known)
    return sum(token not in known for token in step) / max(len(step), 1)


@dataclass(frozen=True, eq=False)
class GutSearch:
    """What the search ends with.

    Attributes:
        candidates: of each prompt, the steps that each beam chose from last, beams in order; the
            `value` of a path is the confidence of its last step, without novelty.
        kept: of each prompt, the candidate that each beam chose.
        cost: of drawing all steps, discarded ones included.
    """

    candidates: list[list[Path]]
    kept: list[list[Path]]
    cost: Cost


def gut_search(
    generator: Generator,
    prompts: Prompts,
    *,
    candidates: int,
    width: int,
    max_steps: int,
    ends: Iterable[int],
    weight: float = 0.5,
    later: Generator | None = None,
    first_turns: int = 11,
    last: Generator | None = None,
    closing: Sequence[int] = (),
    solved: Callable[[Ids], bool] | None = None,
    circling: Callable[[Ids], bool] | None = None,
    seed: int = 0,
) -> GutSearch:
    """Returns the final candidates of independent beams that go where the model is confident.

    Each of `candidates / width` beams holds one text. In every turn `width` next steps of it are
    drawn, and the one with the largest confidence (the mean probability of its tokens) plus
    `weight` times its share of new tokens is kept; of equals, the first. Costs `candidates` rows a
    prompt in every turn, of which only the beams' texts are kept. Steps of unequal length compete,
    as in the paper; a stop by `not_before` makes them longer.

    Args:
        generator: draws steps; its stop ends a step and its `max_new_tokens` is a step's.
        prompts: what to continue.
        candidates: n of each prompt.
        width: m, steps drawn behind each beam, a divisor of n. 1 is plain sampling.
        max_steps: most steps of a text.
        ends: ids that end a text, the EOS id usually.
        weight: b, of novelty.
        later: draws steps from turn `first_turns` on, at a lower temperature, say.
        first_turns: that `generator` draws.
        last: draws the last turn's, without a stop, say.
        closing: ids put behind every beam before the last turn, to ask for an answer.
        solved: whether a continuation holds its answer, so that its beam ends.
        circling: whether a continuation goes in circles; asked in every tenth turn behind the
            fortieth but not in the last three. Its novelty is then -100, and a beam whose best
            candidate it is ends there.
        seed: of all randomness; a row's depends on its prompt's place, the turn and its own place.

    Raises:
        ConfigError: impossible counts, or texts could exceed the model's positions.
        DataError: the generator does not tell confidences.
    """
    at_least_one(candidates=candidates, width=width, max_steps=max_steps)
    if candidates % width:
        raise ConfigError(f"candidates={candidates} must be a multiple of width={width}")
    if first_turns < 0:
        raise ConfigError(f"first_turns={first_turns} must not be negative")
    B, beams = len(prompts.lengths), candidates // width
    after = generator if later is None else later
    drawing = [generator if turn < first_turns else after for turn in range(max_steps)]
    drawing[-1] = drawing[-1] if last is None else last
    turns = Turns(
        drawing,
        prompts,
        each(lambda ids: 0.0),
        ends,
        rows=B * candidates,
        max_steps=max_steps,
        seed=seed,
        more=len(closing),
    )
    live: list[dict[int, Path]] = [dict.fromkeys(range(beams), Path()) for _ in range(B)]
    finals: list[list[list[Path]]] = [[[] for _ in range(beams)] for _ in range(B)]
    kept: list[list[Path]] = [[Path()] * beams for _ in range(B)]
    for turn in range(max_steps):
        if not any(live):
            break
        if turn == max_steps - 1 and closing:
            live = [
                {j: dataclasses.replace(p, tokens=(*p.tokens, *closing)) for j, p in own.items()}
                for own in live
            ]
        asked = turn > 40 and turn % 10 == 0 and turn < max_steps - 3
        new = turns.extend([[p for p in own.values() for _ in range(width)] for own in live])
        for b, own in enumerate(live):
            for i, (j, before) in enumerate(list(own.items())):
                group = new[b][i * width : (i + 1) * width]
                if not all(path.confidences for path in group):
                    raise DataError("the generator does not tell the confidences of what it draws")
                known = {*turns.prompts[b], *before.tokens}
                veto = [asked and circling is not None and circling(list(p.tokens)) for p in group]
                values = [
                    p.confidences[-1]
                    + (_VETO if out else weight * novelty(p.tokens[len(before.tokens) :], known))
                    for p, out in zip(group, veto, strict=True)
                ]
                best = values.index(max(values))
                finals[b][j] = [_scored(path, turns.ends) for path in group]
                kept[b][j] = finals[b][j][best]
                done = group[best].finished or veto[best]
                if done or (solved is not None and solved(list(group[best].tokens))):
                    del own[j]
                else:
                    own[j] = group[best]
    return GutSearch([[p for g in found for p in g] for found in finals], kept, turns.cost)


def _scored(path: Path, ends: frozenset[int]) -> Path:
    """Returns a path whose value is its last step's confidence, -1 if it holds nothing but ends."""
    empty = all(token in ends for token in path.tokens)
    return dataclasses.replace(path, value=-1.0 if empty else path.confidences[-1])


def confident_vote(
    answers: Sequence[Answer | None],
    scores: Sequence[float],
    how: Literal["majority", "sum", "mean"] = "sum",
    *,
    threshold: float = 0.1,
) -> Vote:
    """Returns the vote of candidates whose score is at least a threshold.

    >>> [confident_vote(["A", "B", "B"], [0.9, 0.3, 0.4], how).answer
    ...  for how in ("majority", "sum", "mean")]
    ['B', 'A', 'A']

    Args:
        answers: of each candidate, None where it has none.
        scores: of each candidate, as the values of `GutSearch.candidates`.
        how: votes count one each, their scores, or an answer counts the mean of its scores.
        threshold: candidates below it do not vote, unless all are below it.

    Raises:
        ConfigError: an unknown rule.
        DataError: scores are too many, too few, or not finite.
    """
    if how not in _HOWS:
        raise ConfigError(f"unknown how={how!r}.{nearest(str(how), _HOWS)}")
    if len(scores) != len(answers):
        raise DataError(f"{len(scores)} scores for {len(answers)} answers: there must be one each")
    passed = [score >= threshold for score in scores]
    if any(passed):
        answers = [a if ok else None for a, ok in zip(answers, passed, strict=True)]
    counts: dict[Any, int] = {}
    for answer in answers:
        counts[answer] = counts.get(answer, 0) + 1
    weights = {
        "majority": [1.0] * len(scores),
        "sum": list(scores),
        "mean": [s / counts[a] for a, s in zip(answers, scores, strict=True)],
    }
    return vote(answers, weights[how])


def repeats_word(
    decode: Callable[[Ids], str], word: str = "wait", *, times: int = 3, characters: int = 150
) -> Callable[[Ids], bool]:
    """Returns whether a word occurs more often than `times` at the end of a continuation.

    Args:
        decode: ids to text, such as a tokenizer's.
        word: in any case.
        times: that are still allowed.
        characters: of the end that is looked at.
    """
    return lambda ids: decode(ids)[-characters:].lower().count(word.lower()) > times
