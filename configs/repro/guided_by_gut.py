"""Guided by Gut (arXiv 2505.20325): confidence made trustworthy by reward, and search by it.

    python -m tokjax.reproduce guided_by_gut

A model of 0.1M parameters learns chains of four sums modulo 10, a line each, from a teacher that
slips at some facts, at a quarter of them more often than not. From there on it learns by reward
in groups of 8, without scaling: by the paper's reward, or by accuracy alone. Held-out questions are
answered by each; the confidence of an answer is that of the reward, the weighted mean probability
of its lines. Calibration of samples:
    before      the model of SFT
    gg          behind the paper's reward
    accuracy    behind the reward for right answers alone
Search, 16 rows a question (4 beams of 4 candidates), votes weighted by confidence:
    search      the paper's reward and search
    no_novelty  the same without the bonus for new tokens
    no_rl       the same search by the model of SFT
    other_rl    the same search by the model of the accuracy reward
    majority    the vote of 16 samples of the model of `search`
    best        that of the 16 samples which is most confident
    random      `search` with steps chosen at random, and the majority's vote (control)
    oracle      `search` with steps chosen by their correctness (ceiling)

It did not reproduce, by two of six demands. Reward makes confidence trustworthy (AUROC 0.72 to
0.99), but that for right answers alone does as well (0.99). The search answers 99 % right, against
42 % without the reward and 97 % with steps at random, but the majority of 16 samples has 98 %.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokjax.decoding import Prompts, categorical, decode, on_tokens, top_p
from tokjax.decoding.search import Drawn, Generator, confident_vote, gut_search
from tokjax.language_model import LanguageModel
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained
from tokjax.reproduction.tasks import slipping_sums as sums
from tokjax.reproduction.tasks.slipping_sums import SlippingSums
from tokjax.rl.guided_by_gut import confidence, step_confidences
from tokjax.rl.presets import PRESETS
from tokjax.signals.auroc import auroc

STEPS = 4
NEW = STEPS * sums.LINE  # tokens of an answer, the end included
ROW = 2 * STEPS + 3 + NEW
BREAK, VERIFIER = "\n", {"name": "exact_match", "extract": r"=(\d)$"}
CANDIDATES, WIDTH, NOVELTY, TOP_P = 16, 4, 0.1, 0.95
BINS = 10  # of the calibration error


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "d_model": 16 if smoke else 64,
        "examples": 50 if smoke else 6000,
        "asked": 50 if smoke else 2000,
        "sft_steps": 4 if smoke else 2000,
        "sft_batch": 16 if smoke else 64,
        "updates": 2 if smoke else 80,
        "batch": 16 if smoke else 128,
        "held_out": 4 if smoke else 150,
        "samples": 4 if smoke else 8,
        "rates": SlippingSums.rates,
        "search": [CANDIDATES, WIDTH, NOVELTY, TOP_P],
    }

    def calibration(role: str, label: str, model: str) -> Treatment:
        return Treatment(role, label, {"kind": "calibration", "model": model})  # type: ignore[arg-type]

    def search(role: str, label: str, model: str = "gg", **options: Any) -> Treatment:
        options = {"kind": "search", "model": model, **options}
        return Treatment(role, label, options)  # type: ignore[arg-type]

    def samples(label: str, rule: str) -> Treatment:
        return Treatment("baseline", label, {"kind": "samples", "model": "gg", "rule": rule})

    arms = {
        "gg": calibration("method", "samples, GG's reward", "gg"),
        "before": calibration("baseline", "samples, before", "sft"),
        "accuracy": calibration("baseline", "samples, accuracy reward", "accuracy"),
        "search": search("method", "GG"),
        "no_novelty": search("baseline", "GG without novelty", weight=0.0),
        "no_rl": search("baseline", "GG without learning", model="sft"),
        "other_rl": search("baseline", "GG, accuracy reward", model="accuracy"),
        "majority": samples("majority of 16", "majority"),
        "best": samples("most confident of 16", "best"),
        "random": search("control", "random steps", steps="random"),
        "oracle": search("control", "oracle of steps", steps="oracle"),
    }
    return Comparison(
        claim=(
            "A reward for calibration makes the model's confidence tell right answers from wrong "
            "ones better than a reward for accuracy, and search by that confidence finds more "
            "right answers than as many tokens of samples."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(**options),
        judge=judge,
        metric="right",
        panels=(
            Bars("right", "right answers to held-out questions", "share"),
            Bars("auroc", "confidence of right against wrong samples", "AUROC"),
            Bars("ece", "calibration error of the confidence", "ECE"),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "A first full run taught 500 steps of imitation only: the model had not learnt sums "
            "(.133 right, chance is .1) and GG's reward taught it to hedge (AUROC .750 against "
            ".494, but .046 right). The imitation was made longer, once; the demands stayed.",
            "An item is a held-out question where steps are searched, and one of its samples at "
            "temperature 1 for calibration; the AUROC of an item is that of all items of its seed, "
            "and intervals of AUROCs draw questions anew, the same for both arms.",
            "16 candidates, 4 a beam and novelty of 0.1 are the defaults of the authors' "
            "configuration; steps and the 16 samples are drawn at temperature 1 with top-p 0.95, "
            "as in their recipe. Four steps are fewer than its temperature's 11 first turns.",
            "80 updates of 16 groups of 8, two of each collection, AdamW at 3e-4. Both rewards "
            "have the same settings; none was tuned.",
        ),
    )


@dataclass(frozen=True, eq=False)
class Judging(Generator):
    """Draws steps, and tells for their confidence what something else makes of them."""

    judged: Callable[[Sequence[list[int]], Sequence[list[int]], Sequence[int]], Any] | None = None

    def __call__(self, rows: Any, seeds: Any, *, samples: int = 1) -> Drawn:
        """Returns what the generator draws, with other confidences."""
        found = super().__call__(rows, seeds, samples=samples)
        assert self.judged is not None and samples == 1
        told = np.asarray(self.judged(rows, found.tokens, seeds), float)
        return replace(found, confidences=told)


class Materials:
    """Models of one seed, trained when first asked for."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed
        self.task = SlippingSums(STEPS, tuple(settings["rates"]), seed)
        rng = np.random.default_rng([seed, 1])
        self.held_out = [self.task.question(rng) for _ in range(settings["held_out"])]

    def data(self, slips: bool) -> dict[str, Any]:
        """Returns what runs read: the teacher's texts, or other questions with right answers."""
        held_out, rng = set(self.held_out), np.random.default_rng([self.seed, 2 + slips])

        def records() -> Any:
            for _ in range(self.settings["examples" if slips else "asked"]):
                question = self.task.question(rng)
                while question in held_out:
                    question = self.task.question(rng)
                taken = self.task.slipped(question, rng) if slips else None
                answer = sums.response(question, taken)
                yield {"prompt": sums.prompt(question), "response": answer}

        file = jsonl(self.folder / ("shown.jsonl" if slips else "asked.jsonl"), records)
        return {
            "tokenizer": {"name": "bytes", "add_eos": True},
            "train": [{"source": {"name": "jsonl", "files": (str(file),), "kind": "response"}}],
            "evals": {},
            "packing": "none",
            "seq_len": ROW,
            "batch_size": self.settings["sft_batch" if slips else "batch"],
            "seed": self.seed,
            "cache_dir": str(self.folder / "cache"),
        }

    def tree(self, **changes: Any) -> dict[str, Any]:
        """Returns the configuration of a run."""
        return {
            "title": "guided by gut",
            "seed": self.seed,
            "evaluation": {"every_steps": 10**6},
            "checkpoints": {"every_steps": 10**6},
            "log_every": 25,
            **changes,
        }

    @cached_property
    def models(self) -> dict[str, LanguageModel]:
        """The models, by name."""
        model = {
            "d_model": self.settings["d_model"],
            "n_layers": 2,
            "n_heads": 4,
            "max_positions": 64,
        }
        sft = self.tree(
            model=model,
            data=self.data(slips=True),
            objective={"name": "sft"},
            steps=self.settings["sft_steps"],
            optimizer={"name": "adamw", "peak_lr": 3e-3, "weight_decay": 0.0},
            schedule={"name": "cosine", "warmup_steps": 20},
        )
        found = {"sft": trained(self.folder / "sft", sft)}
        rewards = {
            "gg": {"name": "calibration", "verifier": VERIFIER, "separator": BREAK},
            "accuracy": {"name": "verifier", "verifier": VERIFIER},
        }
        for name, reward in rewards.items():
            rollouts = {"group": 8, "minibatches": 2, "max_new_tokens": NEW, "rows": 256}
            tree = self.tree(
                init_from=str(self.folder / "sft"),
                data=self.data(slips=False),
                objective={
                    **PRESETS["dr_grpo"],
                    "rewards": [{**reward, "stopped_only": True}],
                    "rollouts": rollouts,
                },
                steps=self.settings["updates"],
                optimizer={"name": "adamw", "peak_lr": 3e-4, "weight_decay": 0.0},
                schedule={"name": "constant", "warmup_steps": 2},
            )
            found[name] = trained(self.folder / name, tree)
        return found

    def measure(self, kind: str, **options: Any) -> dict[str, Any]:
        """Returns the metrics of an arm."""
        lm = self.models[options.pop("model")]
        made = {"calibration": self.calibration, "samples": self.chosen, "search": self.searched}
        return made[kind](lm, **options)

    def answers(self, lm: LanguageModel, rows: Sequence[Sequence[int]]) -> list[str | None]:
        """Returns the answers of continuations, None of those that did not end."""
        ended = [list(row[-1:]) == [lm.tokenizer.eos_id] for row in rows]
        texts = [lm.tokenizer.decode(list(row[:-1])) for row in rows]
        return [
            sums.answer(text, STEPS) if end else None
            for text, end in zip(texts, ended, strict=True)
        ]

    def right(self, answers: Sequence[str | None], each: int = 1) -> np.ndarray:
        """Returns which answers are right, so many to each question."""
        wanted = [str(sums.numbers(q)[-1]) for q in self.held_out for _ in range(each)]
        return np.array([a == b for a, b in zip(answers, wanted, strict=True)], float)

    def sampled(
        self, lm: LanguageModel, samples: int, mass: float
    ) -> tuple[list[str | None], np.ndarray, float]:
        """Returns answers of samples, their confidences, and tokens to a question."""
        eos = lm.tokenizer.eos_id
        assert eos is not None
        found = decode(
            lm.model,
            lm.params,
            self.prompts(lm),
            max_new_tokens=NEW,
            samples=samples,
            transform=top_p(mass) if mass < 1 else None,
            sampler=categorical(),
            stop=on_tokens((eos,)),
            key=jax.random.key(self.seed),
        )
        rows, logprobs = found.rows(), np.asarray(found.logprobs)
        confidences = []
        for row, own in zip(rows, logprobs, strict=True):
            pieces = [lm.tokenizer.decode([t]) for t in row]
            of_lines = step_confidences([float(p) for p in own[: len(row)]], pieces, BREAK)
            confidences.append(confidence(of_lines))
        tokens = sum(map(len, rows)) / len(self.held_out)
        return self.answers(lm, rows), np.array(confidences), tokens

    def prompts(self, lm: LanguageModel) -> Prompts:
        """Returns the held-out questions."""
        return Prompts.of([lm.encode(sums.prompt(q)) for q in self.held_out])

    def calibration(self, lm: LanguageModel) -> dict[str, Any]:
        """Returns whether samples are right, their confidences, and how well these tell."""
        samples = self.settings["samples"]
        answers, c, _ = self.sampled(lm, samples, 1.0)
        right = self.right(answers, samples)
        return {
            "right": right,
            "confidence": c,
            "auroc": [rank(c, right)],
            "ece": [calibration_error(c, right)],
        }

    def chosen(self, lm: LanguageModel, rule: str) -> dict[str, Any]:
        """Returns whether the answer that a rule chooses of 16 samples is right."""
        answers, c, tokens = self.sampled(lm, CANDIDATES, TOP_P)
        taken: list[str | None] = []
        for i in range(0, len(answers), CANDIDATES):
            own, scores = answers[i : i + CANDIDATES], c[i : i + CANDIDATES]
            if rule == "best":
                taken.append(own[int(scores.argmax())])
            else:
                taken.append(vote_of(own, scores, "majority"))
        of_samples = self.right(answers, CANDIDATES).reshape(-1, CANDIDATES).mean(1)
        return {"right": self.right(taken), "candidates": of_samples, "tokens": [tokens]}

    def searched(
        self, lm: LanguageModel, weight: float = NOVELTY, steps: str = "confident"
    ) -> dict[str, Any]:
        """Returns whether the answers that the search votes for are right."""
        eos, tokenizer = lm.tokenizer.eos_id, lm.tokenizer
        assert eos is not None
        asked = {tuple(lm.encode(sums.prompt(q))): q for q in self.held_out}
        size = len(next(iter(asked)))  # of all prompts

        def at_random(rows: Any, drawn: Any, seeds: Any) -> list[float]:
            return [float(np.random.default_rng([int(s), 1]).random()) for s in seeds]

        def by_oracle(rows: Any, drawn: Any, seeds: Any) -> list[float]:
            found = []
            for row, new in zip(rows, drawn, strict=True):
                text = tokenizer.decode([t for t in [*row[size:], *new] if t != eos])
                found.append(float(sums.step_is_right(asked[tuple(row[:size])], text)))
            return found

        given: dict[str, Any] = {
            "model": lm.model,
            "params": lm.params,
            "max_new_tokens": sums.LINE + 1,
            "transform": top_p(TOP_P),
            "stop": on_tokens(tokenizer.encode(BREAK)),
        }
        if steps == "confident":
            generator = Generator(**given)
        else:
            judged = {"random": at_random, "oracle": by_oracle}[steps]
            generator, weight = Judging(**given, judged=judged), 0.0
        found = gut_search(
            generator,
            self.prompts(lm),
            candidates=CANDIDATES,
            width=WIDTH,
            max_steps=STEPS,
            ends=[eos],
            weight=weight,
            seed=self.seed,
        )
        values: dict[str, list[str | None]] = {"majority_vote": [], "right": []}
        shares = []
        for question, paths in zip(self.held_out, found.candidates, strict=True):
            own = self.answers(lm, [path.tokens for path in paths])
            scores = [path.value for path in paths]
            values["majority_vote"].append(vote_of(own, scores, "majority"))
            # What is drawn at random is no confidence to weigh votes by.
            how = "majority" if steps == "random" else "sum"
            values["right"].append(vote_of(own, scores, how))
            shares.append(np.mean([a == str(sums.numbers(question)[-1]) for a in own]))
        return {
            **{name: self.right(taken) for name, taken in values.items()},
            "candidates": shares,
            "tokens": [found.cost.tokens / len(self.held_out)],
        }


