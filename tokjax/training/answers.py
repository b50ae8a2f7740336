"""Evaluation by generation: the model answers held-out prompts, a verifier reads the answers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tokjax.decoding.engine import decode
from tokjax.decoding.predictors import as_predictor
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.stops import on_tokens
from tokjax.files import write_atomically

if TYPE_CHECKING:
    from tokjax.training.run import Run

_ROWS = 16  # answers written at a time


@dataclass(frozen=True)
class Question:
    """A held-out example as ids: what is given, and what should be answered."""

    name: str
    prompt: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and how right it is (0 to 1)."""

    question: Question
    text: str
    reference: str
    score: float


def questions(store: Any, limit: int | None) -> list[Question]:
    """Returns the examples of a store that have a prompt and an answer, at most `limit`.

    The answer is the last run of targets with weight, and the prompt all that lies before it.
    """
    found = []
    for i in range(store.num_examples):
        if limit is not None and len(found) == limit:
            break
        tokens, counted = store.tokens(i).tolist(), store.weights(i) > 0
        counted[0] = False
        ends = np.flatnonzero(counted)
        if not ends.size:
            continue
        stop = int(ends[-1]) + 1
        quiet = np.flatnonzero(~counted[:stop])
        start = int(quiet[-1]) + 1
        question = Question(store.example_name(i), tuple(tokens[:start]), tuple(tokens[start:stop]))
        found.append(question)
    return found


def answer_all(run: "Run", model: Any, params: Any, asked: list[Question]) -> list[Answer]:
    """Returns the greedy answer to each question, of at most the configured number of tokens.

    Questions without room for it within the model's positions are answered by an empty text, which
    the verifier reads like any other.
    """
    config, tokenizer = run.config.evaluation.answers, run.tokenizer
    assert config is not None
    ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    room = as_predictor(model).max_positions - config.max_new_tokens
    fits = [i for i, q in enumerate(asked) if len(q.prompt) <= room]
    order = sorted(fits, key=lambda i: len(asked[i].prompt))  # rows of one length share a bucket
    texts = [""] * len(asked)
    for first in range(0, len(order), _ROWS):
        chunk = order[first : first + _ROWS]
        # The last chunk is filled up, so that one program serves all.
        rows = [asked[i].prompt for i in (chunk + chunk[-1:] * _ROWS)[:_ROWS]]
        generation = decode(
            model,
            params,
            Prompts.of([list(row) for row in rows]),
            max_new_tokens=config.max_new_tokens,
            stop=on_tokens(ends),
        )
        for i, ids in zip(chunk, generation.rows(), strict=False):
            texts[i] = _text(tokenizer, ids, ends)
    return [
        Answer(q, text, reference, float(config.verifier(text, reference)))
        for q, text in zip(asked, texts, strict=True)
        for reference in [_text(tokenizer, list(q.reference), ends)]
    ]


def _text(tokenizer: Any, ids: list[int], ends: tuple[int, ...]) -> str:
    return tokenizer.decode([i for i in ids if i not in ends])


def accuracy(answers: list[Answer]) -> float:
    """Returns the mean score."""
    return float(np.mean([a.score for a in answers])) if answers else float("nan")


def evaluate_answers(
    run: "Run", model: Any, params: Any
) -> tuple[dict[str, float], dict[str, list[Answer]]]:
    """Returns `eval/<set>/accuracy` of every set that has questions, and the answers.

    Args:
        run: whose evaluation sets are asked.
        model: a `Transformer` or a `Predictor`, which answers.
        params: its parameters.
    """
    config, found, told = run.config.evaluation.answers, {}, {}
    if config is None:
        return {}, {}
    params = jax.block_until_ready(params)
    for name, store in run.eval_stores.items():
        if store.sequences > 1 or not store.has_weights:  # groups, or texts without prompts
            continue
        if not (asked := questions(store, config.max_examples)):
            continue
        told[name] = answer_all(run, model, params, asked)
        found[f"eval/{name}/accuracy"] = accuracy(told[name])
    return found, told


def write_answers(workdir: Path, step: int, answers: Mapping[str, list[Answer]]) -> None:
    """Writes the answers of the last evaluation to `answers.jsonl`, for people to read.

    Raises:
        StorageError: the file cannot be written.
    """
    lines = [
        {
            "step": step,
            "set": name,
            "example": a.question.name,
            "answer": a.text,
            "reference": a.reference,
            "score": a.score,
        }
        for name, found in answers.items()
        for a in found
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(Path(workdir) / "answers.jsonl", text)
