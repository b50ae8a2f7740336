"""A hierarchical transformer (arXiv 2501.10322): bytes in words, words in a backbone.

    python -m tokjax.train --config=configs/hat.py --workdir=runs/hat

The model of the run is the backbone over words; encoder and decoder of words belong to the
objective and lie in its checkpoints as heads. Evaluation reports `bits_per_byte`, which compares
models of any tokenizer. `tokjax.tokenization.runs.of_run("runs/hat")` gives predictor, parameters
and tokenizer for `decode`. `pieces=patches` cuts every four bytes instead of words.
"""

from ml_collections import ConfigDict


def get_config(pieces: str = "words", steps: int = 600) -> ConfigDict:
    """Returns a run of `steps` steps of 4,096 symbols, bytes and ends of words."""
    longest = {"words": 16, "patches": 4}
    if pieces not in longest:
        raise ValueError(f"pieces={pieces!r} must be one of {', '.join(longest)}")
    return ConfigDict(
        dict(
            title=f"bytes in {pieces}",
            model=dict(d_model=192, n_layers=4, n_heads=4, max_positions=256),
            data=dict(
                tokenizer=dict(name="words", word_bytes=longest[pieces], word_pieces=pieces),
                train=[dict(source=dict(name="stdlib", split="train"))],
                evals=dict(validation=dict(name="stdlib", split="validation")),
                seq_len=256,
                batch_size=16,
            ),
            objective=dict(
                name="hat",
                encoder=dict(n_layers=2, d_model=64),
                decoder=dict(n_layers=2, d_model=64),
            ),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=2e-3),
            schedule=dict(name="cosine", warmup_steps=max(steps // 15, 1)),
            evaluation=dict(every_steps=100, max_batches=20),
            checkpoints=dict(every_steps=100),
        )
    )
