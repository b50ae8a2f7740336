"""UniR (arXiv 2505.19075): a reasoner learns beside one backbone and guides another.

    python -m tokjax.reproduce unir

RESULT: reproduced. Right answers, enumerated: A 0.072, A + reasoner 0.713, reasoner alone 0.250, B
0.097, B + reasoner 0.926, a step late 0.037. Language models: A 0.152 -> 0.942, alone 0, B 0.166 ->
0.989, a step late 0.006; both demands with two reasoners 0.898, with one 0.206 and 0.025.

Enumerated: three tokens, of which the backbone knows the last (+2 on its logit; backbone B: +4) and
avoids the second (-1), and a reasoner that sees step and previous token, never the prompt. Language
models: sums of two digits, which a backbone writes as "7.", "7!", "#7." or "#7!" (# in 15 %, ! in
25 %); rewarded are right answers behind "#" (or with "!"). Backbone B is larger and trained longer;
reasoners of 0.01M parameters are trained beside A alone.

The arms, of either kind:
    a, b            the backbones
    a_r, b_r        with the reasoner for the form (b_r: transferred)
    r               the reasoner without a backbone
    b_shift         its logits a step late
    a_t, a_rt, b_rt the reasoner for the second demand, and both
    b_half, ...     the reasoner's logits times 0.5 and 2
    a_p, b_p        language models only: a reasoner that was trained on the same texts before

It reproduced: backbone A is right on .152 alone and on .942 with the reasoner, B on .166 and on
.989 with the one that was trained beside A, the reasoner alone on 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.decoding import Prompts, categorical, decode, on_tokens
from tokjax.decoding.contrast import with_reasoners
from tokjax.decoding.predictors import Predictor, StepOutput, as_predictor
from tokjax.language_model import LanguageModel
from tokjax.reproduction import Bars, Comparison, Lines, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained
from tokjax.reproduction.tasks import format_and_fact as toy
from tokjax.reproduction.tasks import styled_sums as sums

TASKS = "tokjax.reproduction.tasks.styled_sums"
NEW = 5  # tokens of an answer, the end included
SUMS = ("a", "b", "r", "a_r", "b_r", "a_p", "b_p")
WEIGHTS = {"b": 0.0, "b_half": 0.5, "b_r": 1.0, "b_double": 2.0}


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "toy_steps": 20 if smoke else 300,
        "examples": 200 if smoke else 4000,
        "steps_a": 4 if smoke else 400,
        "steps_b": 4 if smoke else 500,
        "steps_small": 4 if smoke else 150,
        "updates": 4 if smoke else 40,
        "asked": 8 if smoke else 30,
        "samples": 2 if smoke else 16,
    }
    arms = {}
    for kind, name in (("toy", "enumerated"), ("lm", "language models")):
        made = {
            "a": ("baseline", "A", "a", {}),
            "a_r": ("method", "A + form", "a", {"r": 1.0}),
            "r": ("control", "form alone", None, {"r": 1.0}),
            "b": ("baseline", "B", "b", {}),
            "b_r": ("method", "B + form", "b", {"r": 1.0}),
            "b_half": ("method", "B + form / 2", "b", {"r": 0.5}),
            "b_double": ("method", "B + 2 form", "b", {"r": 2.0}),
            "b_shift": ("control", "B + form, late", "b", {"shifted": 1.0}),
            "a_t": ("baseline", "A + second", "a", {"t": 1.0}),
            "a_rt": ("method", "A + both", "a", {"r": 1.0, "t": 1.0}),
            "b_rt": ("method", "B + both", "b", {"r": 1.0, "t": 1.0}),
        }
        if kind == "lm":
            made["a_p"] = ("method", "A + pretrained", "a", {"p": 1.0})
            made["b_p"] = ("method", "B + pretrained", "b", {"p": 1.0})
        for arm, (role, label, backbone, reasoners) in made.items():
            options = {"kind": kind, "backbone": backbone, "reasoners": reasoners}
            arms[f"{kind}_{arm}"] = Treatment(role, f"{label} ({name})", options)  # type: ignore[arg-type]
    pick = lambda kind, *names: tuple(f"{kind}_{name}" for name in names)  # noqa: E731
    main = ("a", "a_r", "r", "b", "b_r", "b_shift")
    return Comparison(
        claim=(
            "A small policy trained by GRPO with its logits added to a frozen backbone's makes it "
            "better, guides other backbones without training, and adds up with further ones."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed).made(),
        measure=lambda materials, options, seed: materials.measure(options),
        judge=judge,
        metric="right",
        panels=(
            Bars("right", "enumerated: form and fact", "probability", pick("toy", *main)),
            Bars(
                "right", "language models: form and sum", "share", pick("lm", *main, "a_p", "b_p")
            ),
            Bars(
                "joint",
                "both demands",
                "share",
                (*pick("toy", "a_r", "a_t", "a_rt"), *pick("lm", "a_r", "a_t", "a_rt", "b_rt")),
            ),
            Lines(
                "right",
                "how much of the reasoner on B",
                "weight of its logits",
                "share",
                {
                    kind: {w: f"{kind}_{arm}" for arm, w in WEIGHTS.items()}
                    for kind in ("toy", "lm")
                },
            ),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "Enumerated: an item is one of four prompts and its value an exact probability; 300 "
            "updates of 16 groups of 8, Adam at 0.05, from zeros. Language models: an item is a "
            "question that no reasoner was trained on (the backbones know all sums), its value the "
            "share of 16 samples at temperature 1.",
            "Both demands: enumerated, form and a first token other than 0 (the second reasoner is "
            "rewarded for that alone); language models, '#', the sum and '!'.",
            "Reasoners of the language models see the prompt but are too small and too briefly "
            "trained to learn sums; they start with an output table of zeros, `p` from 150 steps "
            "on the backbones' texts. 40 updates of 8 groups of 8 at temperature 1, AdamW at 0.01.",
            "The first run gave the language models prompts without the BOS id that they were "
            "trained with; it was stopped behind its first arm, and for time B's 900 steps were "
            "made 500 and the reasoners' 80 updates 40.",
            "Nothing was tuned. Final rewards say nothing of the gradient: with a reasoner of full "
            "capacity even a wrong one reaches them, which is what the tests' gradient checks are "
            "for.",
        ),
    )


class Materials:
    """Backbones and reasoners of one seed, of both kinds."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed
        order = np.random.default_rng([seed, 9]).permutation(sums.prompts()).tolist()
        self.held, self.trained_on = order[: settings["asked"]], order[30:]

    def made(self) -> "Materials":
        """Returns the materials, with all language models trained."""
        self.backbones, self.reasoners  # noqa: B018
        return self

    def measure(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a backbone with reasoners does, prompt by prompt."""
        backbone, reasoners = options["backbone"], options["reasoners"]
        if options["kind"] == "toy":
            found = [self.toy_reasoners[name] for name in reasoners]
            tables = toy.no_backbone() if backbone is None else self.toy_backbones[backbone]
            weights = list(reasoners.values())
            return {
                name: toy.outcome(tables, found, weights, name)
                for name in ("right", "joint", "form", "clean")
            }
        return self.sampled(self.pair(backbone, reasoners))

    # ---------------------------------------------------------------- enumerated

    @cached_property
    def toy_backbones(self) -> dict[str, Any]:
        """Logits of A and B."""
        return {"a": toy.backbone(2.0, self.seed), "b": toy.backbone(4.0, self.seed)}

    @cached_property
    def toy_reasoners(self) -> dict[str, Any]:
        """Reasoners trained beside A: for right answers, for clean ones, and the first, late."""
        steps = self.settings["toy_steps"]
        right, clean = (
            toy.trained(self.toy_backbones["a"], name, self.seed, steps=steps)
            for name in ("right", "clean")
        )
        return {"r": right, "t": clean, "shifted": toy.shifted(right)}

    # ---------------------------------------------------------------- language models

    def run_of(self, name: str, **changes: Any) -> LanguageModel:
        """Returns the model of a run on the sums, trained if it was not before."""
        texts = jsonl(
            self.folder / "sums.jsonl",
            lambda: sums.examples(self.settings["examples"], self.seed),
        )
        asked = jsonl(
            self.folder / "asked.jsonl",
            lambda: ({"prompt": p, "response": str(sums.total(p))} for p in self.trained_on),
        )
        own = changes.pop("data", {})
        file = asked if own else texts
        source = {"name": "jsonl", "files": (str(file),), "kind": "response"}
        tree = {
            "title": f"unir {name}",
            "seed": self.seed,
            "data": {
                "tokenizer": {"name": "bytes", "add_eos": True},
                "train": [{"source": source}],
                "evals": {},
                "seq_len": 48,
                "batch_size": 32,
                "cache_dir": str(self.folder / "cache"),
                **own,
            },
            "objective": {"name": "sft"},
            "optimizer": {"name": "adamw", "peak_lr": 3e-3, "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup_steps": 2},
            "evaluation": {"every_steps": 10_000},
            "checkpoints": {"every_steps": 10_000},
            "log_every": 20,
            **changes,
        }
        return trained(self.folder / name, tree)

    @cached_property
    def backbones(self) -> dict[str, LanguageModel]:
        """A, and the larger B."""
        sizes = {"a": (48, 2, self.settings["steps_a"]), "b": (96, 3, self.settings["steps_b"])}
        return {
            name: self.run_of(
                f"backbone_{name}", model=shape(width, layers, tie_embeddings=True), steps=steps
            )
            for name, (width, layers, steps) in sizes.items()
        }

    def reasoner(self, name: str, reward: str, init_from: str | None = None) -> LanguageModel:
        """Returns a reasoner trained beside A."""
        self.backbones  # noqa: B018 (A lies in its folder)
        objective = {
            "name": "unir",
            "backbone": str(self.folder / "backbone_a"),
            "start": "zero_head" if init_from is None else "pretrained",
            "rewards": [{"name": "function", "path": f"{TASKS}:{reward}"}],
            "rollouts": {"group": 8, "max_new_tokens": NEW, "temperature": 1.0},
        }
        return self.run_of(
            name,
            init_from=init_from,
            model={} if init_from else shape(16, 1),
            objective=objective,
            data={"seq_len": 12, "batch_size": 64},
            steps=self.settings["updates"],
            optimizer={"name": "adamw", "peak_lr": 1e-2, "weight_decay": 0.0},
            schedule={"name": "constant"},
        )

    @cached_property
    def reasoners(self) -> dict[str, LanguageModel]:
        """Reasoners for the form, for the second demand, and one that began trained."""
        self.run_of("small", model=shape(16, 1), steps=self.settings["steps_small"])
        return {
            "r": self.reasoner("form", "prefixed"),
            "t": self.reasoner("second", "exclaimed"),
            "p": self.reasoner("pretrained", "prefixed", str(self.folder / "small")),
        }

    def pair(self, backbone: str | None, reasoners: Mapping[str, float]) -> tuple[Any, Any]:
        """Returns the predictor of a backbone with reasoners, and its parameters."""
        parts = []
        for name in reasoners:
            lm = self.reasoners["r" if name == "shifted" else name]
            late = name == "shifted"
            parts.append((Late(as_predictor(lm.model)) if late else lm.model, lm.params))
        if backbone is None:
            return parts[0]
        lm = self.backbones[backbone]
        if not parts:
            return lm.model, lm.params
        return with_reasoners((lm.model, lm.params), parts, weights=list(reasoners.values()))

    def sampled(self, pair: tuple[Any, Any]) -> dict[str, Any]:
        """Returns shares of sampled answers, question by question."""
        tokenizer, samples = self.backbones["a"].tokenizer, self.settings["samples"]
        assert tokenizer.eos_id is not None
        rows = [self.backbones["a"].encode(prompt) for prompt in self.held]
        found = decode(
            *pair,
            Prompts.of(rows),
            max_new_tokens=NEW,
            samples=samples,
            sampler=categorical(),
            stop=on_tokens((tokenizer.eos_id,)),
            key=jax.random.key(self.seed),
        )
        texts = [tokenizer.decode([i for i in r if i != tokenizer.eos_id]) for r in found.rows()]
        each = [self.held[i // samples] for i in range(len(texts))]

        def share(**demands: bool) -> np.ndarray:
            values = [sums.met(p, text, **demands) for p, text in zip(each, texts, strict=True)]
            return np.asarray(values, float).reshape(-1, samples).mean(1)

        return {
            "right": share(prefix=True, tail=False),
            "joint": share(prefix=True, tail=True),
            "sum": share(prefix=False, tail=False),
        }


def shape(width: int, layers: int, tie_embeddings: bool = False) -> dict[str, Any]:
    """Returns a model's configuration."""
    return {
        "d_model": width,
        "n_layers": layers,
        "n_heads": 2,
        "max_positions": 48,
        "tie_embeddings": tie_embeddings,
    }


@dataclass(frozen=True)
class Late:
    """A predictor that says at each step what another said the step before; nothing at first."""

    inner: Predictor

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.inner.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self.inner.max_positions

    def prepare(self, params: Any) -> Any:
        """Returns the parameters in the form that the other reads fastest."""
        return self.inner.prepare(params)

    def init(self, prepared: Any, prompts: Any, capacity: int) -> tuple[Any, StepOutput]:
        """Returns the other's state with what it says, which is kept, and logits of 0."""
        state, out = self.inner.init(prepared, prompts, capacity)
        return (state, out.logits), StepOutput(jnp.zeros_like(out.logits))

    def step(self, prepared: Any, state: Any, tokens: Any) -> tuple[Any, StepOutput]:
        """Returns the other's next state with what it says, and what it said before."""
        inner, before = state
        inner, out = self.inner.step(prepared, inner, tokens)
        return (inner, out.logits), StepOutput(before)


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    findings: list[tuple[bool | None, str]] = []

    def more(kind: str, arm: str, other: str, metric: str, least: float, said: str) -> None:
        gain = found.difference(f"{kind}_{arm}", f"{kind}_{other}", metric)
        values = [found.mean(f"{kind}_{name}", metric) for name in (arm, other)]
        findings.append(
            (
                gain.low > least,
                f"{kind}: {said}: {values[0]:.3f} against {values[1]:.3f}, difference {gain}"
                + (f", demanded above {least}" if least else ""),
            )
        )

    for kind in ("toy", "lm"):
        more(kind, "a_r", "a", "right", 0.2, "the reasoner makes its backbone better")
        more(kind, "a_r", "r", "right", 0.2, "alone it is far below the pair")
        more(kind, "b_r", "b", "right", 0.2, "it makes a backbone better that it never saw")
        more(kind, "b_r", "a_r", "right", 0.0, "the better backbone gains what it knows more")
        more(kind, "b_r", "b_shift", "right", 0.2, "a step late it does not")
        more(kind, "a_rt", "a_r", "joint", 0.0, "two reasoners meet both demands better than one")
        more(kind, "a_rt", "a_t", "joint", 0.0, "and than the other")
    more("lm", "a_p", "a", "right", 0.2, "a pretrained reasoner makes its backbone better")
    more("lm", "b_p", "b", "right", 0.0, "and the other one")

    def each(kind: str, metric: str, names: Sequence[str]) -> str:
        return ", ".join(f"{name} {found.mean(f'{kind}_{name}', metric):.3f}" for name in names)

    for kind in ("toy", "lm"):
        names = ("a", "a_r", "r", "b", "b_half", "b_r", "b_double", "b_shift", "a_rt", "b_rt")
        findings.append((None, f"{kind}: right: {each(kind, 'right', names)}"))
        findings.append((None, f"{kind}: both demands: {each(kind, 'joint', (*names, 'a_t'))}"))
    findings.append(
        (
            None,
            f"lm: sums in any form: {each('lm', 'sum', SUMS)}",
        )
    )
    return Verdict.of(findings)
