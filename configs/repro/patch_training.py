"""Patch-level training (arXiv 2407.12665) against token-only training, at a small scale.

    python -m tokjax.reproduce patch_training

What came out is in docs/reproductions/patch_training.json and .png: with 2.5M tokens, patches
help a token stage of the same batches (4.31 against 4.48 nats), and not with the targets shuffled;
tokens of equal compute are still better (4.13).

The arms, for C steps of 2,048 tokens:
    tokens          C steps on tokens
    patches         C/6 steps on patches of 4 tokens, then C/3 on tokens: the same data once, for
                    half the operations
    scratch         the C/3 token steps of `patches` alone, from fresh parameters: the same batches
    half            C/2 steps on tokens: the operations of `patches`, on the first half of the data
    shuffled        `patches`, each patch predicting the next patch of another row
    first_token     `patches`, each patch predicting only the first token of the next
"""

from ml_collections import ConfigDict

from tokjax.reproduction import Arm, Panel, Plan, Results, Series, Verdict

LOSS = "eval/validation/loss"
SHARE = 2 / 3  # of the data read in patches
K = 4  # tokens a patch
WITHIN = 300  # token steps within which the patched model must have fallen below scratch
KEPT = 0.25  # largest part of the gain over scratch that shuffled targets may keep


def get_plan(scale: str) -> Plan:
    """Returns the plan: 1M parameters and 2.5M tokens, or in seconds for `smoke`."""
    smoke = scale == "smoke"
    steps = 24 if smoke else 1200
    words = {"name": "bytes"} if smoke else {"name": "bpe", "vocab_size": 1024}
    parts = ["topics"] if smoke else ["topics", "docstrings", "sources"]

    def config(title: str, steps: int, targets: str | None = None) -> ConfigDict:
        every = 4 if smoke else 40
        tree = {
            "title": title,
            "model": {
                "d_model": 32 if smoke else 128,
                "n_layers": 2 if smoke else 4,
                "n_heads": 4,
                "max_positions": 128,
            },
            "data": {
                "tokenizer": words,
                "train": [{"source": {"name": "stdlib", "split": "train", "parts": parts}}],
                "evals": {"validation": {"name": "stdlib", "split": "validation", "parts": parts}},
                "seq_len": 128,
                "batch_size": 16,
            },
            "steps": steps,
            "optimizer": {"name": "adamw", "peak_lr": 3e-3},
            "schedule": {"name": "cosine", "warmup_steps": 2 if smoke else 20},
            "evaluation": {"every_steps": every, "max_batches": 1 if smoke else 16},
            "checkpoints": {"every_steps": 4 if smoke else 200, "keep": 1},
        }
        if targets is not None:
            patch = {"name": "patch", "k": K, "targets": targets}
            token = {"name": "next_token"}
            tree["stages"] = [
                {"objective": patch, "share": SHARE},
                {"objective": token, "share": 1 - SHARE},
            ]
        return ConfigDict(tree)

    arms = {
        "tokens": Arm("baseline", "tokens only", config("tokens only", steps), "patches"),
        "patches": Arm("method", "patches, then tokens", config("patches", steps, "patch")),
        "scratch": Arm(
            "baseline",
            "token stage from scratch",
            config("token stage from scratch", steps // 3),
            data_of="patches",
            from_stage=1,
        ),
        "half": Arm(
            "baseline", "tokens, equal compute", config("equal compute", steps // 2), "patches"
        ),
        "shuffled": Arm("control", "patches of another row", config("shuffled", steps, "shuffled")),
        "first_token": Arm(
            "control", "first token of the next patch", config("first token", steps, "token")
        ),
    }
    return Plan(
        claim=(
            "Training two thirds of the data in patches of 4 tokens and the rest in tokens takes "
            "half the compute of token-only training and gives a better model than its token "
            "stage alone, and than token-only training of equal compute."
        ),
        arms=arms,
        judge=judge,
        metric=LOSS,
        panels=(
            Panel("flops", LOSS, "nats per token", "validation loss against operations"),
            Panel("tokens", LOSS, "nats per token", "validation loss against data tokens"),
            Panel(
                "last_stage",
                LOSS,
                "nats per token",
                "validation loss in the token stage",
                ("patches", "scratch", "shuffled", "first_token"),
            ),
        ),
        seeds=(0, 1),
        notes=(
            "All arms read one packing of the documents, so tokens and patches read the same data "
            "once, scratch reads the batches of the token stage of patches bit for bit, and half "
            "reads the first half of the data.",
            "Everything was fixed before the first run, learning rate included; nothing was tuned "
            "on the validation split.",
            "Validation losses are next-token losses, also within the patch stage.",
            "That patches reach the loss of tokens is not demanded: less than one pass over little "
            "data favours tokens, as the paper's own data scaling says.",
        ),
    )


def judge(results: Results) -> Verdict:
    """Demands what must come out at a small scale; see the sentences."""
    final = {arm: results.final(arm, LOSS) for arm in results.arms}
    mean = {arm: results.mean_final(arm, LOSS) for arm in results.arms}

    def below(arm: str, other: str) -> bool:
        pairs = zip(final[arm], final[other], strict=True)
        return mean[arm] < mean[other] and all(a < b for a, b in pairs)

    def versus(arm: str, other: str) -> str:
        gaps = [b - a for a, b in zip(final[arm], final[other], strict=True)]
        by_seed = ", ".join(f"{gap:+.4f}" for gap in gaps)
        return f"{mean[arm]:.4f} against {mean[other]:.4f} (gain by seed: {by_seed})"

    switches, crossings = [], []
    curves = results.curves("patches", LOSS)
    for run, curve, scratch in zip(
        results.of("patches"), curves, results.curves("scratch", LOSS), strict=True
    ):
        switch = run.stages[1].first_step
        switches.append((curve.at(switch), curve.last))
        crossings.append(crossing(curve.from_step(switch), scratch))
    high = ", ".join(f"{at:.3f} (at its end {end:.3f})" for at, end in switches)
    falls = ", ".join("never" if step is None else str(step) for step in crossings)

    gain = mean["scratch"] - mean["patches"]
    kept = (mean["scratch"] - mean["shuffled"]) / gain if gain > 0 else float("nan")
    kept_first = (mean["scratch"] - mean["first_token"]) / gain if gain > 0 else float("nan")
    tokens, patches = results.of("tokens")[0], results.of("patches")[0]
    model = patches.model_flops / tokens.model_flops
    counted = patches.counted_flops / tokens.counted_flops
    seconds = sum(r.step_seconds for r in results.of("patches")) / sum(
        r.step_seconds for r in results.of("tokens")
    )
    return Verdict.of(
        [
            (
                all(at > end + 1 for at, end in switches),
                f"at the switch the patched model's token loss is high: {high} nats",
            ),
            (
                all(step is not None and step <= WITHIN for step in crossings),
                f"its token stage falls below scratch for good within {WITHIN} steps: after "
                f"{falls}",
            ),
            (
                below("patches", "scratch"),
                f"it ends below scratch on the same token batches: {versus('patches', 'scratch')}",
            ),
            (
                mean["patches"] <= mean["half"],
                f"it ends no higher than tokens of equal compute: {versus('patches', 'half')}",
            ),
            (
                gain > 0 and kept <= KEPT,
                f"shuffled targets keep at most {KEPT:.0%} of the gain over scratch: "
                f"{kept:.0%}; {versus('shuffled', 'scratch')}",
            ),
            (
                abs(model - 0.5) < 0.01,
                f"it takes half the operations of tokens on the same data: {model:.3f} by formula, "
                f"{counted:.3f} counted in the programs",
            ),
            (None, f"its wall time in training steps is {seconds:.3f} of that of tokens"),
            (
                None,
                f"predicting the next patch's first token only keeps {kept_first:.0%} of the gain: "
                f"{versus('first_token', 'scratch')}",
            ),
            (None, f"against tokens on all the data: {versus('patches', 'tokens')}"),
        ]
    )


def crossing(patched: Series, scratch: Series) -> int | None:
    """Returns the step of the token stage from which `patched` stays below `scratch`, or None."""
    steps = [step for step in patched.steps if step in scratch.steps]
    first = None
    for step in reversed(steps):
        if patched.at(step) >= scratch.at(step):
            break
        first = step
    return first
