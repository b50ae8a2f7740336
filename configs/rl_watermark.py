"""A watermark in a checkpoint's own weights: it and the detector of its texts are trained together.

    python -m tokjax.train --config=configs/rl_watermark.py:checkpoint=smollm2-135m \
        --workdir=runs/watermark

Texts are cut into prompts of 32 tokens and human continuations of 128; by default they are the
docstrings of Python's standard library, and `data` names a text file or pattern of one's own. A
fifth of the steps train the detector alone on the model as it is. Then `tokjax.load` gives the
marked model, and

    from tokjax.rl.watermark_detection import load_detector
    scores = load_detector("runs/watermark")(prompts, texts)

scores texts. `detector` names a small checkpoint of the same tokenizer to begin the detector from;
lower `detector_rate` to about 0.02 with it, as in the paper (1e-5). `beta` holds the model to what
it was: raise it where answers repeat themselves (`rollout/distinct`, `kl_reference`).
"""

from ml_collections import ConfigDict


def get_config(
    checkpoint: str = "smollm2-135m",
    data: str = "",
    detector: str = "",
    detector_rate: float = 1.0,
    beta: float = 0.1,
    substitution: float = 0.2,
    steps: int = 2000,
) -> ConfigDict:
    """Returns a run of `steps` steps of 16 answers; adapters are trained beside the checkpoint."""
    source = (
        dict(name="text", files=(data,)) if data else dict(name="stdlib", parts=("docstrings",))
    )
    objective = dict(
        name="rl_watermark",
        prompt_tokens=32,
        rollouts=dict(group=1, max_new_tokens=128),
        advantage=dict(name="gae", kl_coef=beta, whiten=False),
        detector=dict(checkpoint=detector)
        if detector
        else dict(model=dict(d_model=256, n_layers=4, n_heads=4)),
        detector_rate=detector_rate,
        substitution=substitution,  # of 20 % of the tokens, as in the paper; 0 trains without
    )
    return ConfigDict(
        dict(
            title=f"{checkpoint}, watermarked",
            init_from=checkpoint,
            model=dict(lora=dict(rank=16, alpha=32.0)),
            data=dict(
                train=[dict(source=source)],
                evals=dict(),
                long_examples="split",
                seq_len=160,
                batch_size=16,
            ),
            stages=(
                dict(objective=dict(objective, trains_policy=False), share=0.2),
                dict(objective=objective, share=0.8),
            ),
            steps=steps,
            optimizer=dict(name="adamw", peak_lr=5e-4, weight_decay=0.0),
            schedule=dict(name="constant", warmup_steps=20),
            checkpoints=dict(every_steps=100),
            log_every=1,
        )
    )
