"""Time of a training step of fine-tuning objectives, beside plain SFT, in one run.

    python benchmarks/finetuning_step.py [--methods=sft,q_tuning_mask,q_tuning_drop] [--repeats=9]

Every method takes whole training steps (`make_train_step`: forward, backward, clipping, AdamW) of
the same Llama on the same batches, one step at a time in turns, so that whatever else the machine
does hits all. The rows hold one sample each: a prompt of a quarter of its length and an answer.
`--lengths=varied` draws lengths evenly from a quarter of the row to all of it, `full` fills every
row, `packed` puts samples of an eighth to a half of the row side by side. Methods of pairs take
every second sample of a packed row as the rejected answer to the one before.

Printed as JSON: seconds of a step (median), the median of the paired ratios to the first method
with its quartiles, the same in seconds of all cores (which other programs disturb less), seconds
to compile, and what the method reports of itself.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time

METHODS = {
    "sft": {"name": "sft"},
    "next_token": {"name": "next_token"},
    "q_tuning_mask": {"name": "q_tuning"},
    "q_tuning_drop": {"name": "q_tuning", "mode": "drop"},
    "rft": {"name": "sft", "weigher": {"name": "rft"}, "norm": "sequence"},
    "dft": {"name": "sft", "weigher": {"name": "dft"}},
    "one_token_rollout": {"name": "one_token_rollout"},
    "one_token_rollout_exact": {"name": "one_token_rollout", "mode": "exact"},
    "star_dss": {"name": "star_dss"},
    "dpo": {"name": "dpo"},
    "figa": {"name": "figa"},
    "kto": {"name": "kto"},
    "kto_mismatched": {"name": "kto", "reference_point": "mismatched"},
    "tvm": {"name": "tvm"},
    "cat_attention": {"name": "cat_attention"},
}

SIGNED = ("dpo", "figa", "kto", "kto_mismatched")  # methods that compare good with bad answers
CHANNELS = ("reasoning", "safety", "value", "effect", "cause")  # annotations that methods read


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", default="sft,q_tuning_mask,q_tuning_drop")
    parser.add_argument(
        "--options", default="{}", help='JSON of method -> options, {"q_tuning_drop": {...}}'
    )
    parser.add_argument("--lengths", choices=("varied", "full", "packed"), default="varied")
    parser.add_argument("--remat", choices=("none", "elementwise", "block"), default="elementwise")
    sizes = {"d_model": 384, "layers": 6, "heads": 6, "vocab": 8192}
    for name, value in (sizes | {"batch": 16, "length": 512, "repeats": 9}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def _samples(args, rng) -> list[list[int]]:
    """Returns the lengths of the samples of each row."""
    T = args.length
    if args.lengths == "full":
        return [[T] for _ in range(args.batch)]
    if args.lengths == "varied":
        return [[int(rng.integers(T // 4, T + 1))] for _ in range(args.batch)]
    rows = []
    for _ in range(args.batch):
        row: list[int] = []
        while sum(row) + (n := int(rng.integers(T // 8, T // 2))) <= T:
            row.append(n)
        rows.append(row)
    return rows


def _batch(args, seed: int):
    import jax.numpy as jnp
    import numpy as np

    from tokjax.data.batch import Batch

    rng = np.random.default_rng(seed)
    shape = (args.batch, args.length)
    ints = {n: np.zeros(shape, np.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    weights = np.zeros(shape, np.float32)
    most = 8 if args.lengths == "packed" else 1
    ids = np.full((args.batch, most), -1, np.int32)
    for r, row in enumerate(_samples(args, rng)):
        start = 0
        for s, n in enumerate(row):
            # Tokens of skewed frequencies, so that samples differ once the model has learnt some.
            tokens = (args.vocab * rng.random(n + 1) ** rng.integers(1, 6)).astype(np.int32)
            span = slice(start, start + n)
            ints["tokens"][r, span], ints["targets"][r, span] = tokens[:-1], tokens[1:]
            ints["positions"][r, span], ints["segment_ids"][r, span] = np.arange(n), s + 1
            weights[r, start + n // 4 : start + n] = 1.0
            ids[r, s] = r * most + s
            start += n
    rows = {name: jnp.asarray(values) for name, values in {**ints, "weights": weights}.items()}
    marks = {name: jnp.asarray(rng.random(shape) < 0.5, jnp.float32) for name in CHANNELS}
    return Batch(**rows, example_id=jnp.asarray(ids), channels=marks)


def _signed(batch):
    """Returns the batch with negative weights on every second sample of a row."""
    import jax.numpy as jnp

    sign = jnp.where(batch.segment_ids % 2 == 1, 1.0, -1.0)
    return batch.replace(weights=batch.weights * sign)


def main() -> None:
    """Runs the methods in turns and prints one JSON object."""
    args = _arguments()
    from tokjax.training.memory import keep_freed_memory

    keep_freed_memory()  # as python -m tokjax.train does
    import jax

    from tokjax.config import resolve
    from tokjax.models import ModelConfig, Transformer
    from tokjax.training.config import TrainConfig
    from tokjax.training.optimizers import AdamW, Constant
    from tokjax.training.state import init_state
    from tokjax.training.step import StepConfig, make_train_step

    config = ModelConfig(
        vocab_size=args.vocab,
        d_model=args.d_model,
        n_layers=args.layers,
        n_heads=args.heads,
        max_positions=args.length,
        remat=args.remat,
    )
    model, optimizer = Transformer(config), AdamW(weight_decay=0.1).build(config)
    batches = [_batch(args, seed) for seed in range(4)]
    signed = [_signed(batch) for batch in batches]
    options = json.loads(args.options)
    methods, compiled, states, compile_seconds = args.methods.split(","), {}, {}, {}
    for name in methods:
        if name not in METHODS:
            raise SystemExit(f"there is no method {name!r}: choose of {', '.join(METHODS)}")
        chosen = {**METHODS[name], **options.get(name, {})}
        objective = resolve(TrainConfig, {"steps": 1, "objective": chosen}).objective
        step = make_train_step(
            model, objective, optimizer, StepConfig(1e-3, Constant(), 0, 10**6, clip_norm=1.0)
        )
        states[name] = init_state(model, objective, optimizer, 0, False)
        began = time.perf_counter()
        compiled[name] = jax.jit(step, donate_argnums=0).lower(states[name], batches[0]).compile()
        compile_seconds[name] = time.perf_counter() - began
    times: dict[str, list[float]] = {name: [] for name in methods}
    cpu_times: dict[str, list[float]] = {name: [] for name in methods}
    told: dict[str, list[dict]] = {name: [] for name in methods}
    for i in range(args.repeats + 2):
        for name in methods:
            began, cpu = time.perf_counter(), time.process_time()
            read = signed if name in SIGNED else batches
            states[name], metrics = compiled[name](states[name], read[i % 4])
            jax.block_until_ready((states[name], metrics))
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            if i >= 2:  # the first two warm caches and allocators
                times[name].append(wall)
                cpu_times[name].append(cpu)
                told[name].append({n: float(v) for n, v in metrics.items()})
    rows = {}
    for name in methods:
        ratios, of_cpu = (
            [a / b for a, b in zip(found[name], found[methods[0]], strict=True)]
            for found in (times, cpu_times)
        )
        rows[name] = {
            "step_s": round(statistics.median(times[name]), 4),
            f"over_{methods[0]}": round(statistics.median(ratios), 3),
            "quartiles": [round(r, 3) for r in statistics.quantiles(ratios, n=4)[::2]],
            "cpu_s": round(statistics.median(cpu_times[name]), 4),
            f"cpu_over_{methods[0]}": round(statistics.median(of_cpu), 3),
            "compile_s": round(compile_seconds[name], 1),
            **{
                key: round(statistics.mean(m[key] for m in told[name]), 4)
                for key in ("loss", "kept_samples", "kept_tokens", "trained_positions")
                if key in told[name][0]
            },
        }
    result = {
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind}",
        "parameters": sum(a.size for a in jax.tree.leaves(states[methods[0]].params)),
        "size": {n: getattr(args, n) for n in ("batch", "length", "d_model", "layers", "vocab")},
        "lengths": args.lengths,
        "methods": rows,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
