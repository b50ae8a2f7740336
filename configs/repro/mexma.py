"""MEXMA (arXiv 2409.12737) on an invented language: a cipher of real lines with words swapped.

    TOKJAX_TEST_DATA=FOLDER python -m tokjax.reproduce mexma

Language A is lines of Tiny Shakespeare in frequent words. Language B has another word for each,
and the second and third word, the fourth and fifth, ... change places. All arms go on from one
encoder that has learned to restore masked words of both languages. Held-out lines look for their
translations among all, and among translations with one word replaced too.

It did not reproduce: sentence vectors alone find 95 % of translations among near ones, MEXMA 39 %
(28 % with unrelated vectors). Its vectors hardly spread in so few steps (cosine of unrelated
sentences 0.90 against 0.01): beside the unmasking KoLeo's weight of 0.01 is a small part of what
Adam follows.

The arms, on the same pairs:
    sentence   squared distance of translations and KoLeo: vectors of sentences alone
    mexma      and unmasking across languages
    unrelated  the same, but the head is given the vector of an unrelated sentence
    collapse   squared distance alone
"""

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.data.batch import Batch
from tokjax.models import ModelConfig
from tokjax.models.encoder import Encoder
from tokjax.models.stack import StackConfig
from tokjax.pretraining.corruption import Corruption
from tokjax.pretraining.masked_lm import MaskedLM
from tokjax.pretraining.mexma import Mexma
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.small_runs import cosine_rates, fitted, kept
from tokjax.reproduction.tasks.shakespeare import most_frequent, shakespeare_lines
from tokjax.retrieval.mining import margin_scores

