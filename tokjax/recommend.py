"""Trains a recommender that writes items' codes (DiscRec, TIGER), measures it, and asks it.

    python -m tokjax.recommend --config=configs/recommend/discrec.py:interactions=log.csv,texts=items.jsonl --workdir=runs/discrec
    python -m tokjax.recommend --workdir=runs/discrec --stage=evaluate
    python -m tokjax.recommend --workdir=runs/discrec --stage=recommend --data=users.jsonl --out=found.jsonl

Interactions are records with `user` and `item` in JSONL or CSV; items have texts, or embeddings, in
a file of their own. The first command goes on where it was stopped. A line of `--data` is
{"history": [names of items, the latest last]}; the same lines come out with `items`, the best first,
as [{"item", "score"}], where a score is a log-probability.
"""  # noqa: E501

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokjax import cli
from tokjax.errors import ConfigError, DataError

FLAGS = {
    "workdir": cli.FlagSpec("folder of the recommender", required=True),
    "stage": cli.FlagSpec("what to do", Literal["train", "evaluate", "recommend"], "train"),
    "data": cli.FlagSpec("recommend: JSONL file of histories", str | None),
    "out": cli.FlagSpec("recommend: JSONL file that gets the items", str | None),
    "k": cli.FlagSpec("recommend: items for each history", int, 10),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False)
    from tokjax.recsys import run as recommender

    if args.help:
        schema = recommender.RecommendConfig
        print(cli.help_text("tokjax.recommend", __doc__, FLAGS, schema=schema, args=args))
        return 0
    if args["k"] < 1:
        raise ConfigError(f"--k={args['k']} must be at least 1")
    if args["stage"] == "train":
        config = cli.load_config(recommender.RecommendConfig, args)
        found = recommender.train(config, args["workdir"])
        print(f"{args['workdir']}: {found.trained.codes}, {len(found.trained.losses)} steps")
        print(f"validation loss {found.trained.validation:.4f}")
        _report(args["workdir"], found.evaluate())
        return 0
    if args.config is not None or args.overrides:
        raise ConfigError(f"--stage={args['stage']} reads the workdir's own: leave --config out")
    found = recommender.load(args["workdir"])
    if args["stage"] == "evaluate":
        _report(args["workdir"], found.evaluate())
        return 0
    _recommend(args, found)
    return 0


def _report(workdir: str, metrics: dict[str, float]) -> None:
    from tokjax.files import write_atomically

    write_atomically(Path(workdir) / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def _recommend(args: cli.Arguments, found: Any) -> None:
    from tokjax.files import write_atomically
    from tokjax.recsys.interactions import read_records

    if args["data"] is None or args["out"] is None:
        raise ConfigError("--stage=recommend reads --data and writes --out: give both")
    records = []
    for place, record in read_records(args["data"]):
        history = record.get("history")
        if not isinstance(history, list) or not history:
            raise DataError(f'{place}: write {{"history": ["item", ...]}}')
        unknown = [name for name in history if str(name) not in found.items]
        if unknown:
            raise DataError(f"{place}: {unknown[0]!r} is no item that the recommender knows")
        records.append({**record, "history": [str(name) for name in history]})
    if not records:
        raise DataError(f"{args['data']} holds no history")
    lines = []
    ranked = found.recommend([record["history"] for record in records], args["k"])
    for record, items in zip(records, ranked, strict=True):
        told = [{"item": name, "score": round(score, 4)} for name, score in items]
        lines.append(json.dumps({**record, "items": told}, ensure_ascii=False) + "\n")
    write_atomically(Path(args["out"]), "".join(lines))
    print(f"{args['out']}: {len(lines)} histories")


if __name__ == "__main__":
    cli.run(main)
