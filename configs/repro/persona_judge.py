"""Persona-judge (arXiv 2504.12663): one model, two preferences that verify each other's drafts.

    python -m tokjax.reproduce persona_judge

A small model is trained on invented reviews behind one control word each: `<vivid>` and `<plain>`
say which adjectives are used, `<short>` and `<long>` how many clauses there are; what is not said
is drawn. The vivid persona drafts, the short one judges. Arms: each control word alone, both before
one another (never seen in training), fixed roles, exchanged roles, roles exchanged once as in the
reference code, and the average of the two personas' laws.

What came out: reproduced. Fixed roles write as the judge's prompt alone does (no test tells them
apart); with exchanged roles 73 % of the adjectives are vivid and a text has 1.8 clauses, between
the short persona's 54 % and 1.4 and the vivid one's 95 % and 2.7. It gains nothing over the average
of the two laws: 56 % of the texts are short and vivid with either. The vivid prompt alone gives
63 %, and both words in one prompt, which this model happens to combine though it never saw them
so, give 86 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chi2_contingency

from tokjax import struct
from tokjax.decoding import decode, on_tokens
from tokjax.decoding.contrast.two_prompts import stacked
from tokjax.decoding.predictors import ModelPredictor, StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import categorical
from tokjax.decoding.search import row_seed
from tokjax.decoding.speculative import persona_judge
from tokjax.decoding.transforms import chain, temperature, top_k, top_p
from tokjax.language_model import LanguageModel
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained, word_tokenizer

VIVID = (
    *("blazing", "velvet", "thundering", "silken", "radiant", "smoky", "golden", "icy"),
    *("roaring", "crimson", "feathery", "glittering"),
)
PLAIN = (
    *("good", "bad", "fine", "nice", "usual", "normal", "average", "common"),
    *("simple", "decent", "modest", "standard"),
)
SUBJECTS = ("film", "book", "meal", "hotel", "concert", "phone", "lamp", "garden", "coat", "bike")
ASPECTS = (
    *("plot", "sound", "price", "room", "colour", "staff", "shape", "light", "size", "weight"),
    *("cover", "smell"),
)
FRAMES = ("the {aspect} was {word}", "it had a {word} {aspect}", "i found its {aspect} very {word}")
CONTROLS = ("<vivid>", "<plain>", "<short>", "<long>")
WORDS = (
    *CONTROLS, *VIVID, *PLAIN, *SUBJECTS, *ASPECTS,
    *("review", "of", "the", ":", "was", "it", "had", "a", "i", "found", "its", "very"),
    *("and", "."),
)  # fmt: skip
VIVIDNESS = {"<vivid>": 0.8, "<plain>": 0.2}  # probability of a vivid adjective
ENDING = {"<short>": 0.7, "<long>": 0.25}  # probability of an end behind each clause
MOST = 12  # clauses
GAMMA = 4
LEVEL = 0.01  # of all two-sample tests of equal laws together
FILTERS = (temperature(0.9), top_k(20), top_p(0.9))  # the reference code's


def prompt_of(control: str, subject: str) -> str:
    """Returns what comes before a review.

    >>> prompt_of("<short>", "film")
    '<short> review of the film :'
    """
    return f"{control} review of the {subject} :"


def review(control: str, rng: np.random.Generator) -> str:
    """Returns a review as its control word says; the other attribute is drawn, one for a text."""
    style = control if control in VIVIDNESS else rng.choice(list(VIVIDNESS))
    length = control if control in ENDING else rng.choice(list(ENDING))
    clauses: list[str] = []
    while not clauses or (rng.random() > ENDING[length] and len(clauses) < MOST):
        words = VIVID if rng.random() < VIVIDNESS[style] else PLAIN
        frame = FRAMES[rng.integers(len(FRAMES))]
        clauses.append(frame.format(aspect=rng.choice(ASPECTS), word=rng.choice(words)))
    return " and ".join(clauses) + " ."


def attributes(text: str) -> tuple[float, float]:
    """Returns the number of clauses and the share of vivid ones among the adjectives, or NaN.

    >>> attributes("the plot was icy and it had a nice cover .")
    (2.0, 0.5)
    """
    words = text.split()
    vivid, plain = (sum(word in of for word in words) for of in (VIVID, PLAIN))
    clauses = " ".join(words).rstrip(". ").split(" and ")
    return float(len(clauses)), vivid / (vivid + plain) if vivid + plain else float("nan")


@struct.dataclass
class AverageParams:
    """Parameters of the model, and the prompts of the second persona."""

    model: Any
    other: Prompts


@dataclass(frozen=True)
class Average:
    """The average of the laws of one model behind two prompts, each filtered for itself."""

    model: ModelPredictor

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self.model.max_positions

    def prepare(self, params: AverageParams) -> AverageParams:
        """Returns the parameters as the model reads them fastest."""
        return AverageParams(self.model.prepare(params.model), params.other)

    def init(self, prepared: AverageParams, prompts: Prompts, capacity: int) -> Any:
        """Returns the state behind both prompts, and the law of the first token."""
        both = stacked(prompts, prepared.other)
        capacity += both.tokens.shape[1] - prompts.tokens.shape[1]
        state, out = self.model.init(prepared.model, both, capacity)
        return state, self._averaged(out)

    def step(self, prepared: AverageParams, state: Any, tokens: Any) -> Any:
        """Returns the state behind one more token, and the law of the next one."""
        both = jnp.concatenate([tokens, tokens])
        state, out = self.model.step(prepared.model, state, both)
        return state, self._averaged(out)

    def _averaged(self, out: StepOutput) -> StepOutput:
        logits = out.logits.astype(jnp.float32)
        for each in FILTERS:
            logits = each.apply(logits)  # type: ignore[attr-defined]
        first, second = jnp.split(jax.nn.softmax(logits, axis=-1), 2)
        return StepOutput(jnp.log((first + second) / 2))


@dataclass(frozen=True)
class Materials:
    """A trained model, and the subjects of the reviews to be written."""

    lm: LanguageModel
    subjects: tuple[str, ...]

    def prompts(self, controls: str) -> Prompts:
        """Returns the prompts behind these control words."""
        return Prompts.of([self.lm.encode(prompt_of(controls, each)) for each in self.subjects])


def prepare(sizes: dict[str, int], folder: Path, seed: int) -> Materials:
    """Returns a model trained on reviews, each behind one control word."""

    def records():
        rng = np.random.default_rng([seed, 0])
        for i in range(sizes["texts"]):
            control = CONTROLS[i % len(CONTROLS)]
            prompt = prompt_of(control, str(rng.choice(SUBJECTS)))
            yield {"prompt": prompt, "response": f" {review(control, rng)}"}

    file = jsonl(folder / "reviews.jsonl", records)
    tree = {
        "title": "reviews behind control words",
        "seed": seed,
        "model": {
            "d_model": sizes["d_model"],
            "n_layers": sizes["n_layers"],
            "n_heads": 4,
            "max_positions": 128,
        },
        "data": {
            "tokenizer": word_tokenizer(folder / "words", WORDS),
            "train": [{"source": {"name": "jsonl", "files": (str(file),), "kind": "response"}}],
            "evals": {},
            "seq_len": 96,
            "batch_size": 32,
            "seed": seed,
        },
        "steps": sizes["steps"],
        "optimizer": {"name": "adamw", "peak_lr": 3e-3},
        "schedule": {"name": "cosine", "warmup_steps": max(1, sizes["steps"] // 20)},
        "samples": {"prompts": []},
        "checkpoints": {"every_steps": sizes["steps"], "keep": 1},
    }
    rng = np.random.default_rng([seed, 1])
    subjects = tuple(str(each) for each in rng.choice(SUBJECTS, sizes["items"]))
    return Materials(trained(folder / "lm", tree), subjects)


def measure(materials: Materials, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Returns the attributes of each text that an arm writes, and how many drafts stood."""
    lm = materials.lm
    rows = len(materials.subjects)
    settings: dict[str, Any] = {
        "max_new_tokens": 96,
        "stop": on_tokens([lm.encode(".")[-1]]),
        "sampler": categorical(),
        "seeds": [row_seed(seed, options["number"], i) for i in range(rows)],
    }
    first, *others = (materials.prompts(controls) for controls in options["prompts"])
    if options["way"] == "judge":
        swap = options["swap"]
        found = persona_judge(
            lm.model, lm.params, first, *others, gamma=GAMMA, swap=swap, **settings
        )
    elif options["way"] == "average":
        params = AverageParams(lm.params, others[0])
        found = decode(Average(ModelPredictor(lm.model)), params, first, **settings)
    else:
        found = decode(lm.model, lm.params, first, transform=chain(*FILTERS), **settings)
    told = [attributes(lm.tokenizer.decode(ids)) for ids in found.rows()]
    clauses, vivid = (np.array(values) for values in zip(*told, strict=True))
    values = {
        "clauses": clauses,
        "vivid": vivid,
        "both": ((clauses <= 2) & (vivid > 0.5)).astype(float),
        "ended": np.asarray(found.stopped, float),
    }
    if options["way"] == "judge":
        values["accepted"] = np.asarray(found.acceptance_rate, float)  # type: ignore[union-attr]
        values["tokens_per_block"] = np.asarray(found.tokens_per_pass, float)  # type: ignore[union-attr]
    return values


