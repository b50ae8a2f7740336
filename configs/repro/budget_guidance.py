"""Budget Guidance (arXiv 2506.13752): thinking is steered to end in time, on sums modulo 5.

    python -m tokjax.reproduce budget_guidance

A model of 0.2M parameters learns to add six digits modulo 5 step by step. A step is a paragraph of
one to four equal lines of six tokens; its first token says how many, and the number is drawn anew
at a paragraph's beginning with probability 0.3. Mean thinking is 91 tokens and the least 37. A
linear predictor learns from traces how many tokens are left.

What came out is in docs/reproductions/budget_guidance.json and .png: budgets of 46, 64, 91 and 109
tokens give mean lengths of 40, 51, 71 and 80, within the budget in 94, 98, 100 and 100 % of the
questions (unguided 8, 14, 50 and 73 %), and at 46 tokens 91 % right answers, where thinking cut
there has 27 % and thinking without a budget 97 %.

The arms, at budgets of 50, 70, 100 and 120 % of the mean (46, 64, 91 and 109 tokens):
    guided_B        Budget Guidance with the paper's filter
    loose_B         the same without the filter
    plain_B         the model as it is
    shuffled_B      guidance by a predictor of shuffled lengths, without the filter, which would
                    leave nothing of it
    infinite        guidance with an infinite budget, without the filter
    cut             the model as it is, thinking cut at the least budget
    none            no thinking
    predictor, predictor_shuffled, constant, position
                    how well lengths of held-out traces are predicted, the last two by one Gamma
                    and by one for each position
"""

import itertools
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tokjax.decoding import Prompts, categorical, decode, greedy, on_tokens
from tokjax.decoding.budget import (
    LengthPredictor,
    Reliability,
    budget_guided,
    fit_gamma,
    gamma_nll,
    predicted_gammas,
    remaining_lengths,
    train_predictor,
)
from tokjax.reproduction import Bars, Comparison, Lines, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import trained
from tokjax.reproduction.tasks import ANSWER, LINE_END, THINK, Chains, run_on_chains

CHAINS = Chains(steps=(6, 6), lines=(1, 2, 3, 4), modulus=5)
MEAN = 6 * 6 * 2.5 + 1  # tokens of thinking, </think> included
BUDGETS = {"50": 46, "70": 64, "100": 91, "120": 109}  # percent of the mean -> tokens
NEW_TOKENS = 160  # the longest thinking has 145
KEPT = 0.25  # largest part of the gain that shuffled lengths may keep

