"""Puts the passages of queries in order, by scores or by a model that writes the order (DeAR).

    python -m tokjax.rerank --data=queries.jsonl --model=runs/dear --stage=pointwise --out=a.jsonl
    python -m tokjax.rerank --data=a.jsonl --model=runs/listwise --stage=listwise --out=b.jsonl

A line is {"query": ..., "passages": [...], "labels"?: [...], "ranking"?: [...]}; a passage is a
text or {"text", "title"?, "score"?}. The same lines come out with `ranking`, the passages' indices,
the best first. `pointwise` also writes each passage's `score`, so that its output is training data
with a teacher's scores; `listwise` starts from a line's `ranking`, or else from the given order.
Where lines have labels, measures of both orders are printed. The same command goes on where it was
stopped.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokjax import cli
from tokjax.data.rankings import Passage
from tokjax.errors import ConfigError, DataError
from tokjax.retrieval.listwise import Windows, parse_permutation, ranking_chat, rerank
from tokjax.retrieval.measures import kendall_tau, ndcg, reciprocal_rank

FLAGS = {
    "data": cli.FlagSpec("JSONL file of queries with passages", required=True),
    "model": cli.FlagSpec(
        "pointwise: workdir of a run with the objective dear; listwise: what `tokjax.load` takes",
        required=True,
    ),
    "stage": cli.FlagSpec(
        "scores, or an order that is written", Literal["pointwise", "listwise"], required=True
    ),
    "out": cli.FlagSpec("JSONL file that gets the lines with their rankings", required=True),
    "k": cli.FlagSpec("places that measures look at", int, 10),
    "batch_size": cli.FlagSpec("passages (listwise: windows) at a time", int, 8),
    "start": cli.FlagSpec("listwise: first place that is put in order", int, 0),
    "end": cli.FlagSpec("listwise: one past the last such place", int, 30),
    "window": cli.FlagSpec("listwise: places that the model sees at a time", int, 20),
    "step": cli.FlagSpec("listwise: places between windows", int, 10),
    "words": cli.FlagSpec("listwise: most words of a passage", int, 300),
    "temperature": cli.FlagSpec("listwise: 0 takes the likeliest token", float, 0.5),
    "max_new_tokens": cli.FlagSpec("listwise: most tokens of an answer", int, 1024),
    "chat_template": cli.FlagSpec("listwise: default the tokenizer's own", str | None),
    "seed": cli.FlagSpec("listwise: of all randomness", int, 0),
    "dtype": cli.FlagSpec("listwise: of the parameters; default as stored", str | None),
}
_CHUNK = 64  # queries that are read by one call and written together


@dataclass(frozen=True)
class _Query:
    """A line of the file."""

    record: dict[str, Any]
    text: str
    passages: tuple[Passage, ...]
    order: list[int]  # that is improved
    labels: list[float] | None


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False)
    if args.help:
        print(cli.help_text("tokjax.rerank", __doc__, FLAGS, args=args))
        return 0
    windows = _check(args)
    queries = list(read_queries(args["data"]))
    if not queries:
        raise DataError(f"{args['data']} holds no query")
    out, run = Path(args["out"]), _digest(args, queries)
    done = _done(out, run)
    if len(done) < len(queries):
        stage = _pointwise(args) if args["stage"] == "pointwise" else _listwise(args, windows)
        _write(args, queries, len(done), stage, out, run)
    found = _done(out, run)
    print(f"{out}: {len(found)} queries")
    _report(queries, found, args["k"])
    return 0


def read_queries(file: str) -> Iterator[_Query]:
    """Yields the queries of a JSONL file.

    Raises:
        DataError: a line is no JSON, or no query with passages; it names file and line.
    """
    from tokjax.data.files import numbered_lines
    from tokjax.data.records import BadRecord, check_passages

    for number, line in numbered_lines(file):
        place = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: no valid JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("query"), str):
            raise DataError(f'{place}: write {{"query": "...", "passages": [...]}}')
        try:
            passages = check_passages(record.get("passages"), "passages")
        except BadRecord as error:
            raise DataError(f"{place}: {error}") from None
        labels, order = record.get("labels"), record.get("ranking")
        n = len(passages)
        if labels is not None and (not _numbers(labels, n) or min(labels) < 0):
            raise DataError(f"{place}: labels must be a list of {n} numbers from 0, one a passage")
        if order is not None and (not _numbers(order, n) or sorted(order) != list(range(n))):
            raise DataError(f"{place}: ranking must hold each of 0 to {n - 1} once")
        order = list(range(n)) if order is None else [int(i) for i in order]
        yield _Query(record, record["query"], passages, order, labels)


def _numbers(values: Any, n: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == n
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    )


def _check(args: cli.Arguments) -> Windows:
    for name in ("k", "batch_size", "words", "max_new_tokens"):
        if args[name] < 1:
            raise ConfigError(f"--{name}={args[name]} must be at least 1")
    if args["seed"] < 0 or args["temperature"] < 0:
        raise ConfigError("--seed and --temperature must not be negative")
    return Windows(args["start"], args["end"], args["window"], args["step"])


def _digest(args: cli.Arguments, queries: Sequence[_Query]) -> str:
    """Returns what two runs that write into one file must share."""
    names = [name for name in FLAGS if name not in ("data", "out", "k", "batch_size")]
    told = [{name: args[name] for name in names}, [query.record for query in queries]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _done(out: Path, run: str) -> list[dict[str, Any]]:
    """Returns the lines that a file has already; a last one that was cut off is removed.

    Raises:
        ConfigError: the file was written with other settings or queries.
        DataError: it holds something else.
    """
    if not out.exists():
        return []
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            same = record["run"] == run
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{out}:{number} was not written by this command") from None
        if not same:
            raise ConfigError(
                f"{out} was written with another model, queries or settings: choose another --out"
            )
        found.append(record)
    if len(whole) < len(data):
        with open(out, "r+b") as file:
            file.truncate(len(whole))
    return found


Stage = Callable[[int, Sequence[_Query]], list[dict[str, Any]]]


def _write(
    args: cli.Arguments, queries: Sequence[_Query], first: int, stage: Stage, out: Path, run: str
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from tokjax.files import AppendFile, storage_errors

    with storage_errors(out.parent, "create"):
        out.parent.mkdir(parents=True, exist_ok=True)
    file = AppendFile(out)
    size = _CHUNK if args["stage"] == "pointwise" else args["batch_size"]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("queries", total=len(queries), completed=first)
        while first < len(queries):
            chunk = queries[first : first + size]
            lines = [
                json.dumps({**query.record, **told, "run": run}, ensure_ascii=False) + "\n"
                for query, told in zip(chunk, stage(first, chunk), strict=True)
            ]
            file.append("".join(lines).encode())
            progress.advance(task, len(chunk))
            first += len(chunk)
    file.sync()
    file.close()


def _pointwise(args: cli.Arguments) -> Stage:
    """Returns the stage that scores each passage on its own."""
    from tokjax.retrieval.pointwise import load_reranker

    reranker = load_reranker(Path(args["model"]).expanduser())

    def stage(first: int, queries: Sequence[_Query]) -> list[dict[str, Any]]:
        groups = [(query.text, query.passages) for query in queries]
        told = []
        scores = reranker.scores(groups, batch_size=args["batch_size"])
        for query, own in zip(queries, scores, strict=True):
            given = [p if isinstance(p, dict) else {"text": p} for p in query.record["passages"]]
            passages = [{**p, "score": float(s)} for p, s in zip(given, own, strict=True)]
            ranking = np.argsort(-own, kind="stable").tolist()
            told.append({"passages": passages, "ranking": ranking})
        return told

    return stage


def _listwise(args: cli.Arguments, windows: Windows) -> Stage:
    """Returns the stage that has a language model write the order of windows."""
    import tokjax

    lm = tokjax.load(args["model"], dtype=args["dtype"])
    size = args["batch_size"]

    def stage(first: int, queries: Sequence[_Query]) -> list[dict[str, Any]]:
        def order(asked: Sequence[tuple[int, int, list[int]]]) -> list[list[int]]:
            prompts, seeds = [], []
            for i, step, items in asked:
                query = queries[i]
                shown = [query.passages[j] for j in items]
                chat = ranking_chat(query.text, shown, words=args["words"])
                prompts.append(lm.chat(chat, template=args["chat_template"]))
                seeds.append(_seed(args["seed"], first + i, step))
            fill = size - len(asked)  # every call runs the same program
            found = lm.generate(
                [*prompts, *prompts[:1] * fill],
                seeds=[*seeds, *seeds[:1] * fill],
                temperature=args["temperature"],
                max_new_tokens=args["max_new_tokens"],
            )
            return [
                parse_permutation(text, len(items))
                for text, (_, _, items) in zip(found.texts, asked, strict=False)
            ]

        ranked = rerank([query.order for query in queries], order, windows)
        return [{"ranking": ranking} for ranking in ranked]

    return stage


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _report(queries: Sequence[_Query], found: Sequence[dict[str, Any]], k: int) -> None:
    """Prints measures of the orders before and after, of queries that have labels."""
    rows, taus = [], []
    for query, record in zip(queries, found, strict=True):
        teacher = [p.score for p in query.passages]
        scores = [p.get("score") for p in record["passages"] if isinstance(p, dict)]
        if None not in teacher and teacher != scores and len(scores) == len(teacher):
            taus.append(kendall_tau(teacher, scores))  # type: ignore[arg-type]
        if query.labels is None:
            continue
        row = []
        for order in (query.order, record["ranking"]):
            relevance = [query.labels[i] for i in order]
            row += [ndcg(relevance, k), reciprocal_rank(relevance, k)]
        rows.append(row)
    if rows:
        before, mrr_before, after, mrr_after = _means(np.array(rows, float))
        print(f"nDCG@{k} {after:.4f} (before {before:.4f}), ", end="")
        print(f"MRR@{k} {mrr_after:.4f} (before {mrr_before:.4f}), {len(rows)} queries with labels")
    if taus:
        (tau,) = _means(np.array(taus, float)[:, None])
        print(f"Kendall tau to the given scores {tau:.4f}, {len(taus)} queries")


def _means(values: np.ndarray) -> list[float]:
    """Returns the mean of each column, of the finite values; NaN without any."""
    kept = [column[np.isfinite(column)] for column in values.T]
    return [float(column.mean()) if len(column) else float("nan") for column in kept]


if __name__ == "__main__":
    cli.run(main)
