"""Rewards in a process of their own: one that raises or hangs costs its reward, not the run."""

import contextlib
import math
import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np

from tokjax.config.schema import registered_name
from tokjax.rl.rewards import Episode, Reward

_START_S = 120.0  # for the process to begin; it imports what the rewards need


@dataclass
class Judged:
    """What a judge says of episodes.

    Attributes:
        scores: of each reward (before its weight) by name, one number an episode; 0 where it
            failed.
        errors: rewards that raised, or were not finite.
        timeouts: episodes that took too long; all their rewards are 0.
        first_error: what the first of these was.
    """

    scores: dict[str, np.ndarray] = field(default_factory=dict)
    errors: int = 0
    timeouts: int = 0
    first_error: str = ""


class Judge:
    """Calls rewards on episodes in a process beside this one; a context manager.

    Args:
        rewards: to call; pickled, so a reward's class must be importable.
        timeout_s: most seconds for the rewards of one episode; the process is then killed and
            another one goes on with the next.
    """

    def __init__(self, rewards: Sequence[Reward], timeout_s: float):
        self._rewards, self._timeout_s = tuple(rewards), timeout_s
        self._process: Any = None
        self._pipe: Connection | None = None
        self.names = names_of(rewards)

    def __call__(self, episodes: Sequence[Episode]) -> Judged:
        """Returns the rewards of episodes."""
        found = Judged({name: np.zeros(len(episodes), np.float32) for name in self.names})
        first = 0 if self._rewards else len(episodes)  # without rewards no process is begun
        while first < len(episodes):
            first = self._ask(episodes, first, found)
        return found

    def _ask(self, episodes: Sequence[Episode], first: int, found: Judged) -> int:
        """Judges from an episode on until all are done or one takes too long; returns the next."""
        pipe = self._start()
        # Where the process is gone, receiving says so below.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            pipe.send(list(episodes[first:]))
        for i in range(first, len(episodes)):
            try:
                late = not pipe.poll(self._timeout_s)
                answer = None if late else pipe.recv()
            except (EOFError, ConnectionResetError):
                late, answer = False, None
            if answer is None:
                self.close()
                found.timeouts += late
                found.errors += not late
                why = f"took over {self._timeout_s:g} s" if late else "ended the judging process"
                found.first_error = found.first_error or f"a reward {why}, on {_short(episodes[i])}"
                return i + 1
            for name, value in zip(self.names, answer, strict=True):
                if isinstance(value, str):
                    found.errors += 1
                    found.first_error = found.first_error or (
                        f"reward {name!r}: {value}, on {_short(episodes[i])}"
                    )
                else:
                    found.scores[name][i] = value
        return len(episodes)

    def _start(self) -> Connection:
        if self._pipe is not None:
            return self._pipe
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._rewards), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(_START_S) or self._pipe.recv() != "ready":
            self.close()
            raise RuntimeError(f"the process that judges answers did not begin in {_START_S:g} s")
        return self._pipe

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def names_of(rewards: Sequence[Reward]) -> list[str]:
    """Returns a name for each reward: that of its kind, numbered where there are several."""
    kinds = [registered_name(type(r)) or type(r).__name__ for r in rewards]
    return [
        k if kinds.count(k) == 1 else f"{k}_{kinds[: i + 1].count(k)}" for i, k in enumerate(kinds)
    ]


def _serve(pipe: Connection, rewards: Sequence[Reward]) -> None:
    """Answers lists of episodes with a list of numbers (or texts of errors) for each, for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's business
    pipe.send("ready")
    while True:
        try:
            episodes = pipe.recv()
        except EOFError:
            return
        for episode in episodes:
            pipe.send([_reward(reward, episode) for reward in rewards])


def _reward(reward: Reward, episode: Episode) -> float | str:
    try:
        value = float(reward(episode))
    except Exception as error:  # the user's own code: it is counted and told, not hidden
        return f"{type(error).__name__}: {error}"
    return value if math.isfinite(value) else f"{value} is not finite"


def _short(episode: Episode) -> str:
    text = episode.answer if len(episode.answer) <= 80 else episode.answer[:77] + "..."
    return repr(text)
