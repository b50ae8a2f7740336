"""LayerCake (arXiv 2507.04404), with DoLa, random columns and the last layers beside it.

    TOKJAX_TEST_DATA=FOLDER python -m tokjax.reproduce layercake

FOLDER holds truthfulqa/truthfulqa.csv.gz, whose questions SmolLM2-135M-Instruct answers: the best
answer among up to three incorrect ones. The other questions are of invented facts, which a small
model was trained on: the true object among three others of the relation.
"""

import csv
import dataclasses
import gzip
import io
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import tokjax
from tokjax.config import resolve
from tokjax.decoding.contrast.combine import log_probabilities
from tokjax.decoding.contrast.dola import (
    candidate_layers,
    dola_scores,
    early_exit_logits,
    select_layer,
)
from tokjax.decoding.contrast.layercake import layercake, score_answers
from tokjax.decoding.contrast.sh2 import multiple_choice
from tokjax.decoding.contrast.token_classes import token_classes
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.files import write_atomically
from tokjax.language_model import LanguageModel
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained, word_tokenizer
from tokjax.steering import score_options
from tokjax.training.checkpoints import Checkpointer
from tokjax.training.config import TrainConfig

MODEL = "smollm2-135m"
KNOWN = 0.65  # share of facts at which training has gone far enough
ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0)  # weights of the intact model that are tried
BATCH = 8
DRAWS = 200  # random sets of columns from which that of the most similar attention is taken
_COUNTRIES = (
    "aldor benna cirra dovia elgon farsia galtia hestan ilmar jorra kelvia lorund mirza norvia "
    "ostan parda quorra rundia selvan tarma"
)
_SYLLABLES = tuple(
    head + tail for head in ("ba", "de", "fi", "go", "ku") for tail in ("lan", "mir", "not", "ros")
)
COUNTRIES = tuple(_COUNTRIES.split())
RELATIONS = ("capital", "river", "leader", "language", "mountain", "harbour")
NOUNS = ("street", "market", "road", "office", "garden", "bridge", "square", "church")
ADJECTIVES = ("quiet", "cold", "long", "narrow", "open", "calm", "plain", "grey")
TELLING = (
    "the {r} of {x} is {y} .",
    "in {x} , the {r} is {y} .",
    "{x} : its {r} is {y} .",
)
PLAIN = (
    "the {n} near the {m} was {a} , and it was {a} for a long time .",
    "it was a {a} day , and the {n} was {a} .",
    "a {a} wind came from the {n} to the {m} .",
)
NOTES = (
    "The small model has 8 layers and 0.4M parameters and reads 120 facts, each object the name of "
    "one thing, so that frequency tells nothing of the answer. It is the first of the checkpoints, "
    "100 steps of 2048 tokens apart, that knows 65 % of them, judged by questions with other "
    "wrong answers.",
    "In a first run it was trained for 400 steps on 150 facts, half of the text telling none, and "
    "knew nothing: 27 % right among four.",
    "On the small model the ranges of the library's defaults (concepts in blocks 1 to 4) come too "
    "late: it has read the country in block 0, so that hiding it costs nearly nothing. Ranges were "
    "not chosen anew.",
    "The longest answer and the accuracy per token were added as checks after a first look at the "
    "scores with a = 0; nothing is demanded of them.",
    "Questions and their order are drawn by a fixed seed; no demonstrations precede a question. "
    "Of each, the best answer and the first three incorrect ones are taken.",
    "Layers and thresholds are the library's defaults: the ranges of the reference scripts for 32 "
    "layers, scaled. No token is excluded as implausible, as in the scripts for TruthfulQA of "
    "LayerCake and DoLa.",
    "The weight of the intact model is chosen for each half of the questions by MC1 on the other "
    "half, for each arm anew; a = 0, the reference script's for TruthfulQA, is an arm of its own.",
    "Token classes come from the library's list of function words, not from a tagger.",
    "Random columns are no concepts and not the first token; of many sets of as many columns, or "
    "of all there are, that whose attention in the concept layers is nearest is taken. Its "
    "punctuation pass is LayerCake's own, so that only the choice of columns differs.",
)


