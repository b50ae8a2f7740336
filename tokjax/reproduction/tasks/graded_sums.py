"""Sums of one digit to several that a model knows and slips at, for learning by reward in groups.

The warm start learns sums, then for a while ones in whose answers a digit may be wrong, so that its
samples are right now and then. It is trained once and all arms go on from it.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from tokjax.data.arithmetic import ArithmeticSource, problems
from tokjax.decoding import Prompts, categorical, decode, on_tokens
from tokjax.language_model import LanguageModel
from tokjax.loading import load
from tokjax.reproduction.materials import jsonl, trained
from tokjax.training.metrics import read_metrics

SETTINGS = {
    "full": {
        "digits": 2,
        "slips": (0.3, 0.3),
        "width": 64,
        "examples": 4000,
        "clean_steps": 700,
        "slip_steps": 100,
        "batch": 128,
        "updates": 100,
        "rate": 3e-4,
        "prompts": 400,
        "asked": 100,
        "samples": 8,
    },
    "smoke": {
        "digits": 2,
        "slips": (0.3, 0.3),
        "width": 16,
        "examples": 50,
        "clean_steps": 4,
        "slip_steps": 2,
        "batch": 16,
        "updates": 2,
        "rate": 3e-4,
        "prompts": 8,
        "asked": 3,
        "samples": 2,
    },
}
NEW = 5  # tokens of an answer, the end included
ROW = 13  # tokens of a row: "999+999=" and an answer


def slipped(answer: str, rng: np.random.Generator) -> str:
    """Returns a number with one of its digits replaced by another.

    >>> slipped("7", np.random.default_rng(0)) != "7"
    True
    """
    at = int(rng.integers(len(answer)))
    digit = (int(answer[at]) + int(rng.integers(1, 10))) % 10
    return f"{answer[:at]}{digit}{answer[at + 1 :]}"


class GradedSums:
    """A warm start, and runs that go on from it.

    Args:
        folder: of their workdirs.
        settings: as in `SETTINGS`: `digits` are those of the longest numbers shown, `slips` the
            shares of wrong answers shown for each number of digits, `prompts` sums of each number
            of digits to learn from by reward, `asked` as many held out; `unseen` further digits are
            learnt from by reward alone.
        seed: of everything.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed
        self.digits = range(1, settings["digits"] + 1)
        self.learnt = range(1, settings["digits"] + settings.get("unseen", 0) + 1)
        self.asked = [
            (k, *each)
            for k in self.learnt
            for each in problems(
                ArithmeticSource(
                    examples=settings["asked"], digits=(k, k), split="validation", seed=seed
                )
            )
        ]

    def sums(self, digits: int, examples: int) -> dict[str, Any]:
        """Returns the source of sums of numbers of as many digits, none of which is held out."""
        of = {"digits": (digits, digits), "examples": examples, "seed": self.seed}
        return {"name": "arithmetic", **of}

    def shown(self) -> Iterator[dict[str, str]]:
        """Yields the examples of the warm start, in some of which a digit is any other."""
        rng = np.random.default_rng([self.seed, 1])
        found = []
        for k, wrong in zip(self.digits, self.settings["slips"], strict=True):
            source = self.sums(k, self.settings["examples"])
            del source["name"]
            every = list(problems(ArithmeticSource(**source)))
            for i in range(self.settings["examples"]):
                prompt, answer = every[i % len(every)]
                if rng.random() < wrong:
                    answer = slipped(answer, rng)
                found.append({"prompt": prompt, "response": answer})
        yield from (found[i] for i in rng.permutation(len(found)))

    def run(
        self, name: str, tree: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]
    ) -> LanguageModel:
        """Returns the model of a run on sums, trained if it was not before.

        Args:
            name: of its workdir.
            tree: of its configuration, beside data and checkpoints.
            sources: of its data.
        """
        base = {
            "title": name,
            "seed": self.seed,
            "data": {
                "tokenizer": {"name": "bytes", "add_eos": True},
                "train": [{"source": source} for source in sources],
                "evals": {},
                "seq_len": ROW,
                "batch_size": self.settings["batch"],
                "seed": self.seed,
                "cache_dir": str(self.folder / "cache"),
            },
            "evaluation": {"every_steps": 10_000},
            "checkpoints": {"every_steps": 10_000},
            "log_every": 1,
        }
        return trained(self.folder / name, {**base, **tree})

    @cached_property
    def warm(self) -> Path:
        """The workdir of the warm start."""
        model = {
            "d_model": self.settings["width"],
            "n_layers": 2,
            "n_heads": 4,
            "max_positions": ROW + 3,
        }
        adamw = {"name": "adamw", "peak_lr": 3e-3, "weight_decay": 0.0}
        tree = {
            "objective": {"name": "sft"},
            "optimizer": adamw,
            "schedule": {"name": "cosine", "warmup_steps": 10},
        }
        clean = [self.sums(k, self.settings["examples"]) for k in self.digits]
        steps = self.settings["clean_steps"]
        self.run("clean", {**tree, "model": model, "steps": steps}, clean)
        file = jsonl(self.folder / "shown.jsonl", self.shown)
        changes = {
            "init_from": str(self.folder / "clean"),
            "steps": self.settings["slip_steps"],
            "optimizer": {**adamw, "peak_lr": 1e-3},
        }
        slips = [{"name": "jsonl", "files": (str(file),), "kind": "response"}]
        self.run("warm", {**tree, **changes}, slips)
        return self.folder / "warm"

    def learned(self, name: str, objective: Mapping[str, Any], **changes: Any) -> LanguageModel:
        """Returns the model that goes on from the warm start by reward.

        Args:
            name: of its workdir.
            objective: beside rewards and rollouts.
            changes: of the run's configuration.
        """
        rewards = [{"name": "verifier", "stopped_only": True}]
        rollouts = {"group": 8, "minibatches": 2, "max_new_tokens": NEW, "rows": 256}
        tree = {
            "init_from": str(self.warm),
            "objective": {**objective, "rewards": rewards, "rollouts": rollouts},
            "steps": self.settings["updates"],
            "optimizer": {
                "name": "adamw",
                "peak_lr": self.settings["rate"],
                "weight_decay": 0.0,
            },
            "schedule": {"name": "constant", "warmup_steps": 2},
            **changes,
        }
        asked = [self.sums(k, self.settings["prompts"]) for k in self.learnt]
        return self.run(name, tree, asked)

    def before(self) -> dict[str, Float[np.ndarray, " N"]]:
        """Returns shares of right samples of the warm start, as `right` does."""
        return self.right(load(self.warm))

    def told(self, name: str, metric: str) -> Float[np.ndarray, " N"]:
        """Returns the values of a metric in a run, of the steps that have it."""
        found = read_metrics(self.folder / name)[metric]
        return np.array([v for v in found if v is not None], float)

    def right(self, lm: LanguageModel) -> dict[str, Float[np.ndarray, " N"]]:
        """Returns shares of right samples, sum by sum: of all, and of each number of digits."""
        samples, eos = self.settings["samples"], lm.tokenizer.eos_id
        assert eos is not None
        generation = decode(
            lm.model,
            lm.params,
            Prompts.of([lm.encode(prompt) for _, prompt, _ in self.asked]),
            max_new_tokens=NEW,
            samples=samples,
            sampler=categorical(),
            stop=on_tokens((eos,)),
            key=jax.random.key(self.seed),
        )
        rows = generation.rows()
        score = np.array(
            [
                np.mean(
                    [
                        row[-1:] == [eos] and lm.tokenizer.decode(row[:-1]) == answer
                        for row in rows[i * samples : (i + 1) * samples]
                    ]
                )
                for i, (_, _, answer) in enumerate(self.asked)
            ]
        )
        of = np.array([k for k, _, _ in self.asked])
        parts = {f"digits_{k}": np.where(of == k, score, np.nan) for k in self.learnt}
        return {"right": score, **parts}
