"""SPO: credit of segments of an answer, whose ends are valued by fresh continuations; no critic.

A segment's advantage is the value of the state behind it less that of the state before it. Only
tokens that the policy was unsure of carry it: with `norm="kept"` the loss is divided by their
number. Equal states (the prompt of a group's answers) are continued once.

Reference: "Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large
Language Models", arXiv 2505.23564.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.config import register
from tokjax.data.shuffle import derive_seed
from tokjax.errors import ConfigError
from tokjax.rl.advantages import Shaped, group_advantages
from tokjax.rl.rollout import Rollout
from tokjax.rl.token_rewards import whitened
from tokjax.training.rollouts import Answers

_NOTHING = 1e-6  # advantages of a node that are rounding


def _check(threshold: float, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name}={count} must be at least 1")
    if not threshold >= 0:
        raise ConfigError(f"threshold={threshold} must not be negative; above 1 masks nothing")


def unsure(logprobs: Any, threshold: float) -> Any:
    """Returns where the probability is below the threshold (not at it)."""
    if threshold == 0:
        return logprobs < -np.float32(np.inf)
    return logprobs < np.log(np.float32(threshold))


def cutpoints(logprobs: Float[np.ndarray, "N"], threshold: float) -> Int[np.ndarray, "C"]:
    """Returns the places of an answer's tokens whose probability is below the threshold."""
    return np.flatnonzero(np.asarray(unsure(np.asarray(logprobs, np.float32), threshold)))


def chain_boundaries(cuts: Int[np.ndarray, "C"], interval: int) -> Int[np.ndarray, "K"]:
    """Returns how many tokens lie before each boundary: the states before every m-th cutpoint.

    >>> chain_boundaries(np.array([1, 3, 4, 6, 8]), 2).tolist()
    [1, 4, 8]
    """
    return np.asarray(cuts[::interval], int)


def segment_advantages(
    length: int, kept: Sequence[int] | np.ndarray, values: Sequence[float], reward: float
) -> Float[np.ndarray, "N"]:
    """Returns each token's advantage: that of its segment; 0 before the first boundary.

    >>> segment_advantages(4, [1, 3], [0.25, 0.5], 1.0).tolist()
    [0.0, 0.25, 0.25, 0.5]

    Args:
        length: tokens of the answer.
        kept: tokens before each boundary, ascending.
        values: of the states there.
        reward: of the answer, the value behind its last token.
    """
    found = np.zeros(length, np.float32)
    if not len(kept):
        return found
    ends, after = [*kept[1:], length], [*values[1:], reward]
    for start, end, before, behind in zip(kept, ends, values, after, strict=True):
        found[start:end] = behind - before
    return found


