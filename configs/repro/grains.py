"""GrAInS (arXiv 2507.18043): steering by the tokens that gradients find, on invented reviews.

    python -m tokjax.reproduce grains

A word of one clause sets the mood of a review's ending. Pairs of a good and a bad ending make a
vector, which is added to the states of reviews without such a word.

What came out is in docs/reproductions/grains.json and .png: the claim did not come out whole. The
states of the last token, which the reference code reads, steered in one of two models (good endings
-0.02 and +0.39 from 0.49); the states that predict it steered in both (+0.41 and +0.38), and
unrelated texts lost 0.01 nats. Integrated gradients put the deciding word first in 0.39 of the
texts, in 0.87 when the scores of a prompt with both endings are added up (0.42 by gradient times
input).

The arms, for shifts of 0.1, 0.2, 0.4 and 0.8 lengths of a state:
    plain               not steered
    grains              PCA of the last token's states, both sets of tokens (the reference code's)
    grains_mean         their mean
    predicting          PCA of the states that predict the last token
    predicting_mean     their mean
    swapped             grains, with good and bad endings exchanged
    random_tokens       grains, with tokens chosen at random
    direction           a random direction
    rank_*              how often the deciding word is found, without steering
"""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.language_model import LanguageModel
from tokjax.models.edits import Edits
from tokjax.models.transformer import Transformer
from tokjax.reproduction import Bars, Comparison, Lines, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained, word_tokenizer
from tokjax.steering import (
    Pair,
    attribute_tokens,
    score_options,
    steering_edits,
    steering_vector,
)
from tokjax.steering.rows import Rows, batches, rows_of

GOOD = ("splendid", "charming", "superb", "lovely", "brilliant", "delightful")
BAD = ("dreadful", "boring", "awful", "dismal", "poor", "ghastly")
ENDINGS = {True: ("good", "great", "fine"), False: ("sad", "weak", "flat")}
AFTER = {True: ("keep", "love"), False: ("return", "hate")}
SUBJECTS = ("film", "book", "meal", "hotel", "concert", "phone", "lamp", "garden", "coat", "bike")
ASPECTS = (
    *("plot", "sound", "price", "room", "colour", "staff", "shape", "light", "size", "weight"),
    *("cover", "smell"),
)
PLAIN = (
    *("long", "short", "old", "new", "red", "quiet", "round", "common", "usual", "narrow"),
    *("wooden", "foreign"),
)
CITIES = ("paris", "oslo", "rome", "lima", "cairo", "delhi", "quito", "tunis", "dakar", "hanoi")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday")
HOURS = ("six", "seven", "eight", "nine", "ten", "eleven")
FRAME = (
    *("_", "review", "of", "the", ":", "was", "and", "overall", "it", "i", "on", "train", "to"),
    *("leaves", "at", "."),
)
WORDS = (
    *FRAME, *GOOD, *BAD, *ENDINGS[True], *ENDINGS[False], *AFTER[True], *AFTER[False],
    *SUBJECTS, *ASPECTS, *PLAIN, *CITIES, *DAYS, *HOURS,
)  # fmt: skip
BLANK = "_"  # an illegible word: what tokens are replaced by, and the baseline of the integration
AGREES = 0.95  # probability that an ending, or what follows it, is of the review's mood
SHOWN = 0.85  # share of the training reviews with a word of their mood
BLANKS = 0.05  # share of the words before an ending that are illegible
STRENGTHS = (0.1, 0.2, 0.4, 0.8)  # of the shift, in mean lengths of the states that are steered
CHOSEN = 0.4  # strength at which blocks are chosen and arms compared
K = 3  # tokens that are replaced: a tenth of a text
HARM = 0.05  # nats a token that other texts may lose


def prompt_of(rng: np.random.Generator, mood: bool | None) -> str:
    """Returns a review up to its ending, with a word of the mood in one clause, or in none."""
    clauses = int(rng.integers(2, 5))
    words = rng.choice(PLAIN, clauses).astype(object)
    if mood is not None:
        words[rng.integers(clauses)] = rng.choice(GOOD if mood else BAD)
    told = [f"the {rng.choice(ASPECTS)} was {word}" for word in words]
    return f"review of the {rng.choice(SUBJECTS)} : {' and '.join(told)} . overall it was"


