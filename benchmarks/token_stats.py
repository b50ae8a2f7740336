"""Time and memory of the streamed loss and its gradient, beside logits that are kept.

    python benchmarks/token_stats.py [--repeats=3] [--vocab=151936 --batch=8 ...]

Every side computes the mean negative log-likelihood of the same random targets, and its gradient
with respect to hidden states and table, in float32:

    naive         logits materialised as [B T, V], jax.nn.logsumexp, autodiff, jitted: XLA keeps
                  two buffers of their size (log_softmax of [B, T, V] takes five)
    token_stats   tokjax.signals.token_stats(...).nll.mean()
    weighted_nll  tokjax.signals.weighted_nll, the training loss
    torch         transformers' ForCausalLMLoss of materialised logits

With `--entropy=0.1`, minus that times the mean entropy is added, on the two sides that can. Each
side lives in a process of its own with every core; they take turns, one evaluation at a time, so
that whatever else the machine does hits all. Printed as JSON: median and least seconds; the median
of the paired ratios to naive; peak resident memory beyond what the process held before its first
evaluation (it includes the two gradients, which every side must return), and what XLA reserves
for temporary buffers. The full size takes 5 GB on the naive side and as much in torch.
Torch and transformers come with the extra `test`.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from pathlib import Path

SIDES = ("naive", "token_stats", "weighted_nll", "torch")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = {"batch": 8, "length": 512, "width": 512, "vocab": 151_936, "repeats": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--entropy", type=float, default=0.0, help="weight of the mean entropy")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=None)
    return parser.parse_args()


def _data(args):
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((args.batch, args.length, args.width), np.float32)
    table = rng.standard_normal((args.vocab, args.width), np.float32)
    table *= 3.0 / args.width**0.5  # logits of standard deviation 3, as trained models have
    return x, table, rng.integers(0, args.vocab, (args.batch, args.length)).astype(np.int32)


def _torch_side(args):
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    x, table, targets = map(torch.as_tensor, _data(args))
    x.requires_grad_()
    table.requires_grad_()

    def run():
        x.grad = table.grad = None
        logits = x @ table.T
        loss = ForCausalLMLoss(logits, None, args.vocab, shift_labels=targets.long())
        loss.backward()
        return loss.item(), x.grad.numpy(), table.grad.numpy()

    return run, None


def _jax_side(args, name):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tokjax.signals import token_stats, weighted_nll

    data = tuple(map(jnp.asarray, _data(args)))

    def naive(x, table, targets):
        z = jnp.einsum("nd,vd->nv", x.reshape(-1, args.width), table)
        lse = jax.nn.logsumexp(z, axis=-1)
        loss = (lse - jnp.take_along_axis(z, targets.reshape(-1, 1), -1)[:, 0]).mean()
        if args.entropy:
            mean = (jnp.exp(z - lse[:, None]) * z).sum(-1)
            loss -= args.entropy * (lse - mean).mean()
        return loss

    def fused(x, table, targets):
        want = ("nll", "entropy") if args.entropy else ("nll",)
        stats = token_stats(x, table, targets, want)
        return stats.nll.mean() - (args.entropy * stats.entropy.mean() if args.entropy else 0.0)

    def training(x, table, targets):
        weights = jnp.full((*targets.shape, 1), 1.0 / targets.size)
        return weighted_nll(x, table, targets[..., None], weights)[0]

    loss = {"naive": naive, "token_stats": fused, "weighted_nll": training}[name]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*data).compile()

    def run():
        value, (d_x, d_table) = jax.block_until_ready(step(*data))
        return float(value), np.asarray(d_x), np.asarray(d_table)

    return run, step.memory_analysis().temp_size_in_bytes


def _serve(args, name, pipe) -> None:
    run, temporary = _torch_side(args) if name == "torch" else _jax_side(args, name)
    # Forgets the peak of making the data and compiling (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(temporary)
    while pipe.recv():
        began, cpu = time.perf_counter(), time.process_time()
        loss, d_x, d_table = run()
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        pipe.send((wall, cpu, 1024 * peak, loss, d_x, d_table[: 4 * args.width].copy()))
        del d_x, d_table


def _compare(args, workers) -> dict:
    import numpy as np

    results = {name: [] for name in workers}
    for i in range(args.repeats + 1):
        for name, (pipe, _) in workers.items():
            pipe.send(True)
            result = pipe.recv()
            if i:  # the first evaluation warms caches and allocators
                results[name].append(result)
    table = {}
    for name, (pipe, temporary) in workers.items():
        pipe.send(False)
        walls, cpus, peaks, losses, *gradients = zip(*results[name], strict=True)
        row = {
            "seconds": round(statistics.median(walls), 3),
            "least_seconds": round(min(walls), 3),
            "cpu_seconds": round(statistics.median(cpus), 3),
            "peak_bytes_beyond_inputs": max(peaks),
            "xla_temporary_bytes": temporary,
            "loss": losses[0],
        }
        if "naive" in results:
            pairs = zip(walls, (r[0] for r in results["naive"]), strict=True)
            row["seconds_over_naive"] = round(statistics.median(a / b for a, b in pairs), 3)
            exact = results["naive"][0][4:]
            row["gradient_error"] = max(
                float(np.abs(a[0] - b).max() / np.abs(b).max())
                for a, b in zip(gradients, exact, strict=True)
            )
        table[name] = row
    return table


def main() -> None:
    """Runs all sides in turns and prints one JSON object."""
    args = _arguments()
    sides = args.sides or (SIDES[:2] if args.entropy else SIDES)
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in sides:
        here, there = context.Pipe()
        context.Process(target=_serve, args=(args, name, there), daemon=True).start()
        workers[name] = (here, here.recv())
    result = {
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
        "size": {n: getattr(args, n) for n in ("batch", "length", "width", "vocab")},
        "entropy": args.entropy,
        "logits_bytes": 4 * args.batch * args.length * args.vocab,
        "gradient_bytes": 4 * args.width * (args.vocab + args.batch * args.length),
        "sides": _compare(args, workers),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
