"""Alignment of a checkpoint by pairs of answers (DPO) or rated answers (KTO), by adapters.

    python -m tokjax.train --config=configs/preference.py:checkpoint=runs/sft,data=pairs.jsonl \
        --workdir=runs/dpo

Each line is {"prompt": ..., "chosen": ..., "rejected": ...}; the answers (and the prompt) may be
chats, lists of {"role", "content"}. `method=kto` reads {"prompt", "response", "label"} instead. The
reference is the checkpoint itself, without the adapters. The file `artifact` holds token weights
(cDPO, FIGA with `--config.objective='{"name": "figa"}'`, MR-ALIGN).
"""

from ml_collections import ConfigDict


def get_config(
    checkpoint: str = "smollm2-135m",
    data: str = "pairs.jsonl",
    held_out: str = "",
    artifact: str = "",
    method: str = "dpo",
    epochs: float = 1.0,
) -> ConfigDict:
    """Returns a run over `data` by `method`: dpo or kto."""
    kind = "preference" if method == "dpo" else "rated"
    source = dict(name="jsonl", files=(data,), kind=kind)
    return ConfigDict(
        dict(
            title=f"{checkpoint}, {method} on {data}",
            init_from=checkpoint,
            model=dict(lora=dict(rank=16, alpha=32.0)),
            data=dict(
                train=[dict(source=source, artifact=artifact or None)],
                evals=dict(held_out=dict(source, files=(held_out,))) if held_out else dict(),
                seq_len=1024,
                batch_size=4,
                # Half a pair says nothing: pairs that do not fit a row are left out and counted.
                max_tokens=1024,
                on_error="skip",
            ),
            objective=dict(name=method, beta=0.1),
            epochs=epochs,
            optimizer=dict(name="adamw", peak_lr=4e-5, weight_decay=0.01),
            schedule=dict(name="cosine", warmup_steps=10),
            evaluation=dict(every_steps=100),
            checkpoints=dict(every_steps=100),
            log_every=1,
        )
    )
