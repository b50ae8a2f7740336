"""RLFH (arXiv 2406.12221): grades of single statements pay their tokens, and fewer are wrong.

    python -m tokjax.reproduce rlfh

RESULT: reproduced. Wrong statements of an answer fall from 0.839 to 0.091 with rewards at tokens
and 0.257 at the end, right ones rise from 1.058 to 2.180 and 1.809; without a reward for
information 1.759 are right, with verdicts of others 1.503 wrong. Of unknown people the policy does
not fall silent but finds facts out: every question is asked again and again, and verdicts tell.

A small model tells of people; of half of them it has only heard anything and its opposite. Each
sentence is compared with the table of facts. The arms begin at the same model:
    token             statements paid at their last words, sentences at their ends
    paragraph         the same, all at the end of the answer
    no_information    no reward for information (control)
    shuffled          statements with the verdicts of others (control)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokjax.config import register
from tokjax.decoding.engine import decode
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import categorical
from tokjax.decoding.stops import on_tokens
from tokjax.files import write_atomically
from tokjax.language_model import LanguageModel
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained, word_tokenizer
from tokjax.reproduction.tasks import biographies
from tokjax.rl.feedback import FactFeedback, Sentence
from tokjax.rl.rewards import Episode
from tokjax.training.metrics import read_metrics

ARMS = ("start", "token", "paragraph", "no_information", "shuffled")
SAMPLES = 4  # answers to each question


@register("feedback", "shuffled_facts")
@dataclass(frozen=True)
class ShuffledFacts(FactFeedback):
    """Statements with the verdicts of others, from anywhere in the collection."""

    def __call__(self, episodes: Sequence[Episode]) -> list[list[Sentence]]:
        """Returns the graded sentences of each answer."""
        told = super().__call__(episodes)
        verdicts = [t.verdict for found in told for s in found for t in s.statements]
        mixed = iter(np.random.default_rng(len(verdicts)).permutation(verdicts).tolist())
        return [
            [
                dataclasses.replace(
                    s,
                    statements=tuple(
                        dataclasses.replace(t, verdict=next(mixed)) for t in s.statements
                    ),
                )
                for s in found
            ]
            for found in told
        ]


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "examples": 300 if smoke else 8000,
        "warm_steps": 4 if smoke else 500,
        "updates": 8 if smoke else 120,
        "rows": 16 if smoke else 64,
        "width": 16 if smoke else 64,
        "rate": 1e-3,
    }
    labels = {
        "start": ("baseline", "before"),
        "token": ("method", "RLFH at tokens"),
        "paragraph": ("method", "at the end"),
        "no_information": ("control", "no reward for information"),
        "shuffled": ("control", "verdicts of others"),
    }
    return Comparison(
        claim=(
            "Rewards of statements at their tokens make stated facts right more often and fewer "
            "wrong, with information kept; finer placement is no worse than coarser."
        ),
        arms={
            arm: Treatment(role, label, {"arm": arm})  # type: ignore[arg-type]
            for arm, (role, label) in labels.items()
        },
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(options["arm"]),
        judge=judge,
        metric="wrong",
        panels=(
            Bars("right", "right statements", "of an answer"),
            Bars("wrong", "wrong statements", "of an answer"),
            Bars("truth", "right among the stated", "share"),
            Bars("statements", "statements", "of an answer"),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            f"An item is a question, its value a mean over {SAMPLES} samples at temperature 1. All "
            "questions are trained on, about thirty times each. Facts that were never told are "
            "found by trial then, as verdicts tell: right statements of unknown people rise too, "
            "and whether a policy learns when to be silent is not shown.",
            "Reward of an update's answers, summed over their tokens, is the same for the two "
            "placements; `reward` compares their collections.",
            "Settings are those of the code's dataclass; extraction and verdicts are exact. "
            "Nothing was tuned.",
        ),
    )


@dataclass
class Materials:
    """The warm start of a seed, and runs from it."""

    folder: Path
    settings: Mapping[str, Any]
    seed: int

    def tree(self, file: Path, **changes: Any) -> dict[str, Any]:
        """Returns the configuration of a run on a file of answers."""
        tokenizer = word_tokenizer(self.folder / "words", biographies.WORDS)
        source = {"name": "jsonl", "files": (str(file),), "kind": "response"}
        return {
            "title": "rlfh",
            "seed": self.seed,
            "data": {
                "tokenizer": {**tokenizer, "add_eos": True},
                "train": [{"source": source}],
                "evals": {},
                "seq_len": biographies.LENGTH + 7,
                "batch_size": self.settings["rows"],
                "cache_dir": str(self.folder / "cache"),
            },
            "model": {
                "d_model": self.settings["width"],
                "n_layers": 2,
                "n_heads": 4,
                "max_positions": 32,
            },
            "objective": {"name": "sft"},
            "optimizer": {"name": "adamw", "peak_lr": 3e-3, "weight_decay": 0.0},
            "schedule": {"name": "constant", "warmup_steps": 2},
            "evaluation": {"every_steps": 10_000},
            "checkpoints": {"every_steps": 10_000},
            "log_every": 4,
            **changes,
        }

    @cached_property
    def start(self) -> LanguageModel:
        """The model that all arms begin at."""
        told = jsonl(
            self.folder / "examples.jsonl",
            lambda: biographies.examples(self.settings["examples"], self.seed),
        )
        return trained(self.folder / "start", self.tree(told, steps=self.settings["warm_steps"]))

    def measure(self, arm: str) -> dict[str, Any]:
        """Returns what an arm's model states, question by question."""
        facts = self.folder / "facts.jsonl"
        write_atomically(facts, biographies.table_text(self.seed))
        asked = jsonl(self.folder / "asked.jsonl", lambda: biographies.questions(self.seed))
        if arm == "start":
            return self.stated(self.start, facts)
        self.start  # noqa: B018 (lies in its folder)
        tree = self.tree(
            asked,
            steps=self.settings["updates"],
            init_from=str(self.folder / "start"),
            model={},
            objective=self.objective(arm, str(facts)),
            optimizer={"name": "adamw", "peak_lr": self.settings["rate"], "weight_decay": 0.0},
        )
        lm = trained(self.folder / arm, tree)
        rewards = read_metrics(self.folder / arm)["reward/token_mean"]
        reward = np.array([v for v in rewards if v is not None], float)
        return {**self.stated(lm, facts), "reward": reward}

    def objective(self, arm: str, facts: str) -> dict[str, Any]:
        """Returns the objective of an arm."""
        feedback = "shuffled_facts" if arm == "shuffled" else "facts"
        grading = {"information_weight": 0.0} if arm == "no_information" else {}
        return {
            "name": "rlfh",
            "feedback": {"name": feedback, "facts": facts, "forms": biographies.FORMS},
            "grading": grading,
            "granularity": "paragraph" if arm == "paragraph" else "token",
            "rollouts": {
                "group": 1,
                "minibatches": 2,
                "epochs": 2,
                "max_new_tokens": biographies.LENGTH,
            },
        }

    def stated(self, lm: LanguageModel, facts: Path) -> dict[str, Any]:
        """Returns numbers of right and wrong statements of sampled answers."""
        asked = list(biographies.questions(self.seed))
        end = lm.tokenizer.eos_id
        found = decode(
            lm.model,
            lm.params,
            Prompts.of([lm.tokenizer.encode(q["prompt"]) for q in asked]),
            max_new_tokens=biographies.LENGTH,
            samples=SAMPLES,
            sampler=categorical(),
            stop=on_tokens((end,)),
            key=jax.random.key(self.seed),
        )
        grade = biographies.feedback(str(facts)).of_answer
        counts = np.zeros((len(asked) * SAMPLES, 2))
        for i, ids in enumerate(found.rows()):
            text = lm.tokenizer.decode([t for t in ids if t != end]).strip()
            for sentence in grade(text, asked[i // SAMPLES]["response"]):
                for statement in sentence.statements:
                    counts[i, int(statement.verdict == "Wrong")] += 1
        right, wrong = counts.reshape(-1, SAMPLES, 2).mean(1).T
        stated = right + wrong
        known = np.array([biographies.known(q["prompt"].split()[1]) for q in asked])
        return {
            "right": right,
            "wrong": wrong,
            "statements": stated,
            "truth": np.where(stated > 0, right / np.maximum(stated, 1e-9), np.nan),
            "wrong_known": wrong[known],
            "wrong_unknown": wrong[~known],
            "right_known": right[known],
        }


def judge(found: Measurements) -> Verdict:
    """Demands what the paper's claim must show at a small scale; see the sentences."""
    findings: list[tuple[bool | None, str]] = []
    for arm in ("token", "paragraph"):
        fewer = found.difference("start", arm, "wrong")
        findings.append((fewer.low > 0, f"{arm}: fewer wrong statements an answer: {fewer}"))
    truth = [found.mean(arm, "truth") for arm in ("start", "token")]
    findings.append(
        (truth[1] > truth[0], f"right among the stated: {truth[0]:.3f} before, {truth[1]:.3f}")
    )
    mostly = [
        found.mean("start", f"wrong_{kind}") - found.mean("token", f"wrong_{kind}")
        for kind in ("unknown", "known")
    ]
    findings.append(
        (mostly[0] > mostly[1], f"wrong ones go mostly of unknown people: {mostly[0]:.3f} "
         f"against {mostly[1]:.3f} of known")
    )  # fmt: skip
    kept = found.difference("token", "start", "right_known")
    findings.append((kept.high > -0.2, f"right statements of known people stay: {kept}"))
    gain = found.difference("token", "paragraph", "reward")
    findings.append((gain.high > 0, f"rewards at tokens no slower than at the end: {gain}"))
    fewer = found.difference("token", "no_information", "statements")
    findings.append((fewer.low > 0, f"without reward for information less is stated: {fewer}"))
    worse = found.difference("shuffled", "token", "wrong")
    findings.append((worse.low > 0, f"verdicts of others leave more that is wrong: {worse}"))
    for metric in ("right", "wrong", "truth", "statements", "wrong_unknown", "right_known"):
        told = ", ".join(f"{arm} {found.mean(arm, metric):.3f}" for arm in ARMS)
        findings.append((None, f"{metric}: {told}"))
    return Verdict.of(findings)
