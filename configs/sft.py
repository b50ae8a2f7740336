"""Supervised fine-tuning of a checkpoint on a JSONL file of chats, by adapters.

    python -m tokjax.train --config=configs/sft.py:checkpoint=smollm2-135m,data=chats.jsonl \
        --workdir=runs/sft
    python -m tokjax.export --workdir=runs/sft --to=exported

Each line is {"messages": [{"role": ..., "content": ...}, ...]}: the checkpoint's own chat template
renders it, and only what the assistant says is trained on. `kind=response` reads {"prompt": ...,
"response": ...} instead. The file `held_out` is evaluated; the selection `artifact` says which
examples are kept and what their tokens weigh.
"""

from ml_collections import ConfigDict


def get_config(
    checkpoint: str = "smollm2-135m",
    data: str = "chats.jsonl",
    held_out: str = "",
    artifact: str = "",
    kind: str = "messages",
    lora: bool = True,
    epochs: float = 3.0,
) -> ConfigDict:
    """Returns a run over `data`, of the adapters alone or (lora=False) of all parameters."""
    source = dict(name="jsonl", files=(data,), kind=kind)
    return ConfigDict(
        dict(
            title=f"{checkpoint} on {data}",
            init_from=checkpoint,
            model=dict(lora=dict(rank=8, alpha=16.0)) if lora else dict(),
            data=dict(
                train=[dict(source=source, artifact=artifact or None)],
                evals=dict(held_out=dict(source, files=(held_out,))) if held_out else dict(),
                seq_len=512,
                batch_size=8,
                long_examples="split",
            ),
            objective=dict(name="sft"),
            epochs=epochs,
            micro_batches=2,
            optimizer=dict(name="adamw", peak_lr=2e-4 if lora else 2e-5, weight_decay=0.0),
            schedule=dict(name="cosine", warmup_steps=5),
            evaluation=dict(every_steps=100),
            checkpoints=dict(every_steps=100),
            log_every=1,
        )
    )
