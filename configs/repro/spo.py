"""SPO (arXiv 2505.23564): does the advantage lie where an answer went wrong?

    python -m tokjax.reproduce spo

RESULT: reproduced, of credit; what training by it reaches was not compared. 24 % of the answers are
right. Of a wrong answer's advantage, SPO-chain puts 0.349 at the first wrong token, SPO-tree 0.337,
the mask alone 0.251, GRPO 0.038. The correlation of its size with that place is 0.515 of the chain,
0.300 with values of other states, 0.421 of the mask alone, and but 0.231 of the tree.

A model of 30,000 parameters thinks through four steps of arithmetic modulo 10, a line each; a fifth
of the results in its examples are wrong, so that it is right in some of its answers. Of each wrong
answer it is known at which token it left the right text. The arms credit the same answers (the tree
draws its own):
    grpo        the group's advantage, the same at every token
    mask        the same at tokens below probability 0.9 alone
    chain       SPO-chain, interval 2, 8 fresh answers from each boundary
    tree        SPO-tree, branches 4, 4, 4, a line a node
    shuffled    SPO-chain whose values are those of other prompts' states (control)
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokjax.config import resolve
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained, word_tokenizer
from tokjax.reproduction.tasks.chains import ANSWER, WORDS_A_LINE, Chains, apply
from tokjax.rl.collector import Collector
from tokjax.rl.rollout import Rollout
from tokjax.rl.spo import SPOChain
from tokjax.training.config import TrainConfig
from tokjax.training.run import build_run

TASK = Chains(steps=(4, 4))
GROUP = 16


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "d_model": 32,
        "examples": 50 if smoke else 8000,
        "slips": 0.2,
        "sft_steps": 4 if smoke else 600,
        "sft_batch": 8 if smoke else 64,
        "prompts": 2 if smoke else 24,
        "samples": 2 if smoke else 8,
    }
    arms = {
        "chain": Treatment("method", "SPO-chain", {"kind": "chain"}),
        "tree": Treatment("method", "SPO-tree", {"kind": "tree"}),
        "grpo": Treatment("baseline", "GRPO", {"kind": "grpo"}),
        "mask": Treatment("baseline", "GRPO, masked", {"kind": "mask"}),
        "shuffled": Treatment("control", "SPO-chain, values of others", {"kind": "shuffled"}),
    }
    return Comparison(
        claim=(
            "Values of segments' ends, estimated by fresh continuations, put an answer's advantage "
            "where it went wrong; a group's advantage cannot."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(**options),
        judge=judge,
        metric="share",
        panels=(
            Bars("share", "advantage at the first wrong token", "share of an answer's sum of |A|"),
            Bars("correlation", "|A| and the first wrong token", "correlation over tokens"),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "An item is a wrong answer with a word that differs from the right text; `share` is "
            "the part of the sum of |advantage x weight| over its tokens that lies at the first "
            "such word, `correlation` that of the size with the indicator of this place, 0 where "
            "one of them is constant. Answers without any advantage have no share.",
            "In a first try the examples were right, and so were all answers behind 600 steps.",
            "Advantages are not whitened here, which would shift all of them.",
            "Only credit is measured, on one collection of answers from the model before any "
            "reinforcement learning; the accuracy that training reaches was not compared.",
        ),
    )


class Shuffled(SPOChain):
    """SPO-chain that is told the values of other rows' states."""

    def gather(self, rollout: Rollout, environment: Any) -> dict[str, Any]:
        """Returns the advantage of every action, from values that are not its own."""
        real = environment.continued

        def moved(rows: Any, kept: Any, samples: int) -> np.ndarray:
            found = real(rows, kept, samples)
            return found[np.random.default_rng(0).permutation(len(found))]

        environment.continued = moved
        return super().gather(rollout, environment)


