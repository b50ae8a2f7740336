"""CAT (arXiv 2509.01535): attention supervised by annotated causes, on a game of spurious fields.

    python -m tokjax.reproduce cat_attention

What came out is in docs/reproductions/cat_attention.json and .png: out of distribution CAT is right
in 0.75, 0.76 and 0.78 at 400, 800 and 1,600 texts, cross-entropy in 0.71, 0.72 and 0.72 (always the
commoner answer in 0.69), and all controls lie where they should on average. Eleven of the fifteen
demands held, so it did not reproduce: with 400 test texts and three seeds the intervals are as wide
as some bounds (accuracy in distribution at 400 texts; spurious fields at 400 and 800; random fields
at 800, which keep 52 % of the gain where less than half was demanded).

A text lists eight fields with their values and asks for a risk, high or low, that three of them
decide; three more follow from those three in training, but not out of distribution. A model of two
layers learns it from scratch, on the answer alone. Arms, at 400, 800 and 1,600 training texts:
    ce        cross-entropy
    cat       and the hinge: attention on the values of the causes twice that on the rest (gamma 1)
    spurious  the same with the values of the spurious fields annotated (control)
    random    with three fields drawn for each text (control)
"""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from tokjax.data.batch import Batch
from tokjax.finetuning.cat_attention import CausalAttention, causal_bits, causal_pairs
from tokjax.models import ModelConfig, Transformer
from tokjax.reproduction import Bars, Comparison, Lines, Measurements, Treatment, Verdict
from tokjax.reproduction.rows import Row, batch_of, batches
from tokjax.reproduction.small_runs import constant_rates, fitted
from tokjax.reproduction.tasks.risk_game import (
    CAUSES,
    HIGH,
    LENGTH,
    LOW,
    SPURIOUS,
    VOCABULARY,
    fields,
    high_risk,
    place_of_value,
    texts,
)
from tokjax.signals.attention import head_mean
from tokjax.training.passes import forward

