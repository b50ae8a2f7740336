"""Finds what each token of preference pairs weighs, once, before a training.

    python -m tokjax.annotate --method=figa --model=runs/sft --pairs=revisions.jsonl --out=edits.parquet
    python -m tokjax.annotate --method=cdpo --model=runs/sft --right=runs/right --wrong=runs/wrong --pairs=pairs.jsonl --out=critical.parquet

`figa` reads a revised (chosen) and an initial (rejected) answer and marks the edits; train on its
file with the objective `figa`. `cdpo` contrasts a model of right with one of wrong answers; train
with `dpo`. The file is what `data.train.0.artifact` of a training that starts from --model takes.
"""  # noqa: E501

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokjax import cli
from tokjax.errors import ConfigError, DataError

FLAGS = {
    "method": cli.FlagSpec("how", Literal["figa", "cdpo"], required=True),
    "model": cli.FlagSpec(
        "that will be trained, for its tokenizer: what `tokjax.load` takes", required=True
    ),
    "right": cli.FlagSpec("model of right answers (cdpo)", str | None),
    "wrong": cli.FlagSpec("model of wrong answers (cdpo)", str | None),
    "pairs": cli.FlagSpec("JSONL or Parquet file (or a pattern) of pairs", required=True),
    "out": cli.FlagSpec("Parquet file of the weights", required=True),
    "source": cli.FlagSpec("of the records, as --source.prompt=question", dict, {}),
    "set": cli.FlagSpec("option of the method, as --set.beta=0.5", dict, {}),
    "batch_tokens": cli.FlagSpec("places computed at a time (cdpo)", int, 4096),
    "on_error": cli.FlagSpec("bad records", Literal["raise", "skip"], "raise"),
    "dtype": cli.FlagSpec("of the parameters; default as stored", str | None),
}


@dataclass(frozen=True)
class FigaOptions:
    """What the edits weigh."""

    alpha: float = 1.0  # new tokens of the revised answer
    beta: float = 0.5  # deleted and replaced tokens of the initial one
    gamma: float = 0.0  # other tokens of the revised answer

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value >= 0:
                raise ConfigError(f"--set.{name}={value} must not be negative")


@dataclass(frozen=True)
class CdpoOptions:
    """How the two models are contrasted."""

    beta: float = 1.0  # strength of the contrast
    only_negative: bool = True  # chosen answers weigh 1; else their tokens weigh s

    def __post_init__(self):
        if not self.beta >= 0:
            raise ConfigError(f"--set.beta={self.beta} must not be negative")


OPTIONS = {"figa": FigaOptions, "cdpo": CdpoOptions}


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False)
    if args.help:
        print(cli.help_text("tokjax.annotate", __doc__, FLAGS, args=args))
        return 0
    from tokjax.config import resolve

    options = resolve(OPTIONS[args["method"]], args["set"], path=f"options of {args['method']}")
    _check(args)
    print(annotate(args, options), end="")
    return 0


def _check(args: cli.Arguments) -> None:
    from tokjax.data.files import expand_files

    for name in ("right", "wrong"):
        if args["method"] == "cdpo" and args[name] is None:
            raise ConfigError(
                f"--method=cdpo contrasts two models: give --{name}, one tuned on {name} answers"
            )
        if args["method"] != "cdpo" and args[name] is not None:
            raise ConfigError(f"--method={args['method']} contrasts no models: leave --{name} out")
    if args["batch_tokens"] < 1:
        raise ConfigError(f"--batch_tokens={args['batch_tokens']} must be at least 1")
    if Path(args["out"]).is_dir():
        raise ConfigError(f"--out={args['out']} is a folder: name a file in it")
    for file in expand_files((args["pairs"],)):
        if Path(file).stat().st_size == 0:
            raise DataError(f"--pairs={file} is empty: it holds no record")


def annotate(args: cli.Arguments, options: Any) -> str:
    """Finds the weights and writes them; returns a table of what came out."""
    import tokjax
    from tokjax.preference.token_weights import counted_targets, write_token_weights
    from tokjax.selection.stores import open_store, records, tokenizer_of

    tokenizer = tokjax.load(args["model"], dtype=args["dtype"]).tokenizer
    sides = {name: args[name] for name in ("right", "wrong") if args[name] is not None}
    models = {name: tokjax.load(path, dtype=args["dtype"]) for name, path in sides.items()}
    for name, lm in models.items():
        if lm.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"--{name}={sides[name]} has another tokenizer than --model={args['model']}: tune "
                f"both models from that one"
            )
    source = records(args["pairs"], "preference", args["source"])
    config = tokenizer_of(args["model"], tokenizer)
    store = open_store(source, config, on_error=args["on_error"])
    weights = _weights(args, options, store, models)
    told = {**asdict(options), "model": args["model"], **sides}
    write_token_weights(args["out"], store, weights, method=args["method"], options=told)

    lines = [f"{'':10} {'tokens':>8} {'weighing 0':>11} {'mean':>9}"]
    every = range(store.num_examples)
    for name, rejected in (("chosen", False), ("rejected", True)):
        own = np.concatenate(
            [
                weights[i][
                    counted_targets(store, i)
                    & ((np.arange(len(weights[i])) >= store.cut(i)) == rejected)
                ]
                for i in every
            ]
        )
        zero, mean = (own == 0).mean() if len(own) else 0, own.mean() if len(own) else 0
        lines.append(f"{name:10} {len(own):>8} {zero:>11.1%} {mean:>9.4f}")
    lines.append(f"{args['out']}: {store.num_examples} pairs")
    return "\n".join(lines) + "\n"


def _weights(args: cli.Arguments, options: Any, store: Any, models: Any) -> list[np.ndarray]:
    if args["method"] == "figa":
        from tokjax.preference.figa import figa_weights

        return list(figa_weights(store, **asdict(options)))
    from tokjax.preference.critical_tokens import critical_scores, critical_weights

    right, wrong = ((models[name].model, models[name].params) for name in ("right", "wrong"))
    scores = critical_scores(
        store, right, wrong, beta=options.beta, batch_tokens=args["batch_tokens"]
    )
    return list(critical_weights(store, scores, only_negative=options.only_negative))


if __name__ == "__main__":
    cli.run(main)