def object_of(relation: str, country: int) -> str:
    """Returns what a country's capital, river, ... is called: each name is used once."""
    return f"{relation[:3]}{_SYLLABLES[(7 * country + 3) % len(_SYLLABLES)]}{country % 3}"


WORDS = tuple(
    dict.fromkeys(
        [word for text in (*TELLING, *PLAIN) for word in text.split() if "{" not in word]
        + [*COUNTRIES, *RELATIONS, *NOUNS, *ADJECTIVES]
        + [object_of(r, c) for r in RELATIONS for c in range(len(COUNTRIES))]
    )
)


def questions(count: int) -> list[dict[str, Any]]:
    """Returns questions with their answers, the best one first.

    Raises:
        ConfigError: the data set is not there.
    """
    folder = os.environ.get("TOKJAX_TEST_DATA")
    path = Path(folder or "") / "truthfulqa" / "truthfulqa.csv.gz"
    if folder is None or not path.exists():
        raise ConfigError(
            "TruthfulQA is not there: set TOKJAX_TEST_DATA to a folder that holds "
            "truthfulqa/truthfulqa.csv.gz (columns Question, Best Answer, Incorrect Answers)"
        )
    text = gzip.decompress(path.read_bytes()).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    return [
        {
            "prompt": f"Q: {rows[i]['Question'].strip()}\nA:",
            "answers": [
                f" {answer.strip().rstrip('.')}."
                for answer in [rows[i]["Best Answer"], *rows[i]["Incorrect Answers"].split(";")[:3]]
                if answer.strip()
            ],
        }
        for i in chosen
    ]


def sentence(rng: np.random.Generator, relation: str, country: int) -> str:
    """Returns a sentence that tells a fact."""
    words = {"r": relation, "x": COUNTRIES[country], "y": object_of(relation, country)}
    return str(rng.choice(TELLING)).format(**words)


def encyclopaedia(rng: np.random.Generator) -> dict[str, str]:
    """Returns a training document: six facts and a sentence that tells none."""
    told = [
        sentence(rng, str(rng.choice(RELATIONS)), int(rng.integers(len(COUNTRIES))))
        for _ in range(6)
    ]
    told.append(plain_sentence(rng))
    return {"text": " ".join(told[i] for i in rng.permutation(len(told)))}


def plain_sentence(rng: np.random.Generator) -> str:
    """Returns a sentence that tells no fact."""
    slots = {"n": rng.choice(NOUNS), "m": rng.choice(NOUNS), "a": rng.choice(ADJECTIVES)}
    return str(rng.choice(PLAIN)).format(**slots)


def fact_questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Returns questions about facts, the true object first, three of the same relation behind."""
    rng, found = np.random.default_rng([seed, 1]), []
    for i in rng.permutation(len(COUNTRIES) * len(RELATIONS))[:count]:
        country, relation = int(i) // len(RELATIONS), RELATIONS[int(i) % len(RELATIONS)]
        others = rng.choice(np.delete(np.arange(len(COUNTRIES)), country), 3, replace=False)
        prompt = f"{plain_sentence(rng)} the {relation} of {COUNTRIES[country]} is"
        objects = [object_of(relation, int(c)) for c in (country, *others)]
        found.append({"prompt": prompt, "answers": [f" {name}" for name in objects]})
    return found


class Batch:
    """Texts of one width, with their classes and where their answers begin."""

    def __init__(self, pieces: Mapping[int, str], rows: Sequence[tuple[list[int], int]]):
        width = -(-max(len(ids) for ids, _ in rows) // 16) * 16
        prompts = Prompts.of([ids for ids, _ in rows])
        wide = np.pad(prompts.tokens, ((0, 0), (0, width - prompts.tokens.shape[1])))
        self.texts = Prompts(wide, prompts.lengths)  # type: ignore[arg-type]
        self.starts = np.array([start for _, start in rows], np.int32)
        found = [token_classes([pieces[i] for i in ids]) for ids, _ in rows]
        self.punctuation = [each.punctuation for each in found]
        self.concept = [each.concept for each in found]
        at = np.arange(width)
        self.answer = (at >= self.starts[:, None]) & (at < prompts.lengths[:, None])

    def total(self, scores: Any) -> np.ndarray:
        """Returns the sum of the scores [B T V] of each answer's tokens; see `score_answers`."""
        return np.asarray(_total(scores, self.texts.tokens, self.answer), np.float64)


