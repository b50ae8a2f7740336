"""An encoder that never sees the mask (MAE-LM, arXiv 2302.02060), or a plain masked language model.

    python -m tokjax.train --config=configs/mae_lm.py --workdir=runs/mae
    python -m tokjax.train --config=configs/mae_lm.py:masks=True --workdir=runs/mlm

What the first leaves in its workdir is the encoder alone; `tokjax.signals.mask_ranks` compares how
many dimensions the real tokens of the two fill.
"""

from ml_collections import ConfigDict


def get_config(
    masks: bool = False, decoder_layers: int = 2, steps: int = 2000, seq_len: int = 128
) -> ConfigDict:
    """Returns a run; with `masks` a masked language model of the same encoder."""
    if masks:
        corruption = dict(rate=0.15, masked=0.8, random=0.1, count="fixed")
        objective = dict(name="masked_lm", corruption=corruption)
    else:
        objective = dict(
            name="mae_lm",
            corruption=dict(rate=0.15, masked=1.0, random=0.0, count="fixed"),
            # With learned positions alone it takes far longer to learn what stands beside a gap.
            decoder=dict(n_layers=decoder_layers, rotary=True),
            removal="gather",
        )
    return ConfigDict(
        dict(
            title="masked language model" if masks else "masked autoencoder of text",
            model=dict(
                d_model=128,
                n_layers=4,
                n_heads=4,
                d_ff=512,
                max_positions=seq_len,
                # The tokenizer has no mask: the model has one id more.
                vocab_size=4097,
                causal=False,
                mlm_head="gelu" if masks else None,
                # BERT's layers, but rotary positions and norms before each part: they learn sooner.
                positions="rotary",
                norm="layer",
                norm_bias=True,
                gated=False,
                activation="gelu",
                attention_bias=True,
                out_bias=True,
                mlp_bias=True,
            ),
            data=dict(
                tokenizer=dict(name="bpe", vocab_size=4096),
                train=[dict(source=dict(name="stdlib", split="train"))],
                evals=dict(validation=dict(name="stdlib", split="validation")),
                seq_len=seq_len,
                batch_size=32,
            ),
            objective=objective,
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=2e-3, b2=0.98, weight_decay=0.01),
            schedule=dict(name="cosine", warmup_steps=max(steps // 15, 1)),
            clip_norm=2.0,
            evaluation=dict(every_steps=200, max_batches=20),
            checkpoints=dict(every_steps=500),
        )
    )
