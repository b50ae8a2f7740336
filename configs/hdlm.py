"""A diffusion language model between autoregression and full diffusion (HDLM, arXiv 2504.06416).

    python -m tokjax.train --config=configs/hdlm.py --workdir=runs/hdlm
    python -m tokjax.pretraining.hdlm --model=runs/hdlm --prompt="def " --sampler=acs

Blocks of 16 tokens are restored together, each behind finished ones. `configs/hdlm.py:width=1` is
autoregression, `:width=0` diffusion of whole rows. The metric `bound` bounds the negative
log-likelihood, in nats per token; `loss` counts visible tokens too.
"""

from ml_collections import ConfigDict


def get_config(
    width: int = 16, tau: int | None = None, steps: int = 2000, seq_len: int = 128
) -> ConfigDict:
    """Returns a run; a width of 0 stands for the whole row."""
    return ConfigDict(
        dict(
            title="hyperschedule diffusion",
            model=dict(
                d_model=256,
                n_layers=4,
                n_heads=4,
                max_positions=seq_len,
                # The tokenizer has no mask: the model has one id more.
                vocab_size=4097,
                causal=False,
            ),
            data=dict(
                tokenizer=dict(name="bpe", vocab_size=4096),
                train=[dict(source=dict(name="stdlib", split="train"))],
                evals=dict(validation=dict(name="stdlib", split="validation")),
                seq_len=seq_len,
                batch_size=32,
            ),
            objective=dict(
                name="hdlm",
                schedule=dict(name="block", width=width or None, tau=tau or width or None),
                noise=dict(name="epsilon", epsilon=0.01, visible_weight=1.0),
            ),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=1e-3, b2=0.95),
            schedule=dict(name="cosine", warmup_steps=max(steps // 15, 1)),
            ema_decay=0.995,
            evaluation=dict(every_steps=200, max_batches=20),
            checkpoints=dict(every_steps=500),
        )
    )
