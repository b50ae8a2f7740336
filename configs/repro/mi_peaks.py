"""Thinking tokens as information peaks (arXiv 2506.02867), on sums with planted mistakes.

    python -m tokjax.reproduce mi_peaks

Four operations on a digit, worked out step by step; a mistake is followed by a thinking word and
the step again.

It did not reproduce: forbidding thinking words leaves 0.42 of the answers right and forbidding
fillers 0.99, but thinking words stand at peaks no more often than at the same places of other
texts (by -0.005, from -0.009 to -0.0001). Recycling was not tested, since greedy decoding solves
everything behind a mistake; and with every word allowed 0.985 of the answers are right, where less
than 0.98 was demanded.

The arms:
    all_words, no_thinking, no_fillers      drawn texts, with nothing or some words forbidden
    peaks                                   the 3 largest values of each text's curve
    peaks_outliers, peaks_narrow            outliers instead; sigma 1 instead of 50
    peaks_other, peaks_shuffled             another question's solution; places at random
    greedy                                  behind a planted mistake, nothing recycled
    thinking_<block>, random_<block>        recycled at thinking words, or at random as often
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokjax.decoding import Prompts, categorical, decode, on_tokens
from tokjax.decoding.recycling import recycling
from tokjax.decoding.transforms import suppress
from tokjax.language_model import LanguageModel
from tokjax.reproduction import Bars, Comparison, Lines, Measurements, Treatment, Verdict
from tokjax.reproduction.materials import jsonl, trained, word_tokenizer
from tokjax.signals.information_peaks import mi_curves, outlier_peaks, top_peaks

MODULUS = 10
STEPS = 4  # operations of a question
NAMES = ("a", "b", "c", "d")  # of them
OPERATIONS = ("+1", "+2", "+3", "-1", "-2", "-3")  # of one word each
MISTAKES = 0.25  # share of the steps in the training texts with a mistake
TOO_LARGE = ("10", "11", "12", "13", "14")  # results that are mistakes: not reduced by the modulus
THINKING = ("wait", "check", "so")  # behind a mistake; the step is done again
FILLERS = ("well", "okay", "anyway")  # behind right results, as often, and nothing comes of them
FORM = ("=", ".", ":", "answer")
WORDS = (*map(str, range(MODULUS)), *NAMES, *OPERATIONS, *TOO_LARGE, *FORM, *THINKING, *FILLERS)
LAYER = 2  # of 4, as 23 of 32
MOST = 80  # new tokens
PEAKS = 3  # of about 40 tokens; the reference code's are 20 of the first 512
FLATTER = 0.25  # of the height of peaks, what another question's solution must take away


def question(rng: np.random.Generator) -> list[str]:
    """Returns a first number and then operations with their names, as words."""
    words = [str(rng.integers(MODULUS))]
    for name in NAMES[:STEPS]:
        words += [name, str(rng.choice(OPERATIONS))]
    return words


def result(value: str, operation: str) -> str:
    """Returns what one operation gives.

    >>> result("1", "-3")
    '8'
    """
    return str((int(value) + int(operation)) % MODULUS)


def answer_of(words: Sequence[str]) -> str:
    """Returns what all operations of a question give, one after the other.

    >>> answer_of(["8", "a", "+3", "b", "-2"])
    '9'
    """
    value = words[0]
    for operation in words[2::2]:
        value = result(value, operation)
    return value


def scratchpad(
    words: Sequence[str], rng: np.random.Generator, mistakes: float = MISTAKES
) -> list[str]:
    """Returns a worked solution; behind wrong results stands a thinking word and the step again,
    behind as many right ones a filler.

    >>> " ".join(scratchpad(["8", "a", "+3", "b", "-2"], np.random.default_rng(0), 0.0))
    'a 8 +3 = 1 . b 1 -2 = 9 . answer 9'
    """
    written, value = [], words[0]
    for name, operation in zip(words[1::2], words[2::2], strict=True):
        right, step = result(value, operation), [name, value, operation, "="]
        written += step
        if rng.random() < mistakes:
            written += [str(rng.choice(TOO_LARGE)), str(rng.choice(THINKING)), *step, right]
        else:
            written.append(right)
            if mistakes and rng.random() < mistakes / (1 - mistakes):
                written.append(str(rng.choice(FILLERS)))
        written.append(".")
        value = right
    return [*written, "answer", value]


class Materials:
    """A trained model, questions that it has not seen, and the texts that it writes of them."""

    def __init__(self, lm: LanguageModel, questions: int, seed: int):
        self.lm, self.seed = lm, seed
        rng = np.random.default_rng([seed, 1])
        self.questions = [question(rng) for _ in range(questions)]
        self.answers = [answer_of(words) for words in self.questions]
        self.prompts = [self._ids([*words, ":"]) for words in self.questions]
        clean = [scratchpad(words, rng, 0.0) for words in self.questions]
        self.solutions = [
            [*prompt, *self._ids(words)[1:]]
            for prompt, words in zip(self.prompts, clean, strict=True)
        ]
        self.planted = []  # questions with scratchpads up to a wrong result of their own step
        for words, prompt in zip(self.questions, self.prompts, strict=True):
            done = int(rng.integers(STEPS))
            right = scratchpad(words[: 2 * done + 3], rng, 0.0)[:-3]
            wrong = str(rng.choice(TOO_LARGE))
            self.planted.append([*prompt, *self._ids([*right[:-1], wrong])[1:]])
        self.thinking = self._ids(THINKING)[1:]
        self.fillers = self._ids(FILLERS)[1:]
        self._texts: list[list[int]] | None = None

    def _ids(self, words: Sequence[str]) -> list[int]:
        return self.lm.encode(" ".join(words))

    def sampled(self, banned: Sequence[str] = ()) -> list[list[int]]:
        """Returns a text of every question, drawn without the banned words."""
        return decode(
            self.lm.model,
            self.lm.params,
            Prompts.of(self.prompts),
            max_new_tokens=MOST,
            transform=suppress(self._ids(banned)[1:]) if banned else None,
            sampler=categorical(),
            stop=on_tokens(self.lm.eos_ids),
            seeds=[self.seed * 10_000 + i for i in range(len(self.prompts))],
        ).rows()

    def texts(self) -> list[list[int]]:
        """Returns the drawn texts, once made."""
        if self._texts is None:
            self._texts = self.sampled()
        return self._texts

    def correct(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns whether each text ends with the answer."""
        ends = [self._ids(["answer", answer])[1:] for answer in self.answers]
        stop = set(self.lm.eos_ids)
        return np.array(
            [
                float([i for i in text if i not in stop][-2:] == end)
                for text, end in zip(texts, ends, strict=True)
            ]
        )

    def recycled(self, layer: int | None, at: str) -> dict[str, np.ndarray]:
        """Returns whether each text behind a planted mistake ends with the answer, and the share of
        its tokens at which a representation was recycled.

        Args:
            layer: the block; None recycles nowhere.
            at: "thinking" words, or at "random" as often.
        """
        given: tuple[Any, Any] = (self.lm.model, self.lm.params)
        record = {"recycled": lambda context: context.signals["recycled"]}
        if layer is None:
            record = None
        elif at == "thinking":
            given = recycling(*given, self.thinking, layer=layer)
        else:
            share = float(np.mean(self.recycled(layer, "thinking")["recycled"]))
            seeds = [self.seed * 10_000 + i for i in range(len(self.planted))]
            every = range(self.lm.model.config.vocabulary)
            given = recycling(*given, every, layer=layer, probability=share, seeds=seeds)
        found = decode(
            *given,
            Prompts.of(self.planted),
            max_new_tokens=MOST,
            stop=on_tokens(self.lm.eos_ids),
            record=record,
        )
        told = {"recycled_correct": self.correct(found.rows())}
        if record is not None:
            happened = np.asarray(found.recorded["recycled"] & found.mask).sum(1)
            told["recycled"] = happened / np.asarray(found.lengths)
        return told

    def peaks(self, solution: str, rule: str, sigma: float, layer: int) -> dict[str, np.ndarray]:
        """Returns for each text how often thinking words and fillers stand at its peaks, less how
        often they stand at the same places of all texts, and how high the peaks are.

        Args:
            solution: the question's "own", that of an "other" question with another answer, or
                "shuffled": places drawn at random instead of peaks.
            rule: "top" or "outliers".
            sigma: width of the kernel.
            layer: whose output is read.
        """
        texts = [[i for i in text if i not in self.lm.eos_ids] for text in self.texts()]
        golds = self.solutions
        if solution == "other":
            golds = [golds[self._other(i)] for i in range(len(golds))]
        curves = mi_curves(
            self.lm.model,
            self.lm.params,
            self.prompts,
            texts,
            golds,
            layer=layer,
            sigma=sigma,
            batch_size=16,
        )
        find = outlier_peaks if rule == "outliers" else lambda curve: top_peaks(curve, PEAKS)
        places = [find(curve) for curve in curves]
        if solution == "shuffled":
            rng = np.random.default_rng([self.seed, 2])
            places = [
                rng.permutation(len(curve))[: len(own)]
                for curve, own in zip(curves, places, strict=True)
            ]
        height = [
            curve[own].mean() / np.median(curve) - 1 if len(own) else np.nan
            for curve, own in zip(curves, places, strict=True)
        ]
        thinking, filler = (enrichment(texts, places, i) for i in (self.thinking, self.fillers))
        return {
            "thinking": thinking,
            "filler": filler,
            "over_filler": thinking - filler,
            "height": np.array(height),
        }

    def _other(self, i: int) -> int:
        """Returns the next question with another answer, or the next one where there is none."""
        count = len(self.answers)
        after = [(i + step) % count for step in range(1, count)]
        return next((j for j in after if self.answers[j] != self.answers[i]), after[0])


