"""Tokenises the sources of a configuration into token stores, so that training starts at once.

    python -m tokjax.prepare --config=configs/quickstart.py

Training does the same by itself where a store is missing; preparing beforehand is for machines
whose accelerators should not wait, and for looking at what was left out.
"""

from collections.abc import Sequence

from tokjax import cli
from tokjax.data.config import DataConfig


def main(argv: Sequence[str]) -> int:
    """Prepares every source of `config.data` and prints the directory of each store.

    Raises:
      TokjaxError: see `tokjax.data.prepare.prepare`.
    """
    args = cli.parse_args(argv, flags={})
    from tokjax.training.config import TrainConfig

    if args.help:
        print(cli.help_text("tokjax.prepare", __doc__, {}, schema=TrainConfig, args=args))
        return 0
    data = cli.load_config(TrainConfig, args).data
    for label, directory in prepare_all(data).items():
        print(f"{label}: {directory}")
    return 0


def prepare_all(data: DataConfig) -> dict[str, str]:
    """Returns the store's directory of every source, by "train.0", ... and "evals.<name>".

    Raises:
      TokjaxError: see `tokjax.data.prepare.prepare`.
    """
    from tokjax.data.prepare import prepare

    sources = {f"train.{index}": entry.source for index, entry in enumerate(data.train)}
    sources |= {f"evals.{name}": source for name, source in data.evals.items()}
    return {label: str(prepare(source, data)) for label, source in sources.items()}


if __name__ == "__main__":
    cli.run(main)
