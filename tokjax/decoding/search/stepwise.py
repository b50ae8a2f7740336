"""Search over steps of a text: step beam, REBASE and sequential Monte Carlo.

A step is what a generator writes up to its stop (a new line, say). Each turn continues all live
texts by one step, in one call of `decode` with a fixed number of rows; rows without work repeat
another's and are thrown away. A text so far is read anew in every turn: beside one forward pass a
token, each turn costs a pass over the texts so far. Programs are compiled for each bucket of
lengths that texts grow through, not for each turn.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tokjax.decoding.predictors import as_predictor
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.search.drawing import (
    Cost,
    Generator,
    Ids,
    Scorer,
    at_least_one,
    lists,
    row_seed,
    scored,
)
from tokjax.decoding.search.step_rules import (
    Aggregation,
    aggregate,
    effective_sample_size,
    rebase_allocation,
    systematic_resampling,
)
from tokjax.decoding.stops import any_of, never, on_tokens
from tokjax.errors import ConfigError, DataError


@dataclass(frozen=True)
class Path:
    """A continuation and how it came about.

    Attributes:
        tokens: all new ids.
        steps: where each step ends in them.
        rewards: the scorer's number behind each step.
        value: what the search ranks it by.
        finished: whether it ended, instead of being cut at the last step.
        logprob: of the whole, by the model at temperature 1.
        confidences: of each step, the mean probability of its tokens, where the generator tells.
    """

    tokens: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    rewards: tuple[float, ...] = ()
    value: float = 0.0
    finished: bool = False
    logprob: float = 0.0
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class StepSearch:
    """What a search over steps ends with.

    Attributes:
        paths: of each prompt, best first; finished and unfinished ones compete by value.
        cost: of drawing all steps, discarded ones included; the scorer's is its own.
    """

    paths: list[list[Path]]
    cost: Cost

    @property
    def tokens(self) -> list[Ids]:
        """The best continuation of each prompt."""
        return [list(found[0].tokens) for found in self.paths]

    @property
    def finished(self) -> list[Path | None]:
        """The best finished path of each prompt; None where all were cut at the last step."""
        return [next((path for path in found if path.finished), None) for found in self.paths]


class Turns:
    """Continues paths by steps.

    Args:
        generator: draws steps; of several, each those of its turn.
        prompts: what is continued.
        score: of prompts and continuations so far.
        ends: ids that end a text.
        rows: drawn in every turn.
        max_steps: most turns.
        seed: of all randomness.
        more: tokens that texts grow by besides their steps.
    """

    def __init__(
        self,
        generator: Generator | Sequence[Generator],
        prompts: Prompts,
        score: Scorer,
        ends: Iterable[int],
        *,
        rows: int,
        max_steps: int,
        seed: int,
        more: int = 0,
    ):
        at_least_one(max_steps=max_steps)
        self.ends = frozenset(int(i) for i in ends)
        given = [generator] * max_steps if isinstance(generator, Generator) else list(generator)
        stops = [never() if each.stop is None else each.stop for each in given]
        self.generators = [
            dataclasses.replace(each, stop=any_of(stop, on_tokens(self.ends)))
            for each, stop in zip(given, stops, strict=True)
        ]
        self.prompts, self.score, self.rows, self.seed = lists(prompts), score, rows, seed
        self.turn, self.cost = 0, Cost()
        limit = as_predictor(given[0].model).max_positions
        room = sum(each.max_new_tokens for each in given) + more
        for b, prompt in enumerate(self.prompts):
            if len(prompt) + room > limit:
                raise ConfigError(
                    f"prompt {b} has {len(prompt)} tokens; with max_steps={max_steps} of up to "
                    f"{max(each.max_new_tokens for each in given)} tokens that exceeds "
                    f"max_positions={limit}: lower "
                    f"max_steps or the generator's max_new_tokens"
                )

    def extend(self, live: Sequence[Sequence[Path]]) -> list[list[Path]]:
        """Returns each prompt's paths with one more step each, scored, with the value left."""
        work = [(b, i, path) for b, paths in enumerate(live) for i, path in enumerate(paths)]
        assert 0 < len(work) <= self.rows
        full = work + [work[0]] * (self.rows - len(work))
        drawn = self.generators[self.turn](
            [[*self.prompts[b], *path.tokens] for b, _, path in full],
            [row_seed(self.seed, b, self.turn, i) for b, i, _ in full],
        )
        self.turn += 1
        self.cost += drawn.cost
        told = (
            [()] * len(full) if drawn.confidences is None else drawn.confidences[:, None].tolist()
        )
        new = [
            dataclasses.replace(
                path,
                tokens=(*path.tokens, *ids),
                steps=(*path.steps, len(path.tokens) + len(ids)),
                finished=ids[-1] in self.ends,
                logprob=path.logprob + float(logprob),
                confidences=(*path.confidences, *told),
            )
            for (_, _, path), ids, logprob, told in zip(
                work, drawn.tokens, drawn.logprobs, told, strict=False
            )
        ]
        rewards = scored(
            self.score, [self.prompts[b] for b, _, _ in work], [list(path.tokens) for path in new]
        )
        found: list[list[Path]] = [[] for _ in live]
        for (b, _, _), path, reward in zip(work, new, rewards, strict=True):
            rewarded = dataclasses.replace(path, rewards=(*path.rewards, float(reward)))
            found[b].append(rewarded)
        return found