def enrichment(
    texts: Sequence[Sequence[int]], places: Sequence[np.ndarray], ids: Sequence[int]
) -> np.ndarray:
    """Returns the share of each text's places at which one of the ids stands, less the share of
    all texts that have one of them at the same place; NaN for a text without places.

    >>> enrichment([[1, 2], [2, 1]], [np.array([0]), np.array([], int)], [1]).tolist()
    [0.5, nan]
    """
    longest = max(map(len, texts))
    marks = np.full((len(texts), longest), np.nan)
    for row, text in zip(marks, texts, strict=True):
        row[: len(text)] = np.isin(text, ids)
    expected = np.nanmean(marks, axis=0)
    return np.array(
        [
            (row[own] - expected[own]).mean() if len(own) else np.nan
            for row, own in zip(marks, places, strict=True)
        ]
    )


Role = Literal["method", "baseline", "control"]
BANS: dict[str, tuple[Role, str, tuple[str, ...]]] = {
    "all_words": ("baseline", "no word is forbidden", ()),
    "no_thinking": ("method", "thinking words are forbidden", THINKING),
    "no_fillers": ("control", "fillers are forbidden", FILLERS),
}
PEAK_ARMS: dict[str, tuple[Role, str, dict[str, Any]]] = {
    "peaks": ("method", "the 3 largest values", {"solution": "own", "rule": "top", "sigma": 50.0}),
    "peaks_outliers": (
        "method",
        "outliers",
        {"solution": "own", "rule": "outliers", "sigma": 50.0},
    ),
    "peaks_narrow": ("method", "sigma 1", {"solution": "own", "rule": "top", "sigma": 1.0}),
    "peaks_other": (
        "control",
        "another question's solution",
        {"solution": "other", "rule": "top", "sigma": 50.0},
    ),
    "peaks_shuffled": (
        "control",
        "curves shuffled",
        {"solution": "shuffled", "rule": "top", "sigma": 50.0},
    ),
}


