"""A reranker with a scalar head, taught by labels and a teacher's scores (DeAR, first stage).

    python -m tokjax.train --config=configs/dear.py:checkpoint=smollm2-135m,data=groups.jsonl \
        --workdir=runs/dear
    python -m tokjax.rerank --data=queries.jsonl --model=runs/dear --stage=pointwise --out=out.jsonl

Each line is {"query": ..., "passages": [{"text", "title"?, "score"}, ...], "labels"?: [...]}, with
as many passages on every line, the relevant one first where there are no labels. The scores are a
teacher's: a larger model trained by this file with `alpha=0`, whose output of the second command is
data for the first. The second stage is fine-tuning on chats; see docs/retrieval.md.
"""

from ml_collections import ConfigDict


def get_config(
    checkpoint: str = "smollm2-135m",
    data: str = "groups.jsonl",
    held_out: str = "",
    alpha: float = 0.1,
    seq_len: int = 2048,
    epochs: float = 2.0,
) -> ConfigDict:
    """Returns a run over `data`; `alpha` is the teacher's share, 0 needs no scores."""
    source = dict(name="jsonl", files=(data,), kind="ranking", query_tokens=32, passage_tokens=196)
    return ConfigDict(
        dict(
            title=f"{checkpoint}, reranker of {data}",
            init_from=checkpoint,
            model=dict(
                lora=dict(
                    rank=32,
                    alpha=64.0,
                    targets=("query", "value", "out", "gate", "up", "down"),
                )
            ),
            data=dict(
                train=[dict(source=source)],
                evals=dict(held_out=dict(source, files=(held_out,))) if held_out else dict(),
                # All passages of a query share a row: 8 of at most 232 tokens.
                seq_len=seq_len,
                batch_size=4,
            ),
            objective=dict(name="dear", main="ranknet_softmax_ce", alpha=alpha, temperature=2.0),
            epochs=epochs,
            optimizer=dict(name="adamw", peak_lr=1e-4, weight_decay=0.0),
            schedule=dict(name="cosine", warmup_steps=10),
            evaluation=dict(every_steps=200),
            checkpoints=dict(every_steps=200),
        )
    )
