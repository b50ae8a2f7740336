"""TIPA (arXiv 2411.17679): maps of a token's characters, beside questions about spelling.

    python -m tokjax.reproduce tipa

WHAT CAME OUT

A small model with a byte-level BPE of 2,000 tokens, trained on text, is tuned on two questions
about words that are single tokens: where a spelling has a wrong letter, and how long the word is.
Half of the words are in the task's data, a quarter only in TIPA's maps, a quarter in neither. Every
step has 30 questions; beside them stand:
    pure      nothing
    more      as many tokens of further questions
    tipa      16 maps, from the last character to the first
    forward   the same from the first to the last
    mtipa     a third of the maps are of pieces of text
    shuffled  maps whose characters are in another order (control)
    letters   nothing, and words named letter by letter: what a tokenizer of characters could do
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokjax.data.batch import Batch
from tokjax.data.bpe import corpus_texts, train_bpe
from tokjax.data.huggingface_tokenizer import HuggingFaceTokenizer
from tokjax.files import write_atomically
from tokjax.finetuning.sft import SFT
from tokjax.finetuning.tipa import character_map, sentence_samples, token_samples, vocabulary_texts
from tokjax.models import ModelConfig, Transformer
from tokjax.pretraining.next_token import NextToken
from tokjax.reproduction import Bars, Comparison, Measurements, Treatment, Verdict
from tokjax.reproduction.arrays import Sample, answers, epochs, kept, tuned
from tokjax.reproduction.tasks.spelling import Spelling, shuffled, words

WIDTH = 44  # places of a row: three questions, or a map
IN_ROW = 3
LONGEST = 8  # characters of a token that gets a map
GROUPS = ("trained", "mapped", "unseen")  # words of the task's data, of maps alone, of neither


def get_plan(scale: str) -> Comparison:
    """Returns the plan, in seconds for `smoke`."""
    smoke = scale == "smoke"
    settings = {
        "vocab_size": 600 if smoke else 2000,
        "documents": 200 if smoke else 2000,
        "d_model": 32 if smoke else 64,
        "base_steps": 4 if smoke else 300,
        "base_rate": 3e-3,
        "steps": 4 if smoke else 1000,
        "rate": 2e-3,
        "rows": 10,
        "maps": 16,
        "questions": 30 if smoke else 6000,
        "asked": 6 if smoke else 200,
    }

    def arm(role: str, label: str, kind: str) -> Treatment:
        return Treatment(role, label, {"kind": kind})  # type: ignore[arg-type]

    arms = {
        "tipa": arm("method", "TIPA", "tipa"),
        "forward": arm("method", "TIPA, forward maps", "forward"),
        "mtipa": arm("method", "MTIPA", "mtipa"),
        "pure": arm("baseline", "questions alone", "pure"),
        "more": arm("baseline", "questions alone, equal tokens", "more"),
        "letters": arm("baseline", "words by letters", "letters"),
        "shuffled": arm("control", "maps in another order", "shuffled"),
    }
    return Comparison(
        claim=(
            "Maps of tokens to their characters by position raise the accuracy of positions in a "
            "spelling task, at equal task steps and at equal tokens."
        ),
        arms=arms,
        prepare=lambda folder, seed: Materials(folder, settings, seed),
        measure=lambda materials, options, seed: materials.measure(**options),
        judge=judge,
        metric="position_mapped",
        panels=(
            Bars("position_mapped", "position, words of maps alone", "right answers"),
            Bars("position_trained", "position, words of the task's data", "right answers"),
            Bars("position_unseen", "position, words of neither", "right answers"),
            Bars("length_mapped", "length, words of maps alone", "right answers"),
        ),
        settings=settings,
        seeds=(0, 1),
        notes=(
            "An item is a question, answered greedily. Maps have no system message, for which so "
            "small a model has no use; a sample weighs as much as another, however long.",
            "The text is documentation and docstrings of Python's library. Tokens of more than "
            f"{LONGEST} characters get no map.",
        ),
    )


class Materials:
    """Tokenizer, base model and words of a seed."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int):
        self.folder, self.settings, self.seed = folder, settings, seed
        self.spelling = Spelling(self.tokenizer)
        texts = vocabulary_texts(self.tokenizer).kept
        self.texts = [t for t in texts if len(t) <= LONGEST]
        rng = np.random.default_rng([seed, 1])
        every = words(self.texts)
        mixed = [every[i] for i in rng.permutation(len(every))]
        half, quarter = len(mixed) // 2, len(mixed) // 4
        self.words = {
            "trained": mixed[:half],
            "mapped": mixed[half : half + quarter],
            "unseen": mixed[half + quarter :],
        }
        self.model = Transformer(
            ModelConfig(
                vocab_size=self.tokenizer.vocab_size,
                d_model=settings["d_model"],
                n_layers=2,
                n_heads=4,
                max_positions=64,
                remat="none",
            )
        )

    @cached_property
    def documents(self) -> list[str]:
        """Texts, of which the tokenizer and the base model learn."""
        every = list(corpus_texts("stdlib"))
        chosen = np.random.default_rng(0).permutation(len(every))[: self.settings["documents"]]
        return [every[i] for i in chosen]

    @cached_property
    def tokenizer(self) -> HuggingFaceTokenizer:
        """A BPE of the texts and of some maps, whose signs become tokens."""
        path = self.folder / "tokenizer.json"
        if not path.exists():
            # The signs of maps are as common as any text.
            maps = [character_map("text")] * 2000
            write_atomically(
                path, train_bpe(iter(self.documents + maps), self.settings["vocab_size"])
            )
        end = "<|endoftext|>"
        return HuggingFaceTokenizer(json.loads(path.read_text()), title="BPE", bos=end, eos=end)

    @cached_property
    def base(self) -> Any:
        """The parameters of the model of texts."""

        def make() -> Any:
            ids = [i for text in self.tokenizer.encode_batch(self.documents) for i in text]
            count = min(len(ids) // (WIDTH + 1), 20000)
            pieces = [ids[i * (WIDTH + 1) : (i + 1) * (WIDTH + 1)] for i in range(count)]
            rows = [Sample(piece, np.ones(len(piece))) for piece in pieces]  # type: ignore[arg-type]
            steps = self.settings["base_steps"]
            made = epochs(rows, 24, steps, WIDTH, self.seed)
            options = {"rate": self.settings["base_rate"], "cosine": True, "seed": self.seed}
            return tuned(self.model, None, NextToken(), made, steps=steps, **options)[0]

        return kept(self.folder / "base.npz", self.model, make)

    def asked(
        self, spelling: Spelling, group: str, count: int, kind: Any, stream: int
    ) -> list[Any]:
        """Returns questions about words of a group."""
        rng = np.random.default_rng([self.seed, stream, len(kind)])
        own = self.words[group]
        return [spelling.question(own[i], kind, rng) for i in rng.integers(0, len(own), count)]

    def questions(self, spelling: Spelling, count: int, stream: int) -> list[list[Sample]]:
        """Returns rows of questions about the task's words: two in three about spellings."""
        wrong = self.asked(spelling, "trained", 2 * count, "wrong", stream)
        lengths = self.asked(spelling, "trained", count, "length", stream)
        return [[*wrong[2 * i : 2 * i + 2], lengths[i]] for i in range(count)]

    def maps(self, kind: str) -> list[Sample]:
        """Returns TIPA's samples of an arm."""
        held = set(self.words["unseen"])
        own = [text for text in self.texts if text not in held]
        chats = token_samples(own, "forward" if kind == "forward" else "reverse")
        if kind == "shuffled":
            rng = np.random.default_rng([self.seed, 4])
            chats = [shuffled(chat, rng) for chat in chats]
        if kind == "mtipa":
            pieces = [t[i : i + 9] for t in self.documents[:200] for i in range(0, 90, 9)]
            plain = [p for p in pieces if p.isascii() and p.isprintable() and len(p) == 9]
            count = len(own) // 2
            chats += sentence_samples(
                plain, share=min(1.0, count / len(plain)), shortest=6, longest=9, seed=self.seed
            )
        samples = [self.spelling.chat(chat) for chat in chats]
        return [s for s in samples if len(s.tokens) <= WIDTH + 1]

    def batches(self, kind: str, spelling: Spelling) -> Any:
        """Yields what the steps of an arm are trained on."""
        told = self.settings
        steps, rows = told["steps"], told["rows"]
        questions = self.questions(spelling, told["questions"], 5)
        made = epochs(questions, rows, steps, WIDTH + 22 * spelling.by_letter, self.seed)
        if kind in ("pure", "letters"):
            yield from made
            return
        if kind == "more":
            further = self.questions(spelling, told["questions"], 6)
            beside = epochs(further, told["maps"], steps, WIDTH, self.seed + 1)
        else:
            beside = epochs(self.maps(kind), told["maps"], steps, WIDTH, self.seed + 1)
        for first, second in zip(made, beside, strict=True):
            yield _joined(first, second)

    def measure(self, kind: str) -> dict[str, list[float]]:
        """Returns the metrics of an arm."""
        told = self.settings
        spelling = Spelling(self.tokenizer, by_letter=kind == "letters")
        params, seen = tuned(
            self.model,
            self.base,
            SFT(norm="sequence"),
            self.batches(kind, spelling),
            steps=told["steps"],
            rate=told["rate"],
            cosine=True,
            warmup=50,
            seed=self.seed,
        )
        found: dict[str, list[float]] = {}
        for group in GROUPS:
            wrong = self.asked(spelling, group, told["asked"], "wrong", 7)
            lengths = self.asked(spelling, group, told["asked"], "length", 7)
            given = self.answered(params, wrong, 2)
            found[f"position_{group}"] = [float(a[:1] == r[:1]) for a, r in given]
            found[f"character_{group}"] = [float(a[1:2] == r[1:2]) for a, r in given]
            given = self.answered(params, lengths, 1)
            found[f"length_{group}"] = [float(a == r) for a, r in given]
        return found | {"loss": seen["loss"][-20:].tolist()}

    def answered(self, params: Any, asked: list[Sample], count: int) -> list[Any]:
        """Returns (answer given, right answer) of questions whose answers have `count` ids."""
        prompts = [list(s.tokens[: -count - 1]) for s in asked]
        given = answers(self.model, params, prompts, count + 1, self.spelling.end)
        right = [list(s.tokens[-count - 1 : -1]) for s in asked]
        return list(zip(given, right, strict=True))


def _joined(first: Batch, second: Batch) -> Batch:
    """Returns the rows of two batches in one, which have room for equally many samples."""
    most = max(first.example_id.shape[1], second.example_id.shape[1])

    def widened(batch: Batch) -> Batch:
        more = most - batch.example_id.shape[1]
        ids = np.pad(np.asarray(batch.example_id), ((0, 0), (0, more)), constant_values=-1)
        return batch.replace(example_id=ids)  # type: ignore[attr-defined]

    return jax.tree.map(lambda a, b: np.concatenate([a, b]), widened(first), widened(second))


def judge(found: Measurements) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    gains = {
        name: found.difference(name, "pure", "position_mapped")
        for name in ("tipa", "shuffled", "forward", "mtipa")
    }
    over_more = found.difference("tipa", "more", "position_mapped")
    lengths = found.difference("tipa", "forward", "length_mapped")
    best, known = found.mean("letters", "position_mapped"), found.mean("pure", "position_trained")

    def told(metric: str) -> str:
        return ", ".join(f"{name} {found.mean(name, metric):.3f}" for name in found.values)

    of = f"{found.mean('tipa', 'position_mapped'):.3f}"
    return Verdict.of(
        [
            (
                best > 0.8 and known > 0.4,
                f"the task can be learned: named by letters, positions are right in {best:.3f} "
                f"(above 0.8), and questions alone teach {known:.3f} on their own words (above "
                f"0.4)",
            ),
            (
                gains["tipa"].low > 0,
                f"words of maps alone: positions are right in {of} with TIPA, in "
                f"{found.mean('pure', 'position_mapped'):.3f} at equal task steps: {gains['tipa']}",
            ),
            (
                over_more.low > 0,
                f"and in {found.mean('more', 'position_mapped'):.3f} at equal tokens: {over_more}",
            ),
            (
                gains["shuffled"].mean < gains["tipa"].mean / 2,
                f"maps in another order gain less than half of that: {gains['shuffled']}",
            ),
            (
                lengths.low > -0.03,
                f"reverse maps are not 0.03 worse about lengths than forward ones: {lengths}",
            ),
            (None, f"forward maps gain {gains['forward']}, MTIPA {gains['mtipa']}"),
            *(
                (None, f"{metric}, words {group}: {told(f'{metric}_{group}')}")
                for metric in ("position", "character", "length")
                for group in GROUPS
            ),
        ]
    )
