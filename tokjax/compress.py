"""Makes long reasoning traces shorter for fine-tuning, by R1-Compress (arXiv 2505.16838).

    python -m tokjax.compress --data=traces.jsonl --model=qwen2.5-0.5b-instruct --out=short.jsonl
    python -m tokjax.train --config=configs/sft.py:data=short.jsonl,kind=response --workdir=runs/sft

A line holds `prompt` and `response`, or `messages` that end with the assistant's. Lines of --out
are the same with a shorter response and a field `compression` that tells lengths; traces that are
left out are in a file beside it, `short.dropped.jsonl`, with the reason. The same command continues
where it was stopped; what becomes of a trace depends on its line and the seed alone.
"""

import dataclasses
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tokjax import cli
from tokjax.errors import ConfigError, DataError
from tokjax.resumable import appended, finished

FLAGS = {
    "data": cli.FlagSpec("JSONL file of traces", required=True),
    "model": cli.FlagSpec("what `tokjax.load` takes; scores, and rewrites", required=True),
    "out": cli.FlagSpec("JSONL file that gets the shorter traces", required=True),
    "rewriter": cli.FlagSpec("another model that rewrites", str | None),
    "compressor": cli.FlagSpec("lm; prune (tokens); or module:function(text, seed)", str, "lm"),
    "method": cli.FlagSpec("r1, likelihood, shortest, random, instance", str, "r1"),
    "candidates": cli.FlagSpec("versions of a chunk that the model writes", int, 8),
    "keep": cli.FlagSpec("share of them, the shortest, that is searched", float, 0.5),
    "min_words": cli.FlagSpec("least number of words of a chunk", int, 50),
    "normalise": cli.FlagSpec("mean or total log-probability", str, "mean"),
    "beams": cli.FlagSpec("sequences of chunks that the search keeps", int, 1),
    "numbers": cli.FlagSpec("which numbers a version must keep: none, later, all", str, "none"),
    "begin": cli.FlagSpec("tag before the thinking", str, "<think>"),
    "end": cli.FlagSpec("tag behind it; what follows stays as it is", str, "</think>"),
    "verifier": cli.FlagSpec(
        "or module:function(after, before); default compares box, ####, last number or line",
        str | None,
    ),
    "prompt_file": cli.FlagSpec("text with {chunk} that asks for a version", str | None),
    "temperature": cli.FlagSpec("of the rewriter", float, 0.8),
    "prune_keep": cli.FlagSpec("share of tokens that --compressor=prune keeps", float, 0.7),
    "seed": cli.FlagSpec("of all randomness", int, 0),
    "batch_size": cli.FlagSpec("versions written at a time", int, 16),
    "traces": cli.FlagSpec("traces between two writes to the file", int, 8),
    "dtype": cli.FlagSpec("of the parameters; default as stored", str | None),
}
_SHARED = ("method", "keep", "min_words", "normalise", "beams", "numbers", "begin", "end", "seed")
_NOT_DECISIVE = ("out", "data", "batch_size", "traces", "prompt_file")


@dataclass(frozen=True)
class _Line:
    """A line of the data."""

    index: int
    record: Mapping[str, Any]

    @property
    def response(self) -> str:
        if "messages" in self.record:
            return self.record["messages"][-1]["content"]
        return self.record["response"]

    def with_response(self, text: str) -> dict[str, Any]:
        if "messages" not in self.record:
            return {**self.record, "response": text}
        *before, last = self.record["messages"]
        return {**self.record, "messages": [*before, {**last, "content": text}]}


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False)
    if args.help:
        print(cli.help_text("tokjax.compress", __doc__, FLAGS, args=args))
        return 0
    # Imported here: --help needs no model.
    from tokjax.finetuning.r1_compress import PROMPT, Dropped, Settings, Totals

    settings = Settings(**{name: args[name] for name in _SHARED})
    for name in ("candidates", "batch_size", "traces"):
        if args[name] < 1:
            raise ConfigError(f"--{name}={args[name]} must be at least 1")
    prompt = PROMPT if args["prompt_file"] is None else _text(args["prompt_file"])
    same = _same(args["verifier"])
    lines = list(_lines(args["data"]))
    out = Path(args["out"])
    beside = out.with_name(f"{out.stem}.dropped.jsonl")
    run = _digest(args, prompt, lines)
    totals, done = Totals(), set[int]()
    for index, one in finished(out, run, _read_kept):
        done.add(index)
        totals.add(one)
    for index, reason in finished(beside, run, _read_dropped):
        if index not in done:
            done.add(index)
            totals.add(Dropped(reason))
    todo = [line for line in lines if line.index not in done]
    if todo:
        _write_all(args, prompt, same, settings, todo, len(done), (out, beside), run, totals)
    print(_told(out, beside, len(lines), totals))
    if not totals.kept:
        print("no trace was kept: nothing can be trained on", file=sys.stderr)
    return 0


def _lines(file: str) -> Iterator[_Line]:
    """Yields the lines of the data.

    Raises:
        DataError: a line holds no trace; it names file and line.
    """
    from tokjax.data.files import numbered_lines

    for number, text in numbered_lines(file):
        try:
            record = json.loads(text)
        except ValueError as error:
            raise DataError(f"{file}:{number}: no valid JSON: {error}") from None
        if not _is_trace(record):
            raise DataError(
                f'{file}:{number}: write {{"prompt": "...", "response": "..."}} or '
                f'{{"messages": [...]}} that end with the assistant\'s'
            )
        yield _Line(number - 1, record)


