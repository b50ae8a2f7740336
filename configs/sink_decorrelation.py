"""Next-token training with sink decorrelation (arXiv 2510.22603), on the text of Python itself.

    python -m tokjax.train --config=configs/sink_decorrelation.py --workdir=runs/decorrelation
    python -m tokjax.train --config=configs/sink_decorrelation.py:coefficient=0. --workdir=runs/ce

Plain text has no prompts: every token but the first of a row's pieces is penalised. Where records
have prompts (kind "response") leave `tokens` at its default, which penalises those alone. With a
coefficient of 0 the penalty is only measured. `tokjax.signals.find_sinks` shows what became of the
sinks.
"""

from ml_collections import ConfigDict


def get_config(coefficient: float = 10.0, steps: int = 600) -> ConfigDict:
    """Returns a run with the penalty times `coefficient`."""
    return ConfigDict(
        dict(
            title="sink decorrelation",
            model=dict(d_model=256, n_layers=4, n_heads=4, max_positions=256),
            data=dict(
                tokenizer=dict(name="bpe", vocab_size=4096),
                train=[dict(source=dict(name="stdlib", split="train"))],
                evals=dict(validation=dict(name="stdlib", split="validation")),
                seq_len=256,
                batch_size=16,
            ),
            objective=dict(
                name="sink_decorrelation",
                base=dict(name="next_token"),
                coefficient=coefficient,
                tokens="all",
                anchor="first",
            ),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=3e-3),
            schedule=dict(name="cosine", warmup_steps=max(steps // 15, 1)),
            evaluation=dict(every_steps=100, max_batches=20),
            samples=dict(every_steps=200, prompts=["def __init__(self", "Return the "]),
            checkpoints=dict(every_steps=100),
        )
    )
