"""MR-ALIGN (arXiv 2510.24794): KTO whose segments weigh by their transitions, on facts looked up.

    python -m tokjax.reproduce mr_align

What came out is in docs/reproductions/mr_align.json and .png: it did not reproduce as demanded, for
one of seven demands. Misleading traces fall from 31 % to 3.6 % with MR-ALIGN (KTO 29 %), accuracy
rises from 0.57 to 0.94 (KTO 0.69), and shuffled labels (18 %) and swapped matrices (41 %) lose it.
But facts are not answered with at once more often (13 % against 25 % before; checks, which do no
harm, come instead). The weights' mere size brings it to 17 %: on one seed it does as well as the
weights themselves, on the other not at all.

A small model learns traces that retrieve a fact, check it and often backtrack, which spoils right
values more often than it mends wrong ones. Its own traces of half of the questions, rated by their
answers, train every arm for as many steps; the other half judges:
    mr_align  KTO, segments weighted by transitions of good, bad and all traces
    kto       the same with weights of 1 (the matrix of all traces in all three places)
    scaled    KTO whose segments all weigh as much as MR-ALIGN's do on average (told, not judged)
    sft       cross-entropy on the good traces
    shuffled  MR-ALIGN with the segments' labels shuffled within traces (control)
    swapped   MR-ALIGN with the matrices of good and bad traces exchanged (control)
z0 comes from mismatched prompts and answers.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tokjax.finetuning.sft import SFT
from tokjax.models import ModelConfig, Transformer
from tokjax.preference.kto import KTO
from tokjax.preference.meta_reasoning import Polarities, fit_polarities, segment_weights
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.rows import Row, batches
from tokjax.reproduction.small_runs import (
    before,
    constant_rates,
    continued,
    cosine_rates,
    fitted,
    kept,
)
from tokjax.reproduction.tasks import facts as task

WIDTH = task.PROMPT + task.NEW_TOKENS + 1


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "d_model": 32 if smoke else 64,
        "base_samples": 200 if smoke else 20000,
        "base_steps": 4 if smoke else 900,
        "base_rate": 3e-3,
        "samples": 2 if smoke else 32,
        "steps": 4 if smoke else 100,
        "rate": 3e-4,
        "batch": 32,
        "judged": 2 if smoke else 16,
    }

    def arm(role: str, label: str, kind: str) -> Treatment:
        return Treatment(role, label, {"kind": kind})  # type: ignore[arg-type]

    arms = {
        "mr_align": arm("method", "MR-ALIGN", "mr_align"),
        "kto": arm("baseline", "KTO", "kto"),
        "sft": arm("baseline", "SFT on good traces", "sft"),
        "base": arm("baseline", "before training", "base"),
        "scaled": arm("baseline", "KTO, mean weights", "scaled"),
        "shuffled": arm("control", "labels shuffled", "shuffled"),
        "swapped": arm("control", "matrices swapped", "swapped"),
    }
    return Comparison(
        claim=(
            "Weights by transitions typical of good or bad traces make KTO lower the share of "
            "traces that find the right fact and answer wrongly, at no loss of accuracy."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(**options),
        judge=judge,
        metric="misleading",
        panels=(
            Bars("misleading", "right fact in the thinking, wrong answer", "share"),
            Bars("accuracy", "right answers", "share"),
            Bars("direct", "retrieved facts answered with at once", "share"),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "An item is a question, of which 16 traces are sampled at temperature 1. Traces of the "
            "other questions are rated by their answers: good are right ones.",
            "beta 0.1, weights 1.0 and 1.5 of good and bad answers, smoothing 0.6, five iterations "
            "and clipping at e are the method's defaults.",
            "The learning rate was chosen on another seed, by KTO alone: at 3e-4 it leaves room "
            "(0.13 misleading of 0.26 before), at 1e-3 none (0.01).",
            "The arm `scaled` was added after the first full run, to tell what the weights' size "
            "does from what their places do; other arms and what is demanded are as they were.",
        ),
    )


class Materials:
    """The base model of a seed and its rated traces."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed
        self.facts = task.facts(seed)
        rng = np.random.default_rng([seed, 2])
        mixed = [task.questions()[i] for i in rng.permutation(len(task.questions()))]
        self.train, self.judged = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
        self.model = Transformer(
            ModelConfig(
                vocab_size=task.VOCABULARY,
                d_model=settings["d_model"],
                n_layers=2,
                n_heads=4,
                max_positions=32,
                remat="none",
            )
        )

    @cached_property
    def base(self) -> Any:
        """The parameters of the base model."""
        told = self.settings

        def make() -> Any:
            rng = np.random.default_rng([self.seed, 1])
            every = task.questions()
            samples = []
            for i in rng.integers(0, len(every), told["base_samples"]):
                said = task.trace(int(self.facts[every[i]]), rng)
                samples.append(Row.answer(task.prompt(every[i]), said))
            steps = told["base_steps"]
            made = batches(samples, WIDTH, size=64, steps=steps, seed=self.seed)
            rates = cosine_rates(told["base_rate"], steps)
            return fitted(self.model, SFT(), None, made, rates, seed=self.seed)[0]

        return kept(self.folder / "base.npz", self.model, make)

    def sampled(self, params: Any, asked: list[task.Question], each: int, seed: int) -> list[Any]:
        """Returns (question, tokens of a trace) of a number of traces of each question."""
        found = continued(
            self.model,
            params,
            [task.prompt(question) for question in asked],
            end=task.END,
            max_new_tokens=task.NEW_TOKENS,
            samples=each,
            seed=1000 * seed + self.seed,
        )
        pairs = zip(asked, found, strict=True)
        return [(question, before(row, task.END)) for question, rows in pairs for row in rows]

    @cached_property
    def traces(self) -> list[tuple[task.Question, list[int], task.Read, bool]]:
        """Closed traces of the base model, what they say, and whether they are good."""
        found = []
        for question, row in self.sampled(self.base, self.train, self.settings["samples"], 1):
            said = task.read(row)
            if said.answer is not None and said.states:
                good = said.answer == self.facts[question]
                found.append((question, [*row, task.END], task.read([*row, task.END]), good))
        return found

    def samples(self, kind: str) -> list[Row]:
        """Returns what an arm is trained on."""
        rng = np.random.default_rng([self.seed, 3])
        labels = [[(task.STATES[s],) for s in said.states] for _, _, said, _ in self.traces]
        if kind == "shuffled":
            labels = [[own[i] for i in rng.permutation(len(own))] for own in labels]
        rated = [good for *_, good in self.traces]
        fit = fit_polarities(labels, rated)
        if kind == "kto":
            fit = Polarities(fit.every, fit.every, fit.every)
        if kind == "swapped":
            fit = Polarities(fit.bad, fit.good, fit.every)
        weights = [
            segment_weights(own, fit.good if good else fit.bad, fit.every)
            for own, good in zip(labels, rated, strict=True)
        ]
        if kind == "scaled":
            groups = np.repeat(rated, [len(own) for own in weights])
            every = np.concatenate(weights)
            means = {good: every[groups == good].mean() for good in (True, False)}
            weights = [np.full(len(w), means[g]) for w, g in zip(weights, rated, strict=True)]
        found = []
        for (question, row, said, good), own in zip(self.traces, weights, strict=True):
            spread = np.append(own, 1.0)[list(said.segments)]
            if kind == "sft" and not good:
                continue
            if kind == "sft":
                spread = np.ones(len(row))
            asked = task.prompt(question)
            signed = [0.0] * len(asked) + list(spread if good else -spread)
            found.append(Row([*asked, *row], signed))
        return found

    def measure(self, kind: str) -> dict[str, list[float]]:
        """Returns the metrics of an arm."""
        params, told = self.base, self.settings
        if kind != "base":
            objective = (
                SFT() if kind == "sft" else KTO(bad_weight=1.5, reference_point="mismatched")
            )
            steps, rows = told["steps"], self.samples(kind)
            made = batches(rows, WIDTH, size=told["batch"], steps=steps, seed=self.seed)
            rates = constant_rates(told["rate"], steps, warmup=10)
            params, _ = fitted(self.model, objective, params, made, rates, seed=self.seed)
        found: dict[str, list[float]] = {}
        if kind == "base":
            found["good"] = [float(good) for *_, good in self.traces]
        values: dict[str, dict[task.Question, list[float]]] = {}
        for question, row in self.sampled(params, self.judged, told["judged"], 2):
            said, truth = task.read(row), self.facts[question]
            right = said.answer == truth
            at = [i for i, state in enumerate(said.states) if state == task.RETRIEVE]
            last = len(said.states) - 1
            each = {
                "accuracy": float(right),
                "misleading": float(not right and truth in said.values),
                "direct": float(np.mean([i == last for i in at])) if at else np.nan,
                "backtracks": float(task.BACKTRACK in said.states),
                "segments": float(len(said.states)),
            }
            for name, value in each.items():
                values.setdefault(name, {}).setdefault(question, []).append(value)
        for name, of_questions in values.items():
            found[name] = [float(np.nanmean(own)) for own in of_questions.values()]
        return found


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    base, good = found.mean("base", "accuracy"), found.mean("base", "good")
    fewer = {
        name: found.difference("kto", name, "misleading")
        for name in ("mr_align", "shuffled", "swapped")
    }
    right = found.difference("mr_align", "kto", "accuracy")
    direct = found.difference("mr_align", "base", "direct")

    def told(metric: str) -> str:
        return ", ".join(f"{name} {found.mean(name, metric):.3f}" for name in found.values)

    kto, ours = found.mean("kto", "misleading"), found.mean("mr_align", "misleading")
    return Verdict.of(
        [
            (
                0.3 < base < 0.9,
                f"the base model answers {base:.1%} rightly (30 to 90 %); {good:.1%} of the rated "
                f"traces are good",
            ),
            (
                kto < found.mean("base", "misleading"),
                f"KTO lowers the misleading share: {found.mean('base', 'misleading'):.3f} before, "
                f"{kto:.3f} behind it",
            ),
            (
                fewer["mr_align"].low > 0,
                f"MR-ALIGN lowers it further, to {ours:.3f}: by {fewer['mr_align']}",
            ),
            (
                right.low > -0.01,
                f"accuracy is not 0.01 below KTO's: {right}",
            ),
            (
                direct.low > 0,
                f"facts are answered with at once more often than before: {direct}",
            ),
            (
                fewer["shuffled"].mean < fewer["mr_align"].mean / 2,
                f"with shuffled labels less than half of that remains: {fewer['shuffled']}",
            ),
            (
                fewer["swapped"].high < 0,
                f"swapped matrices are worse than KTO: {fewer['swapped']}",
            ),
            (
                None,
                "against KTO with MR-ALIGN's mean weights the misleading share falls by "
                f"{found.difference('scaled', 'mr_align', 'misleading')}",
            ),
            (None, f"misleading: {told('misleading')}"),
            (None, f"accuracy: {told('accuracy')}"),
            (None, f"answered at once: {told('direct')}"),
            (None, f"traces that backtrack: {told('backtracks')}"),
            (None, f"segments a trace: {told('segments')}"),
        ]
    )