def p_values(found: Measurements, arm: str, other: str) -> list[float]:
    """Returns for each seed how likely tables of the two arms' texts, clauses by vividness, differ
    as much as they do if both follow one law.
    """
    kinds = []
    for each in (arm, other):
        clauses, vivid = found.items(each, "clauses"), found.items(each, "vivid")
        kinds.append([_kind(c, v) for c, v in zip(clauses, vivid, strict=True)])
    chances = []
    for first, second in zip(*kinds, strict=True):
        table = np.stack([np.bincount(k, minlength=16) for k in (first, second)])
        chances.append(float(chi2_contingency(table[:, table.sum(0) > 0]).pvalue))  # type: ignore[attr-defined]
    return chances


def _kind(clauses: np.ndarray, vivid: np.ndarray) -> np.ndarray:
    """Returns which of 16 kinds a text is: 1, 2, 3 or more clauses by four classes of vividness."""
    length = np.minimum(clauses, 4).astype(int) - 1
    style = np.select([vivid <= 0.25, vivid <= 0.5, vivid <= 0.75, vivid <= 1], range(4), 0)
    return length * 4 + style


def judge(found: Measurements) -> Verdict:
    """Demands that fixed roles have the judge's law, and exchanged ones lie between the two."""
    same = {arm: p_values(found, arm, "short") for arm in ("base", "other_draft", "itself")}
    least = LEVEL / sum(len(chances) for chances in same.values())
    power = p_values(found, "swap", "short")

    def told(chances: list[float]) -> str:
        return ", ".join(f"{chance:.2g}" for chance in chances)

    def between(metric: str) -> tuple[bool, str]:
        above = found.difference("swap", "short", metric)
        below = found.difference("vivid", "swap", metric)
        means = ", ".join(f"{found.mean(a, metric):.3f}" for a in ("short", "swap", "vivid"))
        text = f"{means} for short, swap and vivid; steps {above} and {below}"
        return above.low > 0 and below.low > 0, text

    differs = [found.difference("vivid", "short", metric) for metric in ("vivid", "clauses")]
    style, length = between("vivid"), between("clauses")
    itself = found.interval("itself", "accepted")
    return Verdict.of(
        [
            (
                all(each.low > 0 for each in differs),
                f"the single prompts differ, so that there is something to mix: the vivid one has "
                f"{differs[0]} more vivid adjectives and {differs[1]} more clauses than the short",
            ),
            (
                min(same["base"]) > least,
                f"fixed roles: no test tells texts from those of the judge's prompt alone "
                f"(p {told(same['base'])}; rejected below {least:.2g})",
            ),
            (
                min(same["other_draft"]) > least,
                f"control: nor with another drafter, <plain> (p {told(same['other_draft'])})",
            ),
            (
                min(same["itself"]) > least and itself.low > 0.999,
                f"control: a persona that judges itself accepts {itself} of its drafts and keeps "
                f"its law (p {told(same['itself'])})",
            ),
            (
                max(power) < least,
                f"the test can tell laws apart: exchanged roles against the judge's prompt alone "
                f"(p {told(power)})",
            ),
            (style[0], f"exchanged roles lie between the personas in vividness: {style[1]}"),
            (length[0], f"and in clauses: {length[1]}"),
            *(
                (
                    None,
                    f"{arm}: vivid {found.interval(arm, 'vivid')}, clauses "
                    f"{found.interval(arm, 'clauses')}, short and vivid "
                    f"{found.interval(arm, 'both')}",
                )
                for arm in ("short", "vivid", "base", "swap", "once", "average", "concatenated")
            ),
            (
                None,
                f"exchanged roles against the average of the laws: "
                f"{found.difference('swap', 'average', 'both')} more texts that are short and "
                f"vivid",
            ),
            (
                None,
                f"drafts that stand: base {found.interval('base', 'accepted')}, swap "
                f"{found.interval('swap', 'accepted')}",
            ),
        ]
    )


