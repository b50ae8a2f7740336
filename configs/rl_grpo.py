"""Reinforcement learning on sums made on the fly: a warm start by examples, then GRPO or a kin.

    python -m tokjax.train --config=configs/rl_grpo.py --workdir=runs/rl

`method` is any of `tokjax.rl.presets.PRESETS`: grpo, dapo, dr_grpo, gspo, rloo, reinforce_pp, ppo.
"""

from ml_collections import ConfigDict

from tokjax.rl.presets import PRESETS


def get_config(method: str = "dapo", seed: int = 0) -> ConfigDict:
    """Returns a run whose first stage imitates a few examples and whose second learns by reward."""
    task = dict(name="arithmetic", digits=(1, 2), examples=4000)
    objective = dict(
        PRESETS[method],
        rewards=(dict(name="verifier", verifier=dict(name="exact_match")),),
        rollouts=dict(group=16, minibatches=2, max_new_tokens=5, rows=512),
        # Without it answers grow certain before they grow right, and groups of equal answers that
        # are wrong teach nothing.
        entropy_coef=0.005,
    )
    return ConfigDict(
        dict(
            title=f"sums by {method}",
            seed=seed,
            model=dict(d_model=128, n_layers=3, n_heads=4, max_positions=32),
            data=dict(
                tokenizer=dict(name="bytes", add_eos=True),
                train=[dict(source=task)],
                evals=dict(held_out=dict(task, split="validation", examples=256)),
                seq_len=12,
                batch_size=256,
            ),
            stages=[
                dict(objective=dict(name="sft"), share=0.05),
                dict(objective=objective, share=0.95, rate=0.2),
            ],
            steps=3000,
            optimizer=dict(name="adamw", peak_lr=1e-3, weight_decay=0.0),
            schedule=dict(name="wsd", warmup_steps=10),
            evaluation=dict(every_steps=100, answers=dict(max_examples=256, max_new_tokens=5)),
            checkpoints=dict(every_steps=200),
            log_every=10,
        )
    )
