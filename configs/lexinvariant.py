"""A small byte model whose symbols get random vectors in each sequence (arXiv 2305.16349).

    python -m tokjax.train --config=configs/lexinvariant.py --workdir=runs/lexinvariant
    python -m tokjax.train --config=configs/lexinvariant.py:p=0.2 --workdir=runs/semi

p=1 has no vectors but that of the special id; its loss is of fresh tables. With p=0.2 a fifth of
the symbols of each sequence are random, and the ordinary model, with learned vectors alone, is
evaluated; p=0 is what to compare it with. A lexinvariant model needs far more steps than an
ordinary one, and longer rows show more: it learns each text's alphabet from the text.
"""

from ml_collections import ConfigDict


def get_config(p: float = 1.0, steps: int = 1200) -> ConfigDict:
    """Returns a run of `steps` steps of 4,096 bytes."""
    p = float(p)
    return ConfigDict(
        dict(
            title=f"bytes, random vectors for a share of {p}",
            model=dict(
                d_model=128,
                # A matrix between vectors and blocks on either side: without it each state begins
                # as the vector it was read from, and predicts that symbol again.
                embedding_width=128,
                n_layers=4,
                n_heads=4,
                max_positions=256,
                # Positions as large as the vectors they are added to. With rotary ones instead a
                # small model learns to repeat what it has read far more slowly.
                positions="learned",
                init_scale=0.5,
                # The byte tokenizer has one special id, which keeps a learned vector.
                embedding_rows=1 if p == 1 else None,
            ),
            data=dict(
                tokenizer=dict(name="bytes"),
                train=[dict(source=dict(name="stdlib", split="train"))],
                evals=dict(validation=dict(name="stdlib", split="validation")),
                seq_len=256,
                batch_size=16,
            ),
            objective=dict(name="lexinvariant", p=p),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=1e-3),
            schedule=dict(name="cosine", warmup_steps=max(steps // 15, 1)),
            evaluation=dict(every_steps=100, max_batches=20),
            checkpoints=dict(every_steps=200),
        )
    )
