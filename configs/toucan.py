"""Toucan (arXiv 2311.08620): a character model whose costly layers run once a group.

    python -m tokjax.train --config=configs/toucan.py --workdir=runs/toucan

The model of the run is the stack over groups; the two stacks over characters belong to the
objective. `boundaries=whitespace` takes words for groups; `learned` trains a predictor, whose
prior says how many groups there should be (0.2: about five bytes in each). Evaluation reports
`bits_per_byte`, ends of groups included. `tokjax.tokenization.runs.of_run("runs/toucan")` gives
predictor, parameters and tokenizer for `decode`.
"""

from ml_collections import ConfigDict


def get_config(boundaries: str = "learned", steps: int = 600) -> ConfigDict:
    """Returns a run of `steps` steps of 4,096 bytes."""
    return ConfigDict(
        dict(
            title=f"Toucan, boundaries: {boundaries}",
            model=dict(
                d_model=128,
                n_layers=4,
                n_heads=4,
                max_positions=256,
                # The last stack reads a character's vector plus what the backbone says, whose
                # numbers are about 1; the table's are 0.02 at the start.
                embedding_scale=50.0,
            ),
            data=dict(
                tokenizer=dict(name="bytes"),
                train=[dict(source=dict(name="stdlib", split="train"))],
                evals=dict(validation=dict(name="stdlib", split="validation")),
                seq_len=256,
                batch_size=16,
            ),
            objective=dict(
                name="toucan",
                before=dict(n_layers=2),
                behind=dict(n_layers=2),
                boundaries=dict(kind=boundaries, prior=0.2),
            ),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=1e-3),
            schedule=dict(name="cosine", warmup_steps=max(steps // 15, 1)),
            evaluation=dict(every_steps=100, max_batches=20),
            checkpoints=dict(every_steps=100),
        )
    )
