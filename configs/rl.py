"""Reinforcement learning of a checkpoint on questions with known answers, by adapters.

    python -m tokjax.train --config=configs/rl.py:checkpoint=smollm2-135m,data=gsm8k.jsonl.gz \
        --workdir=runs/rl

Each line is {"question": ..., "answer": ...}, as GSM8K's are; the last number of what the model
says must be that of the answer. For other data set `question` and `answer` to the fields' names and
--config.objective.rewards.0.verifier to another verifier. `method` is any of
`tokjax.rl.presets.PRESETS`; `held_out` is answered greedily at every evaluation.
"""

from ml_collections import ConfigDict

from tokjax.rl.presets import PRESETS


def get_config(
    checkpoint: str = "smollm2-135m",
    data: str = "gsm8k.jsonl.gz",
    held_out: str = "",
    method: str = "dapo",
    question: str = "question",
    answer: str = "answer",
    max_new_tokens: int = 256,
    steps: int = 200,
) -> ConfigDict:
    """Returns a run of the adapters by `method`."""
    source = dict(
        name="jsonl",
        files=(data,),
        kind="response",
        prompt=question,
        response=answer,
        template="<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}",
    )
    numeric = dict(name="numeric")
    objective = dict(
        PRESETS[method],
        rewards=(
            dict(name="verifier", verifier=numeric),
            dict(name="overlong", weight=0.2),
        ),
        rollouts=dict(group=8, minibatches=2, prompts=16, max_new_tokens=max_new_tokens),
    )
    answers = dict(verifier=numeric, max_examples=64, max_new_tokens=max_new_tokens)
    return ConfigDict(
        dict(
            title=f"{checkpoint}, {method} on {data}",
            init_from=checkpoint,
            model=dict(lora=dict(rank=16, alpha=32.0)),
            data=dict(
                train=[dict(source=source)],
                evals=dict(held_out=dict(source, files=(held_out,))) if held_out else dict(),
                seq_len=512,
                batch_size=32,
            ),
            objective=objective,
            steps=steps,
            micro_batches=4,
            optimizer=dict(name="adamw", peak_lr=1e-4, weight_decay=0.0),
            schedule=dict(name="constant", warmup_steps=5),
            evaluation=dict(every_steps=50, answers=answers),
            checkpoints=dict(every_steps=20),
            log_every=1,
        )
    )