@register("advantage", "spo_chain")
@dataclass(frozen=True)
class SPOChain:
    """Values at every `interval`-th token that the policy was unsure of, from fresh answers."""

    interval: int = 5  # cutpoints from one boundary to the next
    samples: int = 9  # fresh answers from each boundary
    # tokens below this probability are cutpoints, and the only ones trained on; above 1: all
    threshold: float = 0.9
    whiten: bool = True  # mean 0 and variance 1 over the tokens that are trained on
    # id of the token behind which boundaries lie instead, besides the prompt (VinePPO, arXiv
    # 2410.01679, with threshold above 1)
    separator: int | None = None

    def __post_init__(self):
        _check(self.threshold, interval=self.interval, samples=self.samples)

    def gather(self, rollout: Rollout, environment: Any) -> dict[str, Any]:
        """Returns the advantage of every action, from further answers."""
        mask, logprobs = np.asarray(rollout.mask), np.asarray(rollout.logprobs)
        answers = environment.answers
        bounds = [
            self._bounds(logprobs[r][mask[r]], answers.tokens[r]) for r in range(len(logprobs))
        ]
        first: dict[Any, tuple[int, int]] = {}
        for r, kept in enumerate(bounds):
            for n in kept:
                state = (*answers.prompts[r], *answers.tokens[r][:n])
                first.setdefault(state, (r, int(n)))
        found: dict[Any, float] = {}
        if first:
            rows, kept = zip(*first.values(), strict=True)
            values = environment.continued(rows, kept, self.samples).mean(1)
            found = dict(zip(first, values.tolist(), strict=True))
        filled = np.zeros(mask.shape, np.float32)
        for r, kept in enumerate(bounds):
            states = [(*answers.prompts[r], *answers.tokens[r][:n]) for n in kept]
            values = [found[state] for state in states]
            reward = float(np.asarray(rollout.reward)[r])
            filled[r, mask[r]] = segment_advantages(int(mask[r].sum()), kept, values, reward)
        return {"advantage": filled}

    def _bounds(self, logprobs: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        if self.separator is None:
            return chain_boundaries(cutpoints(logprobs, self.threshold), self.interval)
        behind = [i + 1 for i, token in enumerate(tokens[:-1]) if token == self.separator]
        return np.array([0, *behind])

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        found = jnp.asarray(rollout.extra["advantage"])
        kept = rollout.mask & unsure(rollout.logprobs, self.threshold)
        if self.whiten:
            found = whitened(found, jnp.where(kept.any(), kept, rollout.mask))
        return jnp.where(kept, found, 0.0), kept.astype(jnp.float32)


def tree_values(rewards: Float[Array, "P G"], branches: Sequence[int]) -> list[Float[Array, "P N"]]:
    """Returns the values of a tree's nodes by level, the root first: means over their leaves.

    Args:
        rewards: of the leaves, those of a node neighbours.
        branches: children of a node, by level.
    """
    sizes = [math.prod(branches[:level]) for level in range(len(branches) + 1)]
    return [rewards.reshape(rewards.shape[0], size, -1).mean(-1) for size in sizes]


@register("advantage", "spo_tree")
@dataclass(frozen=True)
class SPOTree:
    """Answers drawn as a tree; a node's value is that of its leaves, its baseline its parent's.

    `rollouts.group` must be the product of `branches`: a row is a path from the prompt to a leaf.
    What several paths share counts in the first of them alone, so that each node is trained on
    once. A node that ends early is a leaf; its further rows have no weight and give way to others
    where `rollouts.prompts` asks for more.
    """

    branches: tuple[int, ...] = (6, 6, 6)  # children of the prompt, of each of these, ...
    segment: int = 30  # tokens of a node; those of the last level run to the end
    threshold: float = 0.9  # tokens below this probability alone are trained on; above 1: all
    scale: bool = False  # divide by the standard deviation of the parent's children
    ddof: int = 1  # of that: 1, of a sample, 0, of a population

    def __post_init__(self):
        _check(self.threshold, segment=self.segment)
        if not self.branches or min(self.branches) < 1:
            raise ConfigError(f"branches={self.branches} must be numbers from 1 on, one at least")
        if self.ddof not in (0, 1):
            raise ConfigError(f"ddof={self.ddof} must be 0 or 1")

    def draw(
        self,
        sample: Callable[..., Answers],
        prompts: Sequence[tuple[int, ...]],
        seed: int,
        *,
        group: int,
        limit: int,
    ) -> Answers:
        """Returns the paths of a tree from each prompt, neighbours where they share more.

        Args:
            sample: draws answers: (prompts, seed, group=, limits=).
            prompts: ids.
            seed: of the drawing.
            group: paths wanted from each prompt.
            limit: most tokens of a path.

        Raises:
            ConfigError: that is not the number of the tree's leaves.
        """
        leaves = math.prod(self.branches)
        if group != leaves:
            told = " x ".join(map(str, self.branches))
            raise ConfigError(
                f"rollouts.group={group} must be the number of the tree's leaves, branches: "
                f"{told} = {leaves}"
            )
        nodes = [_Node(i) for i in range(len(prompts))]
        for level, width in enumerate(self.branches):
            last = level == len(self.branches) - 1
            live = [node for node in nodes if not node.stopped and len(node.tokens) < limit]
            grown: list[_Node] = []
            if live:
                left = [limit - len(node.tokens) for node in live]
                found = sample(
                    [(*prompts[node.prompt], *node.tokens) for node in live],
                    derive_seed(seed, "tree", level),
                    group=width,
                    limits=left if last else [min(self.segment, n) for n in left],
                )
                parts = zip(found.tokens, found.logprobs, found.stopped, strict=True)
                grown = [
                    live[i // width].child(tokens, logprobs, bool(stopped))
                    for i, (tokens, logprobs, stopped) in enumerate(parts)
                ]
            children = iter(grown)
            going = set(map(id, live))
            nodes = [
                next(children) if id(node) in going else node
                for node in nodes
                for _ in range(width)
            ]
        return Answers(
            prompts=[tuple(prompts[node.prompt]) for node in nodes],
            tokens=[node.tokens for node in nodes],
            logprobs=[node.logprobs for node in nodes],
            stopped=np.array([node.stopped for node in nodes]),
        )

    def by_level(self, rewards: Float[Array, "P G"]) -> list[Float[Array, "P N"]]:
        """Returns the advantages of the nodes below the root, by level."""
        found = []
        for values, width in zip(
            tree_values(rewards, self.branches)[1:], self.branches, strict=True
        ):
            siblings = values.reshape(-1, width)
            own = group_advantages(siblings, scale=self.scale, ddof=self.ddof, eps=0.0)
            own = jnp.where(jnp.abs(siblings - siblings.mean(-1, keepdims=True)) > _NOTHING, own, 0)
            found.append(own.reshape(values.shape))
        return found

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        levels, G = len(self.branches), rollout.group
        place = jnp.cumsum(rollout.mask, 1) - 1  # of an action within its answer
        level = jnp.clip(place // self.segment, 0, levels - 1)
        leaf = jnp.arange(len(rollout.reward)) % G
        found, first = jnp.zeros(rollout.mask.shape, jnp.float32), jnp.zeros_like(rollout.mask)
        for i, advantages in enumerate(self.by_level(rollout.by_prompt(rollout.reward))):
            below = G // advantages.shape[1]  # leaves of a node
            of_rows = rollout.flat(jnp.repeat(advantages, below, axis=1))
            found = jnp.where(level == i, of_rows[:, None], found)
            first = jnp.where(level == i, (leaf % below == 0)[:, None], first)
        kept: Bool[Array, "R T"] = rollout.mask & first & (found != 0)
        kept &= unsure(rollout.logprobs, self.threshold)
        return jnp.where(rollout.mask, found, 0.0), kept.astype(jnp.float32)


@dataclass(frozen=True)
class _Node:
    """A path from a prompt."""

    prompt: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    stopped: bool = False

    def child(self, tokens: list[int], logprobs: list[float], stopped: bool) -> "_Node":
        return _Node(self.prompt, [*self.tokens, *tokens], [*self.logprobs, *logprobs], stopped)
