"""Transformers need glasses (arXiv 2406.04267): collapse and over-squashing at a small scale.

    python -m tokjax.reproduce transformers_need_glasses

What came out is in docs/reproductions/transformers_need_glasses.json and .png: every rate is the
theory's, profiles become a U, errors of counting grow; only separators do not help here.

The arms:
    rate_...        one attention layer with Gaussian queries, keys and values, n against n + 1
                    tokens (the last one repeated), by kind of positions; with the sum instead of
                    the softmax (a control); `one_...`: ones and a zero, with one more one
    rounded_...     the same ones and zero with the output in a dtype: where states become equal
    count_..._n     a small model asked how many ones there are among n digits, plain and with a
                    separator behind every third, in float32 and bfloat16
    last_..._n      one asked for the last digit
    profile_...     how much the last state of a deep model moves with each input embedding, before
                    and after training to count
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.analysis.over_squashing import (
    attend,
    ends,
    jacobian_profile,
    last_states,
    rounded,
    variant,
)
from tokjax.data.batch import Batch
from tokjax.models import ModelConfig, Transformer
from tokjax.pretraining.next_token import NextToken
from tokjax.reproduction import Bars, Comparison, Lines, Measurements, Treatment, Verdict
from tokjax.reproduction.small_runs import cosine_rates, fitted, kept
from tokjax.reproduction.tasks.counting import Counting, absolute_error

RATES = {  # of the repeated last token: positions, attention, slope of the theory
    "none": ("none", "softmax", -1.0),
    "rotary": ("rotary", "softmax", -0.5),
    "sinusoids": ("sinusoids", "softmax", -0.5),
    "alibi": ("alibi", "softmax", 0.0),
    "sum": ("none", "sum", 0.0),
}
WITHIN = 0.15  # of a slope
MOST = 32  # elements that a model is trained on
LENGTHS = (8, 16, 24, 32)
TASKS = {
    "count_plain": Counting("count"),
    "count_separated": Counting("count", separator_every=3),
    "last_plain": Counting("last"),
}
CAP = 4096  # what stands for "never equal"


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "lengths": (64, 128) if smoke else (128, 256, 512, 1024, 2048, 4096),
        "draws": 2 if smoke else 20,
        "steps": 4 if smoke else 500,
        "questions": 8 if smoke else 150,
        "rows": 4 if smoke else 24,
    }
    arms = {
        f"rate_{name}": Treatment(
            "control" if attention == "sum" else "method",
            name,
            {"part": "rate", "positions": positions, "attention": attention, "pair": "last"},
        )
        for name, (positions, attention, _) in RATES.items()
    }
    for name in ("none", "alibi"):
        options = {"part": "rate", "positions": name, "attention": "softmax", "pair": "one"}
        arms[f"one_{name}"] = Treatment("method", f"1..1 0, {name}", options)
    for dtype in ("bfloat16", "float32"):
        role = "method" if dtype == "bfloat16" else "baseline"
        arms[f"rounded_{dtype}"] = Treatment(role, dtype, {"part": "rounded", "dtype": dtype})
    for task in TASKS:
        for dtype in ("float32", "bfloat16"):
            for n in LENGTHS:
                options = {"part": "task", "task": task, "dtype": dtype, "n": n}
                label = f"{task}, {dtype}, n = {n}"
                role = "baseline" if task == "count_plain" else "method"
                arms[f"{task}_{dtype}_{n}"] = Treatment(role, label, options)
    for state in ("random", "trained"):
        role = "baseline" if state == "random" else "method"
        arms[f"profile_{state}"] = Treatment(role, state, {"part": "profile", "state": state})
    line = lambda task, dtype: {float(n): f"{task}_{dtype}_{n}" for n in LENGTHS}  # noqa: E731
    return Comparison(
        claim=(
            "The last state of a decoder-only transformer tells ever longer sequences apart ever "
            "less, until they are equal in low precision; early tokens have more ways to it than "
            "late ones; counting fails as sequences grow, and separators help."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(options),
        judge=judge,
        metric="slope",
        panels=(
            Bars(
                "slope",
                "rate of the collapse: slope of log-distance by log-n",
                "slope",
                (*(f"rate_{name}" for name in RATES), "one_none", "one_alibi"),
            ),
            Lines(
                "error",
                "counting ones",
                "number of elements",
                "absolute error",
                {
                    f"{task}, {dtype}": line(f"count_{task}", dtype)
                    for task in ("plain", "separated")
                    for dtype in ("float32", "bfloat16")
                },
            ),
            Bars(
                "first",
                "first token's Jacobian over the median of those between",
                "ratio",
                ("profile_random", "profile_trained"),
            ),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "Rates: 20 draws of width 64, n from 128 to 4096, in float64; a draw is an item. "
            "Penalties on distance of 0.5 a token.",
            "Models: two blocks of width 32 with rotary positions, 500 steps of 32 questions with "
            "1 to 32 elements; the loss is of the answer alone. 150 questions of each length; "
            "bfloat16 is the same weights, computed in it.",
            "Profiles: six blocks of width 32, 24 sequences of 33 tokens, 8 probes; trained for a "
            "third of the steps.",
            "Counting by a small model is learned in part only; nothing was tuned.",
        ),
    )


class Materials:
    """Models of one seed, trained when they are first asked for."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed

    def measure(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the values of each draw, question or sequence."""
        told = dict(options)
        return getattr(self, f"_{told.pop('part')}")(**told)

    def _rate(self, positions: Any, attention: Any, pair: str) -> dict[str, list[float]]:
        ns, slopes = self.settings["lengths"], []
        # What fades like an exponential is 0 in float64 at long ones: shorter sequences then.
        ns = ns if (positions, pair) != ("alibi", "one") else (8, 12, 16, 24, 32)
        for draw in range(self.settings["draws"]):
            distances = []
            for n in ns:
                first, second = self._pair(n, draw, pair, positions, attention)
                distances.append(np.abs(first - second).sum())
            slopes.append(np.polyfit(np.log(ns), np.log(distances), 1)[0])
        return {"slope": slopes}

    def _pair(self, n: int, draw: int, pair: str, positions: Any = "none", attention: Any = None):
        rng = np.random.default_rng([self.seed, draw, n if pair == "last" else 0])
        options = {"positions": positions, "attention": attention or "softmax"}
        if pair == "last":
            qkv, at = rng.normal(size=(3, n, 64)), list(range(n))
            longer = [*at, n - 1]
        else:
            qkv, at = rng.normal(size=(3, 2, 64)), [0] * (n - 1) + [1]
            longer = [0] * n + [1]
        return tuple(attend(*(x[rows] for x in qkv), **options) for rows in (at, longer))

    def _rounded(self, dtype: Any) -> dict[str, list[float]]:
        ns = np.unique(np.geomspace(4, CAP, 40 if len(self.settings["lengths"]) > 2 else 6))
        found = []
        for draw in range(self.settings["draws"]):
            equal = CAP
            for n in ns.astype(int):
                first, second = (rounded(y, dtype) for y in self._pair(int(n), draw, "one"))
                if (first == second).all():
                    equal = int(n)
                    break
            found.append(float(equal))
        return {"first_equal": found}

    def _task(self, task: str, dtype: Any, n: int) -> dict[str, list[float]]:
        counting, ids = TASKS[task], _ids()
        words = list(ids)
        rng = np.random.default_rng([self.seed, n, 7])
        asked = [counting.question(n, rng) for _ in range(self.settings["questions"])]
        model = variant(_model(2), dtype=dtype)
        params = self._trained(task, 2)
        rows = [[ids[word] for word in question] for question, _ in asked]
        states = last_states(model, params, rows, batch_size=75)
        logits = model.unembed(params, jnp.asarray(states)[:, None])[:, 0]
        given = [words[i] for i in np.asarray(logits.argmax(-1))]
        pairs = list(zip(given, (answer for _, answer in asked), strict=True))
        errors = [absolute_error(*each) for each in pairs]
        return {"error": errors, "right": [float(a == b) for a, b in pairs]}

    def _profile(self, state: str) -> dict[str, list[float]]:
        counting, ids = TASKS["count_plain"], _ids()
        rng = np.random.default_rng([self.seed, 8])
        asked = [counting.question(MOST, rng)[0] for _ in range(self.settings["rows"])]
        tokens = np.array([[ids[word] for word in question] for question in asked])
        model = _model(6)
        params = self._start(6) if state == "random" else self._trained("count_plain", 6)
        profile = np.asarray(jacobian_profile(model, params, tokens, probes=8))
        found = ends(profile)
        # Tokens of the second quarter against those of the last, the last token left out.
        quarter = MOST // 4
        early = profile[:, quarter : 2 * quarter].mean(1) / profile[:, -quarter - 1 : -1].mean(1)
        return {
            "first": found.first.tolist(),
            "last": found.last.tolist(),
            "early": early.tolist(),
        }

    def _start(self, layers: int) -> Any:
        return _model(layers).init(jax.random.key(self.seed))

    def _trained(self, task: str, layers: int) -> Any:
        model, steps = _model(layers), self.settings["steps"]
        steps = steps if layers == 2 else steps // 3
        file = self.folder / f"{task}_{layers}_{self.seed}_{steps}.npz"
        rng = np.random.default_rng([self.seed, 9])
        batches = (_batch(TASKS[task], rng) for _ in range(steps))
        rates = cosine_rates(3e-3, steps)
        start = self._start(layers)
        return kept(file, model, lambda: fitted(model, NextToken(), start, batches, rates)[0])


@functools.cache
def _ids() -> dict[str, int]:
    words = dict.fromkeys(word for task in TASKS.values() for word in task.words(MOST))
    return {word: at for at, word in enumerate(words)}


@functools.cache
def _model(layers: int) -> Transformer:
    return Transformer(
        ModelConfig(len(_ids()), d_model=32, n_layers=layers, n_heads=4, max_positions=64)
    )


def _batch(task: Counting, rng: np.random.Generator, rows: int = 32) -> Batch:
    ids, width = _ids(), MOST + MOST // 3 + 1
    tokens, targets = np.zeros((2, rows, width), np.int32)
    weights = np.zeros((rows, width), np.float32)
    for b in range(rows):
        words, answer = task.question(int(rng.integers(1, MOST + 1)), rng)
        n = len(words)
        tokens[b, :n] = [ids[word] for word in words]
        targets[b, n - 1], weights[b, n - 1] = ids[answer], 1.0
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    numbers = np.arange(rows, dtype=np.int32)[:, None]
    given = (tokens, targets, positions, np.ones_like(tokens), weights, numbers)
    arrays: Any = map(jnp.asarray, given)
    return Batch(*arrays)


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    slope = {name: found.interval(f"rate_{name}", "slope") for name in RATES}
    one = {name: found.interval(f"one_{name}", "slope") for name in ("none", "alibi")}
    equal = {d: found.mean(f"rounded_{d}", "first_equal") for d in ("bfloat16", "float32")}
    profile = {
        state: {m: found.interval(f"profile_{state}", m) for m in ("first", "last", "early")}
        for state in ("random", "trained")
    }
    few, many = LENGTHS[0], LENGTHS[-1]
    rise = found.difference(f"count_plain_float32_{many}", f"count_plain_float32_{few}", "error")
    helped = found.difference(
        f"count_plain_float32_{many}", f"count_separated_float32_{many}", "error"
    )
    lost = found.difference(f"count_plain_bfloat16_{many}", f"count_plain_float32_{many}", "error")
    right = lambda task, n, d="float32": found.mean(f"{task}_{d}_{n}", "right")  # noqa: E731
    return Verdict.of(
        [
            *(
                (
                    abs(slope[name].mean - expected) < WITHIN,
                    f"{name}: the distance of n and n + 1 tokens goes with n to the power of "
                    f"{slope[name]} (theory {expected:g})",
                )
                for name, (_, _, expected) in RATES.items()
            ),
            (
                abs(one["none"].mean + 2) < WITHIN,
                f"ones and a zero with one more one: power {one['none']} (theory -2)",
            ),
            (
                one["alibi"].mean < -2.5,
                f"with a penalty on distance faster still: {one['alibi']}",
            ),
            (
                equal["bfloat16"] < 0.2 * equal["float32"],
                f"rounded to bfloat16 the states are equal at n = {equal['bfloat16']:.0f} on "
                f"average, to float32 at {equal['float32']:.0f} ({CAP}: never)",
            ),
            (
                profile["random"]["early"].low > 1 and profile["random"]["last"].low > 1,
                f"before training early tokens weigh {profile['random']['early']} of late ones, "
                f"and the last one {profile['random']['last']} of the median",
            ),
            (
                profile["trained"]["first"].low > 1 and profile["trained"]["last"].low > 1,
                f"after training the profile is a U: the first weighs "
                f"{profile['trained']['first']} and the last {profile['trained']['last']} of the "
                f"median",
            ),
            (
                rise.low > 0,
                f"errors of counting grow with n: by {rise} from {few} to {many} elements",
            ),
            (
                helped.low > 0,
                f"separators make the error at {many} elements smaller, by {helped}",
            ),
            (None, f"bfloat16 makes it larger by {lost}"),
            (
                None,
                "right counts: "
                + ", ".join(
                    f"n = {n}: {right('count_plain', n):.2f} (bfloat16 "
                    f"{right('count_plain', n, 'bfloat16'):.2f}, separated "
                    f"{right('count_separated', n):.2f})"
                    for n in LENGTHS
                ),
            ),
            (
                None,
                "right last digits: "
                + ", ".join(f"n = {n}: {right('last_plain', n):.2f}" for n in LENGTHS),
            ),
        ]
    )
