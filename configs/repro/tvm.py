"""TVM (arXiv 2407.12863): values of prefixes against outcomes, as labels of a verifier.

    python -m tokjax.reproduce tvm

What comes out is recorded in docs/reproductions/tvm.json and .png.

A model of 0.1M parameters learns chains of five steps modulo 10, one digit a step, from a teacher
that adds rightly but subtracts with a habit: in 60 % of all cases the result is one too large. Each
step begins with one of four words without meaning, so that solutions soon part. Sampled solutions
are right about half of the time. A verifier, which is this model with a head of values, is trained
on 32 solutions of each of 200 problems, 64 of them a step.

The arms, from the same parameters and on the same solutions in the same order:
    tvm            labels are the values of prefixes
    orm            labels are outcomes
    rollout        labels at the ends of steps, each of four rollouts, for 8 solutions a problem
    group_tvm, group_orm   both, where a step holds whole problems: no difference may remain
    shuffled       values of other solutions of the same problem
    hot            `tvm` by solutions that were sampled at temperature 1.5

It did not reproduce, and tests little so far: the generator that was to be right on 30 to 60 % of
the problems is right on 1 % greedily and on 9 % of its samples.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.data.batch import Batch
from tokjax.decoding import Prompts, decode, greedy, on_tokens, temperature
from tokjax.decoding.search import Generator, row_seed, step_beam, token_values, value_scorer
from tokjax.finetuning.tvm import TVM
from tokjax.models import ModelConfig, Transformer
from tokjax.pretraining.next_token import NextToken
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.selection.tvm import prefix_values
from tokjax.training.optimizers import AdamW, Constant, Cosine
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

STEPS, WORDS = 5, 4
PLUS, MINUS, EQUALS, NEXT, END, WORD = 10, 20, 30, 31, 32, 33  # token ids; digits are 0 to 9
BOS = WORD + WORDS
PROMPT = STEPS + 3  # BOS, first digit, steps, EQUALS
LENGTH = 3 * STEPS  # of a solution: word, digit and NEXT for each step, END behind the last
MINUSES, HABIT = 0.17, 0.6  # share of steps that subtract, and how often the teacher errs there
BUDGETS = (8, 16, 32)  # candidates of a turn of the beam search; a quarter of them goes on


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "d_model": 32 if smoke else 64,
        "n_layers": 2,
        "base_steps": 20 if smoke else 5000,
        "base_rate": 3e-3,
        "problems": 8 if smoke else 200,
        "solutions": 32,
        "batch": 64,
        "steps": 6 if smoke else 200,
        "early": [2, 4] if smoke else [50, 100],
        "rate": 1e-3,
        "held_out": 4 if smoke else 40,
        "held_paths": 16,
        "truth_paths": 2,
        "rollouts": 4 if smoke else 64,
        "few_rollouts": 4,
        "few_paths": 8,
    }
    arms = {
        "tvm": Treatment("method", "values of prefixes", {"labels": "value", "search": True}),
        "orm": Treatment("baseline", "outcomes", {"labels": "outcome", "search": True}),
        "rollout": Treatment("baseline", "step rollouts", {"labels": "rollout", "search": True}),
        "group_tvm": Treatment(
            "control", "values, whole problems", {"labels": "value", "grouped": True}
        ),
        "group_orm": Treatment(
            "control", "outcomes, whole problems", {"labels": "outcome", "grouped": True}
        ),
        "shuffled": Treatment("control", "shuffled values", {"labels": "shuffled"}),
        "hot": Treatment("control", "values at T=1.5", {"labels": "value", "temperature": 1.5}),
    }
    own = ("tvm", "orm", "rollout")
    return Comparison(
        claim=(
            "A verifier trained on the values of prefixes is nearer to the true values than one "
            "trained on outcomes, and guides a beam search over steps at least as well."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(options),
        judge=judge,
        metric="early_mid",
        panels=(
            Bars("early_mid", "early in training, behind the second and third step", "MSE"),
            Bars("final", "after the last step, behind all steps", "MSE"),
            Bars("beam", "beam search, mean over 8, 16 and 32 candidates", "right answers", own),
            Bars("best_of_16", "best of 16 by the final value", "right answers"),
            Bars("lost", "right beginnings pruned for wrong ones", "share"),
        ),
        settings=settings,
        seeds=(0,) if smoke else (0, 1),
        notes=(
            "An item is a held-out problem. Squared errors are against the share of right ones "
            "among 64 continuations of a beginning; early is the mean after 50 and 100 of 200 "
            "steps. Nothing was tuned: rates are those of the reproduction of Q-Tuning.",
            "A first run had a generator of 1,500 steps, right on 5 % of the problems where 30 to "
            "60 % were demanded; this one has 5,000.",
            "The teacher's habit makes the generator's greedy accuracy that of problems without a "
            "subtraction; the verifier must find out from the outcomes which result is right.",
            "lost: of 16 solutions of a problem the quarter with the best values is kept behind "
            "each of the first four steps; right beginnings that wrong ones displace, as a share "
            "of those that could have been kept.",
            "With one solution a problem the labels of both are equal numbers, which a test of the "
            "objective shows bit for bit; it needs no arm.",
        ),
    )


# ---- the task


def problems(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns prompts, [count, PROMPT]."""
    found = np.full((count, PROMPT), BOS)
    found[:, 1] = rng.integers(0, 10, count)
    kinds = np.where(rng.random((count, STEPS)) < MINUSES, MINUS, PLUS)
    found[:, 2:-1] = kinds + rng.integers(0, 10, (count, STEPS))
    found[:, -1] = EQUALS
    return found


