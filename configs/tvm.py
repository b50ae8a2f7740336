"""A value model of solutions (TVM): each token predicts whether the solution so far will end right.

    python -m tokjax.select --method=tvm --model=smollm2-135m --pool=solutions.jsonl --kind=rated \
        --budget=100% --out=values
    python -m tokjax.train \
        --config=configs/tvm.py:checkpoint=smollm2-135m,data=solutions.jsonl,artifact=values/selection.parquet \
        --workdir=runs/tvm

Each line is {"prompt": ..., "response": ..., "label": true or false}: about 100 sampled solutions of
each problem, and whether each is right; a solution without an answer is not. The checkpoint is the
one that wrote them. Without `artifact` every token's label is the outcome (outcome supervision).
The file `held_out`, of other problems, is evaluated by outcomes: stop where `brier` rises again.
"""  # noqa: E501

from ml_collections import ConfigDict


def get_config(
    checkpoint: str = "smollm2-135m",
    data: str = "solutions.jsonl",
    held_out: str = "",
    artifact: str = "",
    loss: str = "mse",
    lora: bool = False,
    epochs: float = 1.0,
) -> ConfigDict:
    """Returns a run over `data` with the labels of `artifact`; `loss` is mse or bce."""
    source = dict(name="jsonl", files=(data,), kind="rated")
    channel = "value" if artifact else None
    return ConfigDict(
        dict(
            title=f"values of {checkpoint} on {data}",
            init_from=checkpoint,
            model=dict(lora=dict(rank=16, alpha=32.0)) if lora else dict(),
            data=dict(
                train=[dict(source=source, artifact=artifact or None)],
                evals=dict(held_out=dict(source, files=(held_out,))) if held_out else dict(),
                seq_len=1024,
                batch_size=8,
                # A part of a solution lacks its problem: longer ones are left out and counted.
                max_tokens=1024,
                on_error="skip",
            ),
            objective=dict(name="tvm", kind=loss, channel=channel, norm="sequence"),
            epochs=epochs,
            micro_batches=2,
            optimizer=dict(name="adamw", peak_lr=2e-4 if lora else 1e-5, weight_decay=0.0),
            schedule=dict(name="cosine", warmup_steps=20),
            evaluation=dict(every_steps=100),
            checkpoints=dict(every_steps=100),
            log_every=1,
        )
    )
