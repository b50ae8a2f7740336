"""A small character model with a mixer between its blocks (arXiv 2409.12924, 2406.10254).

    python -m tokjax.train --config=configs/wavelet_gpt.py:mixer=wavelet --workdir=runs/wavelet

`mixer=wavelet` averages half of the coordinates over 1, 2, 4, ... 256 bytes; `mixer=filters` learns
a bank of 16 filters instead, whose steps take several times as long on a CPU; `mixer=none` is what
to compare them with. Any option of either is an override:
`--config.model.mixer.kernel=learned`, `--config.model.mixer.gains=sigmoid`.
"""

from ml_collections import ConfigDict

MIXERS = {
    "wavelet": dict(name="wavelet", context=256),
    "filters": dict(name="filters", filters=16, length=16),
    "none": None,
}


def get_config(mixer: str = "wavelet", steps: int = 600) -> ConfigDict:
    """Returns a run of `steps` steps of 4,096 bytes."""
    if mixer not in MIXERS:
        raise ValueError(f"mixer={mixer!r} must be one of {', '.join(MIXERS)}")
    return ConfigDict(
        dict(
            title=f"bytes, mixer: {mixer}",
            model=dict(d_model=128, n_layers=4, n_heads=4, max_positions=256, mixer=MIXERS[mixer]),
            data=dict(
                tokenizer=dict(name="bytes"),
                train=[dict(source=dict(name="stdlib", split="train"))],
                evals=dict(validation=dict(name="stdlib", split="validation")),
                seq_len=256,
                batch_size=16,
            ),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=3e-3),
            schedule=dict(name="cosine", warmup_steps=max(steps // 15, 1)),
            evaluation=dict(every_steps=50, max_batches=20),
            samples=dict(prompts=["def __init__(self", "Return the "]),
            checkpoints=dict(every_steps=100),
        )
    )