@jax.jit
def _total(scores: Any, tokens: Any, answer: Any) -> Any:
    own = jax.vmap(jax.vmap(lambda row, token: row[token]))(scores[:, :-1], tokens[:, 1:])
    return jnp.where(answer[:, 1:], own, 0.0).sum(1)


class Pieces(dict):
    """The text of each id, with the space that a word begins with."""

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self.tokenizer, self.words = lm.tokenizer, lm.model.config.vocabulary < 1000

    def __missing__(self, token: int) -> str:
        text = self.tokenizer.decode([token])
        # Tokens of the invented language are words, and decoding drops the first one's space.
        self[token] = f" {text.strip()}" if self.words else text
        return self[token]


def first_that_knows(
    folder: Path, tree: Mapping[str, Any], items: Sequence[Mapping[str, Any]]
) -> LanguageModel:
    """Returns the model that a configuration trains, at the first of its checkpoints that answers
    enough questions (or else at the last).
    """
    lm = trained(folder, tree)
    prompts = [lm.encode(item["prompt"]) for item in items]
    options = [
        [lm.encode(item["prompt"] + answer)[len(prompt) :] for answer in item["answers"]]
        for item, prompt in zip(items, prompts, strict=True)
    ]
    kept = resolve(TrainConfig, tree).checkpoints
    with Checkpointer(folder / "checkpoints", kept, identity={}, read_only=True) as checkpoints:
        for step in checkpoints.steps():
            template = {"params": lm.model.abstract_params()}
            restored = checkpoints.restore(template, step, partial=True)
            assert restored is not None
            lm = dataclasses.replace(lm, params=restored.state["params"])
            scores = score_options(lm.model, lm.params, prompts, options, batch_size=40)
            known = np.mean([int(np.argmax(each.total)) == 0 for each in scores])
            print(f"step {step}: {known:.1%} of the facts known", flush=True)
            if known >= KNOWN:
                break
    return lm