def _is_trace(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    if "messages" not in record:
        return all(isinstance(record.get(name), str) for name in ("prompt", "response"))
    messages = record["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        return False
    last = messages[-1]
    return (
        all(isinstance(m, dict) for m in messages)
        and last.get("role") == "assistant"
        and isinstance(last.get("content"), str)
    )


def _text(file: str) -> str:
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt_file={file}: {error}") from None


def _same(verifier: str | None) -> Callable[[str, str], bool]:
    from tokjax.config import Choice, resolve
    from tokjax.finetuning.r1_compress import same_final_answer
    from tokjax.verifiers import Function

    if verifier is None:
        return same_final_answer
    if ":" in verifier:
        check = Function(verifier)
    else:
        chosen: Any = Annotated[Any, Choice("verifier")]
        check = resolve(chosen, {"name": verifier}, path="--verifier")
    return lambda before, after: check(after, before) >= 1


def _digest(args: cli.Arguments, prompt: str, lines: Sequence[_Line]) -> str:
    """Returns what two runs that write into one file must share."""
    told = {name: args[name] for name in FLAGS if name not in _NOT_DECISIVE}
    whole = json.dumps([told, prompt, [line.record for line in lines]], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _read_kept(record: Any) -> tuple[str, tuple[int, Any]]:
    from tokjax.finetuning.r1_compress import Compressed

    told = dict(record["compression"])
    run, index = told.pop("run"), int(told.pop("index"))
    pairs = {name: tuple(told.pop(name)) for name in ("tokens", "markers")}
    return run, (index, Compressed(text="", **pairs, **told))


def _read_dropped(record: Any) -> tuple[str, tuple[int, str]]:
    return record["run"], (int(record["index"]), str(record["reason"]))


def _write_all(
    args: cli.Arguments,
    prompt: str,
    same: Callable[[str, str], bool],
    settings: Any,
    lines: Sequence[_Line],
    before: int,
    files: tuple[Path, Path],
    run: str,
    totals: Any,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from tokjax import load
    from tokjax.finetuning.r1_compress import Dropped, LMScorer, compress

    lm = load(args["model"], dtype=args["dtype"])
    compressor, scorer = _compressor(args, prompt, lm), LMScorer(lm)
    kept, dropped = (appended(file) for file in files)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("traces", total=before + len(lines), completed=before)
        for first in range(0, len(lines), args["traces"]):
            some = lines[first : first + args["traces"]]
            found = compress(
                [line.response for line in some],
                compressor,
                scorer,
                settings,
                contexts=[_context(lm, line.record) for line in some],
                numbers=[line.index for line in some],
                same=same,
            )
            for line, one in zip(some, found, strict=True):
                totals.add(one)
                told = {"index": line.index, "run": run}
                if isinstance(one, Dropped):
                    dropped.append(_json({**told, "reason": one.reason}))
                    continue
                facts = {**told, **dataclasses.asdict(one)}
                text = facts.pop("text")
                kept.append(_json({**line.with_response(text), "compression": facts}))
            progress.advance(task, len(some))
    for file in (kept, dropped):
        file.sync()
        file.close()


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _context(lm: Any, record: Mapping[str, Any]) -> Any:
    if "messages" not in record:
        return record["prompt"]
    # As the data of fine-tuning is rendered.
    template = "chatml" if lm.tokenizer.chat_template is None else None
    return lm.chat(record["messages"][:-1], template=template)


def _compressor(args: cli.Arguments, prompt: str, lm: Any) -> Any:
    from tokjax import load
    from tokjax.finetuning.r1_compress import LMRewriter, TokenPruner, by_function

    name = args["compressor"]
    if name == "prune":
        return TokenPruner(lm, args["prune_keep"], batch_size=args["batch_size"])
    if name != "lm":
        module, _, function = name.partition(":")
        try:
            return by_function(getattr(importlib.import_module(module), function))
        except (ImportError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"--compressor={name} names no function ({error}): write lm, prune or "
                f"module:function"
            ) from None
    writer = lm if args["rewriter"] is None else load(args["rewriter"], dtype=args["dtype"])
    return LMRewriter(
        writer,
        args["candidates"],
        prompt=prompt,
        temperature=args["temperature"],
        batch_size=args["batch_size"],
    )


def _told(out: Path, beside: Path, lines: int, totals: Any) -> str:
    """Returns what became of the traces, in words."""
    before, after = totals.tokens
    words = [f"{out}: {totals.kept} of {lines} traces"]
    if totals.kept:
        words.append(f"thinking of {before:,} tokens made {after:,} ({after / before:.1%})")
        words.append(f"{totals.markers[1]} of {totals.markers[0]} words of reflection left")
    for kind, counts in (
        (f"left out (in {beside.name})", totals.dropped),
        ("candidates discarded", totals.discarded),
    ):
        if counts:
            told = ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common())
            words.append(f"{kind}: {told}")
    return "\n  ".join(words)


if __name__ == "__main__":
    cli.run(main)
