"""Writes texts with a model that the objective `hdlm` has trained.

python -m tokjax.pretraining.hdlm --model=runs/hdlm --prompt="def " --length=128
python -m tokjax.pretraining.hdlm --model=runs/hdlm --steps=16 --sampler=acs --eta=0.02
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tokjax import cli
from tokjax.errors import ConfigError

FLAGS = {
    "model": cli.FlagSpec("workdir of a run with the objective hdlm", required=True),
    "prompt": cli.FlagSpec("what each text begins with", str, ""),
    "length": cli.FlagSpec(
        "tokens of a text, the prompt's included; default data.seq_len", int | None
    ),
    "steps": cli.FlagSpec("of a block (tau); default the schedule's", int | None),
    "sampler": cli.FlagSpec(
        "default acs, or reverse for gamma noise",
        Literal["original", "acs", "remask", "reverse"] | None,
    ),
    "eta": cli.FlagSpec("of acs: how often visible tokens are drawn again", float, 0.01),
    "temperature": cli.FlagSpec("0 takes the likeliest token", float, 1.0),
    "samples": cli.FlagSpec("texts", int, 1),
    "seed": cli.FlagSpec("of all randomness", int, 0),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    args = cli.parse_args(argv, flags=FLAGS, needs_config=False)
    if args.help:
        print(cli.help_text("tokjax.pretraining.hdlm", __doc__, FLAGS, args=args))
        return 0
    for text in written(args):
        print(text)
    return 0


def written(args: cli.Arguments) -> list[str]:
    """Returns the texts that the flags ask for.

    Raises:
        ConfigError: the run has another objective, or the flags do not fit it.
        CheckpointError: there is no such run.
    """
    from tokjax.data.tokenizers import sequence_ends
    from tokjax.decoding.prompts import Prompts
    from tokjax.pretraining import hdlm
    from tokjax.training.trained import load_trained, read_trained

    workdir = Path(args["model"])
    config = read_trained(workdir).config
    objective: Any = config.stage_list[-1].objective
    if not isinstance(objective, hdlm.HDLM):
        raise ConfigError(f"--model={workdir} was not trained by the objective 'hdlm'")
    lm = load_trained(workdir)
    objective = objective.with_ids_of(lm.tokenizer, lm.model)
    schedule = objective.schedule
    if args["steps"] is not None:
        schedule = dataclasses.replace(schedule, tau=args["steps"])
    before, _ = sequence_ends(config.data.tokenizer, lm.tokenizer)
    ids = [*before, *lm.tokenizer.encode(args["prompt"])]
    makers = {"acs": lambda: hdlm.acs(args["eta"])}
    makers |= {"original": hdlm.original, "remask": hdlm.remask, "reverse": hdlm.reverse}
    found = hdlm.sample(
        objective,
        lm.model,
        lm.params,
        Prompts.of([ids]) if ids else None,
        length=config.data.seq_len if args["length"] is None else args["length"],
        schedule=schedule,
        sampler=None if args["sampler"] is None else makers[args["sampler"]](),
        temperature=args["temperature"],
        samples=args["samples"],
        seed=args["seed"],
    )
    stop = [] if lm.tokenizer.eos_id is None else [lm.tokenizer.eos_id]
    return [args["prompt"] + lm.tokenizer.decode(row) for row in found.rows(stop)]


if __name__ == "__main__":
    cli.run(main)