def vote_of(answers: Sequence[str | None], scores: Sequence[float], how: Any) -> str | None:
    """Returns the answer that candidates vote for."""
    answer = confident_vote(answers, list(scores), how).answer
    return None if answer is None else str(answer)


def rank(scores: np.ndarray, right: np.ndarray) -> float:
    """Returns the AUROC of scores; NaN where all are right, or none."""
    return auroc(scores, right) if 0 < right.sum() < len(right) else float("nan")


def calibration_error(scores: np.ndarray, right: np.ndarray) -> float:
    """Returns the expected calibration error, in bins of equal width.

    >>> round(calibration_error(np.array([0.95, 0.95, 0.15]), np.array([1.0, 0.0, 0.0])), 6)
    0.35
    """
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    apart = [abs((scores - right)[bins == b].sum()) for b in range(BINS)]
    return float(sum(apart) / len(scores))


def rank_difference(found: Measurements, arm: str, other: str) -> tuple[float, float, float]:
    """Returns how much greater an arm's AUROC is, and a 95 % interval; questions are drawn anew."""
    rng, draws = np.random.default_rng(0), 1000
    means, drawn = [], np.zeros(draws)
    for n in range(len(found.seeds)):
        pairs = []
        for name in (arm, other):
            c, right = (found.items(name, m)[n] for m in ("confidence", "right"))
            pairs.append((c, right))
        first, second = pairs
        means.append(rank(*first) - rank(*second))
        if not np.isfinite(means[-1]):
            return (float("nan"),) * 3
        questions = round(len(found.items("search", "right")[n]))
        size = len(first[0]) // questions
        for d in range(draws):
            at = rng.integers(0, questions, questions)
            places = (at[:, None] * size + np.arange(size)).ravel()
            apart = rank(first[0][places], first[1][places])
            apart -= rank(second[0][places], second[1][places])
            drawn[d] += apart / len(found.seeds)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(np.mean(means)), float(low), float(high)


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    right = {name: found.mean(name, "right") for name in found.values}
    ranks = {name: found.mean(name, "auroc") for name in ("before", "gg", "accuracy")}
    errors = {name: found.mean(name, "ece") for name in ("before", "gg", "accuracy")}
    sure = {name: found.mean(name, "confidence") for name in ("before", "gg", "accuracy")}
    apart, low, high = rank_difference(found, "gg", "accuracy")
    gained, gained_low, gained_high = rank_difference(found, "gg", "before")
    against = {
        name: found.difference("search", name, "right")
        for name in ("random", "no_rl", "majority", "best", "no_novelty", "other_rl")
    }
    plain = found.difference("search", "random", "majority_vote")
    shares = found.difference("search", "random", "candidates")

    def told(values: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in values.items())

    searches = ("search", "no_novelty", "no_rl", "other_rl", "majority", "best", "random", "oracle")
    tokens = {name: found.mean(name, "tokens") for name in searches}
    learnt = all(right["before"] < right[name] < 0.97 for name in ("gg", "accuracy"))
    return Verdict.of(
        [
            (
                0.25 < right["before"] < 0.6 and learnt,
                f"precondition: {right['before']:.3f} of the samples are right before (0.25 to "
                f"0.6), {right['gg']:.3f} behind GG's reward, {right['accuracy']:.3f} behind that "
                f"for accuracy (more, below 0.97)",
            ),
            (
                low > 0,
                f"GG's confidence tells right from wrong better: AUROC {told(ranks)}; gg over "
                f"accuracy {apart:.3f} [{low:.3f}, {high:.3f}]",
            ),
            (
                against["random"].low > 0,
                f"the search is guided: {right['search']:.3f} right, {right['random']:.3f} with "
                f"steps chosen at random, {against['random']} more",
            ),
            (
                against["no_rl"].low > 0,
                f"with the model that did not learn by reward {right['no_rl']:.3f}, "
                f"{against['no_rl']} less",
            ),
            (
                against["majority"].low > 0,
                f"the search finds more than the majority of 16 samples of the same model, "
                f"{right['majority']:.3f}: by {against['majority']}",
            ),
            (
                right["oracle"] >= max(right[name] for name in searches),
                f"an oracle of steps is the ceiling: {right['oracle']:.3f}",
            ),
            (None, f"GG over before, AUROC {gained:.3f} [{gained_low:.3f}, {gained_high:.3f}]"),
            (None, f"calibration error {told(errors)}; mean confidence {told(sure)}"),
            (
                None,
                f"over the most confident of 16, {right['best']:.3f}, by {against['best']}; over "
                f"no novelty, {right['no_novelty']:.3f}, by {against['no_novelty']}; over the "
                f"model of the accuracy reward, {right['other_rl']:.3f}, by {against['other_rl']}",
            ),
            (
                None,
                f"over random steps by the majority's vote {plain}, in the share of right final "
                f"candidates {shares}",
            ),
            (None, f"tokens a question: {told(tokens)}"),
        ]
    )