class Materials:
    """A model of one seed, trained when first asked for."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed

    def slipped(self, question: Any, rng: np.random.Generator) -> list[int]:
        """Returns 0 and the number behind each step, some of which are any other."""
        numbers = [0]
        for name, digit in question:
            number = apply(name, numbers[-1], digit)
            if rng.random() < self.settings["slips"]:
                number = (number + int(rng.integers(1, 10))) % 10
            numbers.append(number)
        return numbers

    def data(self, right: bool) -> dict[str, Any]:
        """Returns what runs read: examples that are right, or of which many steps slip."""
        rng = np.random.default_rng([self.seed, int(right)])

        def records() -> Any:
            for _ in range(self.settings["examples"]):
                question = TASK.question(rng)
                numbers = None if right else self.slipped(question, rng)
                response = TASK.response(question, rng, numbers)
                yield {"prompt": TASK.prompt(question), "response": response}

        file = jsonl(self.folder / ("asked.jsonl" if right else "chains.jsonl"), records)
        words = word_tokenizer(self.folder / "words", TASK.words)
        return {
            "tokenizer": {**words, "add_eos": True},
            "train": [{"source": {"name": "jsonl", "files": (str(file),), "kind": "response"}}],
            "evals": {},
            "packing": "none",
            "seq_len": 36,
            "batch_size": self.settings["sft_batch"],
            "cache_dir": str(self.folder / "cache"),
        }

    def tree(self, **changes: Any) -> dict[str, Any]:
        """Returns the configuration of a run."""
        return {
            "title": "spo",
            "seed": self.seed,
            "model": {
                "d_model": self.settings["d_model"],
                "n_layers": 2,
                "n_heads": 4,
                "max_positions": 48,
            },
            "data": self.data(right=False),
            "optimizer": {"name": "adamw", "peak_lr": 3e-3, "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup_steps": 20},
            "evaluation": {"every_steps": 10**6},
            "checkpoints": {"every_steps": 10**6},
            "log_every": 50,
            **changes,
        }

    @cached_property
    def start(self) -> Path:
        """The workdir of the model that answers."""
        sft = self.tree(objective={"name": "sft"}, steps=self.settings["sft_steps"])
        trained(self.folder / "sft", sft)
        return self.folder / "sft"

    def measure(self, kind: str) -> dict[str, list[float]]:
        """Returns where an arm's advantages lie in wrong answers."""
        samples = self.settings["samples"]
        advantage: dict[str, Any] = {"name": "group", "scale": False}
        if kind in ("chain", "shuffled"):
            advantage = {"name": "spo_chain", "interval": 2, "samples": samples, "whiten": False}
        group = GROUP
        if kind == "tree":
            branches = (4, 4, 4)
            advantage = {"name": "spo_tree", "branches": branches, "segment": WORDS_A_LINE}
            group = 64
        prompts = self.settings["prompts"]
        prompts = max(1, prompts * GROUP // group)
        verifier = {"name": "exact_match", "extract": rf"{ANSWER} (\d+)"}
        objective = {
            "name": "policy",
            "advantage": advantage,
            "norm": "kept",
            "rewards": [{"name": "verifier", "verifier": verifier}],
            "rollouts": {"group": group, "max_new_tokens": 4 * WORDS_A_LINE + 3, "rows": 128},
        }
        tree = self.tree(objective=objective, steps=1, init_from=str(self.start))
        tree["model"] = {}
        tree["data"] = {**self.data(right=True), "batch_size": prompts * group}
        del tree["data"]["tokenizer"]
        run = build_run(resolve(TrainConfig, tree), show_progress=False)
        stage = run.stages[0]
        found = stage.objective
        if kind == "shuffled":
            options = {
                f.name: getattr(found.advantage, f.name) for f in dataclasses.fields(SPOChain)
            }
            found = dataclasses.replace(found, advantage=Shuffled(**options))
        initial = run.initial_params()
        state = jax.jit(lambda p: run.init_state(stage, p))(initial)
        (self.folder / kind).mkdir(exist_ok=True)
        with Collector(found, run, stage, self.folder / kind) as collector:
            metrics, _ = collector.collect(state, 0)
            rows = collector.batches[0][0]
            asked = [q for q in collector.asked(0) for _ in range(group)]
        right = [[*q.prompt, *q.reference] for q in asked]
        weight = np.asarray(rows.channels["weight"])
        if kind == "mask":
            weight = weight * (np.asarray(rows.channels["old"]) < np.log(0.9))
        sizes = np.abs(np.asarray(rows.channels["advantage"]) * weight)
        mask, targets = np.asarray(rows.weights) != 0, np.asarray(rows.targets)
        shares, correlations = [], []
        for r, expected in enumerate(right):
            own = np.flatnonzero(mask[r])
            wanted = expected[own[0] + 1 :]
            wrong = [i for i, n in enumerate(own) if i < len(wanted) and targets[r, n] != wanted[i]]
            if not wrong:
                continue
            size, at = sizes[r, own], np.zeros(len(own))
            at[wrong[0]] = 1
            shares.append(float(size[wrong[0]] / size.sum()) if size.sum() else float("nan"))
            varies = np.ptp(size) > 1e-9
            correlations.append(float(np.corrcoef(size, at)[0, 1]) if varies else 0.0)
        return {
            "share": shares,
            "correlation": correlations,
            "accuracy": [metrics["reward/mean"]],
            "further_tokens": [metrics.get("rollout/further_tokens", 0.0)],
        }


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    share = {name: found.interval(name, "share") for name in found.values}
    accuracy = found.mean("chain", "accuracy")
    against = {name: found.difference("chain", name, "share") for name in ("grpo", "mask")}
    moved = found.difference("chain", "shuffled", "correlation")
    return Verdict.of(
        [
            (
                0.15 < accuracy < 0.85,
                f"precondition: {accuracy:.1%} of the answers are right before training",
            ),
            (
                against["grpo"].low > 0 and share["chain"].mean > 3 * share["grpo"].mean,
                f"SPO-chain puts {share['chain']} of an answer's advantage at the first wrong "
                f"token, more than three times GRPO's {share['grpo']}",
            ),
            (
                against["mask"].low > 0,
                f"more than the mask alone does, {share['mask']} (by {against['mask']})",
            ),
            (
                share["tree"].low > share["grpo"].high,
                f"SPO-tree puts {share['tree']} there, more than GRPO",
            ),
            (
                moved.low > 0,
                f"with values of other states the correlation of |A| with the wrong place is lower "
                f"by {moved}: {found.interval('shuffled', 'correlation')} instead of "
                f"{found.interval('chain', 'correlation')}",
            ),
            (
                None,
                f"fresh tokens for the chain: {found.mean('chain', 'further_tokens'):.0f}",
            ),
        ]
    )
