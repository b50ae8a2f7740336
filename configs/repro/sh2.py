"""SH2 (arXiv 2401.05930): highlighting what a model found unlikely, on invented reports.

python -m tokjax.reproduce sh2
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.config import resolve
from tokjax.decoding.contrast.sh2 import (
    hesitation_prompt,
    key_counts,
    key_positions,
    multiple_choice,
    sh2_scores,
)
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.language_model import LanguageModel
from tokjax.loading import load
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained, word_tokenizer
from tokjax.training.checkpoints import Checkpointer
from tokjax.training.config import TrainConfig

_FIRSTS = (
    "anna boris clara david elena felix greta hugo irene jonas karin lukas maria nadia oscar paula "
    "quentin rosa simon tanja ulrich vera walter xenia yusuf zora adele bruno carla dario edith "
    "fabian gloria harald ines jakob klara leon milena nils"
)
_HEADS = "ab bel cor dun el far gar hol jan kel lor mar nor pal ros sel tam ver wal zen"
_TAILS = "lo mer ton by den kov ski"
_NUMBERS = "four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_ADJECTIVES = "quiet cold early long narrow open calm usual plain grey warm slow"
_NOUNS = "street market river office garden bridge harbour station square church school hill"
TITLES = ("doctor", "captain", "judge", "sergeant", "madam", "professor")
FIRSTS = tuple(_FIRSTS.split())
LASTS = tuple(head + tail for head in _HEADS.split() for tail in _TAILS.split())
NUMBERS, ADJECTIVES, NOUNS = (t.split() for t in (_NUMBERS, _ADJECTIVES, _NOUNS))
FILLER = (
    "the {noun} near the {noun} was {adjective} that day .",
    "people spoke of the weather and of the {adjective} {noun} .",
    "it was a {adjective} morning and the {noun} was {adjective} .",
    "there was little to see at the {noun} except a {adjective} {noun} .",
    "nobody could say why the {noun} was so {adjective} .",
    "a {adjective} wind came from the {noun} and went on until the evening .",
    "the reporters waited at the {noun} and wrote down what they saw .",
    "all of it took place between the {noun} and the {adjective} {noun} .",
    "after a while the crowd went home by way of the {noun} .",
)
FACTS = (
    "at the {noun} {title} {first} {last} gave a speech about the {noun} .",
    "in the morning {title} {first} {last} came to the {noun} with {number} others .",
    "the report names {title} {first} {last} as the owner of the {adjective} {noun} .",
    "that day {title} {first} {last} was seen at the {adjective} {noun} .",
)
STEM = "in the end everyone thanked {title} {first}"
ROLLS = 0.5  # share of documents that are lists of persons
LISTED = 0.25  # share of reports that begin with a list of some of their words
HEADER, BODY = "pondering :", "context :"
KNOWN = 0.7  # accuracy on the dev questions at which training has gone far enough
PERCENT = 8  # keys per 100 tokens, as the paper's script for FACTOR has it
ALPHAS = (0.1, 0.5, 1.6, 6.0)  # weights of the contrast that are tried on the dev questions
FIRST = np.array([True, False, False, False])  # the true name is the first option
BATCH = 50
NOTES = (
    "The model has 3 layers and 0.15M parameters (the published ones are LLaMA's); it is the first "
    "of the checkpoints, 200 steps of 2048 tokens apart, whose plain accuracy on the dev questions "
    "reaches 70 %, or else the last, so that it copies from the text, but not always.",
    "Half of the training documents are lists of persons read out three times, without which "
    "copying does not appear within so few steps. A quarter of the reports begin with the "
    "template of the keys and words drawn evenly from the report, so that the template is not "
    "foreign to the model; nothing there tells unlikely words from others.",
    "Keys are 8 per 100 tokens, drawn from 1.5 times as many, written before the passage, as in "
    "the reference code for FACTOR. No token is excluded as implausible: an answer is one token, "
    "and two excluded answers could not be told apart.",
    "The weight of the contrast is chosen by the accuracy of SH2 on the dev questions; all arms "
    "with a contrast use it.",
    "One of the 140 names, garden, is a noun too, which was noticed behind the run.",
    "This is the second run. In the first one rows of 128 tokens had cut most reports before their "
    "persons came back, so that the model hardly copied (58 and 62 % right after 1200 steps), and "
    "SH2 gained 0.6 points [-1.6, 3.0] over plain, as much as random tokens. Rows were made "
    "longer, the end of training was tied to the plain accuracy, and the arm without drawing "
    "was added; what is demanded was left as it was.",
)
WORDS = tuple(
    dict.fromkeys(
        [
            word
            for text in (*FILLER, *FACTS, STEM, HEADER, BODY)
            for word in text.split()
            if not word.startswith("{")
        ]
        + [*TITLES, *FIRSTS, *LASTS, *NUMBERS, *ADJECTIVES, *NOUNS]
    )
)


def filled(rng: np.random.Generator, text: str, **given: str) -> str:
    """Returns a template with the words given in its slots, and random ones in the others."""
    words = []
    slots = {"{noun}": NOUNS, "{adjective}": ADJECTIVES, "{number}": NUMBERS}
    for word in text.split():
        if word.strip("{}") in given:
            word = given[word.strip("{}")]
        words.append(str(rng.choice(slots[word])) if word in slots else word)
    return " ".join(words)


def people(rng: np.random.Generator) -> list[dict[str, str]]:
    """Returns three persons of different names."""
    firsts, lasts = rng.choice(FIRSTS, 3, replace=False), rng.choice(LASTS, 3, replace=False)
    return [
        {"title": str(rng.choice(TITLES)), "first": str(first), "last": str(last)}
        for first, last in zip(firsts, lasts, strict=True)
    ]


def passage(rng: np.random.Generator, persons: list[dict[str, str]]) -> str:
    """Returns a text of 60 to 110 words that names each person once among much that is usual."""
    told = [filled(rng, str(rng.choice(FACTS)), **person) for person in persons]
    told += [filled(rng, str(rng.choice(FILLER))) for _ in range(rng.integers(4, 7))]
    return " ".join(told[i] for i in rng.permutation(len(told)))


def roll(rng: np.random.Generator) -> str:
    """Returns a list of persons that is read out three times, in another order each time."""
    firsts = rng.choice(FIRSTS, 8, replace=False)
    lasts = rng.choice(LASTS, 8, replace=False)
    pairs = [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
    return " ".join(pairs[i] for _ in range(3) for i in rng.permutation(8))


def report(rng: np.random.Generator) -> dict[str, str]:
    """Returns a training document: a passage that comes back to its persons, or a roll."""
    if rng.random() < ROLLS:
        return {"text": roll(rng)}
    persons = people(rng)
    text = passage(rng, persons)
    for i in rng.permutation(3):
        text = f"{text} {filled(rng, f'{STEM} {{last}} .', **persons[i])}"
    if rng.random() < LISTED:
        words = text.split()
        some = np.sort(rng.choice(len(words), rng.integers(4, 13), replace=False))
        text = f"{HEADER} {' '.join(words[i] for i in some)} {BODY} {text}"
    return {"text": text}


def question(rng: np.random.Generator, rival: bool) -> dict[str, Any]:
    """Returns a passage with a stem and four names that may follow it, the true one first.

    Args:
        rng: draws it.
        rival: whether a wrong name is that of another person of the passage; the others are of
            nobody in it.
    """
    persons = people(rng)
    told, asked = passage(rng, persons), persons[0]
    present = [person["last"] for person in persons]
    absent = rng.choice([last for last in LASTS if last not in present], 3, replace=False)
    wrong = [present[1], *absent[:2]] if rival else list(absent)
    return {
        "passage": told,
        "stem": filled(rng, STEM, **asked),
        "options": [asked["last"], *map(str, wrong)],
        "names": {person[key] for person in persons for key in ("first", "last")},
        "rival": rival,
    }


class Materials:
    """A trained model, questions about passages that it has not read, and the weight chosen."""

    def __init__(
        self,
        lm: LanguageModel,
        stages: Iterable[tuple[int, Any]],
        plan: dict[str, int],
        seed: int,
    ):
        self.lm, self.seed = lm, seed
        self.header, self.body, self.dot = (self._ids(text) for text in (HEADER, BODY, "."))
        rng = np.random.default_rng([seed, 1])
        self.sets = {
            split: [question(rng, i % 2 == 1) for i in range(plan[split])]
            for split in ("dev", "test")
        }
        for self.step, params in stages:
            self.lm = dataclasses.replace(lm, params=params)
            self.known = self.judged("dev", {}, 0.0)
            if self.known >= KNOWN:
                break
        self.alpha = max(
            ALPHAS, key=lambda alpha: (self.judged("dev", {"keys": "lowest"}, alpha), -alpha)
        )

    def _ids(self, text: str) -> list[int]:
        return self.lm.encode(f". {text}")[2:]  # behind BOS and the dot

    def judged(self, split: str, options: Mapping[str, Any], alpha: float) -> float:
        """Returns the share of right answers."""
        return float(np.mean(self.measured(split, options, alpha)["accuracy"]))

    def measured(self, split: str, options: Mapping[str, Any], alpha: float) -> dict[str, Any]:
        """Returns the metrics of an arm."""
        items = self.sets[split]
        texts = [item["stem"] if options.get("blind") else told(item) for item in items]
        contexts = [self.lm.encode(text) for text in texts]
        original = predicted(self.lm, contexts)[0]
        found, scores = {}, original
        if "keys" in options:
            keys = self._keys(contexts, options["keys"], options.get("pool_factor", 1.5))
            written = [[context[i] for i in k] for context, k in zip(contexts, keys, strict=True)]
            names = [
                np.isin(context, [self._ids(name)[-1] for name in item["names"]])
                for context, item in zip(contexts, items, strict=True)
            ]
            found["name_keys"] = [n[k].mean() for n, k in zip(names, keys, strict=True)]
            found["name_tokens"] = [n.mean() for n in names]
            if options.get("other_passage"):
                written = written[1:] + written[:1]
            hesitated = [self._hesitated(c, w) for c, w in zip(contexts, written, strict=True)]
        elif options.get("write") == "repeat":
            hesitated = [self._hesitated(context, context[1:]) for context in contexts]
        elif options.get("write") == "pause":
            counts = [key_counts(len(context), PERCENT)[1] for context in contexts]
            hesitated = [
                self._hesitated(c, self.dot * n) for c, n in zip(contexts, counts, strict=True)
            ]
        else:
            hesitated = None
        if hesitated is not None:
            expert, amateur = (jnp.asarray(a) for a in (predicted(self.lm, hesitated)[0], original))
            scores = np.asarray(sh2_scores(expert, amateur, alpha, plausibility=0.0))
        ids = [[self._ids(name)[-1] for name in item["options"]] for item in items]
        given = np.take_along_axis(scores, np.array(ids), axis=1).astype(np.float64)
        right = np.array([multiple_choice(row, FIRST)["factor"] for row in given])
        rival = np.array([item["rival"] for item in items])
        return {
            "accuracy": right,
            "accuracy_absent": np.where(rival, np.nan, right),
            "accuracy_rival": np.where(rival, right, np.nan),
            "margin": given[:, 0] - np.logaddexp.reduce(given[:, 1:], axis=1),
            **found,
        }

    def _keys(self, contexts: list[list[int]], which: str, pool_factor: float) -> list[np.ndarray]:
        """Returns the places of each context's keys: of the lowest, highest or random chances."""
        chances = predicted(self.lm, contexts)[1]
        rng = np.random.default_rng([self.seed, 2])
        found = []
        for i, (context, own) in enumerate(zip(contexts, chances, strict=True)):
            ranked = own[: len(context) - 1]
            if which == "random":
                ranked = rng.permutation(len(ranked))
            elif which == "highest":
                ranked = -ranked
            seed = self.seed * 10_000 + i
            found.append(key_positions(ranked, PERCENT, pool_factor=pool_factor, seed=seed))
        return found

    def _hesitated(self, context: list[int], written: Sequence[int]) -> list[int]:
        """Returns a context with ids written before it, BOS staying first."""
        both = [*context, *written]
        places = range(len(context), len(both))
        keys = hesitation_prompt(both, places, before=self.header, behind=self.body, start=1)
        return keys[: len(keys) - len(written)]