def get_plan(scale: str) -> Comparison:
    """Returns the plan: 0.45M parameters and 1.6M tokens, or in seconds for `smoke`."""
    smoke = scale == "smoke"
    model = {"d_model": 24, "n_layers": 2, "n_heads": 3, "max_positions": 128}
    questions, steps = 6, 4
    if not smoke:
        model |= {"d_model": 96, "n_layers": 4}
        questions, steps = 200, 800
    layer = min(LAYER, model["n_layers"] - 1)

    def prepare(folder: Path, seed: int) -> Materials:
        rng = np.random.default_rng([seed, 0])

        def records() -> Iterator[dict[str, str]]:
            for _ in range(100 if smoke else 20_000):
                words = question(rng)
                written = " ".join(scratchpad(words, rng))
                yield {"prompt": " ".join([*words, ":"]), "response": f" {written}"}

        source = {
            "name": "jsonl",
            "files": (str(jsonl(folder / "sums.jsonl", records)),),
            "kind": "response",
        }
        tree = {
            "title": "sums with mistakes",
            "seed": seed,
            "model": model,
            "data": {
                "tokenizer": word_tokenizer(folder / "words", WORDS),
                "train": [{"source": source}],
                "evals": {},
                "seq_len": 128,
                "batch_size": 16,
            },
            "steps": steps,
            "optimizer": {"name": "adamw", "peak_lr": 3e-3},
            "schedule": {"name": "cosine", "warmup_steps": min(steps // 2, 30)},
            "samples": {"prompts": []},
        }
        return Materials(trained(folder / "lm", tree), questions, seed)

    def measure(materials: Materials, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
        if "banned" in options:
            return {"correct": materials.correct(materials.sampled(options["banned"]))}
        if "solution" in options:
            return materials.peaks(**options)
        return materials.recycled(options["layer"], options["at"])

    arms = {
        name: Treatment(role, label, {"banned": list(words)})
        for name, (role, label, words) in BANS.items()
    }
    for name, (role, label, options) in PEAK_ARMS.items():
        arms[name] = Treatment(role, label, {**options, "layer": layer})
    arms["greedy"] = Treatment("baseline", "no recycling", {"layer": None, "at": "nowhere"})
    for block in range(model["n_layers"]):
        roles: dict[str, Role] = {"thinking": "method", "random": "control"}
        for at, role in roles.items():
            arms[f"{at}_{block}"] = Treatment(
                role, f"block {block}, at {at} tokens", {"layer": block, "at": at}
            )
    recycled = {at: {} for at in ("thinking", "random")}
    for at, line in recycled.items():
        line.update({float(block): f"{at}_{block}" for block in range(model["n_layers"])})
    return Comparison(
        claim=(
            "The dependence of hidden states on the solution peaks at thinking words, without "
            "which a model solves fewer problems, and reading a representation once more at them "
            "solves more."
        ),
        arms=arms,
        prepare=prepare,
        measure=measure,
        judge=lambda found: judge(found, layer),
        metric="correct",
        panels=(
            Bars("correct", "answers", "share that is right"),
            Bars("thinking", "thinking words at peaks", "share above that of the same places"),
            Bars("filler", "fillers at peaks", "share above that of the same places"),
            Lines(
                "recycled_correct",
                "recycling behind a planted mistake",
                "block",
                "share of answers that are right",
                recycled,
            ),
        ),
        settings={
            "questions": questions,
            "model": model,
            "steps": steps,
            "operations": STEPS,
            "mistakes": MISTAKES,
            "peaks": PEAKS,
        },
        seeds=(0, 1),
        notes=NOTES,
    )


NOTES = (
    "Mistakes are results too large to be any, planted in a quarter of the steps of the training "
    "texts; a thinking word stands behind each, and the step again. Fillers stand as often behind "
    "right results, and nothing comes of them. Texts of the first five findings are drawn from the "
    "model's probabilities; recycling decodes greedily behind a planted mistake.",
    "The solution is read behind its question, and its state is that of the answer's token. The "
    "block of curves and of the demanded recycling is the third of four, as 23 of 32 in the "
    "reference code; sigma is the paper's 50.",
    "Where greedy decoding solves everything behind a mistake, recycling has nothing to gain: its "
    "two findings then fail without testing the claim, and only what it costs is seen.",
    "In texts of one of the models peaks stood where the state has just read a number, as that "
    "of the solution has: at operations of the question (0.22 on average at the third block, "
    "against 0.03 at thinking words and 0.06 at fillers).",
    "The task was made easier in trials with another seed, in which models of this size did not "
    "learn sums of any two digits, nor to notice a wrong digit, within the budget; and once more "
    "after a first full run was stopped, in which the mistake left the value as it was: its model "
    "noticed none (0.33 right with thinking words forbidden, 0.36 without). No demand was changed.",
    "The first seed had been run once before the recorded run, of the same configuration and with "
    "the same values.",
)


def judge(found: Measurements, layer: int) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    plain = found.interval("all_words", "correct")
    greedy = found.interval("greedy", "recycled_correct")
    banned = found.difference("no_fillers", "no_thinking", "correct")
    peaks, fillers = found.interval("peaks", "thinking"), found.interval("peaks", "filler")
    over = found.interval("peaks", "over_filler")
    height, other = found.mean("peaks", "height"), found.mean("peaks_other", "height")
    lower = found.difference("peaks", "peaks_other", "height")
    gain = found.difference(f"thinking_{layer}", "greedy", "recycled_correct")
    over_random = found.difference(f"thinking_{layer}", f"random_{layer}", "recycled_correct")
    by_block = [
        found.difference(arm, "greedy", "recycled_correct").mean
        for arm in found.values
        if arm.startswith("thinking_")
    ]
    return Verdict.of(
        [
            (
                0.4 < plain.mean < 0.98,
                f"the model solves many questions, and not all: {plain} of drawn texts, {greedy} "
                f"of greedy ones behind a mistake",
            ),
            (
                banned.low > 0,
                "forbidding thinking words costs more answers than forbidding fillers: "
                f"{found.mean('no_thinking', 'correct'):.3f} against "
                f"{found.mean('no_fillers', 'correct'):.3f} right, by {banned}",
            ),
            (
                peaks.low > 0,
                f"thinking words stand at peaks more often than at the same places of other "
                f"texts: by {peaks}",
            ),
            (over.low > 0, f"and that by more than fillers, which do by {fillers}: {over}"),
            (
                lower.low > 0 and other <= (1 - FLATTER) * height,
                f"another question's solution takes {FLATTER:.0%} at least of the height of "
                f"peaks: {height:.2f} against {other:.2f}, by {lower}",
            ),
            (
                gain.low > 0,
                f"recycling at block {layer} at thinking words solves more than greedy decoding: "
                f"by {gain}",
            ),
            (over_random.low > 0, f"and more than at random tokens: by {over_random}"),
            (
                None,
                "recycling gains by block: " + ", ".join(f"{each:+.3f}" for each in by_block),
            ),
            (
                None,
                f"thinking words at outliers: {found.interval('peaks_outliers', 'thinking')}; "
                f"with sigma 1: {found.interval('peaks_narrow', 'thinking')}; with another "
                f"question's solution: {found.interval('peaks_other', 'thinking')}; at random "
                f"places: {found.interval('peaks_shuffled', 'thinking')}",
            ),
        ]
    )
