"""Writes continuations of prompts, of one or of a file of them.

    python -m tokjax.generate --model=smollm2-135m --prompt="The capital of Japan is"
    python -m tokjax.generate --model=runs/mine --prompts=in.jsonl --out=out.jsonl --temperature=0.8
    python -m tokjax.generate --model=smollm2-135m --prompt="Rome? " --choices=yes,no
    python -m tokjax.generate --model=runs/mine --prompt=Once --strategy=dola --option.layers=[2]
    python -m tokjax.generate --model=big --prompt=Hi --strategy=reasoners --option.reasoners=runs/r

A line of the file is a JSON string, or an object with `prompt` (text) or `messages` (a chat). The
same command continues where it was stopped; a line's text depends on its number and the seed, not
on what was computed beside it.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokjax import cli
from tokjax.errors import ConfigError, DataError
from tokjax.resumable import appended, finished

FLAGS = {
    "model": cli.FlagSpec("what `tokjax.load` takes: name, file, folder, workdir", required=True),
    "prompt": cli.FlagSpec("text to continue", str | None),
    "prompts": cli.FlagSpec("JSONL file of prompts", str | None),
    "out": cli.FlagSpec("JSONL file that gets the texts, with --prompts", str | None),
    "chat": cli.FlagSpec("--prompt is a user's message, not a text", bool, False),
    "samples": cli.FlagSpec("texts for each prompt", int, 1),
    "max_new_tokens": cli.FlagSpec("most tokens of a text", int, 64),
    "temperature": cli.FlagSpec("0 takes the likeliest token", float, 0.0),
    "top_k": cli.FlagSpec("how many of the likeliest tokens may be drawn; 0: all", int, 0),
    "top_p": cli.FlagSpec("probability mass that may be drawn from", float, 1.0),
    "min_p": cli.FlagSpec("least probability over that of the likeliest token", float, 0.0),
    "repetition_penalty": cli.FlagSpec("1: none", float, 1.0),
    "regex": cli.FlagSpec("expression that each whole text matches", str | None),
    "json_schema": cli.FlagSpec("schema by which each text is valid: file or JSON", str | None),
    "choices": cli.FlagSpec("texts to choose from: yes,no or a JSON list", str | None),
    "strategy": cli.FlagSpec(
        "sample, dola, layercake, guided, reasoners, beam, contrastive_search, speculative",
        str,
        "sample",
    ),
    "option": cli.FlagSpec("of the strategy, as --option.weight=1.5", dict, {}),
    "stop": cli.FlagSpec("text that ends a text; default the EOS token alone", str | None),
    "seed": cli.FlagSpec("of all randomness", int, 0),
    "stream": cli.FlagSpec("print as it is written; default on a terminal", bool, None),
    "batch_size": cli.FlagSpec("texts written at a time", int, 8),
    "dtype": cli.FlagSpec("of the parameters; default as stored", str | None),
}
WHOLE = ("beam", "contrastive_search", "speculative")  # strategies that write no text in pieces
_SETTINGS = (
    *("strategy", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
)


@dataclass(frozen=True)
class _Job:
    """One text to write."""

    index: int  # of the prompt
    sample: int
    prompt: Any  # a text, or messages

    @property
    def key(self) -> tuple[int, int]:
        return self.index, self.sample


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False)
    if args.help:
        print(cli.help_text("tokjax.generate", __doc__, FLAGS, args=args))
        return 0
    _check(args)
    constraint = _constraint(args)
    if args["prompts"] is None:
        prompt = [{"role": "user", "content": args["prompt"]}] if args["chat"] else args["prompt"]
        jobs = [_Job(0, sample, prompt) for sample in range(args["samples"])]
        if _streams(args):
            _show(args, jobs, constraint)
            return 0
        for texts in _written(args, jobs, constraint):
            for _, record in texts:
                print(record["text"])
        return 0
    prompts = list(read_prompts(args["prompts"]))
    out, run = Path(args["out"]), _digest(args, prompts, constraint)
    done = set(finished(out, run, _key))
    jobs = [
        job
        for index, prompt in enumerate(prompts)
        for sample in range(args["samples"])
        if (job := _Job(index, sample, prompt)).key not in done
    ]
    _write_all(args, jobs, constraint, out, run, len(done))
    print(f"{out}: {len(done) + len(jobs)} texts of {len(prompts)} prompts")
    return 0


def _streams(args: cli.Arguments) -> bool:
    if args["stream"] is not None:
        return args["stream"]
    return sys.stdout.isatty() and args["strategy"] not in WHOLE


def read_prompts(file: str) -> Iterator[Any]:
    """Yields the prompt of each line of a JSONL file: a text, or the messages of a chat.

    Raises:
        DataError: a line is no JSON, or holds no prompt; it names file and line.
    """
    from tokjax.data.files import numbered_lines

    for number, line in numbered_lines(file):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: no valid JSON: {error}") from None
        if isinstance(record, str):
            yield record
            continue
        known = [k for k in ("prompt", "messages") if isinstance(record, dict) and k in record]
        if len(known) != 1 or not isinstance(
            record[known[0]], list if known[0] == "messages" else str
        ):
            raise DataError(
                f'{file}:{number}: write a string, {{"prompt": "..."}} or {{"messages": [...]}}'
            )
        yield record[known[0]]


def _check(args: cli.Arguments) -> None:
    if (args["prompt"] is None) == (args["prompts"] is None):
        raise ConfigError("give --prompt or --prompts, one of them")
    if (args["prompts"] is None) != (args["out"] is None):
        raise ConfigError("--prompts and --out go together: give both or neither")
    if args["chat"] and args["prompt"] is None:
        raise ConfigError("--chat is for --prompt; a line of --prompts says 'messages' for a chat")
    for name in ("samples", "batch_size", "max_new_tokens"):
        if args[name] < 1:
            raise ConfigError(f"--{name}={args[name]} must be at least 1")
    if args["stream"] and args["prompt"] is None:
        raise ConfigError("--stream is for --prompt; texts of --prompts go to a file")
    if args["seed"] < 0:
        raise ConfigError(f"--seed={args['seed']} must not be negative")
    if args["samples"] > 1 and args["temperature"] == 0:
        raise ConfigError(
            f"--samples={args['samples']} at --temperature=0 would write the same text: set "
            f"--temperature above 0"
        )


def _constraint(args: cli.Arguments) -> dict[str, Any]:
    """Returns what a text has to satisfy, as `LanguageModel.generate` takes it.

    Raises:
        ConfigError: there are several constraints, or one cannot be read.
    """
    given = [name for name in ("regex", "json_schema", "choices") if args[name] is not None]
    if len(given) > 1:
        raise ConfigError(f"give --{given[0]} or --{given[1]}, one of them")
    if not given:
        return {}
    (name,), text = given, args[given[0]]
    if name == "json_schema" and not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--json_schema={text}: {error}; give a file, or JSON") from None
    if name == "choices":
        if not text.lstrip().startswith("["):
            return {name: text.split(",")}
        try:
            return {name: json.loads(text)}
        except ValueError as error:
            raise ConfigError(f"--choices={text} is no valid JSON list: {error}") from None
    return {name: text}


def _digest(args: cli.Arguments, prompts: Sequence[Any], constraint: Mapping[str, Any]) -> str:
    """Returns what two runs that write into one file must share."""
    names = ("model", "dtype", "seed", "samples", "stop", "option", *_SETTINGS)
    told = [{name: args[name] for name in names}, constraint, prompts]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _key(record: Any) -> tuple[str, tuple[int, int]]:
    return record["run"], (int(record["index"]), int(record["sample"]))


def _write_all(
    args: cli.Arguments,
    jobs: Sequence[_Job],
    constraint: Mapping[str, Any],
    out: Path,
    run: str,
    before: int,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    file = appended(out)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("texts", total=before + len(jobs), completed=before)
        for texts in _written(args, jobs, constraint):
            lines = [
                json.dumps({"index": j.index, "sample": j.sample, **record, "run": run}) + "\n"
                for j, record in texts
            ]
            file.append("".join(lines).encode())
            progress.advance(task, len(texts))
    file.sync()
    file.close()


def _show(args: cli.Arguments, jobs: Sequence[_Job], constraint: Mapping[str, Any]) -> None:
    """Prints the texts of one prompt as they are written, one after the other."""
    import tokjax

    lm = tokjax.load(args["model"], dtype=args["dtype"])
    settings = _settings(lm, args, constraint)
    for job in jobs:
        found = lm.stream([_prompt(lm, job)], seeds=[_seed(args["seed"], job)], **settings)
        for _, piece in found:
            print(piece, end="", flush=True)
        print()


def _written(
    args: cli.Arguments, jobs: Sequence[_Job], constraint: Mapping[str, Any]
) -> Iterator[list[tuple[_Job, Mapping[str, Any]]]]:
    """Yields batches of jobs with what was written."""
    if not jobs:
        return
    import tokjax

    lm = tokjax.load(args["model"], dtype=args["dtype"])
    size, settings = args["batch_size"], _settings(lm, args, constraint)
    for first in range(0, len(jobs), size):
        batch = jobs[first : first + size]
        prompts = [_prompt(lm, job) for job in batch]
        seeds = [_seed(args["seed"], job) for job in batch]
        fill = size - len(batch) if first else 0  # the last batch runs the program of the others
        found = lm.generate(
            [*prompts, *prompts[:1] * fill],
            seeds=[*seeds, *seeds[:1] * fill],
            **settings,
        )
        rows = []
        for i, job in enumerate(batch):
            n = int(found.lengths[i])
            rows.append(
                (
                    job,
                    {
                        "text": found.texts[i],
                        "tokens": n,
                        "stopped": bool(found.stopped[i]),
                        "mean_logprob": round(float(found.logprobs[i, :n].mean()), 6),
                    },
                )
            )
        yield rows


def _prompt(lm: Any, job: _Job) -> Any:
    return job.prompt if isinstance(job.prompt, str) else lm.chat(job.prompt)


def _settings(lm: Any, args: cli.Arguments, constraint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `LanguageModel.generate` takes besides prompts and seeds."""
    from tokjax import strategies

    settings = {name: args[name] for name in _SETTINGS}
    for name in args["option"]:
        if name in settings or name in ("seed", "seeds", "stop"):
            raise ConfigError(f"--option.{name} is no option of a strategy: write --{name}")
    stop = None if args["stop"] is None else [*lm.eos_ids, args["stop"]]
    options = strategies.opened(args["strategy"], args["option"], dtype=args["dtype"])
    return {**settings, **constraint, **options, "stop": stop}


def _seed(seed: int, job: _Job) -> int:
    return int(np.random.SeedSequence([seed, job.index, job.sample]).generate_state(1)[0])


if __name__ == "__main__":
    cli.run(main)
