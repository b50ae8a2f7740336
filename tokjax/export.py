"""Writes the model that a run has trained as a Hugging Face checkpoint, or its adapters alone.

    python -m tokjax.export runs/sft --to=exported
    python -m tokjax.export runs/sft --to=adapters --adapters

The folder has the tokenizer and its chat template too; adapters are merged into the matrices they
belong to. With --adapters they are written in the form of the library peft instead.
"""

from collections.abc import Sequence
from pathlib import Path

from tokjax import cli
from tokjax.errors import ConfigError, StorageError

FLAGS = {
    "to": cli.FlagSpec("folder that appears whole or not at all", str, required=True),
    "adapters": cli.FlagSpec("write the adapters alone", bool, False),
    "overwrite": cli.FlagSpec("replace a folder that holds something", bool, False),
    "dtype": cli.FlagSpec("of the parameters; default as trained", str | None),
}


def main(argv: Sequence[str]) -> int:
    """Writes the checkpoint; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False, positionals=1)
    if args.help:
        print(cli.help_text("tokjax.export WORKDIR", __doc__, FLAGS, args=args))
        return 0
    if not args.positional:
        raise ConfigError("name the run: python -m tokjax.export WORKDIR --to=FOLDER")
    import dataclasses

    from tokjax.loading import load
    from tokjax.models import lora

    source, target = args.positional[0], Path(args["to"])
    lm = load(source, dtype=args["dtype"])
    if args["adapters"]:
        if target.exists() and any(target.iterdir()) and not args["overwrite"]:
            raise StorageError(f"{target} is not empty: name another folder, or say --overwrite")
        lora.save(target, lm.model, lm.params, base=_base(Path(source)))
    else:
        if lm.model.config.lora is not None:
            model, params = lora.merge(lm.model, lm.params)
            lm = dataclasses.replace(lm, model=model, params=params)
        lm.save(target, overwrite=args["overwrite"])
    print(f"wrote {target}")
    return 0


def _base(workdir: Path) -> str:
    """Returns what the run started from."""
    from tokjax.training.run_facts import read_run

    return str(read_run(workdir).get("config", {}).get("init_from") or "")


if __name__ == "__main__":
    cli.run(main)
