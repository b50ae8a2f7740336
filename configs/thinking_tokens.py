"""Thinking tokens beside a rationale (arXiv 2411.11371), on sums made on the fly or on a file.

    python -m tokjax.train --config=configs/thinking_tokens.py --workdir=runs/thinking
    python -m tokjax.train --config=configs/thinking_tokens.py:rationale=True --workdir=runs/both
    python -m tokjax.train --config=configs/thinking_tokens.py:count=0,rationale=True \
        --workdir=runs/rationale
    python -m tokjax.train --config=configs/thinking_tokens.py:count=0 --workdir=runs/baseline

The rationale of "3+4*5=" is "3+20=". Between question and answer (before the rationale, if there is
one) lie `count` thinking tokens, 0 for as many as the rationale would have with matched=True.
Answers to held-out questions, which get their thinking tokens with the prompt, are the metric
`accuracy`. With `data` each line is {"prompt": ..., "rationale": ..., "response": ...}; for GSM8K
set --config.data.train.0.source.prompt=question, .response=answer and .rationale_end="#### ".
"""

from typing import Any

from ml_collections import ConfigDict

TOKEN = "<T>"


def get_config(
    count: int = 8,
    matched: bool = False,
    place: str = "question",
    distinct: int = 1,
    rationale: bool = False,
    freeze: bool = False,
    data: str = "",
    held_out: str = "",
    steps: int = 2000,
) -> ConfigDict:
    """Returns a run of one of the four conditions; `distinct` thinking tokens take turns."""
    tokens = tuple(f"<T{i}>" for i in range(1, distinct + 1)) if distinct > 1 else (TOKEN,)
    thinking = dict(count="matched" if matched else count, place=place, tokens=tokens)
    if data:
        template = "{prompt}\n{rationale}\n{response}" if rationale else "{prompt}\n{response}"
        source: dict[str, Any] = dict(
            name="jsonl", files=(data,), kind="reasoned", template=template
        )
        validation = dict(source, files=(held_out,), thinking=thinking) if held_out else None
    else:
        source = dict(
            name="arithmetic",
            examples=20_000,
            digits=(1, 1),
            operations=("+", "*"),
            terms=4,
            rationale=rationale,
            validation_share=0.02,
        )
        validation = dict(source, split="validation", thinking=thinking)
    source["thinking"] = thinking
    seq_len = 512 if data else 64
    return ConfigDict(
        dict(
            title="thinking tokens",
            model=dict(d_model=128, n_layers=3, n_heads=4, max_positions=2 * seq_len),
            data=dict(
                tokenizer=dict(name="bytes", added=tokens),
                train=[dict(source=source)],
                evals=dict(validation=validation) if validation else dict(),
                seq_len=seq_len,
                batch_size=32,
            ),
            objective=dict(name="thinking_tokens", tokens=tokens, freeze=freeze),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=3e-4 if data else 2e-3, weight_decay=0.0),
            schedule=dict(name="cosine", warmup_steps=max(steps // 20, 1)),
            evaluation=dict(
                every_steps=max(steps // 4, 1),
                answers=dict(
                    verifier=dict(name="numeric"),
                    max_examples=128,
                    max_new_tokens=seq_len // 2,
                ),
            ),
            checkpoints=dict(every_steps=max(steps // 4, 1)),
        )
    )
