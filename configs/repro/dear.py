"""DeAR (arXiv 2508.16998): a student reranker taught by binary labels and a teacher's scores.

    python -m tokjax.reproduce dear

An invented language: each of 16 attributes has a query word and three synonyms in passages. A query
names three attributes; a passage of six words covers 0 to 3 of them, which is its relevance. Groups
have eight passages; the first is relevant, but its grade is any of 1 to 3 and others may be
relevant too, as in collections with one judged passage a query. The teacher learns from graded
labels (ListNet), the student, of a third of its parameters and on fewer queries, from the first
passage alone, by the losses of the arms. Then a model that writes orders is trained on oracle
permutations of windows of four passages, and reorders the first eight of 16 in windows two apart.

Arms of the first stage (nDCG@10 and Kendall's tau to the teacher, on lists of 16 passages):
    teacher         the teacher itself
    ce              softmax cross-entropy
    ranknet         RankNet on binary labels
    hybrid          half of each
    dear            hybrid, and the teacher's divergence with the script's share .1
    dear_half       the same with the class's share .5
    shuffled        dear_half with the teacher's scores permuted within each group
of the second, which begins with the order of `dear`:
    listwise        the written order
    listwise_mixed  the same, beginning with the windows' order shuffled: position bias
    oracle          the windows ordered by the true relevances

The scores reproduce, the written order does not: nDCG@10 is .713 with the teacher's share .1 and
.965 with .5, .601 without the teacher and .584 with permuted scores; the written order leaves the
scores' order as it is, and shuffled windows cost .045.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.data.batch import Batch
from tokjax.models import ModelConfig, Transformer
from tokjax.pretraining.next_token import NextToken
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.retrieval.dear import DeAR, passage_scores
from tokjax.retrieval.listwise import Windows, rerank
from tokjax.retrieval.measures import kendall_tau, ndcg
from tokjax.training.objective import Objective
from tokjax.training.optimizers import AdamW, Cosine
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

ATTRIBUTES, SYNONYMS, ASKED, WORDS = 16, 3, 3, 6
N, LIST = 8, 16  # passages of a group of training, and of a list to be ranked
PASSAGE = ATTRIBUTES  # ids: query words, then synonyms, then marks
END = PASSAGE + ATTRIBUTES * SYNONYMS
ASK, NUMBER = END + 1, END + 2
WINDOW = Windows(0, 8, 4, 2)
VOCABULARY = NUMBER + WINDOW.size

Queries = dict[str, np.ndarray]  # query [n ASKED], passages [n k WORDS], relevance [n k]


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "teacher": {"d_model": 96, "steps": 4 if smoke else 1200, "rate": 2e-3},
        "student": {"d_model": 48, "steps": 4 if smoke else 500, "rate": 3e-3},
        "writer": {"d_model": 96, "steps": 4 if smoke else 1500, "rate": 2e-3},
        "batch": 16,
        "pool": 32 if smoke else 1500,  # queries that the student is trained on
        "lists": 8 if smoke else 300,
    }
    arms = {
        "teacher": Treatment("baseline", "teacher", {"kind": "teacher"}),
        "ce": Treatment("baseline", "cross-entropy", {"main": "softmax_ce", "alpha": 0.0}),
        "ranknet": Treatment("baseline", "RankNet", {"main": "ranknet", "alpha": 0.0}),
        "hybrid": Treatment("baseline", "half of each", {"alpha": 0.0}),
        "dear": Treatment("method", "+ teacher, .1", {"alpha": 0.1}),
        "dear_half": Treatment("method", "+ teacher, .5", {"alpha": 0.5}),
        "shuffled": Treatment("control", "scores permuted", {"alpha": 0.5, "shuffled": True}),
        "listwise": Treatment("method", "written order", {"kind": "writer"}),
        "listwise_mixed": Treatment(
            "control", "windows shuffled before", {"kind": "writer", "mixed": True}
        ),
        "oracle": Treatment("baseline", "oracle in the windows", {"kind": "oracle"}),
    }
    first = ("teacher", "ce", "ranknet", "hybrid", "dear", "dear_half", "shuffled")
    return Comparison(
        claim=(
            "A teacher's divergence improves a student reranker over binary labels alone, and a "
            "written order of the first places improves on the scores."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(options),
        judge=judge,
        metric="ndcg",
        panels=(
            Bars("ndcg", "graded nDCG@10 of lists of 16", "nDCG@10"),
            Bars("tau", "agreement with the teacher's scores", "Kendall tau", first),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "An item is a list of 16 passages that no model was trained on. Learning rates and "
            "numbers of steps were fixed before the first run.",
            "Smaller than the method's windows: the first eight places in windows of four, two "
            "apart, so that a model of 0.3M parameters can read a window.",
        ),
    )


def judge(found: Measurements) -> Verdict:
    """Demands what the method promises, of both stages, and what the controls must lose."""
    conditions: list[tuple[bool | None, str]] = []
    for arm in ("dear", "dear_half"):
        for metric in ("ndcg", "tau"):
            gain = found.difference(arm, "hybrid", metric)
            told = f"{arm} is above the same loss without a teacher in {metric}: {gain}"
            conditions.append((gain.low > 0, told))
    gain = found.difference("dear_half", "ce", "ndcg")
    conditions.append((gain.low > 0, f"dear_half is above cross-entropy in ndcg: {gain}"))
    gain = found.difference("shuffled", "hybrid", "ndcg")
    conditions.append((gain.low <= 0, f"permuted scores give no gain in ndcg: {gain}"))
    gain = found.difference("dear_half", "shuffled", "ndcg")
    conditions.append((gain.low > 0, f"dear_half is above permuted scores in ndcg: {gain}"))
    gain = found.difference("listwise", "dear", "ndcg")
    conditions.append((gain.low > 0, f"the written order is above the scores in ndcg: {gain}"))
    # Two windows share as many places as they are apart.
    exact = found.mean("oracle", "exact"), found.mean("oracle", "kept")
    conditions.append(
        (
            exact == (1.0, 1.0),
            f"an oracle's pass makes the first {WINDOW.step} places exact in {exact[0]:.3f} of the "
            f"lists, and a second pass keeps them in {exact[1]:.3f}",
        )
    )
    bias = found.difference("listwise_mixed", "listwise", "ndcg")
    told = f"with windows shuffled before they are read the written order changes by {bias}"
    means = ", ".join(f"{arm} {found.mean(arm, 'ndcg'):.3f}" for arm in found.values)
    return Verdict.of([*conditions, (None, told), (None, f"nDCG@10: {means}")])


class Materials:
    """What the arms of one seed share: the teacher, the students' data, the lists, the writer."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed

    def rng(self, purpose: int) -> np.random.Generator:
        """Returns the random numbers of one purpose."""
        return np.random.default_rng([self.seed, purpose])

    @cached_property
    def synonyms(self) -> np.ndarray:
        """The ids of each attribute's synonyms: [ATTRIBUTES SYNONYMS]."""
        ids = self.rng(0).permutation(ATTRIBUTES * SYNONYMS).reshape(ATTRIBUTES, SYNONYMS)
        return ids + PASSAGE

    @cached_property
    def lists(self) -> Queries:
        """What is ranked."""
        return queries(self.rng(1), self.synonyms, self.settings["lists"], LIST)

    @cached_property
    def pool(self) -> Queries:
        """What the student is trained on: the first passage is relevant, others may be."""
        rng = self.rng(2)
        made = queries(rng, self.synonyms, self.settings["pool"], N)
        for i, relevance in enumerate(made["relevance"]):
            first = int(rng.choice(np.flatnonzero(relevance)))
            order = np.r_[first, np.delete(np.arange(N), first)]
            made["passages"][i] = made["passages"][i][order]
            made["relevance"][i] = relevance[order]
        return made

    @cached_property
    def teacher(self) -> tuple[Transformer, Any]:
        """The model that has learned from graded labels."""
        rng, size = self.rng(3), self.settings["batch"]

        def batch(step: int) -> Batch:
            drawn = queries(rng, self.synonyms, size, N)
            return groups(drawn, label=drawn["relevance"])

        objective = DeAR(main="listnet", relevance="labels", alpha=0.0)
        return self.trained("teacher", objective, batch, "teacher")

    @cached_property
    def teacher_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's scores of the pool and of the lists."""
        return scored(*self.teacher, self.pool), scored(*self.teacher, self.lists)

    @cached_property
    def writer(self) -> tuple[Transformer, Any]:
        """The model that writes orders of windows, trained on those of an oracle."""
        rng, size = self.rng(4), 2 * self.settings["batch"]

        def batch(step: int) -> Batch:
            drawn = queries(rng, self.synonyms, size, WINDOW.size)
            order = np.argsort(-drawn["relevance"], axis=1, kind="stable")
            return written(drawn, order)

        return self.trained("writer", NextToken(), batch, "writer")

    def student(self, options: Mapping[str, Any]) -> tuple[Transformer, Any]:
        """Returns the model that one of the arms trains."""
        size, count = self.settings["batch"], len(self.pool["query"])
        scores = self.teacher_scores[0]
        if options.get("shuffled"):
            scores = self.rng(5).permuted(scores, axis=1)
        label = np.zeros((count, N))
        label[:, 0] = 1
        orders = self.rng(6)
        epochs = -(-self.settings["student"]["steps"] * size // count)
        order = np.concatenate([orders.permutation(count) for _ in range(epochs)])

        def batch(step: int) -> Batch:
            at = order[step * size : (step + 1) * size]
            drawn = {name: values[at] for name, values in self.pool.items()}
            return groups(drawn, label=label[at], score=scores[at])

        objective = DeAR(main=options.get("main", "ranknet_softmax_ce"), alpha=options["alpha"])
        begins = options == {"alpha": 0.1}  # the second stage begins with its order
        return self.trained("student", objective, batch, "dear" if begins else None)

    def trained(
        self, sizes_of: str, objective: Objective, batch: Any, file: str | None
    ) -> tuple[Transformer, Any]:
        """Returns a model trained on the batches of its steps, kept in a file if one is named."""
        sizes = self.settings[sizes_of]
        model = Transformer(
            ModelConfig(
                vocab_size=VOCABULARY,
                d_model=sizes["d_model"],
                n_layers=2,
                n_heads=4,
                max_positions=64,
                remat="none",
            )
        )
        optimizer = AdamW().build(model.config)
        state = init_state(model, objective, optimizer, self.seed, False)
        path = self.folder / f"{file}.npz"
        if file is None or not path.exists():
            steps = sizes["steps"]
            schedule = Cosine(warmup_steps=steps // 20)
            config = StepConfig(sizes["rate"], schedule, 0, steps, clip_norm=1.0)
            step = jax.jit(make_train_step(model, objective, optimizer, config))
            for number in range(steps):
                state, _ = step(state, batch(number))
            if file is None:
                return model, state.params
            leaves = [np.asarray(a) for a in jax.tree.leaves(state.params)]
            np.savez(path, *leaves)  # type: ignore[arg-type]
        with np.load(path) as kept:
            leaves = [jnp.asarray(kept[f"arr_{i}"]) for i in range(len(kept.files))]
        return model, jax.tree.unflatten(jax.tree.structure(state.params), leaves)

    @cached_property
    def first_order(self) -> np.ndarray:
        """The lists' order by the scores of the arm `dear`: where the second stage begins."""
        return np.argsort(-scored(*self.student({"alpha": 0.1}), self.lists), axis=1, kind="stable")

    def measure(self, options: Mapping[str, Any]) -> dict[str, Sequence[float]]:
        """Returns the measures of an arm's order of each list."""
        relevance, kind = self.lists["relevance"], options.get("kind", "student")
        if kind in ("teacher", "student"):
            own = self.teacher if kind == "teacher" else self.student(options)
            scores, wanted = scored(*own, self.lists), self.teacher_scores[1]
            order = np.argsort(-scores, axis=1, kind="stable")
            tau = [kendall_tau(*pair) for pair in zip(scores, wanted, strict=True)]
            return {"ndcg": _ndcg(relevance, order), "tau": tau}
        orders = self.first_order.tolist()
        if kind == "oracle":
            found = rerank(orders, self.by_oracle, WINDOW)
            again, step = rerank(found, self.by_oracle, WINDOW), WINDOW.step
            grades = [np.take_along_axis(relevance, np.array(o), 1) for o in (orders, found, again)]
            best = -np.sort(-grades[0][:, : WINDOW.end], axis=1)[:, :step]
            exact = (grades[1][:, :step] == best).all(1).astype(float).tolist()
            kept = [float(a[:step] == b[:step]) for a, b in zip(found, again, strict=True)]
            return {"ndcg": _ndcg(relevance, np.array(found)), "exact": exact, "kept": kept}
        mixed = self.rng(7) if options.get("mixed") else None

        def by_writer(asked: Sequence[tuple[int, int, list[int]]]) -> list[list[int]]:
            shown = [mixed.permutation(len(a[2])) if mixed else np.arange(len(a[2])) for a in asked]
            items = [[a[2][j] for j in s] for a, s in zip(asked, shown, strict=True)]
            wrote = self.write([a[0] for a in asked], np.array(items))
            return [s[o].tolist() for s, o in zip(shown, wrote, strict=True)]

        return {"ndcg": _ndcg(relevance, np.array(rerank(orders, by_writer, WINDOW)))}

    def by_oracle(self, asked: Sequence[tuple[int, int, list[int]]]) -> list[list[int]]:
        """Returns the orders by relevance, ties as they are."""
        relevance = self.lists["relevance"]
        return [np.argsort(-relevance[i][items], kind="stable").tolist() for i, _, items in asked]

    def write(self, rows: list[int], items: np.ndarray) -> np.ndarray:
        """Returns the orders of windows [n WINDOW] that the writer writes, greedily."""
        model, params = self.writer
        at = np.array(rows)[:, None]
        drawn = {
            "query": self.lists["query"][rows],
            "passages": self.lists["passages"][at, items],
            "relevance": self.lists["relevance"][at, items],
        }
        order = np.zeros(items.shape, int)
        used = np.zeros(items.shape, bool)
        for place in range(WINDOW.size):
            batch = written(drawn, order)
            position = batch.tokens.shape[1] - WINDOW.size + place
            logits = np.asarray(_logits(model, params, batch.tokens)[:, position])
            chances = np.where(used, -np.inf, logits[:, NUMBER : NUMBER + WINDOW.size])
            order[:, place] = chances.argmax(1)
            np.put_along_axis(used, order[:, place : place + 1], True, axis=1)
        return order


_logits = jax.jit(lambda model, params, tokens: model(params, tokens)[0], static_argnums=0)
_scores = jax.jit(passage_scores, static_argnums=0)


def _ndcg(relevance: np.ndarray, order: np.ndarray) -> list[float]:
    return [ndcg(r[o], 10) for r, o in zip(relevance, order, strict=True)]


def queries(rng: np.random.Generator, synonyms: np.ndarray, n: int, k: int) -> Queries:
    """Returns n queries with k passages each, at least one of them relevant."""
    query = np.argsort(rng.random((n, ATTRIBUTES)), axis=1)[:, :ASKED]
    relevance = rng.choice(ASKED + 1, (n, k), p=[0.4, 0.3, 0.2, 0.1])
    none = ~relevance.any(1)
    relevance[none, rng.integers(0, k, none.sum())] = rng.integers(1, ASKED + 1, none.sum())
    passages = np.zeros((n, k, WORDS), int)
    for i in range(n):
        others = np.setdiff1d(np.arange(ATTRIBUTES), query[i])
        for j in range(k):
            covered = rng.permutation(query[i])[: relevance[i, j]]
            rest = rng.permutation(others)[: WORDS - len(covered)]
            about = rng.permutation(np.r_[covered, rest])
            passages[i, j] = synonyms[about, rng.integers(0, SYNONYMS, WORDS)]
    return {"query": query, "passages": passages, "relevance": relevance}


def groups(drawn: Queries, **values: np.ndarray) -> Batch:
    """Returns a batch with a query and its passages in each row, a segment for each passage."""
    n, k, _ = drawn["passages"].shape
    query = np.repeat(drawn["query"][:, None], k, axis=1)
    end = np.full((n, k, 1), END)
    tokens = np.concatenate([query, drawn["passages"], end], axis=2).astype(np.int32)
    size = tokens.shape[2]
    tokens = tokens.reshape(n, k * size)
    make: Any = Batch
    return make(
        tokens=tokens,
        targets=tokens,
        positions=np.tile(np.arange(size, dtype=np.int32), (n, k)),
        segment_ids=np.tile(np.repeat(np.arange(1, k + 1, dtype=np.int32), size), (n, 1)),
        weights=np.ones(tokens.shape, np.float32),
        example_id=np.repeat(np.arange(n, dtype=np.int32)[:, None], k, axis=1),
        values={name: value.astype(np.float32) for name, value in values.items()},
        group=k,
    )


def written(drawn: Queries, order: np.ndarray) -> Batch:
    """Returns a batch that shows numbered passages and writes their order, which alone counts."""
    n, k, _ = drawn["passages"].shape
    numbers = np.tile(np.arange(k)[None, :, None] + NUMBER, (n, 1, 1))
    shown = np.concatenate([drawn["passages"], numbers], axis=2).reshape(n, -1)
    ask = np.full((n, 1), ASK)
    ids = np.concatenate([drawn["query"], shown, ask, order + NUMBER], axis=1).astype(np.int32)
    shape = (n, ids.shape[1] - 1)
    weights = np.zeros(shape, np.float32)
    weights[:, -k:] = 1
    make: Any = Batch
    return make(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        positions=np.tile(np.arange(shape[1], dtype=np.int32), (n, 1)),
        segment_ids=np.ones(shape, np.int32),
        weights=weights,
        example_id=np.arange(n, dtype=np.int32)[:, None],
    )


def scored(model: Transformer, params: Any, drawn: Queries) -> np.ndarray:
    """Returns the scores [n k] of passages."""
    found = []
    for first in range(0, len(drawn["query"]), 64):
        part = {name: values[first : first + 64] for name, values in drawn.items()}
        found.append(np.asarray(_scores(model, params, groups(part, label=part["relevance"]))))
    return np.concatenate(found)