KINDS = {
    "ce": ("baseline", "cross-entropy"),
    "cat": ("method", "CAT"),
    "spurious": ("control", "spurious fields annotated"),
    "random": ("control", "random fields annotated"),
}
ALPHA = 2.0


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    sizes = (40, 60) if smoke else (400, 800, 1600)
    settings = {
        "d_model": 32 if smoke else 64,
        "steps": 4 if smoke else 600,
        "batch": 32,
        "rate": 1e-3,
        "test": 20 if smoke else 400,
    }
    arms = {
        f"{kind}_{size}": Treatment(
            role,  # type: ignore[arg-type]
            f"{label}, {size} texts",
            {"kind": kind, "size": size},
        )
        for size in sizes
        for kind, (role, label) in KINDS.items()
    }
    lines = {
        label: {size: f"{kind}_{size}" for size in sizes} for kind, (_, label) in KINDS.items()
    }
    largest = tuple(f"{kind}_{sizes[-1]}" for kind in KINDS)
    shown = "training texts"
    return Comparison(
        claim=(
            "A penalty on attention away from annotated causes leaves accuracy in distribution as "
            "it is and raises it where spurious correlations break."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(settings, seed),
        measure=lambda materials, options, seed: materials.measure(**options),
        judge=partial(judge, sizes=sizes),
        metric="ood",
        panels=(
            Lines("ood", "out of distribution", shown, "right answers", lines),
            Lines("iid", "in distribution", shown, "right answers", lines),
            Bars("ratio", "attention on causes over that on the rest", "ratio", largest),
        ),
        settings=settings,
        seeds=(0, 1, 2),
        notes=(
            "An item is a test text; intervals are over texts within the three seeds. Fields stand "
            "in one order, and field names and values are one token each: with random order and "
            "digits a model from scratch does not learn the task.",
            "The annotated causes are the value tokens. Nothing was tuned: alpha and gamma are the "
            "method's defaults, rate and batch those of all arms, 600 steps the least of what the "
            "small experiment is specified with.",
        ),
    )


class Materials:
    """The texts of a seed, and what a model that learned some of them answers."""

    def __init__(self, settings: Mapping[str, Any], seed: int):
        self.settings, self.seed = settings, seed
        rng = np.random.default_rng([seed, 1])
        self.train = fields(rng, 1600)
        self.tests = {
            "iid": fields(rng, settings["test"]),
            "ood": fields(rng, settings["test"], independent=True),
        }
        self.random = np.array([rng.choice(8, 3, replace=False) for _ in self.train])
        self.model = Transformer(
            ModelConfig(
                vocab_size=VOCABULARY,
                d_model=settings["d_model"],
                n_layers=2,
                n_heads=4,
                max_positions=LENGTH,
                remat="none",
                attention="dense",
            )
        )

    def samples(self, kind: str, size: int) -> list[Row]:
        """Returns the training texts with the annotation of an arm."""
        fixed = {"ce": CAUSES, "cat": CAUSES, "spurious": SPURIOUS}
        return [
            annotated(ids, fixed.get(kind, self.random[n]))
            for n, ids in enumerate(texts(self.train[:size]).tolist())
        ]

    @cached_property
    def questions(self) -> dict[str, Batch]:
        """The test texts, with the true causes annotated."""
        return {
            name: batch_of([annotated(ids, CAUSES) for ids in texts(values).tolist()], LENGTH)
            for name, values in self.tests.items()
        }

    def measure(self, kind: str, size: int) -> dict[str, list[float]]:
        """Returns the metrics of an arm."""
        objective = CausalAttention(alpha=ALPHA, gamma=0.0 if kind == "ce" else 1.0)
        size_of_batch, steps = self.settings["batch"], self.settings["steps"]
        rows = self.samples(kind, size)
        made = batches(rows, LENGTH, size=size_of_batch, steps=steps, seed=self.seed)
        rates = constant_rates(self.settings["rate"], steps, warmup=20)
        params, _ = fitted(self.model, objective, None, made, rates, seed=self.seed)
        found = {}
        for name, values in self.tests.items():
            says_high, ratio = map(np.asarray, _asked(self.model, params, self.questions[name]))
            high = high_risk(values)
            found[name] = (says_high == high).astype(float)
            if name == "iid":
                found["ratio"] = ratio
            else:
                found["majority"] = np.full(len(high), max(high.mean(), 1 - high.mean()))
        return {name: values.tolist() for name, values in found.items()}


def annotated(ids: list[int], causes: Any) -> Row:
    """Returns a text whose answer is the effect of the values of some fields."""
    places = [place_of_value(int(field)) for field in causes]
    # Values occur in several fields, so phrases are looked for in the places' own numbers.
    numbers = list(range(len(ids)))
    effect, cause = causal_bits(numbers, [(numbers[-1:], [[place] for place in places])])
    weights = np.zeros(len(ids), np.float32)
    weights[-1] = 1.0
    channels = {"effect": effect, "cause": cause}
    return Row(ids, weights, channels=channels)  # type: ignore[arg-type]


@partial(jax.jit, static_argnums=0)
def _asked(model: Transformer, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns whether "high" is likelier than "low", and the ratio of attention of the answer."""
    capture = {"attn_probs": lambda probs: head_mean(probs)[:, -1]}
    out = forward(model, params, batch, capture=capture)
    logits = model.unembed(params, out.x[:, -1:])[:, 0]
    attention = out.captured["attn_probs"].mean(0)
    means = [
        (attention * pairs[:, -1]).sum(-1) / pairs[:, -1].sum(-1) for pairs in causal_pairs(batch)
    ]
    return logits[:, HIGH] > logits[:, LOW], means[0] / means[1]


def judge(found: Measurements, sizes: tuple[int, ...]) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    findings: list[tuple[bool | None, str]] = []
    for n in sizes:
        ce, cat = f"ce_{n}", f"cat_{n}"
        gain = {k: found.difference(f"{k}_{n}", ce, "ood") for k in ("cat", "spurious", "random")}
        same = found.difference(cat, ce, "iid")
        ratio = found.mean(cat, "ratio")
        findings += [
            (
                same.low > -0.03,
                f"{n} texts: in distribution CAT is right in {found.mean(cat, 'iid'):.3f}, "
                f"cross-entropy in {found.mean(ce, 'iid'):.3f}: not 0.03 less, {same}",
            ),
            (
                gain["cat"].low > 0,
                f"{n} texts: out of distribution {found.mean(cat, 'ood'):.3f} against "
                f"{found.mean(ce, 'ood'):.3f}: {gain['cat']}",
            ),
            (
                ratio > ALPHA,
                f"{n} texts: the ratio of attention rises above {ALPHA:g}: {ratio:.2f}, "
                f"{found.mean(ce, 'ratio'):.2f} without",
            ),
            (
                gain["spurious"].high < 0,
                f"{n} texts: with spurious fields annotated it falls below: {gain['spurious']}",
            ),
            (
                gain["random"].mean < gain["cat"].mean / 2,
                f"{n} texts: random fields gain less than half of it: {gain['random']}",
            ),
        ]
    better = [
        np.mean(found.values[f"cat_{n}"][s]["ood"]) > np.mean(found.values[f"ce_{n}"][s]["ood"])
        for n in sizes
        for s in found.seeds
    ]
    majority = found.mean(f"ce_{sizes[0]}", "majority")
    findings += [
        (None, f"CAT is above cross-entropy in {sum(better)} of {len(better)} seeds and sizes"),
        (None, f"always the commoner answer is right in {majority:.3f} out of distribution"),
    ]
    return Verdict.of(findings)
