"""Chooses training examples from a pool: scores all of them and keeps the best.

    python -m tokjax.select --method=trim --model=runs/warm --pool=pool.jsonl --target=few.jsonl --budget=5% --out=chosen --kind=response
    python -m tokjax.select --method=random --model=smollm2-135m --pool=pool.jsonl --budget=200 --out=random --set.seed=1
    python -m tokjax.select --method=shad --model=runs/warm --pool=pool.jsonl --budget=100% --out=shad
    python -m tokjax.select --method=tvm --model=runs/warm --pool=solutions.jsonl --kind=rated --budget=100% --out=values

The folder gets `selection.parquet`, which `data.train.0.artifact` of a training takes, and
`report.html`. The same command continues where it was stopped; with another budget it chooses anew
from the same scores. Of `shad` and `tvm` the tokens' channels are always kept.
"""  # noqa: E501

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokjax import cli
from tokjax.errors import ConfigError, DataError

FLAGS = {
    "method": cli.FlagSpec("trim, rds, gradient, loss, longest, random, shad, tvm", str, "trim"),
    "model": cli.FlagSpec("that scores: what `tokjax.load` takes", required=True),
    "pool": cli.FlagSpec("JSONL or Parquet file (or a pattern) to choose from", required=True),
    "target": cli.FlagSpec("file of a few examples of the task that is meant", str | None),
    "budget": cli.FlagSpec("how much is kept: a share as 5%, or a count", required=True),
    "out": cli.FlagSpec("folder of the results", required=True),
    "kind": cli.FlagSpec(
        "what a record is", Literal["response", "messages", "text", "rated"], "response"
    ),
    "source": cli.FlagSpec("of the records, as --source.prompt=question", dict, {}),
    "target_source": cli.FlagSpec("the same of the target, where it differs", dict, {}),
    "set": cli.FlagSpec("option of the method, as --set.lam=0.3", dict, {}),
    "channels": cli.FlagSpec("keep what was found of each token too", bool, False),
    "max_tokens": cli.FlagSpec("of an example; what is behind is not read", int, 2048),
    "batch_tokens": cli.FlagSpec("places computed at a time", int, 4096),
    "on_error": cli.FlagSpec("bad records", Literal["raise", "skip"], "raise"),
    "dtype": cli.FlagSpec("of the parameters; default as stored", str | None),
}
SELECTION, REPORT, SCORES = "selection.parquet", "report.html", "scores.jsonl"


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False)
    if args.help:
        print(cli.help_text("tokjax.select", __doc__, FLAGS, args=args))
        return 0
    from tokjax.selection.methods import selector
    from tokjax.selection.scoring import parse_budget

    parse_budget(args["budget"])
    method = selector(args["method"], args["set"])
    _check(args, method.needs_target)
    print(select(args, method), end="")
    return 0


def _check(args: cli.Arguments, needs_target: bool) -> None:
    from tokjax.data.files import expand_files

    if needs_target and args["target"] is None:
        raise ConfigError(
            f"--method={args['method']} compares with a target: give --target, a file of a few "
            f"examples of the task"
        )
    if not needs_target and args["target"] is not None:
        raise ConfigError(f"--method={args['method']} looks at no target: leave --target out")
    for name, least in (("max_tokens", 2), ("batch_tokens", 1)):
        if args[name] < least:
            raise ConfigError(f"--{name}={args[name]} must be at least {least}")
    for name in ("pool", "target"):
        if args[name] is not None:
            for file in expand_files((args[name],)):
                if Path(file).stat().st_size == 0:
                    raise DataError(f"--{name}={file} is empty: it holds no record")