def review(rng: np.random.Generator) -> dict[str, str]:
    """Returns a whole review: its mood shows in one clause of most reviews, and in the ending and
    what follows it.
    """
    mood = bool(rng.integers(2))
    prompt = prompt_of(rng, mood if rng.random() < SHOWN else None)
    words = [BLANK if rng.random() < BLANKS else word for word in prompt.split()]
    ending, after = (mood ^ bool(rng.random() > AGREES) for _ in range(2))
    tail = f"{rng.choice(ENDINGS[ending])} and i {rng.choice(AFTER[after])} it ."
    return {"prompt": " ".join(words), "response": f" {tail}"}


def timetable(rng: np.random.Generator) -> str:
    """Returns a text of another kind, in which each city and day have their hour."""
    lines = []
    for _ in range(rng.integers(2, 5)):
        city, day = rng.integers(len(CITIES)), rng.integers(len(DAYS))
        hour = HOURS[(city * 3 + day) % len(HOURS)]
        lines.append(f"on {DAYS[day]} the train to {CITIES[city]} leaves at {hour} .")
    return " ".join(lines)


class Materials:
    """A trained model, texts that are not among its training data, and vectors once made."""

    def __init__(self, lm: LanguageModel, sizes: dict[str, int], seed: int):
        self.lm = lm
        rng = np.random.default_rng([seed, 1])
        self.blank = lm.encode(BLANK)[-1]
        self.bos = lm.encode("")[0]
        self.endings = {
            mood: [lm.encode(f"was {word}")[-1] for word in words]
            for mood, words in ENDINGS.items()
        }

        def prompts(count: int, moods: tuple[bool | None, ...]) -> list[str]:
            return [prompt_of(rng, moods[i % len(moods)]) for i in range(count)]

        def ids(texts: list[str]) -> list[list[int]]:
            return [lm.encode(text) for text in texts]

        self.pairs = [
            Pair(ids([text])[0], [good], [bad])
            for text in prompts(sizes["pairs"], (True, False))
            for good, bad in [(self._ending(rng, True), self._ending(rng, False))]
        ]
        self.ranked = prompts(sizes["ranked"], (True, False))
        self.neutral = {
            "dev": ids(prompts(sizes["dev"], (None,))),
            "test": ids(prompts(sizes["test"], (None,))),
        }
        self.other = {
            name: ids([timetable(rng) for _ in range(sizes[name])]) for name in ("dev", "test")
        }
        self.seed = seed
        self.vectors: dict[str, np.ndarray] = {}
        self.layers: dict[str, int] = {}

    def _ending(self, rng: np.random.Generator, mood: bool) -> int:
        return int(rng.choice(self.endings[mood]))

    def vector(self, kind: str) -> np.ndarray:
        """Returns the vector of a kind, of the length of the model's states at each block."""
        if kind not in self.vectors:
            raw = self._raw(kind)
            states = forward(self.lm, self.neutral["dev"])[1].mean(1)
            lengths = np.linalg.norm(raw, axis=-1, keepdims=True)
            self.vectors[kind] = raw / np.maximum(lengths, 1e-12) * states[:, None]
        return self.vectors[kind]

    def _raw(self, kind: str) -> np.ndarray:
        config = self.lm.model.config
        if kind == "direction":
            rng = np.random.default_rng([self.seed, 2])
            return rng.normal(size=(config.n_layers, config.d_model))
        turned = [Pair(prompt, bad, good) for prompt, good, bad in self.pairs]
        return steering_vector(
            self.lm.model,
            self.lm.params,
            turned if kind == "swapped" else self.pairs,
            ablation_id=self.blank,
            baseline_id=self.blank,
            bos_id=self.bos,
            k=K,
            scores="random" if kind == "random_tokens" else "integrated",
            method="mean" if "mean" in kind else "pca",
            place="predicting" if "predicting" in kind else "last",
            seed=self.seed,
            batch_size=20,
        )

    def edits(self, kind: str, strength: float, layer: int | None = None) -> Edits:
        """Returns the edits that steer, at the block that is best on texts that are not judged."""
        layer = self.layer(kind) if layer is None else layer
        return steering_edits(self.vector(kind), layer, strength, gain=1.0)

    def layer(self, kind: str) -> int:
        """Returns the block at which steering moves the endings most, among those that leave other
        texts alone (or else the one that harms them least).
        """
        kind = "grains" if kind == "swapped" else kind
        if kind not in self.layers:
            plain = self.measured("dev", None)
            found = []
            for layer in range(self.lm.model.config.n_layers):
                own = self.measured("dev", self.edits(kind, CHOSEN, layer))
                gain = np.mean(own["positive"]) - np.mean(plain["positive"])
                harm = np.mean(own["other_nll"]) - np.mean(plain["other_nll"])
                found.append((harm <= HARM, gain if harm <= HARM else -harm, layer))
            self.layers[kind] = max(found)[-1]
        return self.layers[kind]

    def measured(self, split: str, edits: Edits | None) -> dict[str, Any]:
        """Returns how likely neutral prompts end well, and what other texts cost a token."""
        chances = forward(self.lm, self.neutral[split], edits)[0]
        other = score_options(
            self.lm.model,
            self.lm.params,
            [text[:1] for text in self.other[split]],
            [[text[1:]] for text in self.other[split]],
            edits=edits,
            batch_size=50,
        )
        return {
            "positive": chances[:, self.endings[True]].sum(1),
            "negative": chances[:, self.endings[False]].sum(1),
            "other_nll": np.array([-each.total[0] / each.lengths[0] for each in other]),
        }

    def first(self, kind: str) -> dict[str, np.ndarray]:
        """Returns whether the word of the mood has the most extreme score of all tokens, on the
        side that it speaks for: in each prompt with each answer, and in each prompt when what its
        tokens score with the two answers is added up.
        """
        texts, sides, at = [], [], []
        for number, prompt in enumerate(self.ranked):
            mood = number % 2 == 0
            word = next(i for i, w in enumerate(prompt.split()) if w in (*GOOD, *BAD))
            for answer in (True, False):
                texts.append((self.lm.encode(prompt), [self.endings[answer][number % 3]]))
                sides.append(1 if mood == answer else -1)
                at.append(word)
        rows, found = rows_of(texts, self.lm.model.config), []
        for batch, own in batches(len(texts), 50):
            scores = _scores(self.lm.model, kind, self.blank, self.lm.params, rows.take(batch))
            found.append(np.asarray(scores)[:own])
        scores = np.concatenate(found)
        if kind == "random":
            scores = np.random.default_rng([self.seed, 3]).normal(size=scores.shape)
        first = [
            float((row[1:length] * side).argmax() == word)  # behind BOS
            for row, side, word, length in zip(scores, sides, at, rows.lengths, strict=True)
        ]
        both = [
            float(((good - bad)[1 : length - 1] * side).argmax() == word)
            for good, bad, side, word, length in zip(
                scores[::2], scores[1::2], sides[::2], at[::2], rows.lengths[::2], strict=True
            )
        ]
        return {"first": np.array(first), "first_of_both": np.array(both)}


