"""Compiles a run's programs for TPUs that are not there, and says what they will need.

    python -m tokjax.aot --config=configs/quickstart.py --topology=v5e:4x4

Printed: memory of each chip, operations, collectives by kind and size, the roofline's time and the
share of the peak that it allows. Topologies: v4, v5p (three sides), v5e, v6e (two), several slices
with --slices; `cpu` compiles for this machine's devices. Nothing runs and no data are read.
`pip install -e '.[tpu]'` brings the compiler.

Exit codes: 0 it fits; 7 it does not, with what to change; 2 the configuration is wrong.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokjax import cli

FLAGS = {
    "topology": cli.FlagSpec("chips to compile for, such as v5e:16x16", str, required=True),
    "slices": cli.FlagSpec("slices of that shape, joined by the data centre's network", int, 1),
    "vocab_size": cli.FlagSpec("token ids; default the model's or the tokenizer's", int | None),
    "training": cli.FlagSpec("whether the training step is compiled", bool, True),
    "decode_rows": cli.FlagSpec("texts decoded at once; 0 leaves decoding out", int, 0),
    "capacity": cli.FlagSpec("tokens of a decoded text; default data.seq_len", int | None),
    "json": cli.FlagSpec("file that the figures are also written to", str | None),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS)
    from tokjax.training.config import TrainConfig

    if args.help:
        print(cli.help_text("tokjax.aot", __doc__, FLAGS, schema=TrainConfig, args=args))
        return 0
    # The program is for other devices than this machine's.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    config = cli.load_config(TrainConfig, args)

    from tokjax.ahead.chips import topology
    from tokjax.ahead.programs import advice, decoding_estimate, program, training_estimate
    from tokjax.ahead.tables import show

    there = topology(args["topology"], args["slices"])
    made = program(config, there, args["vocab_size"])
    stages = made.stages if args["training"] else ()
    found = [training_estimate(made, there, stage) for stage in stages]
    if args["decode_rows"]:
        capacity = args["capacity"] or config.data.seq_len
        found.append(decoding_estimate(made, there, args["decode_rows"], capacity))
    show(found, made, there)
    if args["json"]:
        _write(Path(args["json"]), [_plain(each) for each in found])
    if any(each.fits is False for each in found):
        print(f"it does not fit. {advice(config)}")
        return 7
    return 0


def _plain(found: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(found) | {"mfu": found.mfu, "bound": found.bound}


def _write(path: Path, found: list[dict[str, Any]]) -> None:
    from tokjax.files import write_atomically

    write_atomically(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