def _valued(paths: Sequence[Path], how: Aggregation) -> list[Path]:
    return [dataclasses.replace(path, value=aggregate(path.rewards, how)) for path in paths]


def _ranked(paths: Sequence[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: -path.value)  # stable: of equals, the earliest


def step_beam(
    generator: Generator,
    prompts: Prompts,
    score: Scorer,
    *,
    beams: int,
    expand: int,
    max_steps: int,
    ends: Iterable[int],
    aggregation: Aggregation = "last",
    seed: int = 0,
) -> StepSearch:
    """Returns the best texts that a beam search over steps finds.

    Each live text is continued by `expand` sampled steps (the prompt by `beams * expand`), and the
    `beams` best go on; finished ones stay among them as long as they are that good. Costs
    `beams * expand` rows a prompt in every turn.

    Args:
        generator: draws steps; its stop ends a step and its `max_new_tokens` is a step's.
        prompts: what to continue.
        score: of prompts and continuations so far, a number for each: a process reward.
        beams: texts kept.
        expand: steps drawn behind each.
        max_steps: most steps of a text.
        ends: ids that end a text, the EOS id usually.
        aggregation: how a text's rewards make its value.
        seed: of all randomness; a row's depends on its prompt's place, the turn and its own place.

    Raises:
        ConfigError: a count is below 1, an unknown aggregation, or texts could exceed the model's
            positions.
        DataError: the scorer's numbers are not one for each, or NaN.

    Reference: Welleck et al., "From Decoding to Meta-Generation: Inference-time Algorithms for
    Large Language Models", arXiv 2406.16838.
    """
    at_least_one(beams=beams, expand=expand)
    aggregate([0.0], aggregation)
    B = len(prompts.lengths)
    turns = Turns(
        generator,
        prompts,
        score,
        ends,
        rows=B * beams * expand,
        max_steps=max_steps,
        seed=seed,
    )
    pools: list[list[Path]] = [[Path()] for _ in range(B)]
    for turn in range(max_steps):
        copies = beams * expand if turn == 0 else expand
        live = [[p for p in pool if not p.finished for _ in range(copies)] for pool in pools]
        if not any(live):
            break
        new = turns.extend(live)
        done = [[path for path in pool if path.finished] for pool in pools]
        pools = [
            _ranked([*kept, *_valued(found, aggregation)])[:beams]
            for kept, found in zip(done, new, strict=True)
        ]
    return StepSearch(pools, turns.cost)


def rebase(
    generator: Generator,
    prompts: Prompts,
    score: Scorer,
    *,
    budget: int,
    max_steps: int,
    ends: Iterable[int],
    temperature: float = 0.2,
    aggregation: Aggregation = "last",
    seed: int = 0,
) -> StepSearch:
    """Returns all texts that REBASE ends with: steps are spent in proportion to softmax(value / T).

    The prompt gets `budget` children; then what the finished texts leave of the budget is allotted
    to the unfinished ones by `rebase_allocation`. Finished texts are usually put to a weighted
    `vote`. Costs `budget` rows a prompt in every turn.

    Args:
        generator: draws steps; its stop ends a step and its `max_new_tokens` is a step's.
        prompts: what to continue.
        score: of prompts and continuations so far, a number for each: a process reward.
        budget: texts of each prompt.
        max_steps: most steps of a text.
        ends: ids that end a text, the EOS id usually.
        temperature: lower spends more on the best.
        aggregation: how a text's rewards make its value.
        seed: of all randomness; a row's depends on its prompt's place, the turn and its own place.

    Raises:
        ConfigError: an impossible count, temperature or aggregation, or texts could exceed the
            model's positions.
        DataError: the scorer's numbers are not one for each, or NaN.

    Reference: Wu et al., "Inference Scaling Laws: An Empirical Analysis of Compute-Optimal
    Inference for Problem-Solving with Language Models", arXiv 2408.00724.
    """
    at_least_one(budget=budget)
    rebase_allocation([0.0], budget, temperature)
    aggregate([0.0], aggregation)
    B = len(prompts.lengths)
    turns = Turns(generator, prompts, score, ends, rows=B * budget, max_steps=max_steps, seed=seed)
    finished: list[list[Path]] = [[] for _ in range(B)]
    live = [[Path()] * budget for _ in range(B)]
    leaves: list[list[Path]] = [[] for _ in range(B)]
    for _ in range(max_steps):
        if not any(live):
            break
        leaves = [_valued(found, aggregation) for found in turns.extend(live)]
        live = []
        for b, found in enumerate(leaves):
            finished[b] += [path for path in found if path.finished]
            leaves[b] = [path for path in found if not path.finished]
            left = budget - len(finished[b])
            counts = np.zeros(0, int)
            if leaves[b]:
                counts = rebase_allocation([p.value for p in leaves[b]], left, temperature)
            live.append([p for p, n in zip(leaves[b], counts, strict=False) for _ in range(n)])
    return StepSearch(
        [_ranked([*done, *cut]) for done, cut in zip(finished, leaves, strict=True)], turns.cost
    )


@dataclass(frozen=True, eq=False)
class Particles:
    """What sequential Monte Carlo ends with, a weighted sample of each prompt's texts.

    Attributes:
        paths: the particles; each one's value is its log-potential.
        weights: of each, summing to one; all 0 where every particle's potential is.
        log_normalizer: of each prompt, an estimate of log E[potential] under the generator (its
            exponential is unbiased).
        effective_sizes: of each prompt's weights behind every turn, before resampling.
        cost: of drawing all steps.
    """

    paths: list[list[Path]]
    weights: Float[np.ndarray, "B N"]
    log_normalizer: Float[np.ndarray, "B"]
    effective_sizes: list[list[float]]
    cost: Cost


def particle_filter(
    generator: Generator,
    prompts: Prompts,
    log_potential: Scorer,
    *,
    particles: int,
    max_steps: int,
    ends: Iterable[int],
    threshold: float = 0.5,
    seed: int = 0,
) -> Particles:
    """Returns weighted texts of the generator's distribution times a potential.

    Each turn continues every particle by a step and multiplies its weight by how its potential has
    grown (by the first potential itself at first); where the effective sample size falls below
    `threshold * particles`, particles are resampled (systematically) and weigh the same again. Only
    the potential of whole texts decides what is sampled; those of parts say where to look. Costs
    `particles` rows a prompt in every turn.

    Args:
        generator: draws steps; its stop ends a step and its `max_new_tokens` is a step's.
        prompts: what to continue.
        log_potential: of prompts and continuations so far, the logarithm of a number of 0 or more
            for each: reward / temperature, say; -inf where a text is impossible.
        particles: of each prompt.
        max_steps: most steps of a text.
        ends: ids that end a text, the EOS id usually.
        threshold: 0 never resamples (importance weighting), above 1 always.
        seed: of all randomness; a row's depends on its prompt's place, the turn and its own place.

    Raises:
        ConfigError: an impossible count or threshold, or texts could exceed the model's positions.
        DataError: the potentials are not one for each, or one is NaN or infinite.

    Reference: Doucet & Johansen, "A Tutorial on Particle Filtering and Smoothing", 2009; for
    language models: Lew et al., "Sequential Monte Carlo Steering of Large Language Models using
    Probabilistic Programs", arXiv 2306.03081.
    """
    at_least_one(particles=particles)
    if not threshold >= 0:
        raise ConfigError(f"threshold={threshold} must be 0 or more")
    B = len(prompts.lengths)
    turns = Turns(
        generator,
        prompts,
        log_potential,
        ends,
        rows=B * particles,
        max_steps=max_steps,
        seed=seed,
    )
    pools = [[Path()] * particles for _ in range(B)]
    logw, normal = np.zeros((B, particles)), np.zeros(B)
    sizes: list[list[float]] = [[] for _ in range(B)]
    for turn in range(max_steps):
        possible = np.isfinite(logw)
        live = [
            [i for i, p in enumerate(pool) if not p.finished and possible[b, i]]
            for b, pool in enumerate(pools)
        ]
        if not any(live):
            break
        new = turns.extend([[pools[b][i] for i in own] for b, own in enumerate(live)])
        for b in range(B):
            if not live[b]:
                continue
            for i, path in zip(live[b], new[b], strict=True):
                if path.rewards[-1] == np.inf:
                    raise DataError(f"the log-potential of continuation {path.tokens} is infinite")
                logw[b, i] += path.rewards[-1] - pools[b][i].value
                pools[b][i] = dataclasses.replace(path, value=path.rewards[-1])
            weights, _ = _normalized(logw[b])
            sizes[b].append(effective_sample_size(weights))
            going = turn + 1 < max_steps and not all(path.finished for path in pools[b])
            if going and 0 < sizes[b][-1] < threshold * particles:
                offset = np.random.default_rng(row_seed(seed, b, turn)).random()
                kept = systematic_resampling(weights, offset)
                normal[b] += _normalized(logw[b])[1]
                pools[b], logw[b] = [pools[b][i] for i in kept], 0.0
    final = [_normalized(row) for row in logw]
    return Particles(
        pools,
        np.stack([weights for weights, _ in final]),
        normal + np.array([mean for _, mean in final]),
        sizes,
        turns.cost,
    )


def _normalized(logw: Float[np.ndarray, "N"]) -> tuple[Float[np.ndarray, "N"], float]:
    """Returns the weights, summing to one, and the logarithm of their mean before that."""
    largest = logw.max()
    if np.isneginf(largest):
        return np.zeros(logw.shape), -np.inf
    weights = np.exp(logw - largest)
    return weights / weights.sum(), float(largest + np.log(weights.mean()))