@partial(jax.jit, static_argnums=(0, 1))
def _scores(model: Transformer, kind: str, blank: Any, params: Any, rows: Rows) -> jax.Array:
    gradient = kind == "gradient"
    return attribute_tokens(
        model,
        params,
        rows.tokens,
        rows.lengths,
        rows.starts,
        baseline_id=blank if kind == "blank" else None,
        steps=1 if gradient else 20,
        rule="right" if gradient else "gauss",
    ).scores


def forward(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], edits: Edits | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the probabilities of the token behind each prompt, and the length of the state at
    its last token behind each block.
    """
    rows = rows_of([(prompt[:-1], prompt[-1:]) for prompt in prompts], lm.model.config)
    chances, norms = [], []
    for batch, own in batches(len(prompts), 50):
        found = _forward(lm.model, lm.params, rows.take(batch), edits or Edits())
        chances.append(np.asarray(found[0])[:own])
        norms.append(np.asarray(found[1])[:, :own])
    return np.concatenate(chances), np.concatenate(norms, axis=1)


@partial(jax.jit, static_argnums=0)
def _forward(model: Transformer, params: Any, rows: Rows, edits: Edits) -> tuple[Any, Any]:
    at = (rows.lengths - 1)[:, None, None]
    last = lambda x: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
    embedded = model.embed(params, rows.tokens)
    out = model.backbone(params, embedded, edits=edits, capture={"resid_post": last})
    norms = jnp.linalg.norm(out.captured["resid_post"][:, :, 0], axis=-1)
    logits = model.unembed(params, last(out.x))[:, 0]
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1), norms


Role = Literal["method", "baseline", "control"]
VECTORS: dict[str, tuple[Role, str]] = {
    "grains": ("method", "last token's states"),
    "grains_mean": ("method", "last token's states, mean"),
    "predicting": ("method", "predicting states"),
    "predicting_mean": ("method", "predicting states, mean"),
    "swapped": ("control", "answers swapped"),
    "random_tokens": ("control", "random tokens"),
    "direction": ("control", "random direction"),
}
RANKINGS: dict[str, tuple[Role, str]] = {
    "blank": ("method", "integrated gradients from blanks"),
    "zero": ("method", "integrated gradients from zeros"),
    "gradient": ("baseline", "gradient times input"),
    "random": ("control", "random scores"),
}


def get_plan(scale: str) -> Comparison:
    """Returns the plan: 0.5M parameters and 1.2M tokens, or in seconds for `smoke`."""
    smoke = scale == "smoke"
    model = {"d_model": 24, "n_layers": 2, "n_heads": 3, "max_positions": 128}
    sizes, steps = {"pairs": 4, "ranked": 4, "dev": 4, "test": 6}, 4
    if not smoke:
        model |= {"d_model": 96, "n_layers": 4}
        sizes, steps = {"pairs": 50, "ranked": 150, "dev": 50, "test": 200}, 600

    def prepare(folder: Path, seed: int) -> Materials:
        rng = np.random.default_rng([seed, 0])
        count = 100 if smoke else 20_000
        reviews = jsonl(folder / "reviews.jsonl", lambda: (review(rng) for _ in range(count)))
        tables = jsonl(
            folder / "tables.jsonl", lambda: ({"text": timetable(rng)} for _ in range(count // 5))
        )
        source = {"name": "jsonl", "files": (str(reviews),), "kind": "response"}
        tree = {
            "title": "reviews and timetables",
            "seed": seed,
            "model": model,
            "data": {
                "tokenizer": word_tokenizer(folder / "words", WORDS),
                "train": [
                    {"source": source, "rate": 3.0},
                    {"source": {"name": "jsonl", "files": (str(tables),)}},
                ],
                "evals": {},
                "seq_len": 128,
                "batch_size": 16,
            },
            "steps": steps,
            "optimizer": {"name": "adamw", "peak_lr": 3e-3},
            "schedule": {"name": "cosine", "warmup_steps": min(steps // 2, 30)},
            "samples": {"prompts": []},
        }
        return Materials(trained(folder / "lm", tree), sizes, seed)

    def measure(materials: Materials, options: Any, seed: int) -> dict[str, Any]:
        if "ranking" in options:
            return materials.first(options["ranking"])
        if options["vector"] is None:
            prompts = [materials.lm.encode(text) for text in materials.ranked]
            chances = forward(materials.lm, prompts)[0]
            told = [chances[i, materials.endings[i % 2 == 0]].sum() for i in range(len(prompts))]
            return {**materials.measured("test", None), "told": np.array(told)}
        edits = materials.edits(options["vector"], options["strength"])
        block = float(materials.layer(options["vector"]))
        return {**materials.measured("test", edits), "block": np.array([block])}

    arms = {"plain": Treatment("baseline", "not steered", {"vector": None})}
    lines: dict[str, dict[float, str]] = {}
    for name, (role, label) in VECTORS.items():
        lines[label] = {0.0: "plain"}
        for strength in STRENGTHS:
            options = {"vector": name, "strength": strength}
            arms[f"{name}_{strength}"] = Treatment(role, f"{label}, {strength}", options)
            lines[label][strength] = f"{name}_{strength}"
    for name, (role, label) in RANKINGS.items():
        arms[f"rank_{name}"] = Treatment(role, label, {"ranking": name})
    strength = "strength of the shift, in lengths of the state"
    return Comparison(
        claim=(
            "Integrated gradients find the word that decides an answer; what its removal changes "
            "of hidden states gives a direction that steers other texts to the preferred answer "
            "without training, and leaves unrelated texts alone."
        ),
        arms=arms,
        prepare=prepare,
        measure=measure,
        judge=judge,
        metric="positive",
        panels=(
            Bars("first", "texts whose deciding word has the most extreme score", "share"),
            Lines("positive", "neutral reviews", strength, "probability of a good ending", lines),
            Lines("other_nll", "unrelated texts", strength, "nats per token", lines),
        ),
        settings={
            **sizes,
            "k": K,
            "model": model,
            "steps": steps,
            "harm": HARM,
            "chosen": CHOSEN,
            "agrees": AGREES,
            "shown": SHOWN,
            "blanks": BLANKS,
        },
        seeds=(0, 1),
        notes=NOTES,
    )


NOTES = (
    "The vector is that of 50 pairs; strengths are in mean lengths of the states at the steered "
    "block, so all vectors shift as far. Each vector is used at the block where it does most for "
    "50 other neutral reviews while other texts lose no more than is allowed (swapped answers at "
    "the block of the unswapped).",
    "Layout, sizes and training were found with another seed than those judged: trained on all "
    "tokens of the reviews, and not on their endings alone, a model did not learn within the "
    "budget to use the deciding word.",
    "In a first full run the model of one seed had not learned the deciding word (0.72 for endings "
    "of its mood over both seeds, where 0.75 was demanded). It was run once more, with twice the "
    "steps and the word in 85 % of the reviews instead of two thirds; no demand was changed.",
    "Scores rank the tokens of each text with one answer, as the reference "
    'code does. A prompt\'s form ("overall it was") makes either ending likely, so its words '
    "compete with the one that decides; they cancel where the scores of both answers are added up.",
    "In the trial the last token's states gave a direction only because the last token itself, "
    "whose score is exactly 0, was among those replaced where fewer than 3 others had a score of "
    "the sign; spared, it was gone (good endings 0.434 to 0.433 instead of 0.776). The states that "
    "predict gave one as long as the predicting token was spared (0.757); replaced, its change was "
    "all that PCA found, and good endings fell (by 0.29 at the last block).",
)


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    chosen = {name: f"{name}_{CHOSEN}" for name in VECTORS}
    told = found.interval("plain", "told")
    first = found.interval("rank_blank", "first")
    over_random = found.difference("rank_blank", "rank_random", "first")
    chain = ["plain", *(f"grains_{strength}" for strength in STRENGTHS if strength <= CHOSEN)]
    rises = [found.difference(b, a, "positive") for a, b in itertools.pairwise(chain)]
    harm = found.difference(chosen["grains"], "plain", "other_nll")
    swapped = found.difference(chosen["swapped"], "plain", "positive")
    findings: list[tuple[bool | None, str]] = [
        (told.low > 0.75, f"the model uses the deciding word: {told} for endings of its mood"),
        (first.low > 0.9, f"integrated gradients put it first in over 90 % of texts: {first}"),
        (over_random.low > 0, f"more often than random scores: by {over_random}"),
        (
            None,
            f"integrated from zeros in {found.interval('rank_zero', 'first')}, gradient times "
            f"input in {found.interval('rank_gradient', 'first')}",
        ),
        (
            None,
            "with the scores of both answers added up, it is first in "
            f"{found.interval('rank_blank', 'first_of_both')} from blanks, "
            f"{found.interval('rank_zero', 'first_of_both')} from zeros, "
            f"{found.interval('rank_gradient', 'first_of_both')} by gradient times input",
        ),
        (
            all(rise.low > 0 for rise in rises),
            f"good endings gain at every step of the strength up to {CHOSEN}, from "
            f"{found.mean('plain', 'positive'):.3f} on: {', '.join(map(str, rises))}",
        ),
        (harm.high <= HARM, f"unrelated texts lose at most {HARM} nats a token: {harm}"),
        (swapped.high < 0, f"with answers swapped good endings lose: {swapped}"),
    ]
    for name in ("random_tokens", "direction"):
        gain = found.difference(chosen["grains"], chosen[name], "positive")
        findings.append((gain.low > 0, f"more than {VECTORS[name][1]}: by {gain}"))
    for name in ("grains", "grains_mean", "predicting", "predicting_mean"):
        pairs = zip(
            found.items(chosen[name], "positive"), found.items("plain", "positive"), strict=True
        )
        gains = ", ".join(f"{a.mean() - b.mean():+.3f}" for a, b in pairs)
        blocks = ", ".join(str(int(each[0])) for each in found.items(chosen[name], "block"))
        told_of = f"{VECTORS[name][1]}: good endings {gains} by seed, at blocks {blocks}"
        findings.append((None, told_of))
    return Verdict.of(findings)
