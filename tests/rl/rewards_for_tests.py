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