def checkpoints(folder: Path, tree: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """Yields the steps and parameters that a run has kept, from its first on."""
    config = resolve(TrainConfig, tree)
    model = load(folder).model
    where = folder / "checkpoints"
    with Checkpointer(where, config.checkpoints, identity={}, read_only=True) as found:
        for step in found.steps():
            restored = found.restore({"params": model.abstract_params()}, step, partial=True)
            assert restored is not None
            yield step, restored.state["params"]


def told(item: Mapping[str, Any]) -> str:
    """Returns a passage with its stem."""
    return f"{item['passage']} {item['stem']}"


def predicted(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log-probabilities of what follows each row, and of each row's own tokens but
    the first.
    """
    width = bucket(max(map(len, rows)))
    after, within = [], []
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        filled_up = Prompts.of([*some, *[some[0]] * (BATCH - len(some))])
        tokens = np.pad(filled_up.tokens, ((0, 0), (0, width - filled_up.tokens.shape[1])))
        found = jax.device_get(_predicted(lm.model, lm.params, tokens, filled_up.lengths))
        after.append(found[0][: len(some)])
        within.append(found[1][: len(some)])
    return np.concatenate(after), np.concatenate(within)


@partial(jax.jit, static_argnums=0)
def _predicted(model: Any, params: Any, tokens: Any, lengths: Any) -> tuple[Any, Any]:
    logp = jax.nn.log_softmax(model(params, tokens)[0])
    after = jnp.take_along_axis(logp, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return after, jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]


def get_plan(scale: str) -> Comparison:
    """Returns the plan: a model of 0.2M parameters, or in seconds for `smoke`."""
    smoke = scale == "smoke"
    sizes = {
        "documents": 200 if smoke else 12_000,
        "steps": 12 if smoke else 2000,
        "every": 6 if smoke else 200,
        "dev": 12 if smoke else 300,
        "test": 12 if smoke else 500,
        "d_model": 32 if smoke else 64,
        "n_layers": 2 if smoke else 3,
    }

    every = sizes["every"]

    def prepare(folder: Path, seed: int) -> Materials:
        def documents() -> list[dict[str, str]]:
            rng = np.random.default_rng([seed, 0])
            return [report(rng) for _ in range(sizes["documents"])]

        file = jsonl(folder / "reports.jsonl", documents)
        tree = {
            "title": "invented reports",
            "seed": seed,
            "model": {
                "d_model": sizes["d_model"],
                "n_layers": sizes["n_layers"],
                "n_heads": 4,
                "max_positions": 320,
            },
            "data": {
                "seed": seed,
                "tokenizer": word_tokenizer(folder / "tokenizer", WORDS),
                "train": [{"source": {"name": "jsonl", "files": (str(file),)}}],
                "evals": {},
                "seq_len": 256,
                "batch_size": 8,
            },
            "steps": sizes["steps"],
            "optimizer": {"name": "adamw", "peak_lr": 5e-3},
            "schedule": {"name": "constant", "warmup_steps": 20},
            "checkpoints": {"every_steps": every, "keep": 1, "keep_every": every},
        }
        return Materials(
            trained(folder / "lm", tree), checkpoints(folder / "lm", tree), sizes, seed
        )

    def measure(made: Materials, options: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
        alpha = options.get("alpha", made.alpha)
        found = made.measured("test", options, alpha)
        return {**found, "alpha": [alpha], "step": [made.step]}

    return Comparison(
        claim=(
            "Writing the tokens of a passage that the model found least likely a second time, and "
            "decoding from the contrast with and without them, makes a model that copies "
            "imperfectly choose the passage's facts more often."
        ),
        arms={
            "plain": Treatment("baseline", "plain"),
            "repeat": Treatment("baseline", "passage twice", {"write": "repeat"}),
            "pause": Treatment("control", "as many dots", {"write": "pause"}),
            "sh2": Treatment("method", "SH2: least likely tokens", {"keys": "lowest"}),
            "sh2_all": Treatment(
                "method", "SH2, none left out", {"keys": "lowest", "pool_factor": 1.0}
            ),
            "uncontrasted": Treatment(
                "baseline", "their repetition alone, a = 0", {"keys": "lowest", "alpha": 0.0}
            ),
            "random": Treatment("control", "random tokens", {"keys": "random"}),
            "highest": Treatment("control", "likeliest tokens", {"keys": "highest"}),
            "other": Treatment(
                "control",
                "another passage's least likely",
                {"keys": "lowest", "other_passage": True},
            ),
            "blind": Treatment("control", "no passage", {"blind": True}),
        },
        prepare=prepare,
        measure=measure,
        judge=judge,
        metric="accuracy",
        panels=(
            Bars("accuracy", "four names, one of them the passage's", "share right"),
            Bars(
                "accuracy_rival",
                "where a wrong name is of another person of the passage",
                "share right",
            ),
            Bars("margin", "true name against the three others", "log odds (nats)"),
        ),
        settings={
            **sizes,
            "percent": PERCENT,
            "alphas": list(ALPHAS),
            "rolls": ROLLS,
            "lists": LISTED,
            "known": KNOWN,
        },
        seeds=(0, 1),
        notes=NOTES,
    )


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""

    def more(arm: str, other: str, what: str) -> tuple[bool, str]:
        gap = found.difference(arm, other, "accuracy")
        first, second = (found.interval(name, "accuracy") for name in (arm, other))
        return gap.low > 0, f"{what}: {first} against {second}, difference {gap}"

    plain = [float(np.mean(values)) for values in found.items("plain", "accuracy")]
    names = found.mean("sh2", "name_keys") / found.mean("sh2", "name_tokens")
    foreign = found.difference("other", "plain", "accuracy")
    blind = found.interval("blind", "accuracy")
    kinds = {
        kind: found.difference("sh2", "plain", f"accuracy_{kind}") for kind in ("absent", "rival")
    }
    chosen = [float(values[0]) for values in found.items("sh2", "alpha")]
    return Verdict.of(
        [
            (
                all(0.5 <= value <= 0.85 for value in plain),
                f"the plain model is right in 50 to 85 % of the questions: "
                f"{', '.join(f'{value:.1%}' for value in plain)} by seed",
            ),
            more("sh2", "plain", "SH2 is right more often than plain decoding"),
            more("sh2", "random", "and than with random tokens"),
            more("random", "highest", "random tokens are better than the likeliest"),
            (
                names >= 3,
                f"names are at least three times as common among the keys as in the text: "
                f"{names:.1f} times",
            ),
            (
                foreign.low <= 0,
                f"keys of another passage do not help: difference to plain {foreign}",
            ),
            (
                blind.low <= 0.25,
                f"without a passage the choice is no better than a guess among four: {blind}",
            ),
            (
                None,
                f"gain over plain where the wrong names are of nobody in the passage "
                f"{kinds['absent']}, where one is of another person in it {kinds['rival']}",
            ),
            (
                None,
                f"the repetition alone (a = 0) against plain: "
                f"{found.difference('uncontrasted', 'plain', 'accuracy')}; the passage twice: "
                f"{found.difference('repeat', 'plain', 'accuracy')}; dots: "
                f"{found.difference('pause', 'plain', 'accuracy')}",
            ),
            (
                None,
                f"the least likely tokens themselves, none left out by chance, against plain: "
                f"{found.difference('sh2_all', 'plain', 'accuracy')}; against SH2 as in the "
                f"reference code: {found.difference('sh2_all', 'sh2', 'accuracy')}",
            ),
            (
                None,
                f"by seed, weight chosen on other questions {chosen}, training ended at step "
                f"{[int(values[0]) for values in found.items('sh2', 'step')]}",
            ),
        ]
    )
