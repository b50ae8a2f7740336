"""Scoring of a pool by TRIM beside scoring by gradients, on the same model and the same examples.

    python benchmarks/selection.py [--examples=64] [--tokens=256] [--repeats=5] [--d_model=512 ...]
    python benchmarks/selection.py --model=smollm2-135m --examples=8 --repeats=3

Examples are random ids, the second half of each being the response. Methods take turns, each over
all examples, so that whatever else the machine does hits all; the first turn, which compiles, does
not count, nor does the pass over the target, which is paid once. Printed: median milliseconds an
example, and the medians of the paired ratios to TRIM's time, with quartiles, and to its CPU time. A
`gradient` is that of the adapters that LESS has, a `small_gradient` that of adapters of rank 8 at
two matrices of a block; their batches are smaller, as their memory is larger. Both are of one
checkpoint (LESS adds up four).
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time

import jax
import numpy as np

METHODS = {
    "trim": ("trim", {}),
    "rds": ("rds", {}),
    "loss": ("loss", {}),
    "gradient": ("gradient", {}),
    "small_gradient": (
        "gradient",
        {"rank": 8, "targets": ("query", "value"), "dimensions": 1024},
    ),
}


class Examples:
    """Random examples of one length as a token store in memory."""

    def __init__(self, count: int, tokens: int, vocab: int, seed: int):
        self.ids = np.random.default_rng(seed).integers(3, vocab, (count, tokens)).astype(np.int32)
        self.num_examples, self.lengths = count, np.full(count, tokens)

    def tokens(self, i, start=0, stop=None):
        """Returns ids of an example."""
        return self.ids[i, start:stop]

    def weights(self, i, start=0, stop=None):
        """Returns its weights: 1 in the second half."""
        own = np.arange(self.ids.shape[1]) >= self.ids.shape[1] // 2
        return own.astype(np.float32)[start:stop]

    def example_key(self, i):
        """Returns a key."""
        return f"{i:016x}"

    def example_name(self, i):
        """Returns a name."""
        return str(i)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="what tokjax.load takes; else one of the sizes below")
    sizes = {"d_model": 512, "layers": 8, "heads": 8, "vocab": 8192}
    for name, value in (sizes | {"examples": 64, "tokens": 256, "repeats": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def main() -> None:
    """Runs all methods and prints the comparison as JSON."""
    args = _arguments()
    from tokjax.models import ModelConfig, Transformer
    from tokjax.models.config import with_dtypes
    from tokjax.selection.methods import selector
    from tokjax.selection.rows import batches
    from tokjax.selection.scoring import Target

    if args.model:
        import tokjax

        lm = tokjax.load(args.model)
        model, params = lm.model, lm.params
    else:
        config = ModelConfig(
            vocab_size=args.vocab, d_model=args.d_model, n_layers=args.layers, n_heads=args.heads,
            max_positions=args.tokens,
        )  # fmt: skip
        model = Transformer(with_dtypes(config, args.dtype, args.dtype))
        params = jax.jit(model.init)(jax.random.key(0))
    vocab = model.config.vocabulary
    pool = Examples(args.examples, args.tokens, vocab, 0)
    target = Target(Examples(8, args.tokens, vocab, 1), args.batch_tokens, args.tokens)
    turns = {}
    for name, given in METHODS.items():
        chosen = selector(*given)
        scorer = chosen.prepare(model, params, target if chosen.needs_target else None)
        size = max(1, args.batch_tokens // chosen.memory)
        rows = list(batches(pool, range(args.examples), batch_tokens=size, max_tokens=args.tokens))
        turns[name] = (scorer, rows)

    def seconds(name: str) -> tuple[float, float]:
        scorer, rows = turns[name]
        began, cpu = time.perf_counter(), time.process_time()
        for batch in rows:
            scorer(batch)
        return time.perf_counter() - began, time.process_time() - cpu

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for turn in range(args.repeats + 1):
        for name in METHODS:
            taken = seconds(name)
            if turn:
                times[name].append(taken)
    found = {
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "examples": args.examples,
        "tokens": args.tokens,
    }
    for name in METHODS:
        own = times[name]
        pairs = list(zip(own, times["trim"], strict=True))
        ratios = [mine[0] / trim[0] for mine, trim in pairs]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found[name] = {
            "ms_per_example": round(1e3 * statistics.median(t for t, _ in own) / args.examples, 2),
            "time_over_trim": round(statistics.median(ratios), 2),
            "quartiles": [round(quartiles[0], 2), round(quartiles[2], 2)],
            "cpu_time_over_trim": round(statistics.median(m[1] / t[1] for m, t in pairs), 2),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
