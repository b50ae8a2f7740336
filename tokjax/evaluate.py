"""Evaluates a model on tasks of lm-evaluation-harness (needs the extra `eval`).

    python -m tokjax.evaluate --model=smollm2-135m --tasks=lambada --task_dir=tasks --limit=20
    python -m tokjax.evaluate --model=runs/mine --tasks=a,b --task_dir=tasks --out=results.json

Tasks are the YAML files of a folder, on local data (`dataset_path: json` with `data_files`); the
network is not used. With a strategy, its predictions are scored and sampled.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokjax import cli
from tokjax.errors import ConfigError, nearest

FLAGS = {
    "model": cli.FlagSpec("what `tokjax.load` takes: name, file, folder, workdir", required=True),
    "tasks": cli.FlagSpec("names of tasks or groups, with commas between", required=True),
    "task_dir": cli.FlagSpec("folder of the tasks' YAML files", required=True),
    "out": cli.FlagSpec("JSON file that gets the results", str | None),
    "samples_out": cli.FlagSpec("JSON file that gets every request and answer", str | None),
    "limit": cli.FlagSpec("examples of each task; default all", int | None),
    "num_fewshot": cli.FlagSpec("examples in each context; default the task's", int | None),
    "chat": cli.FlagSpec("write contexts as chats, by the model's template", bool, False),
    "strategy": cli.FlagSpec("whose predictions are taken, as in lm.generate", str, "sample"),
    "option": cli.FlagSpec("of the strategy, as --option.weight=1.5", dict, {}),
    "batch_size": cli.FlagSpec("requests computed at a time", int, 8),
    "seed": cli.FlagSpec("of sampled texts", int, 0),
    "dtype": cli.FlagSpec("of the parameters; default as stored", str | None),
}
_BOOTSTRAP = 1000  # resamplings by which the harness estimates errors


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False)
    if args.help:
        print(cli.help_text("tokjax.evaluate", __doc__, FLAGS, args=args))
        return 0
    for name in ("limit", "batch_size"):
        if args[name] is not None and args[name] < 1:
            raise ConfigError(f"--{name}={args[name]} must be at least 1")
    if not Path(args["task_dir"]).is_dir():
        raise ConfigError(f"--task_dir={args['task_dir']} is no folder")
    found = evaluate(
        args["model"],
        [name.strip() for name in args["tasks"].split(",")],
        args["task_dir"],
        limit=args["limit"],
        num_fewshot=args["num_fewshot"],
        chat=args["chat"],
        strategy=args["strategy"],
        options=args["option"],
        batch_size=args["batch_size"],
        seed=args["seed"],
        dtype=args["dtype"],
    )
    print(found.pop("table"), end="")
    samples = found.pop("samples")
    for name, content in (("out", found), ("samples_out", samples)):
        if args[name] is not None:
            _write(Path(args[name]), content)
    return 0


def evaluate(
    model: Any,
    tasks: Sequence[str],
    task_dir: str | os.PathLike,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    strategy: str = "sample",
    options: Any = None,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Returns results of tasks: the harness's `results`, `samples`, a readable `table`, and what
    was evaluated how.

    Args:
        model: a `LanguageModel`, or what `tokjax.load` takes.
        tasks: names of tasks or groups.
        task_dir: folder of their YAML files.
        limit: examples of each task; default all.
        num_fewshot: examples in each context; default the task's.
        chat: write contexts as chats, by the model's template.
        strategy: whose predictions are scored and sampled; see `LanguageModel.generate`.
        options: of the strategy.
        batch_size: requests computed at a time.
        seed: of sampled texts.
        dtype: of the parameters, where the model is loaded here.

    Raises:
        ConfigError: the extra `eval` is not installed, or there is no such task.
    """
    # The harness would look for data sets and metrics on the hub.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork, which JAX's threads forbid
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"evaluation needs the extra 'eval' (pip install 'tokjax[eval]'): {error}"
        ) from None
    import tokjax
    from tokjax.evaluation.harness import HarnessModel

    manager = TaskManager(include_path=str(task_dir), include_defaults=False)
    known = list(manager.all_tasks)
    for name in tasks:
        if name not in known:
            raise ConfigError(f"there is no task {name!r} in {task_dir}.{nearest(name, known)}")
    lm = model if isinstance(model, tokjax.LanguageModel) else tokjax.load(model, dtype=dtype)
    adapter = HarnessModel(lm, batch_size=batch_size, seed=seed, strategy=strategy, options=options)
    found = lm_eval.simple_evaluate(
        model=adapter,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat,
        bootstrap_iters=_BOOTSTRAP,
    )
    assert found is not None  # as it is in the first of several processes
    kept = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")
    return {
        "model": repr(lm) if model is lm else str(model),
        "strategy": strategy,
        "options": dict(options or {}),
        "limit": limit,
        "chat": chat,
        "seed": seed,
        "truncated_contexts": adapter.truncated,
        "lm_eval": lm_eval.__version__,
        "tokjax": tokjax.__version__,
        **{name: found[name] for name in kept if name in found},
        "table": table(found["results"]),
        "samples": found.get("samples", {}),
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a line for each metric of each task.

    >>> print(table({"t": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "t"}}), end="")
    task  metric   value  error
    t     acc     0.5000 0.1000
    """
    lines = [("task", "metric", "value", "error")]
    for task, numbers in results.items():
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else ""
            name = metric if kind == "none" else f"{metric} ({kind})"
            lines.append((task, name, f"{value:.4f}", shown))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}} {d:>{widths[3]}}".rstrip() + "\n"
        for a, b, c, d in lines
    )


def _write(path: Path, content: Any) -> None:
    from tokjax.files import storage_errors, write_atomically

    with storage_errors(path.parent, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2, default=str) + "\n")


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    cli.run(main)
