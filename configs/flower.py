"""Recommendations in proportion to a target by Flower: titles chosen, and a catalogue with weights.

    python -m tokjax.train --config=configs/flower.py --workdir=runs/flower

`interactions` holds lines such as {"prompt": "Liked: Heat, Alien. Next:", "response": " Fargo"},
`catalogue` the same titles with their leading space and a weight each, how often they were chosen:
{"title": " Fargo", "weight": 181}. The weights may be a file of interactions itself (one a line, of
weight 1 each). With `init_from` a model is tuned; without, a small one is trained from nothing.
Recommend from the result with `tokjax.decoding.constrained.on_trie.recommend`; see
docs/gflownets.md.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(
    interactions: str = "interactions.jsonl",
    catalogue: str = "catalogue.jsonl",
    theta: float = 0.999,
    power: float = 1.0,
    init_from: str = "",
    seed: int = 0,
) -> ConfigDict:
    """Returns a run of imitation and balance at once, the paper's setting for next items."""
    tree: dict[str, Any] = dict(
        title="Flower",
        seed=seed,
        data=dict(
            train=[dict(source=dict(name="jsonl", files=[interactions], kind="response"))],
            evals={},
            seq_len=512,
            batch_size=64,  # rows of an update: for each prompt its reference and one path
        ),
        objective=dict(
            name="flower",
            catalogue=catalogue,
            power=power,  # below 1 flattens the target
            theta=theta,  # 0.99 to 0.9999 in the paper's code; 0 fits the target alone
            explore="trie",
            rollouts=dict(group=1, minibatches=4, max_new_tokens=100),
        ),
        epochs=7,
        optimizer=dict(name="adamw", peak_lr=3e-4),
        schedule=dict(name="cosine", warmup_steps=20),
        evaluation=dict(every_steps=500),
        checkpoints=dict(every_steps=500),
    )
    if init_from:
        tree["init_from"] = init_from
    else:
        tree["model"] = dict(d_model=256, n_layers=6, n_heads=4, max_positions=512)
        tree["data"]["tokenizer"] = dict(name="bytes", add_eos=True)
    return ConfigDict(tree)
