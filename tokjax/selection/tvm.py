"""TVM: the value of every prefix of sampled solutions, told from the solutions alone.

The value of a prefix is the share of right solutions among those of the same problem that begin
with exactly this prefix: an estimate of P(right | problem, prefix). Solutions are rated answers
(source kind "rated"), those of one problem have the same prompt. A verifier is trained on these
labels by the objective `tvm` (see `tokjax.finetuning.tvm`).

Most prefixes are shared at the beginning only; behind that a label is the solution's own outcome.
Look at the sharing depth before the labels are used.

Reference: "Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of
Large Language Models", arXiv 2407.12863.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float64, Int64

from tokjax.config import register
from tokjax.data.artifact import write_artifact
from tokjax.errors import ConfigError, DataError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.selection.rows import Rows, Store
from tokjax.selection.scoring import Found, RowScorer, Target

CHANNEL = "value"  # of the artifact


@dataclass(frozen=True, eq=False)
class Prefixes:
    """What is known of the prefixes of the solutions of one problem.

    Attributes:
        values: of each solution, for each token the value of the prefix that ends with it.
        counts: of each solution, for each token the solutions that begin with this prefix.
    """

    values: list[np.ndarray]
    counts: list[np.ndarray]

    @property
    def depths(self) -> Int64[np.ndarray, "N"]:
        """Tokens at the beginning of each solution that another one begins with too."""
        return np.array([int((own > 1).sum()) for own in self.counts], np.int64)


def prefix_values(
    paths: Sequence[Sequence[int] | np.ndarray], correct: Sequence[float] | np.ndarray
) -> Prefixes:
    """Returns the value of every prefix of the solutions of one problem.

    Equal solutions count as often as they were sampled. The time is that of reading the shared
    tokens once: a prefix that one solution alone has takes its outcome.

    Args:
        paths: ids of each solution, its end token included.
        correct: of each, 1 if it is right and 0 if not, or a grade between.

    Raises:
        DataError: they are not one for each, or no grade.

    >>> found = prefix_values([[1, 2, 3], [1, 2, 4], [1, 5]], [1, 0, 1])
    >>> [[round(float(value), 3) for value in own] for own in found.values]
    [[0.667, 0.5, 1.0], [0.667, 0.5, 0.0], [0.667, 1.0]]
    >>> found.depths.tolist()
    [2, 2, 1]
    """
    grades = np.asarray(correct, np.float64)
    if grades.shape != (len(paths),):
        raise DataError(f"{len(paths)} solutions need as many grades, not {grades.shape}")
    if not ((grades >= 0) & (grades <= 1)).all():
        raise DataError(f"grades of solutions {grades.tolist()} must lie in [0, 1]")
    ids = [np.asarray(path, np.int64).reshape(-1).tolist() for path in paths]
    values = [np.full(len(own), grade, np.float32) for own, grade in zip(ids, grades, strict=True)]
    counts = [np.ones(len(own), np.int32) for own in ids]
    # Nodes of the prefix trie that several solutions go through: which ones, and how deep.
    nodes = [(list(range(len(ids))), 0)]
    while nodes:
        members, depth = nodes.pop()
        children: dict[int, list[int]] = {}
        for n in members:
            if depth < len(ids[n]):
                children.setdefault(ids[n][depth], []).append(n)
        for own in children.values():
            if len(own) == 1:
                continue
            value = np.float32(grades[own].mean())
            for n in own:
                values[n][depth], counts[n][depth] = value, len(own)
            nodes.append((own, depth + 1))
    return Prefixes(values, counts)


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of the solutions in a token store. N is the number of its examples.

    Attributes:
        values: of each example, float32 of each of its tokens; 0 on the prompt.
        problems: number of each example's problem; -1 for an example without an answer.
        correct: which examples are right.
        depths: tokens at the beginning of each solution that another of its problem has too.
        rates: share of right solutions of each problem.
        sizes: solutions of each problem.
    """

    values: list[np.ndarray]
    problems: Int64[np.ndarray, "N"]
    correct: Bool[np.ndarray, "N"]
    depths: Int64[np.ndarray, "N"]
    rates: Float64[np.ndarray, "P"]
    sizes: Int64[np.ndarray, "P"]

    @property
    def constant(self) -> Bool[np.ndarray, "P"]:
        """Problems with several solutions, all right or all wrong: their labels are constant."""
        return (self.sizes > 1) & ((self.rates == 0) | (self.rates == 1))

    @property
    def sharing_depth(self) -> float:
        """Mean number of tokens that a solution shares with another one of its problem."""
        return float(self.depths[self.problems >= 0].mean())

    def kept(self, constant_share: float, seed: int = 0) -> Bool[np.ndarray, "N"]:
        """Returns which examples to train on: all but some problems with constant labels.

        Args:
            constant_share: largest share of such problems among those that stay; 1 keeps all.
            seed: of the draw of those that stay.

        Raises:
            DataError: nothing stays.
        """
        constant = np.flatnonzero(self.constant)
        others = len(self.sizes) - len(constant)
        most = len(constant)
        if constant_share < 1:
            most = min(most, int(constant_share * others / (1 - constant_share) + 1e-9))
        stays = np.ones(len(self.sizes), bool)
        stays[np.random.default_rng([seed, 0]).permutation(constant)[most:]] = False
        if not stays.any():
            raise DataError(
                f"the solutions of every one of the {len(self.sizes)} problems are all right or "
                f"all wrong: sample more of each, or keep them by constant_share=1"
            )
        return (self.problems >= 0) & stays[self.problems]

    def summary(self) -> dict[str, Any]:
        """Returns what to look at before the labels are used."""
        solutions = self.problems >= 0
        own = np.concatenate([v for v, s in zip(self.values, solutions, strict=True) if s])
        return {
            "problems": len(self.sizes),
            "solutions_each": round(float(self.sizes.mean()), 2),
            "right": round(float(self.correct[solutions].mean()), 4),
            "constant_problems": int(self.constant.sum()),
            "sharing_depth": round(self.sharing_depth, 2),
            "soft_labels": int(((own > 0) & (own < 1)).sum()),
        }