def get_plan(scale: str) -> Comparison:
    """Returns the plan: two models of 0.5M parameters, or in seconds for `smoke`."""
    full = {"texts": 16000, "items": 800, "d_model": 96, "n_layers": 4, "steps": 400}
    small = {"texts": 400, "items": 24, "d_model": 32, "n_layers": 2, "steps": 10}
    sizes = small if scale == "smoke" else full
    number = iter(range(100))

    def arm(role: Any, label: str, way: str, *prompts: str, swap: str = "") -> Treatment:
        options = {"way": way, "prompts": prompts, "swap": swap, "number": next(number)}
        return Treatment(role, label, options)

    d, g = "<vivid>", "<short>"
    return Comparison(
        claim=(
            "With roles that are exchanged behind every block, two preference prompts that verify "
            "each other's drafts give texts that lie between both preferences; with fixed roles "
            "the text follows the judge's preference alone."
        ),
        arms={
            "swap": arm("method", "roles exchanged", "judge", d, g, swap="always"),
            "base": arm("baseline", "roles fixed: short judges", "judge", d, g, swap="never"),
            "once": arm("baseline", "roles exchanged once", "judge", d, g, swap="once"),
            "short": arm("baseline", "<short> alone", "decode", g),
            "vivid": arm("baseline", "<vivid> alone", "decode", d),
            "concatenated": arm("baseline", "<vivid> <short>", "decode", f"{d} {g}"),
            "average": arm("control", "average of both laws", "average", d, g),
            "other_draft": arm(
                "control", "roles fixed, plain drafts", "judge", "<plain>", g, swap="never"
            ),
            "itself": arm("control", "short judges itself", "judge", g, g, swap="always"),
        },
        prepare=lambda folder, seed: prepare(sizes, folder, seed),
        measure=measure,
        judge=judge,
        metric="both",
        panels=(
            Bars("vivid", "vividness", "share of the adjectives"),
            Bars("clauses", "length", "clauses of a text"),
            Bars("both", "short and vivid", "share of the texts"),
        ),
        settings={**sizes, "gamma": GAMMA, "vividness": VIVIDNESS, "ending": ENDING, "most": MOST},
        seeds=(0, 1),
        notes=(
            "Temperature 0.9, top-k 20, top-p 0.9 and four drafted tokens, the reference code's "
            "defaults, in all arms; each filter once, before tests and residuals.",
            "Roles are exchanged behind every block, as the abstract is read here; the reference "
            "code exchanges them once (arm `once`).",
            "Every arm has random seeds of its own, so that its texts are independent of the "
            "others'.",
            "Equal laws are tested by a chi-square test of clauses by vividness for each seed of "
            f"the model, with the level {LEVEL} shared among all tests.",
            "Nothing was tuned: what is demanded, the language and the sizes were fixed before the "
            "first full run.",
        ),
    )
