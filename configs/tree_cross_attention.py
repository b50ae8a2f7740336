"""Tree Cross Attention (arXiv 2309.17388) on the copy task: a few nodes read instead of all tokens.

    python -m tokjax.train --config=configs/tree_cross_attention.py --workdir=runs/tree
    python -m tokjax.train --config=configs/tree_cross_attention.py:reader=full --workdir=runs/full

A context is a begin token and random digits; each of their places, backwards, is asked for. The
metrics of the evaluation are the answers' loss, `accuracy`, `used` (vectors that a query attends
to) and `share` (of the context). Readers: `tree`, `latents` (as many as the tree's nodes), `full`.
"""

from ml_collections import ConfigDict


def get_config(
    reader: str = "tree", context: int = 32, layers: int = 2, steps: int = 3000
) -> ConfigDict:
    """Returns a run; `context` counts the begin token."""
    task = dict(name="copy", length=context - 1, kinds=10, examples=100_000)
    readers = dict(
        tree=dict(
            name="tree",
            branching=2,
            aggregator=dict(n_layers=1),
            bptt=False,
            control="none",  # or "random_path", "exchanged"
        ),
        latents=dict(name="latents", latents=None),
        full=dict(name="full"),
    )
    return ConfigDict(
        dict(
            title=f"copies read by {reader}",
            model=dict(
                d_model=64,
                n_layers=layers,
                n_heads=4,
                d_ff=128,
                max_positions=2 * context,
                causal=False,
                positions="learned",
                activation="gelu",
                remat="none",
            ),
            data=dict(
                tokenizer=dict(name="bytes"),
                train=[dict(source=task | dict(split="train"))],
                evals=dict(validation=task | dict(split="validation", examples=1000)),
                # Begin token, symbols, the symbols backwards, end token; the last predicts nothing.
                seq_len=2 * context - 1,
                batch_size=64,
                packing="none",
                long_examples="error",
            ),
            objective=dict(
                name="tree_cross_attention",
                reader=readers[reader],
                context=context,
                policy_weight=1.0,
                whole_weight=1.0,
                entropy_weight=0.01,
                reward="accuracy",
            ),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=1e-3, b1=0.9, b2=0.999, weight_decay=0.0),
            schedule=dict(name="cosine", warmup_steps=max(steps // 20, 1), final_factor=0.0),
            clip_norm=1.0,
            evaluation=dict(every_steps=500),
            checkpoints=dict(every_steps=500),
        )
    )
