"""Syntactic smoothing of next tokens, or of masked ones, with tags from the corpus itself.

    python -m tokjax.train --config=configs/syntactic_smoothing.py --workdir=runs/smoothing
    python -m tokjax.train --config=configs/syntactic_smoothing.py:masked=True --workdir=runs/masked

Tags are classes of tokens with alike neighbours; with `treebank=FILE.conllu.gz` they are those of a
treebank. The table of counts is made once and kept in the cache.
"""

from ml_collections import ConfigDict


def get_config(
    masked: bool = False, treebank: str = "", start: float = 0.5, steps: int = 600
) -> ConfigDict:
    """Returns a run whose true tokens' mass rises from `start` to 1."""
    if masked:
        # 15 % of the tokens; of these the mask replaces 90 % and a random token 10 %.
        corruption = dict(rate=0.15, masked=0.9, random=0.1, count="fixed")
        base = dict(name="masked_lm", corruption=corruption)
        # The tokenizer has no mask: the model has one id more.
        model = dict(causal=False, mlm_head="gelu", vocab_size=4097)
    else:
        base, model = dict(name="next_token"), dict()
    tags = dict(name="distributional", classes=12)
    if treebank:
        tags = dict(name="treebank", files=(treebank,))
    return ConfigDict(
        dict(
            title="syntactic smoothing" + (" of masked tokens" if masked else ""),
            model=dict(d_model=256, n_layers=4, n_heads=4, max_positions=256, **model),
            data=dict(
                tokenizer=dict(name="bpe", vocab_size=4096),
                train=[dict(source=dict(name="stdlib", split="train"))],
                evals=dict(validation=dict(name="stdlib", split="validation")),
                seq_len=256,
                batch_size=16,
            ),
            objective=dict(
                name="syntactic_smoothing",
                base=base,
                tags=tags,
                similarity=dict(kind="cosine", temperature=0.025),
                gate=dict(course="linear", start=start, end=1.0),
            ),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=3e-3),
            schedule=dict(name="cosine", warmup_steps=max(steps // 15, 1)),
            evaluation=dict(every_steps=100, max_batches=20),
            samples=dict(prompts=[] if masked else ["def __init__(self", "Return the "]),
            checkpoints=dict(every_steps=100),
        )
    )
