r"""UniR: a small reasoner learns by reward what to add to the logits of a frozen backbone.

    python -m tokjax.train --config=configs/unir.py --workdir=runs/unir
    python -m tokjax.generate --model=HuggingFaceTB/SmolLM2-1.7B-Instruct --prompt="12+7=" \
        --strategy=reasoners --option.reasoners=runs/unir

The checkpoint holds the reasoner alone, and the second command adds it to any model of the same
tokenizer: `--option.weights=0.5` for less of it, `--option.reasoners=[runs/unir,runs/other]` for
several. Any two models of one tokenizer serve as `backbone` and `reasoner`, a run's workdir too.
"""

from ml_collections import ConfigDict


def get_config(
    backbone: str = "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    reasoner: str = "smollm2-135m",
    seed: int = 0,
) -> ConfigDict:
    """Returns a run on sums made on the fly; `backbone` is frozen, `reasoner` is trained."""
    task = dict(name="arithmetic", digits=(1, 3), examples=4000)
    return ConfigDict(
        dict(
            title="sums by a reasoner",
            seed=seed,
            init_from=reasoner,
            model=dict(dtype="bfloat16"),
            data=dict(
                train=[dict(source=task)],
                evals=dict(held_out=dict(task, split="validation", examples=256)),
                seq_len=32,
                batch_size=64,
            ),
            objective=dict(
                name="unir",
                backbone=backbone,
                rewards=(dict(name="verifier", verifier=dict(name="exact_match")),),
                rollouts=dict(group=8, max_new_tokens=8),  # at temperature 0.7, as in the paper
            ),
            steps=1000,
            optimizer=dict(name="adamw", peak_lr=1e-6, weight_decay=0.0),
            schedule=dict(name="cosine", warmup_steps=100),
            evaluation=dict(every_steps=100, answers=dict(max_examples=256, max_new_tokens=8)),
            checkpoints=dict(every_steps=100),
            log_every=10,
        )
    )
