"""Thinking tokens against a rationale (arXiv 2411.11371), on compositions of functions.

    python -m tokjax.reproduce thinking_tokens

What came out is in docs/reproductions/thinking_tokens.json and .png: it reproduced, at the floor.
With a rationale all held-out questions are answered (1.00, beside thinking tokens too), without
one 0.15, where chance is 0.125, whether there are four thinking tokens (0.15), four different ones
(0.14), frozen ones (0.14), repeated separators (0.15) or hidden keys (0.14); shuffled rationales
give 0.12. Nothing is learned there, so that these equalities say no more than that thinking tokens
do not help. The gradients of the thinking token cancel more than those of an equally frequent
function (rho 0.33 and 0.23 by seed against 0.46 and 0.25) and its vector moves less (0.24 and 0.25
against 0.26 and 0.29), both by little. Those of the separator cancel as much (0.27 and 0.25) and it
moves as little (0.24 and 0.25), so that this is no property of thinking tokens alone; nor does the
vector stay where it was (cosine with its start 0.64 and 0.62).

A question names a value and four of six fixed permutations of eight values; the rationale is the
three values on the way. All arms train the same model of 0.1M parameters for equally many steps on
equal questions. The arms:
    baseline        question, answer
    cot             question, rationale, answer
    thinking        question, four thinking tokens, answer
    both            question, four thinking tokens, rationale, answer
    one             question, one thinking token, answer
    distinct        as `thinking` with four different tokens
    frozen          as `thinking`, the token's vector stays as it was drawn (control)
    repeated        as `thinking` with the separator in the place of the token (control)
    hidden          as `thinking`, none attends to the tokens but they themselves (control)
    shuffled        as `cot` with the rationales of other questions (control)
and, of the model of `one`, what became of one embedding row each:
    row_thinking    of the thinking token, once in every question
    row_ordinary    of function 0, once in a question on average
    row_separator   of the separator, once in every question
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.data.batch import Batch
from tokjax.decoding import Prompts, decode
from tokjax.models import ModelConfig, Transformer
from tokjax.pretraining.thinking_tokens import Thinking, ThinkingTokens, forbidden, place
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.small_runs import cosine_rates, fitted
from tokjax.reproduction.tasks.compositions import Compositions
from tokjax.signals.row_gradients import (
    begin_history,
    cancellation,
    context_gradients,
    displacement,
    matched_tokens,
    observe,
)

N = 4  # thinking tokens of a question
SMALL = 0.05  # difference in accuracy that counts as none
SHARE = 0.25  # of the rationale's gain, above which a gain is more than marginal
TASK = Compositions()
TOKENS = tuple(TASK.size + i for i in range(N))  # ids of thinking tokens; mostly the first is used


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "d_model": 16 if smoke else 64,
        "layers": 2,
        "steps": 6 if smoke else 500,
        "batch": 8 if smoke else 64,
        "rate": 3e-3,
        "test": 32 if smoke else 512,
        "task": [TASK.values, TASK.functions, TASK.length, TASK.first],
    }
    arms = {
        "baseline": Treatment("baseline", "answer alone", {}),
        "cot": Treatment("baseline", "rationale", {"rationale": True}),
        "thinking": Treatment("method", f"{N} thinking tokens", {"count": N}),
        "both": Treatment("method", "both", {"count": N, "rationale": True}),
        "one": Treatment("method", "one thinking token", {"count": 1}),
        "distinct": Treatment("method", f"{N} different ones", {"count": N, "distinct": True}),
        "frozen": Treatment("control", "frozen random vector", {"count": N, "freeze": True}),
        "repeated": Treatment("control", "repeated separator", {"count": N, "repeated": True}),
        "hidden": Treatment("control", "hidden keys", {"count": N, "hide_keys": True}),
        "shuffled": Treatment(
            "control", "shuffled rationales", {"rationale": True, "shuffled": True}
        ),
        "row_thinking": Treatment("method", "thinking token", {"row": "thinking"}),
        "row_ordinary": Treatment("control", "equally frequent function", {"row": "ordinary"}),
        "row_separator": Treatment("control", "separator", {"row": "separator"}),
    }
    rows = tuple(name for name in arms if name.startswith("row_"))
    return Comparison(
        claim=(
            "Thinking tokens gain little where a rationale gains much, and nothing beside one: "
            "the gradients of their one vector cancel more than those of an equally frequent "
            "token, and it moves less."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(options),
        judge=judge,
        metric="accuracy",
        panels=(
            Bars("accuracy", "answers to held-out questions", "right"),
            Bars("rho", "length of the summed gradients over the sum of lengths", "rho", rows),
            Bars("rho_updates", "the same of Adam's updates", "rho", rows),
            Bars("cosine", "mean cosine of two contexts' gradients", "cosine", rows),
            Bars("moved", "distance of the vector from its start", "distance", rows),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "Everything was fixed before the first full run; nothing was tuned on the test "
            "questions, which no training question equals.",
            "Far smaller than the paper's GPT-2 and Llama-3.2-1B, and another task; the numbers of "
            "tokens and the learning rates of the paper are not known to us.",
            "Without a rationale the answers stay near chance (0.125): equalities among the arms "
            "with thinking tokens are demanded, but at the floor they show no more than that none "
            "of them helps.",
            "Input and output tables are untied, so that a row's gradient is that of the input. "
            "Answers are greedy; thinking tokens come with the prompt and are never generated.",
            "A row's values are one number a seed: their intervals say nothing.",
        ),
    )


def judge(found: Measurements) -> Verdict:
    """Demands what must come out; see the sentences."""

    def seeds(arm: str, metric: str) -> list[float]:
        return [float(values[0]) for values in found.items(arm, metric)]

    def told(values: list[float]) -> str:
        return ", ".join(f"{v:.3g}" for v in values)

    mean = {arm: found.mean(arm, "accuracy") for arm in found.values if not arm.startswith("row_")}
    gain = mean["cot"] - mean["baseline"]
    over_thinking = found.difference("cot", "thinking", "accuracy")
    thinking = found.difference("thinking", "baseline", "accuracy")
    shuffled = found.difference("shuffled", "baseline", "accuracy")

    def alike(arm: str, other: str, what: str) -> tuple[bool, str]:
        apart = found.difference(arm, other, "accuracy")
        return abs(apart.mean) < SMALL, f"{what}: {mean[arm]:.3f} against {mean[other]:.3f}"

    def less(metric: str, what: str) -> tuple[bool, str]:
        own, other = seeds("row_thinking", metric), seeds("row_ordinary", metric)
        return (
            all(a < b for a, b in zip(own, other, strict=True)),
            f"{what}: {told(own)} against {told(other)} of an equally frequent function "
            f"(separator {told(seeds('row_separator', metric))})",
        )

    cosine = seeds("row_thinking", "cosine")
    return Verdict.of(
        [
            (mean["cot"] > 0.8, f"with a rationale the task is learned: {mean['cot']:.3f} right"),
            (
                over_thinking.low > 0.3,
                f"a rationale is worth far more than thinking tokens: {over_thinking}",
            ),
            (
                thinking.high < SHARE * gain and thinking.low > -0.1,
                f"thinking tokens gain less than {SHARE:.0%} of what a rationale gains "
                f"({gain:.3f}): {thinking}",
            ),
            alike("both", "cot", "beside a rationale they change nothing"),
            alike("frozen", "thinking", "a vector that is never trained is as good"),
            alike("repeated", "thinking", "so is a repeated ordinary token"),
            alike("hidden", "baseline", "with hidden keys they are the baseline"),
            (
                shuffled.high < SHARE * gain,
                f"shuffled rationales lose the gain: {shuffled} over the baseline",
            ),
            less("rho", "gradients cancel more"),
            less("rho_updates", "and so do Adam's updates"),
            (
                max(map(abs, cosine)) < 0.1,
                f"gradients of two contexts are nearly orthogonal: cosine {told(cosine)}; of the "
                f"function {told(seeds('row_ordinary', 'cosine'))}",
            ),
            less("moved", "the vector moves less"),
            (
                None,
                f"one thinking token {mean['one']:.3f}, four different ones "
                f"{mean['distinct']:.3f}; cosine of the vector with its start "
                f"{told(seeds('row_thinking', 'turned'))} (function "
                f"{told(seeds('row_ordinary', 'turned'))})",
            ),
        ]
    )


class Materials:
    """What the arms of one seed share: questions, held-out questions, rows that are watched."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        del folder  # seconds to train: nothing is kept
        self.settings, self.seed = settings, seed
        self.model = Transformer(
            ModelConfig(
                vocab_size=TASK.size + N,
                d_model=settings["d_model"],
                n_layers=settings["layers"],
                n_heads=4,
                d_ff=3 * settings["d_model"],
                max_positions=32,
                tie_embeddings=False,
                remat="none",
            )
        )

    @cached_property
    def questions(self) -> tuple[np.ndarray, np.ndarray]:
        """Questions to train on, in order, and different ones to be tested on."""
        rng = np.random.default_rng([self.seed, 2])
        wanted, test = self.settings["steps"] * self.settings["batch"], self.settings["test"]
        drawn = TASK.questions(rng, 2 * wanted + 40 * test)
        held = TASK.held_out(drawn)
        different = np.unique(drawn[held], axis=0)
        return drawn[~held][:wanted], rng.permutation(different)[:test]

    @cached_property
    def rows(self) -> dict[str, int]:
        """The ids whose vectors are watched."""
        batches = self.batches({"count": 1})
        counts = sum(np.bincount(np.ravel(b.tokens), minlength=TASK.size + N) for b in batches)
        # The separator is as frequent, but always in one place.
        others = (TASK.separator, *TOKENS, *range(TASK.values))
        (ordinary,) = matched_tokens(np.asarray(counts), TOKENS[0], exclude=others, within=1.5)
        return {"thinking": TOKENS[0], "ordinary": ordinary, "separator": TASK.separator}

    def ids(self, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Returns the thinking tokens of an arm."""
        if options.get("repeated"):
            return (TASK.separator,)
        return TOKENS if options.get("distinct") else TOKENS[:1]

    def placed(self, options: Mapping[str, Any], questions: np.ndarray, shuffle: bool) -> list[Any]:
        """Returns the records of questions."""
        worked = TASK.worked(questions)
        rationales = worked[:, :-1]
        if shuffle:
            rng = np.random.default_rng([self.seed, 3])
            rationales = rng.permutation(rationales)
        thinking = Thinking(options.get("count", 0))
        return [
            place(
                *(question.tolist(), rationale.tolist(), answer.tolist()),
                *(thinking, self.ids(options)),
                keep_rationale=options.get("rationale", False),
            )
            for question, rationale, answer in zip(
                questions, rationales, worked[:, -1:], strict=True
            )
        ]

    def batches(self, options: Mapping[str, Any]) -> list[Batch]:
        """Returns what an arm is trained on, in order."""
        records = self.placed(options, self.questions[0], options.get("shuffled", False))
        size = self.settings["batch"]
        return [as_batch(records[i : i + size]) for i in range(0, len(records), size)]

    def objective(self, options: Mapping[str, Any]) -> ThinkingTokens:
        """Returns the objective of an arm."""
        switches = {name: options.get(name, False) for name in ("freeze", "hide_keys")}
        return ThinkingTokens(ids=TOKENS, **switches)

    def train(self, options: Mapping[str, Any], after_step: Any = None) -> Any:
        """Returns the parameters that an arm ends with."""
        steps = self.settings["steps"]
        rates = cosine_rates(self.settings["rate"], steps)
        return fitted(
            *(self.model, self.objective(options), self.start, self.batches(options), rates),
            seed=self.seed,
            after_step=after_step,
        )[0]

    @cached_property
    def start(self) -> Any:
        """The parameters that all arms begin with."""
        return self.model.init(jax.random.key(self.seed))

    @cached_property
    def watched(self) -> dict[str, dict[str, float]]:
        """What became of each watched row in the training of `one`."""
        ids = jnp.asarray(list(self.rows.values()))
        batches, before = self.batches({"count": 1}), [self.start]

        @jax.jit
        def step(history, earlier, now, batch):
            found = context_gradients(self.model, earlier, batch, list(self.rows.values()))
            return observe(history, found, batch.weights.sum(-1), now["embedding"][ids])

        history = [begin_history(self.start["embedding"][ids])]

        def after(number: int, params: Any) -> None:
            history[0] = step(history[0], before[0], params, batches[number - 1])
            before[0] = params

        self.train({"count": 1}, after)
        (own,) = history
        moved, turned = displacement(own.now, own.start)
        told = {
            "rho": cancellation(own.gradients),
            "rho_updates": cancellation(own.updates),
            "cosine": own.mean_cosine,
            "moved": moved,
            "turned": turned,
        }
        return {
            name: {metric: float(values[i]) for metric, values in told.items()}
            for i, name in enumerate(self.rows)
        }

    def measure(self, options: Mapping[str, Any]) -> dict[str, list[float]]:
        """Returns for each held-out question whether it is answered, or what became of a row."""
        if "row" in options:
            return {name: [value] for name, value in self.watched[options["row"]].items()}
        params = self.train(options)
        questions = self.questions[1]
        records = self.placed(options, questions, False)
        wanted = TASK.worked(questions)[:, -1]
        if options.get("rationale"):
            found = decode(
                self.model,
                params,
                Prompts.of([record.tokens[: record.prompt].tolist() for record in records]),
                max_new_tokens=TASK.length,
                transform=forbidden(TOKENS),
            )
            said = np.array([row[-1] for row in found.rows()])
        else:
            said = self.answers(options, params, as_batch(records))
        return {"accuracy": (said == wanted).astype(float).tolist()}

    def answers(self, options: Mapping[str, Any], params: Any, batch: Batch) -> np.ndarray:
        """Returns the likeliest answer of one id, thinking tokens forbidden."""
        objective = self.objective(options)

        @jax.jit
        def likeliest(params, batch):
            found = objective.predictions(self.model, params, batch, jax.random.key(0))
            logits = self.model.unembed(params, found.x)[:, -1]
            return logits.at[:, jnp.asarray(TOKENS)].set(-jnp.inf).argmax(-1)

        return np.asarray(likeliest(params, batch))


def as_batch(records: list[Any]) -> Batch:
    """Returns records of one length as a batch."""
    ids = np.stack([record.tokens for record in records])
    weights = np.stack([record.weights for record in records])
    tokens = jnp.asarray(ids[:, :-1])
    return Batch(
        tokens=tokens,
        targets=jnp.asarray(ids[:, 1:]),
        positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        segment_ids=jnp.ones_like(tokens),
        weights=jnp.asarray(weights[:, 1:]),
        example_id=jnp.zeros((len(records), 1), jnp.int32),
    )
