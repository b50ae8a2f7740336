"""Patch-level training, then token-level training, in one run (arXiv 2407.12665).

    python -m tokjax.train --config=configs/patch.py:k=4,share=0.667 --workdir=runs/patch

`steps` counts steps of token-level training on the same data: with k=4 and two thirds of the data
in patches the run takes half of them.
"""

from ml_collections import ConfigDict


def get_config(k: int = 4, share: float = 2 / 3, steps: int = 600) -> ConfigDict:
    """Returns a run that reads `share` of its data in patches of `k` tokens."""
    return ConfigDict(
        dict(
            title=f"patch-level training, k={k}, {share:.0%} of the data",
            model=dict(d_model=256, n_layers=4, n_heads=4, max_positions=256),
            data=dict(
                tokenizer=dict(name="bpe", vocab_size=4096),
                train=[dict(source=dict(name="stdlib", split="train"))],
                evals=dict(validation=dict(name="stdlib", split="validation")),
                seq_len=256,
                batch_size=16,
            ),
            stages=[
                dict(objective=dict(name="patch", k=k), share=share),
                dict(objective=dict(name="next_token"), share=1 - share),
            ],
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=3e-3),
            schedule=dict(name="cosine", warmup_steps=20),
            evaluation=dict(every_steps=50, max_batches=20),
            samples=dict(prompts=["def __init__(self", "Return the "]),
            checkpoints=dict(every_steps=100),
        )
    )