BEGIN, FIRST = 0, 1  # ids; words of A come from FIRST on, then those of B, then the mask
SHORTEST, LONGEST = 4, 9  # words of a line
WIDTH = 2 * (LONGEST + 1)  # tokens of a row: a line and its translation
NEGATIVES = 3  # of each held-out translation, with one word replaced


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "d_model": 16 if smoke else 64,
        "n_layers": 1 if smoke else 2,
        "words": 300 if smoke else 700,
        "pairs": 40 if smoke else 5000,
        "held_out": 20 if smoke else 400,
        "rows": 8 if smoke else 48,  # of a batch
        "warm_up": 4 if smoke else 250,  # steps
        "steps": 6 if smoke else 350,
        "rate": 2e-3,
    }
    off = {"unmasking_weight": 0.0}
    arms = {
        "sentence": Treatment("baseline", "sentence vectors alone", off),
        "mexma": Treatment("method", "MEXMA", {}),
        "unrelated": Treatment("control", "unrelated vectors", {"context": "unrelated"}),
        "collapse": Treatment("control", "no KoLeo", {**off, "koleo_weight": 0.0}),
    }
    return Comparison(
        claim=(
            "Unmasking the tokens of a sentence with the vector of its translation makes sentence "
            "vectors that find translations better, above all among near ones."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(options),
        judge=judge,
        metric="hard",
        panels=(
            Bars("mined", "translations found among held-out ones, both ways", "accuracy"),
            Bars("hard", "and among those with a word replaced", "accuracy"),
            Bars("unrelated_cosine", "unrelated sentences", "cosine"),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "A seed draws the cipher, which lines are held out, the parameters and the order. The "
            "weights 1, 1 and 0.01 and the rate 0.4 are the paper's; nothing was tuned.",
            f"Of each held-out translation there are {NEGATIVES} copies with a word replaced by "
            f"another of the same language.",
        ),
    )


def judge(found: Measurements) -> Verdict:
    """Demands that unmasking helps, because of the vector, and that KoLeo prevents a collapse."""

    def more(arm: str, other: str, metric: str, said: str) -> tuple[bool, str]:
        difference = found.difference(arm, other, metric)
        told = f"{found.mean(arm, metric):.3f} against {found.mean(other, metric):.3f}"
        return difference.low > 0, f"{said}: {told} (more by {difference})"

    cosine = {arm: found.mean(arm, "unrelated_cosine") for arm in ("collapse", "sentence", "mexma")}
    gains = {m: found.difference("mexma", "sentence", m).mean for m in ("mined", "hard")}
    return Verdict.of(
        [
            more("mexma", "sentence", "hard", "MEXMA finds more among near translations"),
            more("mexma", "sentence", "mined", "and among all"),
            more("mexma", "unrelated", "hard", "the vector of an unrelated sentence gives less"),
            (
                cosine["collapse"] > 0.95 and cosine["sentence"] < 0.9,
                f"without KoLeo vectors collapse: cosine of unrelated sentences "
                f"{cosine['collapse']:.3f}, with it {cosine['sentence']:.3f}",
            ),
            (
                None,
                f"gains over sentence vectors alone: {gains['hard']:+.3f} among near translations, "
                f"{gains['mined']:+.3f} among all; cosine of unrelated sentences with MEXMA "
                f"{cosine['mexma']:.3f}",
            ),
        ]
    )


class Materials:
    """What the arms of one seed share: pairs of translations, and the encoder they begin with."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed
        self.mask = FIRST + 2 * settings["words"]
        self.model = Encoder(
            ModelConfig(
                vocab_size=self.mask + 1,
                d_model=settings["d_model"],
                n_layers=settings["n_layers"],
                n_heads=4,
                max_positions=WIDTH,
                positions="learned",
                causal=False,
                remat="none",
            )
        )

    @cached_property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """Lines and their translations; the last ones are held out."""
        rng, words = np.random.default_rng(1000 + self.seed), self.settings["words"]
        lines = shakespeare_lines()
        known = {word: i for i, word in enumerate(most_frequent(lines, words))}
        short = {tuple(line) for line in lines if SHORTEST <= len(line) <= LONGEST}
        usable = sorted(line for line in short if all(word in known for word in line))
        cipher = FIRST + words + rng.permutation(words)
        wanted = self.settings["pairs"] + self.settings["held_out"]
        found = []
        for i in rng.permutation(len(usable))[:wanted]:
            ids = [known[word] for word in usable[i]]
            found.append(([BEGIN, *(FIRST + w for w in ids)], [BEGIN, *translated(ids, cipher)]))
        return found

    @cached_property
    def held_out(self) -> list[tuple[list[int], list[int]]]:
        """Pairs that nothing is trained on."""
        return self.pairs[-self.settings["held_out"] :]

    def batches(self, steps: int, stream: int) -> list[Batch]:
        """Returns batches of training pairs; they depend on the seed and the stream."""
        rng = np.random.default_rng([2000 + self.seed, stream])
        train = self.pairs[: -self.settings["held_out"]]
        size = (steps, self.settings["rows"])
        return [as_batch([train[i] for i in part]) for part in rng.integers(0, len(train), size)]

    @cached_property
    def warm(self) -> Any:
        """An encoder that restores masked words of both languages."""
        steps = self.settings["warm_up"]
        spec = Corruption(0.15, 0.8, 0.1, "bernoulli", self.mask, self.mask)

        def make() -> Any:
            rates = cosine_rates(self.settings["rate"], steps)
            objective = MaskedLM(spec, exempt=(BEGIN,))
            batches = self.batches(steps, 0)
            return fitted(self.model, objective, None, batches, rates, seed=self.seed)[0]

        return kept(self.folder / "warm.npz", self.model, make)

    def measure(self, options: Mapping[str, Any]) -> dict[str, list[float]]:
        """Returns for each held-out line and each translation whether it finds its counterpart."""
        steps = self.settings["steps"]
        spec = Corruption(0.4, 0.8, 0.1, "bernoulli", self.mask, self.mask)
        objective = Mexma(spec, StackConfig(n_layers=1), exempt=(BEGIN,), **options)
        rates = cosine_rates(self.settings["rate"], steps, warmup=3 * steps // 10)
        params, _ = fitted(
            self.model, objective, self.warm, self.batches(steps, 1), rates, seed=self.seed
        )
        embed = partial(vectors, jax.jit(self.model.embed_sentences, static_argnames="how"), params)
        sides = [embed([pair[side] for pair in self.held_out]) for side in (0, 1)]
        count = len(self.held_out)
        rng = np.random.default_rng(3000 + self.seed)
        near = [
            embed(
                [self.replaced(rng, pair[side]) for pair in self.held_out for _ in range(NEGATIVES)]
            )
            for side in (0, 1)
        ]
        found: dict[str, list[float]] = {"mined": [], "hard": []}
        for side in (0, 1):
            targets = np.concatenate([sides[1 - side], near[1 - side]])
            scores = margin_scores(sides[side], targets, "cosine")
            right = np.arange(count)
            found["mined"] += (scores[:, :count].argmax(1) == right).astype(float).tolist()
            found["hard"] += (scores.argmax(1) == right).astype(float).tolist()
        cosines = margin_scores(sides[0], sides[0], "cosine")
        found["unrelated_cosine"] = ((cosines.sum(1) - 1) / (count - 1)).tolist()
        return found

    def replaced(self, rng: np.random.Generator, ids: list[int]) -> list[int]:
        """Returns a sentence with one word replaced by another of its language."""
        words, found = self.settings["words"], list(ids)
        at = int(rng.integers(1, len(ids)))
        start = FIRST + words * int(ids[at] >= FIRST + words)
        found[at] = start + (ids[at] - start + int(rng.integers(1, words))) % words
        return found


def translated(words: list[int], cipher: np.ndarray) -> list[int]:
    """Returns the other language's words, those at places 1 and 2, 3 and 4, ... exchanged."""
    found = [int(cipher[w]) for w in words]
    for i in range(1, len(found) - 1, 2):
        found[i], found[i + 1] = found[i + 1], found[i]
    return found


def as_batch(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    """Returns a batch with one pair a row."""
    tokens, segments, positions = (np.zeros((len(pairs), WIDTH), np.int32) for _ in range(3))
    for row, pair in enumerate(pairs):
        at = 0
        for side, ids in enumerate(pair):
            own = slice(at, at + len(ids))
            tokens[row, own], segments[row, own] = ids, side + 1
            positions[row, own] = np.arange(len(ids))
            at += len(ids)
    ids = jnp.asarray(tokens)
    return Batch(
        tokens=ids,
        targets=jnp.roll(ids, -1, 1),
        positions=jnp.asarray(positions),
        segment_ids=jnp.asarray(segments),
        weights=jnp.asarray(segments > 0, jnp.float32),
        example_id=jnp.broadcast_to(jnp.arange(len(pairs))[:, None], (len(pairs), 2)),
        values={"side": jnp.broadcast_to(jnp.arange(2.0), (len(pairs), 2))},
        group=2,
    )


def vectors(embed: Any, params: Any, sentences: list[list[int]]) -> np.ndarray:
    """Returns the vector of each sentence."""
    tokens = np.zeros((len(sentences), LONGEST + 1), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(sentences):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    own = {name: value for name, value in params.items() if name != "heads"}
    return np.asarray(embed(own, tokens, mask, how="first"))
