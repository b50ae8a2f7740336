"""MR-ALIGN (arXiv 2510.24794): KTO whose segments weigh by their transitions, on facts looked up.

    python -m tokjax.reproduce mr_align

WHAT CAME OUT

A small model learns traces that retrieve a fact, check it and often backtrack, which spoils right
values more often than it mends wrong ones. Its own traces of half of the questions, rated by their
answers, train every arm for as many steps; the other half judges:
    mr_align  KTO, segments weighted by transitions of good, bad and all traces
    kto       the same with weights of 1 (the matrix of all traces in all three places)
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

from tokjax.decoding.samplers import categorical
from tokjax.finetuning.sft import SFT
from tokjax.models import ModelConfig, Transformer
from tokjax.preference.kto import KTO
from tokjax.preference.meta_reasoning import Polarities, fit_polarities, segment_weights
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.arrays import Sample, answers, epochs, kept, tuned
from tokjax.reproduction.tasks import facts as task

WIDTH = task.PROMPT + task.NEW_TOKENS


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "d_model": 32 if smoke else 64,
        "base_samples": 200 if smoke else 20000,
        "base_steps": 4 if smoke else 1200,
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
        seeds=(0, 1) if smoke else (0, 1, 2, 3, 4),
        notes=(
            "An item is a question, of which 16 traces are sampled at temperature 1. Traces of the "
            "other questions are rated by their answers: good are right ones.",
            "beta 0.1, weights 1.0 and 1.5 of good and bad answers, smoothing 0.6, five iterations "
            "and clipping at e are the method's defaults.",
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
                samples.append(Sample.answer(task.prompt(every[i]), said))
            steps = told["base_steps"]
            made = epochs(samples, 64, steps, WIDTH, self.seed)
            options = {"rate": told["base_rate"], "cosine": True, "seed": self.seed}
            return tuned(self.model, None, SFT(), made, steps=steps, **options)[0]

        return kept(self.folder / "base.npz", self.model, make)

    def sampled(self, params: Any, asked: list[task.Question], each: int, seed: int) -> list[Any]:
        """Returns (question, tokens of a trace) of a number of traces of each question."""
        count = len(asked) * each
        rows = answers(
            self.model,
            params,
            [task.prompt(question) for question in asked],
            task.NEW_TOKENS,
            task.END,
            samples=each,
            sampler=categorical(),
            seeds=np.arange(count) + seed * count,
        )
        return [(asked[i // each], row) for i, row in enumerate(rows)]

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

    def samples(self, kind: str) -> list[Sample]:
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
        found = []
        for (question, row, said, good), own in zip(self.traces, labels, strict=True):
            weights = segment_weights(own, fit.good if good else fit.bad, fit.every)
            spread = np.append(weights, 1.0)[list(said.segments)]
            if kind == "sft" and not good:
                continue
            if kind == "sft":
                spread = np.ones(len(row))
            asked = task.prompt(question)
            signed = [0.0] * len(asked) + list(spread if good else -spread)
            found.append(Sample([*asked, *row], signed))
        return found

    def measure(self, kind: str) -> dict[str, list[float]]:
        """Returns the metrics of an arm."""
        params, told = self.base, self.settings
        if kind != "base":
            objective = (
                SFT() if kind == "sft" else KTO(bad_weight=1.5, reference_point="mismatched")
            )
            steps = told["steps"]
            made = epochs(self.samples(kind), told["batch"], steps, WIDTH, self.seed)
            params, _ = tuned(
                self.model,
                params,
                objective,
                made,
                steps=steps,
                rate=told["rate"],
                warmup=10,
                seed=self.seed,
            )
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
            (None, f"misleading: {told('misleading')}"),
            (None, f"accuracy: {told('accuracy')}"),
            (None, f"answered at once: {told('direct')}"),
            (None, f"traces that backtrack: {told('backtracks')}"),
            (None, f"segments a trace: {told('segments')}"),
        ]
    )