def select(args: cli.Arguments, method: Any) -> str:
    """Scores, chooses and writes; returns a table of what came out."""
    import jax

    import tokjax
    from tokjax.config import to_dict
    from tokjax.data.artifact import write_artifact
    from tokjax.models.digests import sampled_digest
    from tokjax.selection.report import Selection, length_correlation, write_report
    from tokjax.selection.scoring import (
        PoolSelector,
        Target,
        budget_count,
        keep_best,
        longest_example,
        score,
    )
    from tokjax.selection.stores import open_store, records, tokenizer_of

    lm = tokjax.load(args["model"], dtype=args["dtype"])
    tokenizer = tokenizer_of(args["model"], lm.tokenizer)
    stores: dict[str, Any] = {"pool": None, "target": None}
    for name in stores:
        if args[name] is not None:
            options = {**args["source"], **(args["target_source"] if name == "target" else {})}
            source = records(args[name], args["kind"], options)
            stores[name] = open_store(source, tokenizer, on_error=args["on_error"])
    pool, target = stores["pool"], stores["target"]
    count = budget_count(args["budget"], pool.num_examples)

    # A method that looks at the whole pool is there for what it says of tokens.
    channels = args["channels"] or isinstance(method, PoolSelector)
    identity = {
        "method": to_dict(method),
        "model": args["model"],
        "parameters": sampled_digest(lm.params),
        "stores": {name: store.fingerprint for name, store in stores.items() if store is not None},
        "max_tokens": args["max_tokens"],
        "channels": channels,
    }
    file = Path(args["out"]) / SCORES
    scoring = {
        "target": target,
        "batch_tokens": args["batch_tokens"],
        "max_tokens": args["max_tokens"],
    }
    scores, found = _scores(file, identity, method, lm, pool, scoring)
    keep = keep_best(scores, count)
    counts = {
        "examples": pool.num_examples,
        "kept": int(keep.sum()),
        "dropped": int((~keep).sum()),
        "unscored": int((~np.isfinite(scores)).sum()),
        "skipped_records": pool.manifest["counts"]["skipped"],
    }
    if not counts["kept"]:
        raise DataError(
            f"no example of {args['pool']} has a token that counts, so none can be kept: see "
            f"--kind and the method's option scope"
        )
    options = to_dict(method)
    options.pop("name")
    meta = {
        "method": args["method"],
        "options": options,
        "model": args["model"],
        "pool": args["pool"],
        "target": args["target"],
        "budget": args["budget"],
        "max_tokens": args["max_tokens"],
        "tokenizer": lm.tokenizer.fingerprint,
        "stores": identity["stores"],
        "parameters": identity["parameters"],
        "counts": counts,
        "length_correlation": length_correlation(scores, pool.lengths),
        "versions": {"tokjax": tokjax.__version__, "jax": jax.__version__},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if isinstance(method, PoolSelector):
        longest = longest_example(lm.model, args["max_tokens"])
        meta["found"] = method.summary(Target(pool, args["batch_tokens"], longest), found)
    selection = Selection(pool, scores, keep, meta)
    if not channels:
        shown = [i for group in selection.shown() for i in group]
        found = score(
            method, lm.model, lm.params, pool, indices=shown, channels=True, **scoring
        ).channels
    every = range(pool.num_examples)
    write_artifact(
        Path(args["out"]) / SELECTION,
        keys=[pool.example_key(i) for i in every],
        names=[pool.example_name(i) for i in every],
        n_tokens=pool.lengths,
        scores=scores,
        keep=keep,
        channels=found if channels else {},
        meta=meta,
    )
    name = next(iter(found), None)
    channel = None
    if name is not None:
        channel = (name, {i: v for i, v in enumerate(found[name]) if v is not None})
    write_report(Path(args["out"]) / REPORT, selection, lm.tokenizer, channel)
    return _table(selection, Path(args["out"]))


def _scores(
    file: Path, identity: dict[str, Any], method: Any, lm: Any, pool: Any, scoring: dict[str, Any]
) -> tuple[np.ndarray, dict[str, list[Any]]]:
    """Returns the scores of the pool, and channels where they are kept: those that the file has,
    and the rest, which it gets.
    """
    from rich.console import Console
    from rich.progress import Progress

    from tokjax.files import AppendFile, storage_errors
    from tokjax.selection.scoring import score

    told = json.dumps(identity, sort_keys=True)
    run = hashlib.sha256(told.encode()).hexdigest()[:16]
    scores, left, channels = _done(file, run, pool.num_examples)
    if not left:
        return scores, channels
    with storage_errors(file.parent, "create"):
        file.parent.mkdir(parents=True, exist_ok=True)
    out = AppendFile(file)
    with closing(out), Progress(console=Console(stderr=True)) as progress:
        total = pool.num_examples
        task = progress.add_task("examples", total=total, completed=total - len(left))

        def keep(rows: Any, found: Any) -> None:
            lines = []
            for b, i in enumerate(rows.indices.tolist()):
                if i < 0:
                    continue
                value = float(found[0][b])
                record = {"index": i, "score": value if np.isfinite(value) else None, "run": run}
                for name, values in found[1].items() if identity["channels"] else ():
                    own = np.zeros(int(pool.lengths[i]), "<f4")
                    own[: rows.lengths[b]] = values[b, : rows.lengths[b]]
                    text = base64.b64encode(own.tobytes()).decode()
                    record = {**record, "tokens": {**record.get("tokens", {}), name: text}}
                lines.append(json.dumps(record) + "\n")
            out.append("".join(lines).encode())
            progress.advance(task, len(lines))

        learning = None

        def learned(done: int, steps: int) -> None:
            nonlocal learning
            if learning is None:
                learning = progress.add_task("tuning a copy", total=steps)
            progress.update(learning, completed=done)

        score(
            method,
            lm.model,
            lm.params,
            pool,
            indices=left,
            on_batch=keep,
            on_step=learned,
            **scoring,
        )
        out.sync()
    scores, _, channels = _done(file, run, pool.num_examples)
    return scores, channels


def _done(
    file: Path, run: str, examples: int
) -> tuple[np.ndarray, list[int], dict[str, list[Any]]]:
    """Returns the scores that a file has, the numbers of the examples that are left, and channels.

    A last line that was cut off is removed.

    Raises:
        ConfigError: the file is of another model, data or method.
        DataError: it holds something else.
    """
    scores, done = np.full(examples, np.nan), np.zeros(examples, bool)
    channels: dict[str, list[Any]] = {}
    if file.exists():
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                found, i, value = record["run"], int(record["index"]), record["score"]
                value = -np.inf if value is None else float(value)
                tokens = {
                    name: np.frombuffer(base64.b64decode(text), "<f4")
                    for name, text in record.get("tokens", {}).items()
                }
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f"{file}:{number} was not written by this command") from None
            if found != run or not 0 <= i < examples:
                raise ConfigError(
                    f"{file} is of another model, data, method or options: choose another --out"
                )
            scores[i], done[i] = value, True
            for name, own in tokens.items():
                channels.setdefault(name, [None] * examples)[i] = own
        if len(whole) < len(data):
            with open(file, "r+b") as handle:
                handle.truncate(len(whole))
    return scores, np.flatnonzero(~done).tolist(), channels


def _table(selection: Any, out: Path) -> str:
    meta, lengths = selection.meta, np.asarray(selection.store.lengths)
    lines = [f"{'':10} {'examples':>8} {'tokens each':>11} {'lowest':>9} {'highest':>9}"]
    for name, group in (("kept", selection.keep), ("dropped", ~selection.keep)):
        scores = selection.scores[group & selection.scored]
        low, high = (f"{v:.4f}" for v in (scores.min(), scores.max())) if len(scores) else "--"
        mean = f"{lengths[group].mean():.1f}" if group.any() else "-"
        lines.append(f"{name:10} {int(group.sum()):>8} {mean:>11} {low:>9} {high:>9}")
    for name, value in meta.get("found", {}).items():
        lines.append(f"{name.replace('_', ' ')}: {value}")
    correlation = meta["length_correlation"]
    told = "none" if correlation is None else f"{correlation:.3f}"
    lines.append(f"rank correlation of score and length: {told}")
    if meta["counts"]["unscored"]:
        lines.append(f"without a score, never kept: {meta['counts']['unscored']}")
    return "\n".join([*lines, f"{out / SELECTION}, {out / REPORT}"]) + "\n"


if __name__ == "__main__":
    cli.run(main)
