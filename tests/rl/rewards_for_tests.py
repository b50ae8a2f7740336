"""Reward functions that misbehave; named by path, since a process of its own imports them."""

import os
import time


def first_token(episode):
    """1 if the answer's first token is even."""
    return float(bool(episode.tokens) and episode.tokens[0] % 2 == 0)


def failing(episode):
    """Raises on answers with an even first token."""
    if episode.tokens and episode.tokens[0] % 2 == 0:
        raise ValueError("an even token")
    return 1.0


def hanging(episode):
    """Never returns for the answer "hang"."""
    while episode.answer == "hang":
        time.sleep(0.1)
    return 1.0


def dying(episode):
    """Ends its process on the answer "die"."""
    if episode.answer == "die":
        os._exit(3)
    return 1.0


def infinite(episode):
    """No number."""
    return float("nan")


def even_characters(episode, reward):
    """A critic: characters with an even code help, none hurts."""
    del reward
    places = [i for i, c in enumerate(episode.answer) if ord(c) < 128 and ord(c) % 2 == 0]
    return [(i, i + 1) for i in places], []


def everything_is_wrong(episode):
    """A feedback: the answer is one wrong statement."""
    text = episode.answer
    return {text: {text: ("Wrong", "5")}} if text.strip() else {}


def odd_characters_are_wrong(episode):
    """A feedback: the answer is one statement, wrong unless its first character's code is even."""
    text = episode.answer
    if not text.strip():
        return {}
    verdict = "Correct" if ord(text[0]) < 128 and ord(text[0]) % 2 == 0 else "Wrong"
    return {text: {text: (verdict, "5")}}