Rows = list[list[int]]


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "d_model": 32 if smoke else 64,
        "n_layers": 2 if smoke else 3,
        "steps": 10 if smoke else 800,
        "corpus": 200 if smoke else 8000,
        "traces": 40 if smoke else 1500,
        "held_out": 20 if smoke else 300,
        "questions": 16 if smoke else 128,
        "epochs": [1, 1] if smoke else [40, 10],
        "rates": [3e-2, 3e-3],
    }
    arms = {}
    kinds = {
        "guided": ("method", "guided", {"kind": "guided", "filter": True}),
        "loose": ("method", "guided, no filter", {"kind": "guided", "filter": False}),
        "plain": ("baseline", "as it is", {"kind": "plain"}),
        "shuffled": (
            "control",
            "guided by shuffled lengths, no filter",
            {"kind": "guided", "filter": False, "shuffled": True},
        ),
    }
    for name, (role, label, options) in kinds.items():
        for share, budget in BUDGETS.items():
            arms[f"{name}_{share}"] = Treatment(
                role,  # type: ignore[arg-type]
                f"{label}, {budget} tokens",
                {**options, "budget": budget},
            )
    least = BUDGETS["50"]
    arms |= {
        "infinite": Treatment(
            "control",
            "guided, no budget, no filter",
            {"kind": "guided", "filter": False, "budget": None},
        ),
        "cut": Treatment("baseline", f"cut at {least} tokens", {"kind": "cut", "budget": least}),
        "none": Treatment("baseline", "no thinking", {"kind": "cut", "budget": 1}),
        "predictor": Treatment("method", "linear predictor", {"kind": "nll", "of": "predictor"}),
        "predictor_shuffled": Treatment(
            "control", "linear predictor, shuffled lengths", {"kind": "nll", "of": "shuffled"}
        ),
        "constant": Treatment("baseline", "one Gamma", {"kind": "nll", "of": "constant"}),
        "position": Treatment("baseline", "a Gamma a position", {"kind": "nll", "of": "position"}),
    }
    swept = {
        label: {float(budget): f"{name}_{share}" for share, budget in BUDGETS.items()}
        for name, (_, label, _) in kinds.items()
    }
    return Comparison(
        claim=(
            "A length predictor on the frozen model steers thinking into a budget of tokens: "
            "lengths rise with the budget and stay within it, and answers are better than those "
            "of thinking cut at the same length."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(options),
        judge=judge,
        metric="within",
        panels=(
            Lines("length", "length of thinking", "budget, tokens", "tokens", swept),
            Lines("within", "thinking within its budget", "budget, tokens", "share", swept),
            Bars("nll", "predictions of the remaining length", "nats a token"),
            Bars(
                "correct",
                f"right answers, budget {least} tokens",
                "share",
                ("guided_50", "loose_50", "plain_50", "shuffled_50", "cut", "none"),
            ),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "Budgets count what follows <think>, </think> included.",
            "The sums are modulo 5 and of six digits, not of decimal numbers: a model trained for "
            "a minute has to learn them. They, the prompt's words and the model's size were chosen "
            "in pilots that trained the language model alone.",
            "The predictor learns from fresh traces of the generator; the concise copies of the "
            "paper are left out, for these traces are short already. Learning rates and epochs "
            "were fixed before the first run.",
            "The cut baseline may use the whole budget; the guided arm must not use more on "
            "average.",
            "Thinking that has not ended after 160 tokens counts as 160 tokens and as not within.",
        ),
    )


class Materials:
    """A trained model, predictors, and questions that are not among its training data."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed
        run = run_on_chains(CHAINS, "sums modulo 5", folder, settings, seed)
        self.lm = trained(folder / "lm", run)
        rng = np.random.default_rng([seed, 2])
        self.questions = [CHAINS.question(rng) for _ in range(settings["questions"])]
        self.prompts = [self.lm.encode(CHAINS.prompt(q)) for q in self.questions]
        self.traces = self._traces(rng, settings["traces"])
        self.held_out = self._traces(rng, settings["held_out"])
        table = {word: self.lm.encode(word)[-1] for word in (THINK, ANSWER, LINE_END)}
        self.ids = {"think_start": table[THINK], "think_end": table[ANSWER]}
        size = self.lm.model.config.vocabulary
        self.breaks = np.arange(size) == table[LINE_END]
        self.predictor = LengthPredictor(settings["d_model"], size, "linear")
        self.lengths = [remaining_lengths(row, **self.ids) for row in self.traces]

    def _traces(self, rng: np.random.Generator, count: int) -> Rows:
        found = []
        for _ in range(count):
            question = CHAINS.question(rng)
            found.append(self.lm.encode(CHAINS.prompt(question) + CHAINS.response(question, rng)))
        return found

    def measure(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the metrics of an arm."""
        if options["kind"] == "nll":
            return {"nll": self._nll(options["of"])}
        budget = options["budget"]
        if options["kind"] == "cut":
            return self._told(self._cut(budget), budget)
        if options["kind"] == "plain":
            return self._told(self.plain, budget)
        weights = self.shuffled if options.get("shuffled") else self.weights
        rows = self._decoded(
            *budget_guided(
                self.lm.model,
                self.lm.params,
                self.predictor,
                weights,
                budget=np.inf if budget is None else budget,
                think_end=self.ids["think_end"],
                breaks=self.breaks,
                reliability=Reliability() if options["filter"] else None,
            )
        )
        if budget is None:
            same = [float(a == b) for a, b in zip(rows, self.plain, strict=True)]
            return {"same": same, "length": self._told(rows, 0)["length"]}
        return self._told(rows, budget)

    def _decoded(self, model: Any, params: Any) -> Rows:
        generation = decode(
            model,
            params,
            Prompts.of(self.prompts),
            max_new_tokens=NEW_TOKENS,
            sampler=categorical(),
            seeds=np.arange(len(self.prompts)) + 1000 * self.seed,
            stop=on_tokens(self.lm.eos_ids),
        )
        return generation.rows()

    def _told(self, rows: Rows, budget: int) -> dict[str, list[float]]:
        end = self.ids["think_end"]
        lengths = [row.index(end) + 1 if end in row else NEW_TOKENS for row in rows]
        words = [self.lm.tokenizer.decode(row).split() for row in rows]
        return {
            "within": [
                float(end in row and n <= budget) for row, n in zip(rows, lengths, strict=True)
            ],
            "length": [float(n) for n in lengths],
            "correct": [
                float(CHAINS.correct(q, own)) for q, own in zip(self.questions, words, strict=True)
            ],
        }

    def _cut(self, budget: int) -> Rows:
        """Returns unguided thinking, ended at the budget where it would go beyond it."""
        end = self.ids["think_end"]
        kept = [row[: row.index(end)] if end in row else row for row in self.plain]
        kept = [[*thought[: budget - 1], end] for thought in kept]
        prompts = [[*ids, *thought] for ids, thought in zip(self.prompts, kept, strict=True)]
        answers = decode(
            self.lm.model,
            self.lm.params,
            Prompts.of(prompts),
            max_new_tokens=1,
            sampler=greedy(),
        )
        return [[*own, *answer] for own, answer in zip(kept, answers.rows(), strict=True)]

    @cached_property
    def plain(self) -> Rows:
        """What the model writes without guidance."""
        return self._decoded(self.lm.model, self.lm.params)

    @cached_property
    def weights(self) -> Any:
        """The predictor's parameters."""
        return self._trained("predictor", self.lengths)

    @cached_property
    def shuffled(self) -> Any:
        """Those of a predictor whose lengths are those of other places."""
        rng = np.random.default_rng([self.seed, 3])
        joined = np.concatenate(self.lengths)
        labels = np.flatnonzero(joined)
        joined[labels] = rng.permutation(joined[labels])
        ends = np.cumsum([len(own) for own in self.lengths])
        return self._trained("predictor-shuffled", np.split(joined, ends[:-1]))

    def _trained(self, name: str, lengths: Any) -> Any:
        start = None
        for number, (epochs, rate) in enumerate(
            zip(self.settings["epochs"], self.settings["rates"], strict=True)
        ):
            start = train_predictor(
                self.lm.model,
                self.lm.params,
                self.predictor,
                self.traces,
                **self.ids,
                remaining=lengths,
                start=start,
                store_states=True,
                batch_size=32,
                epochs=epochs,
                peak_lr=rate,
                seed=self.seed,
                checkpoint=self.folder / f"{name}-{number}.training",
                progress=False,
            ).params
        return start

    def _nll(self, of: str) -> Float[np.ndarray, "N"]:
        """Returns how surprising the lengths of each held-out trace are, in nats a token.

        Behind <think>, which is part of the prompt.
        """
        tokens = np.zeros((len(self.held_out), NEW_TOKENS), np.int32)
        left = np.zeros(tokens.shape, np.int32)
        for b, row in enumerate(self.held_out):
            tokens[b, : len(row)] = row
            left[b, : len(row)] = remaining_lengths(row, **self.ids)
            left[b, row.index(self.ids["think_start"])] = 0
        left = left[:, 1:]
        if of in ("predictor", "shuffled"):
            weights = self.weights if of == "predictor" else self.shuffled
            alpha, rate = predicted_gammas(
                self.lm.model, self.lm.params, self.predictor, weights, jnp.asarray(tokens)
            )
        else:
            fits, behind = self._position_fits, np.cumsum(left > 0, axis=1) - 1
            places = behind if of == "position" else np.full(left.shape, -1)
            gammas = np.array([fits.get(int(t), fits[-1]) for t in places.ravel()])
            alpha, rate = jnp.float32(gammas.T).reshape(2, *left.shape)
        nll = jnp.where(left > 0, gamma_nll(jnp.float32(left), alpha, rate), 0.0)
        return np.asarray(nll.sum(1) / (left > 0).sum(1))

    @cached_property
    def _position_fits(self) -> dict[int, tuple[float, float]]:
        """The best Gamma for each place behind <think>, and at -1 that for all."""
        behind = [own[own > 0][1:] for own in self.lengths]
        fits = {-1: fit_gamma(np.concatenate(behind))}
        for t in range(max(len(own) for own in behind)):
            there = [own[t] for own in behind if t < len(own)]
            if len(set(there)) > 1:
                fits[t] = fit_gamma(there)
        return fits


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    shares = list(BUDGETS)
    rises = [
        found.difference(f"guided_{more}", f"guided_{less}", "length")
        for less, more in itertools.pairwise(shares)
    ]
    means = lambda name, metric: ", ".join(  # noqa: E731
        f"{found.mean(f'{name}_{share}', metric):.3g}" for share in shares
    )
    gains = {
        name: [found.difference(f"{name}_{s}", f"plain_{s}", "within") for s in shares]
        for name in ("guided", "loose", "shuffled")
    }
    gain, kept = (np.mean([g.mean for g in gains[name]]) for name in ("guided", "shuffled"))
    over = {b: found.difference("predictor", b, "nll") for b in ("constant", "position")}
    better = found.difference("guided_50", "cut", "correct")
    longer = found.difference("guided_50", "cut", "length")
    same = found.mean("infinite", "same")
    return Verdict.of(
        [
            *(
                (
                    gap.high < 0,
                    f"held-out lengths are predicted better than by {told}: "
                    f"{found.mean('predictor', 'nll'):.3f} against "
                    f"{found.mean(baseline, 'nll'):.3f} nats, difference {gap}",
                )
                for (baseline, gap), told in zip(
                    over.items(), ("one Gamma", "a Gamma a position"), strict=True
                )
            ),
            (
                all(rise.low > 0 for rise in rises),
                f"mean length rises with the budgets {list(BUDGETS.values())}: "
                f"{means('guided', 'length')} (unguided {means('plain', 'length')}); rises "
                f"{', '.join(map(str, rises))}",
            ),
            (
                all(g.low > 0 for g in gains["guided"]),
                f"more thinking stays within each budget than unguided: "
                f"{means('guided', 'within')} against {means('plain', 'within')}",
            ),
            (
                better.low > 0 and longer.mean <= 0,
                f"at half the mean length answers are better than of thinking cut there: "
                f"{found.mean('guided_50', 'correct'):.3f} against "
                f"{found.mean('cut', 'correct'):.3f}, difference {better}, with "
                f"{found.mean('guided_50', 'length'):.1f} against "
                f"{found.mean('cut', 'length'):.1f} tokens",
            ),
            (
                bool(gain > 0 and kept <= KEPT * gain),
                f"shuffled lengths keep at most {KEPT:.0%} of the gain in staying within: "
                f"{kept:+.3f} of {gain:+.3f} on average; within {means('shuffled', 'within')}",
            ),
            (
                same == 1,
                f"an infinite budget without the filter changes no token: {same:.0%} of the "
                f"responses are the same",
            ),
            (
                None,
                f"without the filter: within {means('loose', 'within')}, length "
                f"{means('loose', 'length')}",
            ),
            (
                None,
                f"right answers: guided {means('guided', 'correct')}, without the filter "
                f"{means('loose', 'correct')}, unguided {means('plain', 'correct')}, without "
                f"thinking {found.mean('none', 'correct'):.3g}",
            ),
        ]
    )