def results(prompts: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Returns the digit behind each step, [count, STEPS]: right ones, or the teacher's."""
    digit, found = prompts[:, 1], []
    for step in prompts[:, 2:-1].T:
        minus = step >= MINUS
        digit = np.where(minus, digit - (step - MINUS), digit + (step - PLUS))
        if rng is not None:
            digit = digit + (minus & (rng.random(len(digit)) < HABIT))
        digit = digit % 10
        found.append(digit)
    return np.stack(found, 1)


def solutions(prompts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the teacher's solutions, [count, LENGTH]."""
    found = np.full((len(prompts), STEPS, 3), NEXT)
    found[:, :, 0] = WORD + rng.integers(0, WORDS, (len(prompts), STEPS))
    found[:, :, 1] = results(prompts, rng)
    found[:, -1, 2] = END
    return found.reshape(len(prompts), LENGTH)


def is_right(prompts: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Returns which solutions end in the right digit, where it belongs."""
    return (written[:, -2] == results(prompts)[:, -1]) & (written[:, -1] == END)


def as_batch(prompts, written, labels, weights) -> Batch:
    """Returns solutions as rows; `weights` are those of their tokens, negative on wrong ones."""
    tokens = np.concatenate([prompts, written], 1)
    n, T = len(tokens), tokens.shape[1] - 1
    wide = lambda own: np.concatenate([np.zeros((n, PROMPT - 1)), own], 1)  # noqa: E731
    return Batch(
        tokens=jnp.asarray(tokens[:, :-1], jnp.int32),
        targets=jnp.asarray(tokens[:, 1:], jnp.int32),
        positions=jnp.tile(jnp.arange(T, dtype=jnp.int32), (n, 1)),
        segment_ids=jnp.ones((n, T), jnp.int32),
        weights=jnp.asarray(wide(weights), jnp.float32),
        example_id=jnp.arange(n, dtype=jnp.int32)[:, None],
        channels={"value": jnp.asarray(wide(labels), jnp.float32)},
    )


class Materials:
    """What the arms of one seed share: the generator, its solutions, held-out problems."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed
        self.model = Transformer(
            ModelConfig(
                vocab_size=BOS + 1,
                d_model=settings["d_model"],
                n_layers=settings["n_layers"],
                n_heads=2,
                max_positions=64,
                remat="none",
            )
        )
        self.optimizer = AdamW().build(self.model.config)

    def kept(self, name: str, make) -> dict[str, np.ndarray]:
        """Returns arrays that the folder has, made now where it has not."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            np.savez(path, **make())
        with np.load(path) as found:
            return dict(found)

    @cached_property
    def base(self) -> Any:
        """The generator's parameters."""

        def make():
            steps = self.settings["base_steps"]
            config = StepConfig(
                self.settings["base_rate"],
                Cosine(warmup_steps=steps // 20),
                0,
                steps,
                clip_norm=1.0,
            )
            step = jax.jit(make_train_step(self.model, NextToken(), self.optimizer, config))
            state = init_state(self.model, NextToken(), self.optimizer, self.seed, False)
            rng = np.random.default_rng([self.seed, 1])
            ones = np.ones((64, LENGTH))
            for _ in range(steps):
                given = problems(rng, 64)
                state, _ = step(state, as_batch(given, solutions(given, rng), ones, ones))
            leaves = jax.tree.leaves(state.params)
            return {f"p{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}

        found = self.kept("base", make)
        leaves = [jnp.asarray(found[f"p{i}"]) for i in range(len(found))]
        return jax.tree.unflatten(jax.tree.structure(self.model.abstract_params()), leaves)

    def generator(self, t: float, most: int) -> Generator:
        """Returns what draws solutions at a temperature."""
        stop = on_tokens([END])
        return Generator(self.model, self.base, most, transform=temperature(t), stop=stop)

    def continued(self, rows: Any, count: int, seed: int, t: float = 1.0) -> np.ndarray:
        """Returns solutions, `count` of each beginning, [rows, count, LENGTH]; 0 where cut."""
        draw = self.generator(t, LENGTH)
        size = max(1, 2560 // count)
        found = np.zeros((len(rows), count, LENGTH), np.int64)
        for first in range(0, len(rows), size):
            # A fixed number of rows: one program.
            own = [list(map(int, row)) for row in rows[first : first + size]]
            full = own + [own[0]] * (size - len(own))
            seeds = [row_seed(seed, first + b, i) for b in range(size) for i in range(count)]
            drawn = draw(full, seeds, samples=count).tokens
            for b, row in enumerate(own):
                for i in range(count):
                    whole = [*row[PROMPT:], *drawn[b * count + i]][:LENGTH]
                    found[first + b, i, : len(whole)] = whole
        return found

    def sampled(self, t: float) -> tuple[np.ndarray, ...]:
        """Returns prompts, solutions, outcomes and values of prefixes for training, flat."""
        num, each = self.settings["problems"], self.settings["solutions"]
        given = problems(np.random.default_rng([self.seed, 2]), num)
        found = self.kept(
            f"solutions-{t}", lambda: {"written": self.continued(given, each, self.seed, t)}
        )
        prompts = np.repeat(given, each, 0)
        written = found["written"].reshape(-1, LENGTH)
        right = is_right(prompts, written)
        values = np.concatenate(
            [
                np.stack(prefix_values(own, outcome).values)
                for own, outcome in zip(
                    found["written"], right.reshape(num, each).astype(float), strict=True
                )
            ]
        )
        return prompts, written, right, values

    def rolled_out(self) -> np.ndarray:
        """Returns values at the ends of steps by rollouts, NaN elsewhere, for training."""
        prompts, written, right, _ = self.sampled(1.0)
        each, few = self.settings["solutions"], self.settings["few_paths"]
        chosen = np.flatnonzero(np.arange(len(prompts)) % each < few)
        ends = 3 * np.arange(1, STEPS) - 1

        def make():
            rows = [
                np.concatenate([prompts[i], written[i, : end + 1]]) for i in chosen for end in ends
            ]
            count = self.settings["few_rollouts"]
            drawn = self.continued(rows, count, self.seed + 100)
            of = np.repeat(prompts[chosen], len(ends) * count, 0)
            outcome = is_right(of, drawn.reshape(-1, LENGTH)).reshape(len(chosen), len(ends), count)
            return {"values": outcome.mean(2)}

        labels = np.full(written.shape, np.nan)
        labels[np.ix_(chosen, ends)] = self.kept("rollouts", make)["values"]
        labels[chosen, -1] = right[chosen]
        return labels

    @cached_property
    def held(self) -> dict[str, np.ndarray]:
        """Held-out problems: solutions, and true values behind the first steps of some."""

        def make():
            num, each = self.settings["held_out"], self.settings["held_paths"]
            given = problems(np.random.default_rng([self.seed, 3]), num)
            written = self.continued(given, each, self.seed + 200)
            few, count = self.settings["truth_paths"], self.settings["rollouts"]
            rows = [
                np.concatenate([given[p], written[p, i, : 3 * k]])
                for p in range(num)
                for i in range(few)
                for k in range(1, STEPS)
            ]
            drawn = self.continued(rows, count, self.seed + 300)
            of = np.repeat(given, few * (STEPS - 1) * count, 0)
            outcome = is_right(of, drawn.reshape(-1, LENGTH))
            truth = outcome.reshape(num, few, STEPS - 1, count).mean(3)
            answers = decode(
                self.model,
                self.base,
                Prompts.of(given.tolist()),
                max_new_tokens=LENGTH,
                sampler=greedy(),
            )
            best = is_right(given, np.asarray(answers.tokens)[:, :LENGTH])
            return {"prompts": given, "written": written, "truth": truth, "greedy": best}

        return self.kept("held", make)

    def labelled(self, options: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        """Returns prompts, solutions, labels and weights of their tokens, as an arm has them."""
        prompts, written, right, values = self.sampled(options.get("temperature", 1.0))
        labels, sign = values, np.where(right, 1.0, -1.0)
        weights = np.repeat(sign[:, None], LENGTH, 1)
        kind = options["labels"]
        if kind == "outcome":
            labels = np.repeat(right[:, None].astype(float), LENGTH, 1)
        elif kind == "shuffled":
            each = self.settings["solutions"]
            order = np.random.default_rng([self.seed, 4]).permuted(
                np.arange(len(labels)).reshape(-1, each), axis=1
            )
            labels = labels[order.reshape(-1)]
        elif kind == "rollout":
            labels = self.rolled_out()
            some = np.isfinite(labels).any(1)
            prompts, written, labels = prompts[some], written[some], labels[some]
            weights = np.where(np.isfinite(labels), weights[some], 0.0)
            labels = np.nan_to_num(labels)
        return prompts, written, labels, weights

    def orders(self, count: int, grouped: bool) -> list[np.ndarray]:
        """Returns which solutions each step reads."""
        rng = np.random.default_rng([self.seed, 5])
        size, each = self.settings["batch"], self.settings["solutions"]
        found: list[np.ndarray] = []
        while len(found) < self.settings["steps"]:
            if grouped:
                order = rng.permutation(count // each)[:, None] * each + np.arange(each)
            else:
                order = rng.permutation(count)
            flat = order.reshape(-1)
            found += list(flat[: len(flat) // size * size].reshape(-1, size))
        return found[: self.settings["steps"]]

    @cached_property
    def step(self) -> Any:
        """The step of every arm's training, compiled once."""
        settings = self.settings
        config = StepConfig(settings["rate"], Constant(), 0, settings["steps"], clip_norm=1.0)
        return jax.jit(make_train_step(self.model, TVM(), self.optimizer, config))

    def measure(self, options: Mapping[str, Any]) -> dict[str, list[float]]:
        """Returns errors, right answers and prunings for each held-out problem."""
        data = self.labelled(options)
        state = init_state(self.model, TVM(), self.optimizer, self.seed, False, self.base)
        early = []
        orders = self.orders(len(data[0]), options.get("grouped", False))
        for number, chosen in enumerate(orders, 1):
            state, _ = self.step(state, as_batch(*(array[chosen] for array in data)))
            if number in self.settings["early"]:
                early.append(self.errors(self.values(state.params)))
        values = self.values(state.params)
        last, first = self.errors(values), np.mean(early, 0)
        result = {
            "early_mid": first[:, 1:3].mean(1),
            "final": last.mean(1),
            **{f"early_step_{k + 1}": first[:, k] for k in range(STEPS - 1)},
            **{f"final_step_{k + 1}": last[:, k] for k in range(STEPS - 1)},
            "best_of_16": self.best(values),
            "lost": self.lost(values),
            "greedy": self.held["greedy"],
            "sampled": self.outcomes.mean(1),
        }
        if options.get("search"):
            own = [self.searched(state.params, k) for k in BUDGETS]
            result |= {f"beam_{k}": found for k, found in zip(BUDGETS, own, strict=True)}
            result["beam"] = np.mean(own, 0)
        return {name: np.asarray(found, float).tolist() for name, found in result.items()}

    @property
    def outcomes(self) -> np.ndarray:
        """Which held-out solutions are right, [problems, solutions]."""
        written = self.held["written"]
        each = written.shape[1]
        prompts = np.repeat(self.held["prompts"], each, 0)
        return is_right(prompts, written.reshape(-1, LENGTH)).reshape(-1, each)

    def values(self, params: Any) -> np.ndarray:
        """Returns the value of each token of the held-out solutions, [problems, solutions, LENGTH]."""  # noqa: E501
        written = self.held["written"]
        num, each, _ = written.shape
        prompts = np.broadcast_to(self.held["prompts"][:, None], (num, each, PROMPT))
        tokens = np.concatenate([prompts, written], 2).reshape(num * each, -1)
        found = token_values(
            self.model, _without_heads(params), params["heads"]["value"], jnp.asarray(tokens)
        )
        return np.asarray(found)[:, PROMPT:].reshape(written.shape)

    def errors(self, values: np.ndarray) -> np.ndarray:
        """Returns the mean squared error behind each of the first steps, by problem."""
        truth = self.held["truth"]
        ends = 3 * np.arange(1, STEPS) - 1
        return ((values[:, : truth.shape[1], ends] - truth) ** 2).mean(1)

    def best(self, values: np.ndarray) -> np.ndarray:
        """Returns whether each problem's solution of the highest final value is right."""
        chosen = values[:, :, -1].argmax(1)
        return self.outcomes[np.arange(len(chosen)), chosen]

    def lost(self, values: np.ndarray) -> np.ndarray:
        """Returns the share of right beginnings that pruning to a quarter gives up for wrong ones.

        Over the first steps of each problem; NaN where no beginning is right, or none wrong.
        """
        written = self.held["written"]
        right = written[:, :, 1::3] == results(self.held["prompts"])[:, None]
        right = np.logical_and.accumulate(right, axis=2)
        keep = written.shape[1] // 4
        found = np.full((len(written), STEPS - 1), np.nan)
        for k in range(STEPS - 1):
            order = np.argsort(-values[:, :, 3 * k + 2], axis=1, kind="stable")[:, :keep]
            good = np.take_along_axis(right[:, :, k], order, 1).sum(1)
            possible = np.minimum(right[:, :, k].sum(1), keep)
            mixed = (possible > 0) & ~right[:, :, k].all(1)
            found[mixed, k] = 1 - good[mixed] / possible[mixed]
        some = np.isfinite(found).any(1)
        return np.where(
            some, np.nansum(found, 1) / np.maximum(np.isfinite(found).sum(1), 1), np.nan
        )

    def searched(self, params: Any, budget: int) -> np.ndarray:
        """Returns whether the beam search's best finished solution is right, for each problem."""
        draw = Generator(
            self.model, self.base, 4, transform=temperature(1.0), stop=on_tokens([NEXT])
        )
        score = value_scorer(
            self.model, _without_heads(params), params["heads"]["value"], batch_tokens=65536
        )
        given = self.held["prompts"]
        found = step_beam(
            draw,
            Prompts.of(given.tolist()),
            score,
            beams=budget // 4,
            expand=4,
            max_steps=STEPS,
            ends=[END],
            seed=self.seed,
        )
        written = np.zeros((len(given), LENGTH), np.int64)
        for row, path in zip(written, found.finished, strict=True):
            if path is not None and len(path.tokens) == LENGTH:
                row[:] = path.tokens
        return is_right(given, written)


def _without_heads(params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name != "heads"}


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    greedy = found.mean("tvm", "greedy")
    gain = found.difference("orm", "tvm", "early_mid")
    beam = found.difference("tvm", "orm", "beam")
    best = found.difference("tvm", "orm", "best_of_16")
    grouped = found.difference("group_orm", "group_tvm", "early_mid")
    limit = 0.02 * found.mean("group_orm", "early_mid")
    shuffled = found.difference("shuffled", "tvm", "early_mid")

    def means(metric: str, arms: Sequence[str], digits: int = 3) -> str:
        return ", ".join(f"{arm} {found.mean(arm, metric):.{digits}f}" for arm in arms)

    every, searched = list(found.values), ["tvm", "orm", "rollout"]
    return Verdict.of(
        [
            (
                0.3 <= greedy <= 0.6,
                f"the generator is right on {greedy:.2f} of the problems greedily (0.3 to 0.6), on "
                f"{found.mean('tvm', 'sampled'):.2f} of its samples",
            ),
            (
                gain.low > 0,
                f"early in training the MSE of values in the middle is "
                f"{found.mean('tvm', 'early_mid'):.4f}, of outcomes as labels "
                f"{found.mean('orm', 'early_mid'):.4f}: lower by {gain}",
            ),
            (
                beam.low > -0.05,
                f"beam search is right on {found.mean('tvm', 'beam'):.3f}, by outcomes on "
                f"{found.mean('orm', 'beam'):.3f}: {beam} (no worse by more than 0.05)",
            ),
            (
                best.low > -0.05,
                f"best of 16 does not suffer by more than 0.05: {best}",
            ),
            (
                abs(grouped.mean) < limit,
                f"with whole problems in a batch nothing remains: {grouped.mean:.2g}, below 2 % of "
                f"the MSE ({limit:.2g})",
            ),
            (shuffled.low > 0, f"shuffled within a problem the MSE is higher by {shuffled}"),
            (None, f"early, in the middle: {means('early_mid', every, 4)}"),
            (None, f"after the last step, all depths: {means('final', every, 4)}"),
            *(
                (None, f"early, behind step {k}: {means(f'early_step_{k}', every, 4)}")
                for k in range(1, STEPS)
            ),
            *((None, f"beam search of {k}: {means(f'beam_{k}', searched)}") for k in BUDGETS),
            (None, f"right beginnings lost: {means('lost', every)}"),
        ]
    )
