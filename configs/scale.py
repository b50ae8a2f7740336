"""Llamas from 135M to 70B parameters, laid out for pods: a starting point for a run of one's own.

    python -m tokjax.aot --config=configs/scale.py:size=8b,chips=256 --topology=v6e:16x16
    python -m tokjax.train --config=configs/scale.py:size=8b,chips=256 --workdir=runs/8b

The text and the tokenizer are yours: `files` and `tokenizer`. Parameters, their state and gradients
are float32 and split over so many chips that each keeps 128 columns of a matrix, of 70B 32, which
would not fit otherwise (`mesh.fsdp`); further chips hold copies (`mesh.data`). Blocks are computed
in bfloat16, and again in the backward pass, so that a layer keeps one vector a token. The batch
grows with the chips: `rows` of `seq_len` tokens on each. What the compiler says of these
configurations: docs/scale.md.
"""

from ml_collections import ConfigDict

# size: (architecture, token ids, tokens of a row, rows on a chip, most chips that share the
# parameters, peak learning rate)
SIZES = {
    "135m": ("smollm2-135m", 49152, 2048, 8, 4, 3e-3),
    "1b": ("llama3-1b", 128256, 4096, 2, 16, 1e-3),
    "8b": ("llama3-8b", 128256, 8192, 1, 32, 3e-4),
    "70b": ("llama3-70b", 128256, 8192, 1, 256, 1.5e-4),
}


def get_config(
    size: str = "8b",
    chips: int = 256,
    slices: int = 1,
    seq_len: int | None = None,
    rows: int | None = None,
    steps: int = 100_000,
    files: str = "text/*.txt",
    tokenizer: str = "tokenizer.json",
) -> ConfigDict:
    """Returns a run of a size on so many chips.

    Args:
        size: a key of `SIZES`.
        chips: of all slices.
        slices: groups of chips that a slower network joins.
        seq_len: tokens of a row; None takes those of `SIZES`.
        rows: that a chip computes at once; None takes those of `SIZES`.
        steps: of training.
        files: what is learned from, as a pattern.
        tokenizer: a Hugging Face tokenizer's file, or its folder.
    """
    base, vocabulary, default_len, default_rows, split, rate = SIZES[size]
    return ConfigDict(
        dict(
            title=f"{size} on {chips} chips",
            model=dict(base=base, vocab_size=vocabulary, dtype="bfloat16", remat="block"),
            data=dict(
                tokenizer=dict(name="huggingface", path=tokenizer),
                train=[dict(source=dict(name="text", files=(files,)))],
                seq_len=seq_len or default_len,
                batch_size=(rows or default_rows) * chips,
            ),
            mesh=dict(data=-1, fsdp=min(split, chips // slices)),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=rate, b2=0.95, weight_decay=0.1),
            schedule=dict(name="cosine", warmup_steps=2000),
            clip_norm=1.0,
            checkpoints=dict(every_steps=1000),
        )
    )
