"""TS-GRPO of Thinkquel (arXiv 2510.00186): a plan credited by token, the query as one sequence.

    python -m tokjax.reproduce thinkquel

RESULT: did not reproduce. Share of right results over all collections, 0.43 at the start: GRPO
0.923, GSPO 0.905, TS-GRPO 0.919 (plan paid for itself; -0.005 [-0.009, 0.000] against GRPO) and
0.918 (paid for both; -0.006 [-0.010, -0.001]), cut anywhere 0.913. TS-GRPO is better than its
control by 0.006 [0.002, 0.010], and no steadier than GRPO. All end at 0.97 to 0.98, so what can be
told is speed.

A small model answers questions on a database of three tables with a plan (table and columns) and a
query; it has learnt from examples that are often wrong. GRPO, GSPO and TS-GRPO (plans paid for
their own reward, or for the query's too) train it by F1 of the plan's names and by the query's
rows; a control cuts plan from answer anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tokjax.config import register
from tokjax.files import write_atomically
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained, word_tokenizer
from tokjax.reproduction.tasks import queries
from tokjax.rl.ts_grpo import ANSWER, PLAN, SpanAdvantage
from tokjax.training.metrics import read_metrics

ARMS = ("grpo", "gspo", "routed", "paid", "random")
GSPO_CLIP = {"clip_low": 3e-4, "clip_high": 4e-4}


@register("advantage", "ts_grpo_random")
@dataclass(frozen=True)
class RandomBoundary(SpanAdvantage):
    """Plan and answer are what lies before and behind a place drawn anew for each answer."""

    def tagged(self, rollout: Any, tokens: Any, tokenizer: Any) -> dict[str, Any]:
        """Returns spans that are cut anywhere among the actions of both."""
        found = super().tagged(rollout, tokens, tokenizer)
        rng = np.random.default_rng([len(t) + sum(t) for t in tokens])
        for row, complete in zip(found["spans"], found["tagged"], strict=True):
            inside = np.flatnonzero((row == PLAN) | (row == ANSWER))
            if complete:
                cut = rng.integers(0, len(inside) + 1)
                row[inside[:cut]], row[inside[cut:]] = PLAN, ANSWER
        return found


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "examples": 300 if smoke else 6000,
        "warm_steps": 4 if smoke else 400,
        "updates": 8 if smoke else 160,
        "rows": 16 if smoke else 64,
        "width": 16 if smoke else 64,
        "rate": 5e-4,
    }
    labels = {
        "grpo": ("baseline", "GRPO"),
        "gspo": ("baseline", "GSPO"),
        "routed": ("method", "TS-GRPO, plan paid for itself"),
        "paid": ("method", "TS-GRPO, plan paid for both"),
        "random": ("control", "cut anywhere"),
    }
    return Comparison(
        claim=(
            "Crediting a plan by token and its query as one sequence reaches GRPO's share of right "
            "results sooner, or more steadily."
        ),
        arms={
            arm: Treatment(role, label, {"arm": arm})  # type: ignore[arg-type]
            for arm, (role, label) in labels.items()
        },
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(options["arm"]),
        judge=judge,
        metric="match",
        panels=(
            Bars("match", "all collections", "share of right results"),
            Bars("last", "the last fifth", "share of right results"),
            Bars("plan", "the last fifth", "F1 of the plan's names"),
            Bars("jump", "from a collection to the next", "change of the share of right results"),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "An item is a collection of 16 questions with 8 answers each, in two updates, in the "
            "order they came; its value is a mean of its answers. The arms' n-th collections, "
            "which ask the same questions, are compared. Collections of a run depend on each "
            "other, so the intervals are narrower than those over runs would be.",
            f"Examples of the warm start: {queries.WRONG_PLAN:.0%} name a wrong column in the plan "
            f"and {queries.WRONG_QUERY:.0%} leave the plan in the query.",
            "GRPO and GSPO are rewarded by the sum of the two rewards that TS-GRPO keeps apart. "
            "The formula, its clips and the plan's reward are reconstructions: the paper's are not "
            "public. Nothing was tuned.",
        ),
    )


@dataclass
class Materials:
    """The warm start of a seed, and runs from it."""

    folder: Path
    settings: Mapping[str, Any]
    seed: int

    def tree(self, file: Path, **changes: Any) -> dict[str, Any]:
        """Returns the configuration of a run on a file of questions."""
        tokenizer = word_tokenizer(self.folder / "words", queries.WORDS)
        source = {"name": "jsonl", "files": (str(file),), "kind": "response"}
        return {
            "title": "thinkquel",
            "seed": self.seed,
            "data": {
                "tokenizer": {**tokenizer, "add_eos": True},
                "train": [{"source": source}],
                "evals": {},
                "seq_len": queries.LENGTH + 8,
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
            "log_every": 2,
            **changes,
        }

    @cached_property
    def start(self) -> Path:
        """The workdir of the warm start."""
        wrong = jsonl(
            self.folder / "examples.jsonl",
            lambda: queries.examples(self.settings["examples"], self.seed),
        )
        trained(self.folder / "start", self.tree(wrong, steps=self.settings["warm_steps"]))
        return self.folder / "start"

    def measure(self, arm: str) -> dict[str, Any]:
        """Returns what an arm's collections are worth."""
        script = self.folder / "database.sql"
        write_atomically(script, queries.script(self.seed))
        asked = jsonl(self.folder / "asked.jsonl", lambda: queries.right(self.seed))
        tree = self.tree(
            asked,
            steps=self.settings["updates"],
            init_from=str(self.start),
            model={},
            objective=self.objective(arm, str(script)),
            optimizer={"name": "adamw", "peak_lr": self.settings["rate"], "weight_decay": 0.0},
        )
        trained(self.folder / arm, tree)
        table = read_metrics(self.folder / arm)
        match, plan = (
            np.array([v for v in table[f"reward/{name}"] if v is not None], float)
            for name in ("sql", "schema_linking")
        )
        last = max(len(match) // 5, 1)
        return {
            "match": match,
            "last": match[-last:],
            "plan": plan[-last:],
            "first": match[:1],
            "jump": np.abs(np.diff(match)),
            "norm": np.array([v for v in table["grad_norm"] if v is not None], float),
        }

    def objective(self, arm: str, script: str) -> dict[str, Any]:
        """Returns the objective of an arm."""
        shared = {
            "rewards": [
                {"name": "schema_linking", "script": script},
                # only right rows are paid
                {"name": "sql", "script": script, "runs": 0.0},
            ],
            "rollouts": {"group": 8, "minibatches": 2, "max_new_tokens": queries.LENGTH},
        }
        if arm == "grpo":
            return shared | {"name": "policy", "norm": "response"}
        if arm == "gspo":
            more = {"ratio": "sequence_geo", "norm": "response", **GSPO_CLIP}
            return shared | {"name": "policy", **more}
        advantage = {"name": "ts_grpo_random" if arm == "random" else "ts_grpo"}
        if arm == "paid":
            advantage |= {"answer_share": 1.0}
        return shared | {"name": "ts_grpo", "advantage": advantage}


def judge(found: Measurements) -> Verdict:
    """Demands what the paper's claim must show at a small scale; see the sentences."""
    findings: list[tuple[bool | None, str]] = []
    first = found.mean("grpo", "first")
    findings.append((0.2 < first < 0.8, f"the warm start is right in {first:.0%}"))
    for arm in ("routed", "paid"):
        gain = found.difference(arm, "grpo", "match")
        steadier = found.difference(arm, "grpo", "jump")
        findings.append(
            (
                gain.low > 0 or steadier.high < 0,
                f"{arm}: sooner right than GRPO (difference {gain}) or steadier (change from a "
                f"collection to the next {steadier})",
            )
        )
    gain = found.difference("random", "grpo", "match")
    findings.append((gain.low <= 0, f"cut anywhere there is no gain over GRPO: {gain}"))
    for arm in ("routed", "paid"):
        gain = found.difference(arm, "random", "match")
        findings.append((gain.low > 0, f"{arm}: better than cut anywhere: {gain}"))
    findings.append((None, f"GSPO less GRPO: {found.difference('gspo', 'grpo', 'match')}"))
    findings.append((None, f"paid less routed: {found.difference('paid', 'routed', 'match')}"))
    for metric in ("match", "last", "plan", "jump", "norm"):
        told = ", ".join(f"{arm} {found.mean(arm, metric):.3f}" for arm in ARMS)
        findings.append((None, f"{metric}: {told}"))
    return Verdict.of(findings)