def label_solutions(store: Store) -> Labels:
    """Returns the values of all prefixes of the solutions in a store of rated answers.

    A solution is what follows the prompt, from the first target with a weight to the end token. It
    is right where the weights of its targets sum to more than 0.

    Raises:
        DataError: no example has an answer, or all of them are right or all wrong.
    """
    groups: dict[bytes, list[int]] = {}
    starts = np.zeros(store.num_examples, np.int64)
    correct = np.zeros(store.num_examples, bool)
    for i in range(store.num_examples):
        weights = np.asarray(store.weights(i))[1:]  # nothing predicts the first token
        answer = np.flatnonzero(weights)
        if len(answer):
            starts[i] = answer[0] + 1
            correct[i] = weights.sum() > 0
            groups.setdefault(store.tokens(i, 0, int(starts[i])).tobytes(), []).append(i)
    if not groups:
        raise DataError("no example has a target with a weight: there are no solutions to label")
    solutions = [i for own in groups.values() for i in own]
    if correct[solutions].all() or not correct[solutions].any():
        which = "right" if correct[solutions].all() else "wrong"
        raise DataError(
            f"all {len(solutions)} solutions are {which}: there is nothing to tell apart. Read "
            f'records of kind "rated", with the solutions\' labels'
        )
    values = [np.zeros(int(n), np.float32) for n in store.lengths]
    problems = np.full(store.num_examples, -1, np.int64)
    depths = np.zeros(store.num_examples, np.int64)
    for number, own in enumerate(groups.values()):
        found = prefix_values([store.tokens(i, int(starts[i])) for i in own], correct[own])
        problems[own], depths[own] = number, found.depths
        for i, value in zip(own, found.values, strict=True):
            values[i][starts[i] :] = value
    return Labels(
        values=values,
        problems=problems,
        correct=correct,
        depths=depths,
        rates=np.array([correct[own].mean() for own in groups.values()]),
        sizes=np.array([len(own) for own in groups.values()], np.int64),
    )


