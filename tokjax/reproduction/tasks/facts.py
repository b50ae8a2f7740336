"""Facts looked up aloud: traces of segments that retrieve, check and revise a value.

A question names a thing and an attribute. Thinking is a row of segments, each a state, a value and
a closing mark; then comes the answer. What is retrieved is mostly right. A check repeats it. A
backtrack behind a right value takes a wrong one, and behind a wrong value mostly the right one; as
right values are the commoner, backtracking right behind retrieval spoils more than it mends.

    <s> thing attribute <think> RETRIEVE v ; CHECK v ; </think> v </s>
"""

from dataclasses import dataclass

import numpy as np

THINGS, ATTRIBUTES, VALUES = 32, 4, 16
BOS, END, THINK, ANSWER, MARK = 0, 1, 2, 3, 4
# States, with the numbers they have among those of MR-ALIGN.
FRAME, BACKTRACK, CHECK, RETRIEVE = 5, 6, 7, 8
STATES = {FRAME: 1, BACKTRACK: 2, CHECK: 3, RETRIEVE: 8}
THING = 9
ATTRIBUTE = THING + THINGS
VALUE = ATTRIBUTE + ATTRIBUTES
VOCABULARY = VALUE + VALUES
PROMPT = 4  # ids of a question
SEGMENT = 3  # ids of a segment
MOST_SEGMENTS = 6
NEW_TOKENS = SEGMENT * MOST_SEGMENTS + 3

Question = tuple[int, int]


def facts(seed: int) -> np.ndarray:
    """Returns the value of each thing's attributes."""
    return np.random.default_rng(seed).integers(0, VALUES, (THINGS, ATTRIBUTES))


def questions() -> list[Question]:
    """Returns all questions there are."""
    return [(thing, attribute) for thing in range(THINGS) for attribute in range(ATTRIBUTES)]


def prompt(question: Question) -> list[int]:
    """Returns the ids of a question, up to where thinking begins."""
    return [BOS, THING + question[0], ATTRIBUTE + question[1], THINK]


def trace(truth: int, rng: np.random.Generator) -> list[int]:
    """Returns thinking and answer as the base model learns them, with its bad habit."""

    def other(value: int) -> int:
        return int((value + rng.integers(1, VALUES)) % VALUES)

    value = truth if rng.random() < 0.85 else other(truth)
    segments = [(FRAME, value)] if rng.random() < 0.5 else []
    segments = [(state, int(rng.integers(VALUES))) for state, _ in segments]
    segments.append((RETRIEVE, value))
    state = RETRIEVE
    while len(segments) < MOST_SEGMENTS:
        right = value == truth
        chances = {
            RETRIEVE: {CHECK: 0.35, BACKTRACK: 0.4},
            CHECK: {BACKTRACK: 0.1 if right else 0.8},
            BACKTRACK: {CHECK: 0.3},
        }[state]
        drawn = rng.random()
        following = None
        for name, chance in chances.items():
            if drawn < chance:
                following = name
                break
            drawn -= chance
        if following is None:
            break
        if following == BACKTRACK:
            value = truth if not right and rng.random() < 0.9 else other(value)
        segments.append((following, value))
        state = following
    said = [part for state, v in segments for part in (state, VALUE + v, MARK)]
    return [*said, ANSWER, VALUE + value, END]


@dataclass(frozen=True)
class Read:
    """What a trace says.

    Attributes:
        states: of its segments, as the tokens of states.
        segments: of each token, the number of its segment, -1 from the answer on.
        values: that occur in the thinking.
        answer: the value behind it, or None.
    """

    states: tuple[int, ...]
    segments: tuple[int, ...]
    values: tuple[int, ...]
    answer: int | None


def read(tokens: list[int]) -> Read:
    """Returns what a trace says; whatever is no segment belongs to the segment before it.

    Args:
        tokens: behind the prompt.
    """
    close = tokens.index(ANSWER) if ANSWER in tokens else len(tokens)
    states, segments, values = [], [], []
    for token in tokens[:close]:
        if token in STATES:
            states.append(token)
        segments.append(len(states) - 1)
        if token >= VALUE:
            values.append(token - VALUE)
    behind = tokens[close + 1 : close + 2]
    answer = behind[0] - VALUE if behind and behind[0] >= VALUE else None
    segments += [-1] * (len(tokens) - close)
    return Read(tuple(states), tuple(segments), tuple(values), answer)