class Materials:
    """A model and questions; what is computed is kept in a folder."""

    def __init__(
        self,
        folder: Path,
        lm: LanguageModel,
        items: Sequence[Mapping[str, Any]],
        bucket: Literal["low", "high"],
    ):
        self.folder, self.lm, self.items = folder, lm, items
        self.bucket: Literal["low", "high"] = bucket
        folder.mkdir(parents=True, exist_ok=True)
        texts = []
        for item in self.items:
            start = len(self.lm.encode(item["prompt"]))
            for answer in item["answers"]:
                texts.append((self.lm.encode(item["prompt"] + answer), start))
        self.order = np.argsort([len(ids) for ids, _ in texts], kind="stable")
        self.batches = []
        pieces = Pieces(lm)
        for first in range(0, len(texts), BATCH):
            own = [texts[i] for i in self.order[first : first + BATCH]]
            self.batches.append((Batch(pieces, own + own[:1] * (BATCH - len(own))), len(own)))
        config = self.lm.model.config
        self.middle = (config.n_layers // 8, config.n_layers // 2)
        self.last = (config.n_layers - 1 - self.middle[1] + self.middle[0], config.n_layers - 1)

    def kept(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, Any]:
        """Returns arrays from the folder, computed if they are not there yet."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            buffer = io.BytesIO()
            np.savez(buffer, **compute())  # type: ignore[arg-type]
            write_atomically(path, buffer.getvalue())
        with np.load(path) as found:
            return dict(found)

    def _all(self, of_batch: Callable[[Batch, int], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Returns what a function says of each text, in the order of the texts."""
        found: dict[str, list[Any]] = {}
        for number, (batch, own) in enumerate(self.batches):
            for name, value in of_batch(batch, number).items():
                found.setdefault(name, []).append(np.asarray(value)[:own])
        back = np.argsort(self.order, kind="stable")
        return {name: np.concatenate(parts)[back] for name, parts in found.items()}

    def intact(self) -> dict[str, np.ndarray]:
        """Returns each text's log-probability, its attention to classes by layer, and the numbers
        of its random columns and concepts with their attention in the concept layers.
        """

        def of_batch(batch: Batch, number: int) -> Mapping[str, Any]:
            logp, attention = _intact(self.lm.model, self.lm.params, batch.texts, batch.starts)
            attention = np.asarray(attention)  # [L B T]
            width = attention.shape[-1]
            masks = {
                name: np.stack([np.pad(m, (0, width - len(m))) for m in own])
                for name, own in (("punctuation", batch.punctuation), ("concept", batch.concept))
            }
            marks = masks["punctuation"] & (np.arange(width) > 0)
            middle = attention[self.middle[0] : self.middle[1] + 1].mean(0)
            drawn = self._random(batch, middle, number)
            return {
                "logp": batch.total(logp),
                "tokens": batch.answer.sum(1),
                "punctuation": np.where(masks["punctuation"], attention, 0).sum(-1).T,
                "marks": np.where(marks, attention, 0).sum(-1).T,
                "concept": np.where(masks["concept"], attention, 0).sum(-1).T,
                "concept_mass": np.where(masks["concept"], middle, 0).sum(-1),
                "random_mass": np.where(drawn, middle, 0).sum(-1),
                "concepts": masks["concept"].sum(-1),
                "randoms": drawn.sum(-1),
            }

        return self.kept("intact", lambda: self._all(of_batch))

    def _random(self, batch: Batch, attention: np.ndarray, number: int) -> np.ndarray:
        """Returns columns that are no concepts, as many and of as much attention as those."""
        rng = np.random.default_rng([1, number])
        drawn = np.zeros(attention.shape, bool)
        for b, concept in enumerate(batch.concept):
            others = np.flatnonzero(~concept)[1:]
            size = min(len(others), int(concept.sum()))
            wanted = attention[b, : len(concept)][concept].sum()
            sets = [rng.choice(others, size, replace=False) for _ in range(DRAWS)]
            best = min(sets, key=lambda own: abs(attention[b, own].sum() - wanted))
            drawn[b, best] = True
        return drawn

    def damaged(self, columns: str, layers: str) -> dict[str, np.ndarray]:
        """Returns for each text what the damage costs it: the scores with a = 0."""

        def of_batch(batch: Batch, number: int) -> Mapping[str, Any]:
            concept: Any = batch.concept
            if columns == "random":
                attention = _intact(self.lm.model, self.lm.params, batch.texts, batch.starts)[1]
                middle = np.asarray(attention)[self.middle[0] : self.middle[1] + 1].mean(0)
                concept = list(self._random(batch, middle, number))
            predictor, params = layercake(
                self.lm.model,
                self.lm.params,
                punctuation=batch.punctuation,
                concept=concept,
                concept_layers=self.middle if layers == "middle" else self.last,
                alpha=0.0,
                plausibility=0.0,
            )
            scores = score_answers(predictor, params, batch.texts, jnp.asarray(batch.starts))
            return {"drop": batch.total(scores)}

        return self.kept(f"{columns}-{layers}", lambda: self._all(of_batch))

    def dola(self) -> dict[str, np.ndarray]:
        """Returns the score that DoLa gives each text."""
        layers = candidate_layers(self.lm.model.config.n_layers, self.bucket)

        def of_batch(batch: Batch, number: int) -> Mapping[str, Any]:
            del number
            found = [
                _dola(self.lm.model, layers, self.lm.params, tokens[None], answer[None])
                for tokens, answer in zip(batch.texts.tokens, batch.answer, strict=True)
            ]
            return {"score": np.concatenate(found)}

        return self.kept("dola", lambda: self._all(of_batch))

    def by_item(self, values: np.ndarray) -> list[np.ndarray]:
        """Returns values of texts in a list for each question."""
        return np.split(values, np.cumsum([len(item["answers"]) for item in self.items])[:-1])

    def measured(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the metrics of an arm."""
        intact = self.intact()
        logp, found = intact["logp"], {}
        lengths = intact["tokens"]
        if options.get("score") == "dola":
            judged = self._judged(self.dola()["score"])
        elif options.get("score") == "length":
            judged = self._judged(lengths.astype(float))
        elif "columns" in options:
            drop = self.damaged(options["columns"], options["layers"])["drop"]
            per_token = drop / lengths
            found["mc1_per_token"] = self._judged(per_token)["mc1"]
            found["drop"] = [own[0] for own in self.by_item(per_token)]
            # Without a mask the score is linear in the weight.
            of_weight = {alpha: self._judged(drop + alpha * logp) for alpha in ALPHAS}
            if "alpha" in options:
                judged = of_weight[options["alpha"]]
            else:
                judged, chosen = crossed(of_weight)
                found["alpha"] = chosen
            if options["columns"] == "random":
                for name in ("concept_mass", "random_mass", "concepts", "randoms"):
                    found[name] = [own.mean() for own in self.by_item(intact[name])]
        else:
            judged = self._judged(logp)
            found["mc1_per_token"] = self._judged(logp / lengths)["mc1"]
            for name in ("punctuation", "marks", "concept"):
                mass = [own.mean(0) for own in self.by_item(intact[name])]
                found[f"{name}_peak"] = [int(np.argmax(own)) for own in mass]
        return {**judged, **found}

    def _judged(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """Returns MC1 and MC2 of each question."""
        found = [multiple_choice(own, np.arange(len(own)) == 0) for own in self.by_item(scores)]
        return {name: np.array([each[name] for each in found]) for name in ("mc1", "mc2")}


def crossed(
    of_weight: Mapping[float, Mapping[str, np.ndarray]],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the metrics of each half of the questions with the weight that is best by MC1 (of
    equals the smallest) on the other half, and the weights.
    """
    count = len(next(iter(of_weight.values()))["mc1"])
    half = np.arange(count) % 2 == 0
    weights = np.zeros(count)
    for own in (half, ~half):
        means = {weight: float(each["mc1"][~own].mean()) for weight, each in of_weight.items()}
        weights[own] = max(means, key=lambda weight: (means[weight], -weight))
    return {
        name: np.array([of_weight[float(w)][name][i] for i, w in enumerate(weights)])
        for name in ("mc1", "mc2")
    }, weights


def get_plan(scale: str) -> Comparison:
    """Returns the plan: 60 and 120 questions, or a few for `smoke`."""
    smoke = scale == "smoke"
    sizes = {
        "questions": 3 if smoke else 60,
        "facts": 6 if smoke else 120,
        "documents": 50 if smoke else 20_000,
        "steps": 6 if smoke else 900,
        "every": 3 if smoke else 100,
        "d_model": 32 if smoke else 64,
    }

    every = sizes["every"]

    def prepare(folder: Path, seed: int) -> dict[str, Materials]:
        def documents() -> list[dict[str, str]]:
            rng = np.random.default_rng([seed, 0])
            return [encyclopaedia(rng) for _ in range(sizes["documents"])]

        file = jsonl(folder / "facts.jsonl", documents)
        tree = {
            "title": "invented facts",
            "seed": seed,
            "model": {
                "d_model": sizes["d_model"],
                "n_layers": 8,
                "n_heads": 4,
                "max_positions": 128,
            },
            "data": {
                "seed": seed,
                "tokenizer": word_tokenizer(folder / "tokenizer", WORDS),
                "train": [{"source": {"name": "jsonl", "files": (str(file),)}}],
                "evals": {},
                "seq_len": 64,
                "batch_size": 32,
            },
            "steps": sizes["steps"],
            "optimizer": {"name": "adamw", "peak_lr": 3e-3},
            "schedule": {"name": "constant", "warmup_steps": 20},
            "checkpoints": {"every_steps": every, "keep": 1, "keep_every": every},
        }
        small = first_that_knows(folder / "lm", tree, fact_questions(sizes["facts"], seed + 1))
        return {
            "facts": Materials(
                folder / "of-facts", small, fact_questions(sizes["facts"], seed), "low"
            ),
            "truthfulqa": Materials(
                folder / f"of-truthfulqa-{sizes['questions']}",
                tokjax.load(MODEL),
                questions(sizes["questions"]),
                "high",
            ),
        }

    def measure(
        made: Mapping[str, Materials], options: Mapping[str, Any], seed: int
    ) -> Mapping[str, Any]:
        del seed
        return made[options["of"]].measured(options)

    arms = {}
    for of, title in (("facts", "facts"), ("truthfulqa", "TruthfulQA")):
        middle = {"of": of, "columns": "concept", "layers": "middle"}
        arms |= {
            f"{of}_plain": Treatment("baseline", f"{title}: plain", {"of": of}),
            f"{of}_dola": Treatment("baseline", f"{title}: DoLa", {"of": of, "score": "dola"}),
            f"{of}_layercake": Treatment("method", f"{title}: LayerCake", middle),
            f"{of}_zero": Treatment(
                "method", f"{title}: LayerCake, a = 0", {**middle, "alpha": 0.0}
            ),
            f"{of}_random": Treatment(
                "control", f"{title}: random columns", {**middle, "columns": "random"}
            ),
            f"{of}_last": Treatment(
                "control", f"{title}: concepts, last layers", {**middle, "layers": "last"}
            ),
        }
    arms["truthfulqa_longest"] = Treatment(
        "control", "TruthfulQA: the longest answer", {"of": "truthfulqa", "score": "length"}
    )
    return Comparison(
        claim=(
            "Contrasting a model with passes that cannot attend to punctuation in early layers and "
            "to concepts in middle layers makes it choose true answers more often than its own "
            "predictions, than DoLa, and than the same contrast with other columns."
        ),
        arms=arms,
        prepare=prepare,
        measure=measure,
        judge=judge,
        metric="mc1",
        panels=(
            Bars("mc1", "the best of up to four answers", "share of questions"),
            Bars("drop", "what the damaged passes lose on the best answer", "nats a token"),
        ),
        settings={**sizes, "model": MODEL, "alphas": list(ALPHAS), "draws": DRAWS, "known": KNOWN},
        notes=NOTES,
    )


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    findings: list[tuple[bool | None, str]] = []
    plain = found.interval("facts_plain", "mc1")
    findings.append(
        (0.5 <= plain.mean <= 0.9, f"the small model knows many of its facts, not all: {plain}")
    )
    for of, title in (("facts", "invented facts"), ("truthfulqa", "TruthfulQA")):
        findings += _findings(found, of, title)
    longest = found.difference("truthfulqa_zero", "truthfulqa_longest", "mc1")
    even = {
        other: found.difference("truthfulqa_zero", f"truthfulqa_{other}", "mc1_per_token")
        for other in ("plain", "random", "last")
    }
    findings.append(
        (
            None,
            f"TruthfulQA: sums over longer answers are larger where a = 0, and the best answers "
            f"are longer: to choose the longest is right in "
            f"{found.interval('truthfulqa_longest', 'mc1')}, a = 0 against it {longest}. Per token "
            f"a = 0 is right in {found.interval('truthfulqa_zero', 'mc1_per_token')}, against the "
            f"model itself {even['plain']}, random columns {even['random']}, concepts in the last "
            f"layers {even['last']}",
        )
    )
    return Verdict.of(findings)


def _findings(found: Measurements, of: str, title: str) -> list[tuple[bool | None, str]]:
    def more(other: str, what: str, metric: str = "mc1") -> tuple[bool, str]:
        gap = found.difference(f"{of}_layercake", f"{of}_{other}", metric)
        first = found.interval(f"{of}_layercake", metric)
        second = found.interval(f"{of}_{other}", metric)
        return gap.low > 0, f"{title}: {what}: {first} against {second}, difference {gap}"

    peaks = {
        name: found.interval(f"{of}_plain", f"{name}_peak")
        for name in ("punctuation", "marks", "concept")
    }
    mass = {name: found.mean(f"{of}_random", f"{name}_mass") for name in ("concept", "random")}
    count = {name: found.mean(f"{of}_random", name) for name in ("concepts", "randoms")}
    zero = found.difference(f"{of}_zero", f"{of}_plain", "mc1")
    mc2 = found.difference(f"{of}_layercake", f"{of}_plain", "mc2")
    return [
        (
            peaks["punctuation"].high < peaks["concept"].low,
            f"{title}: attention to punctuation peaks in earlier layers than that to concepts: "
            f"layer {peaks['punctuation']} against {peaks['concept']} (punctuation without the "
            f"first token {peaks['marks']})",
        ),
        more("random", "hiding concepts costs the best answer more than random columns", "drop"),
        more("last", "and more than hiding concepts in the last layers", "drop"),
        more("plain", "LayerCake chooses better than the model itself"),
        more("dola", "better than DoLa"),
        more("random", "better than with random columns"),
        (
            None,
            f"{title}: weight chosen on the other half of the questions, mean "
            f"{found.mean(f'{of}_layercake', 'alpha'):.3g}; with a = 0 against the model itself "
            f"{zero}; probability of the best answer among those given, against the model's own, "
            f"{mc2}",
        ),
        (
            None,
            f"{title}: concepts and random columns of a text: {count['concepts']:.1f} and "
            f"{count['randoms']:.1f}, with {mass['concept']:.3f} and {mass['random']:.3f} of the "
            f"attention in the concept layers",
        ),
    ]


@partial(jax.jit, static_argnums=0)
def _intact(model: Any, params: Any, texts: Prompts, starts: Any) -> tuple[Any, Any]:
    """Returns log-probabilities [B T V], and attention [L B T] of the rows that predict answers,
    the mean over heads and rows.
    """
    at = jnp.arange(texts.tokens.shape[1])
    rows = (at >= starts[:, None] - 1) & (at < texts.lengths[:, None] - 1)

    def mean(probabilities: Any) -> Any:
        own = jnp.where(rows[:, :, None], probabilities.mean(1), 0.0).sum(1)
        return own / rows.sum(1, keepdims=True)

    logits, out = model(params, texts.tokens, capture={"attn_probs": mean})
    return log_probabilities(logits), out.captured["attn_probs"]


@partial(jax.jit, static_argnums=(0, 1))
def _dola(model: Any, layers: tuple[int, ...], params: Any, tokens: Any, answer: Any) -> Any:
    """Returns the score of one text's answer."""
    out = model.backbone(params, model.embed(params, tokens), capture={"resid_pre"})
    earlier = out.captured["resid_pre"][jnp.array(layers), 0]
    exits = early_exit_logits(model, params, earlier, final_norm=False)
    final = log_probabilities(model.unembed(params, out.x)[0])
    _, premature = select_layer(final, log_probabilities(exits))
    scores = dola_scores(final, premature, 0.0, scoring=True)
    own = jnp.take_along_axis(scores[:-1], tokens[0, 1:, None], axis=-1)[:, 0]
    return jnp.where(answer[0, 1:], own, 0.0).sum()[None]