def write_prefix_values(
    path: str | os.PathLike, store: Any, *, constant_share: float = 0.5, seed: int = 0
) -> Labels:
    """Writes the artifact of a `TokenStore` of rated answers; returns the labels in it.

    Args:
        path: of the file, for `data.train.0.artifact`.
        store: whose solutions are labelled, whole ones of any length.
        constant_share: see `Labels.kept`.
        seed: likewise.

    Raises:
        DataError: see `label_solutions` and `Labels.kept`.
        StorageError: the file cannot be written.
    """
    import tokjax

    _check(constant_share, seed)
    found = label_solutions(store)
    keep = found.kept(constant_share, seed)
    every = range(store.num_examples)
    write_artifact(
        path,
        keys=[store.example_key(i) for i in every],
        names=[store.example_name(i) for i in every],
        n_tokens=store.lengths,
        scores=None,
        keep=keep,
        channels={CHANNEL: found.values},
        meta={
            "method": "tvm",
            "options": {"constant_share": constant_share, "seed": seed},
            "tokenizer": store.manifest["tokenizer"].get("fingerprint"),
            "stores": {"pool": store.fingerprint},
            "found": found.summary(),
            "counts": {"examples": len(every), "kept": int(keep.sum())},
            "versions": {"tokjax": tokjax.__version__},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )
    return found


@register("selector", "tvm")
@dataclass(frozen=True)
class Tvm:
    """Variance of the outcome within the solution's problem; the values of prefixes are a channel.

    A budget of 100% keeps all solutions but those of problems over the share and those longer than
    `max_tokens`; a lower one leaves out problems that are nearly always right or wrong first.
    """

    needs_target: ClassVar[bool] = False
    memory: ClassVar[int] = 1

    # largest share, among the problems that stay, of those whose solutions are all right or all
    # wrong; 1 keeps all of them
    constant_share: float = 0.5
    seed: int = 0  # of the draw of those that stay

    def __post_init__(self):
        _check(self.constant_share, self.seed)

    def learn(
        self,
        model: Transformer,
        params: Params,
        pool: Target,
        on_step: Callable[[int, int], None] | None = None,
    ) -> RowScorer:
        """Returns what looks rows up; the model computes nothing, its tokenizer made the pool.

        Raises:
            DataError: see `label_solutions` and `Labels.kept`.
        """
        labels = label_solutions(pool.store)
        # What is behind `max_tokens` would have no labels.
        kept = labels.kept(self.constant_share, self.seed) & ~_too_long(pool)
        rates = labels.rates[labels.problems]
        scores = np.where(kept, rates * (1 - rates), -np.inf)

        def score(rows: Rows) -> Found:
            values = np.zeros(rows.tokens.shape, np.float32)
            for b, i in enumerate(rows.indices):
                if i >= 0:
                    values[b, : rows.lengths[b]] = labels.values[i][: rows.lengths[b]]
            return np.where(rows.indices >= 0, scores[rows.indices], -np.inf), {CHANNEL: values}

        return score

    def summary(self, pool: Target, channels: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Returns what to look at before the labels are used."""
        labels = label_solutions(pool.store)
        found = labels.summary()
        left = int((labels.problems >= 0).sum() - labels.kept(self.constant_share, self.seed).sum())
        for name, count in (
            ("left_out_of_constant_problems", left),
            ("too_long_solutions", int(_too_long(pool).sum())),
        ):
            if count:
                found[name] = count
        return found


def _too_long(pool: Target) -> Bool[np.ndarray, "N"]:
    return np.asarray(pool.store.lengths) > pool.max_tokens


def _check(constant_share: float, seed: int) -> None:
    if not 0 <= constant_share <= 1:
        raise ConfigError(f"constant_share={constant_share} must lie in [0, 1]")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} must be at least 0 and below 2^32")
