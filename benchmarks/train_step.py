"""Training throughput beside PyTorch, and as a share of the matmul peak, in one run.

    python benchmarks/train_step.py [--repeats=15] [--d_model=512 --layers=8 ...]

Both sides train the same Llama (width 512, 8 layers, 29.5M parameters, vocabulary 8,192, batch 8 x
256, float32, AdamW, clipping at 1) from the same initial weights on the same batches. Each lives
in a process of its own with every core; they take turns, one step at a time, so that whatever
else the machine does hits both. Printed: the losses (they must agree), the median seconds and CPU
seconds of a step, the median of the paired ratios with its quartiles, and the share of the matmul
peak that was measured between the steps. Needs the extra `test` (torch, transformers).
"""

import argparse
import dataclasses
import json
import multiprocessing
import platform
import statistics
import tempfile
import time


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    sizes = {"d_model": 512, "layers": 8, "heads": 8, "d_ff": 1376, "vocab": 8192}
    for name, value in (sizes | {"batch": 8, "length": 256, "repeats": 15}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--unroll", type=int, default=1, help="tokjax: blocks per scan iteration")
    return parser.parse_args()


def _batches(args):
    import numpy as np

    generator = np.random.default_rng(0)
    return [generator.integers(0, args.vocab, (args.batch, args.length)) for _ in range(4)]


def _torch_worker(args, folder, pipe) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.d_model,
        intermediate_size=args.d_ff,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batches = [torch.as_tensor(b) for b in _batches(args)]
    pipe.send(sum(p.numel() for p in model.parameters()))
    square = torch.randn(1024, 1024)

    def work(i):
        if i < 0:
            return float((square @ square)[0, 0])
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=batches[i % 4], labels=batches[i % 4]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    _serve(pipe, work)


def _tokjax_worker(args, folder, pipe) -> None:
    from tokjax.training.memory import keep_freed_memory

    keep_freed_memory()  # as python -m tokjax.train does
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tokjax.data.batch import Batch
    from tokjax.models import Transformer
    from tokjax.models.huggingface import load
    from tokjax.pretraining.next_token import NextToken
    from tokjax.training.optimizers import AdamW, Constant
    from tokjax.training.state import init_state
    from tokjax.training.step import StepConfig, make_train_step

    model, params = load(folder)
    model = Transformer(dataclasses.replace(model.config, unroll=args.unroll))
    objective, optimizer = NextToken(), AdamW(weight_decay=0.1).build(model.config)
    state = init_state(model, objective, optimizer, 0, False).replace(params=params)
    step = make_train_step(
        model, objective, optimizer, StepConfig(1e-3, Constant(), 0, 10**6, clip_norm=1.0)
    )
    ones = np.ones((args.batch, args.length), np.float32)
    ones[:, -1] = 0  # the last token of a row has no successor in it, as on the other side
    batches = [
        Batch(
            tokens=jnp.asarray(b, jnp.int32),
            targets=jnp.asarray(np.roll(b, -1, 1), jnp.int32),
            positions=jnp.tile(jnp.arange(args.length), (args.batch, 1)),
            segment_ids=jnp.ones((args.batch, args.length), jnp.int32),
            weights=jnp.asarray(ones),
            example_id=jnp.zeros((args.batch, 1), jnp.int32),
        )
        for b in _batches(args)
    ]
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batches[0]).compile()
    pipe.send(time.perf_counter() - began)
    square = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    holder = [state]

    def work(i):
        if i < 0:
            return float(product(square)[0, 0])
        holder[0], metrics = compiled(holder[0], batches[i % 4])
        return float(metrics["loss"])

    _serve(pipe, work)


def _serve(pipe, work) -> None:
    while (i := pipe.recv()) is not None:
        began, cpu = time.perf_counter(), time.process_time()
        value = work(i)
        pipe.send((time.perf_counter() - began, time.process_time() - cpu, value))


def main() -> None:
    """Runs both sides and prints the comparison, and one JSON line."""
    args = _arguments()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for name, worker in (("torch", _torch_worker), ("tokjax", _tokjax_worker)):
            here, there = context.Pipe()
            context.Process(target=worker, args=(args, folder, there), daemon=True).start()
            there.close()  # so that a side that dies ends this one too
            sides[name] = (here, here.recv())
    parameters, compile_seconds = sides["torch"][1], sides["tokjax"][1]

    def ask(name, i):
        sides[name][0].send(i)
        return sides[name][0].recv()

    times = {"torch": [], "tokjax": [], "product": []}
    cpu_times = {"torch": [], "tokjax": []}
    losses = {"torch": [], "tokjax": []}
    for i in range(args.repeats + 2):
        for name in ("torch", "tokjax"):
            seconds, cpu, loss = ask(name, i)
            losses[name].append(loss)
            if i >= 2:  # the first two warm caches and allocators
                times[name].append(seconds)
                cpu_times[name].append(cpu)
        times["product"].append(min(ask("tokjax", -1)[0] for _ in range(3)))
    for name in ("torch", "tokjax"):
        sides[name][0].send(None)

    tokens = args.batch * args.length
    head = args.vocab * args.d_model
    attention = 2 * args.layers * args.length * args.d_model
    flops = 6 * (parameters - head + head + attention) * tokens
    peak = 2 * 2048**3 / statistics.median(times["product"])
    ratios = sorted(t / j for t, j in zip(times["torch"], times["tokjax"], strict=True))
    result = {
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
        "parameters": parameters,
        "compile_s": round(compile_seconds, 2),
        "torch_step_s": round(statistics.median(times["torch"]), 4),
        "tokjax_step_s": round(statistics.median(times["tokjax"]), 4),
        "tokjax_over_torch": round(statistics.median(ratios), 3),
        "quartiles": [round(r, 3) for r in statistics.quantiles(ratios, n=4)[::2]],
        "cpu_s": {name: round(statistics.median(v), 3) for name, v in cpu_times.items()},
        "tokens_per_s": round(tokens / statistics.median(times["tokjax"])),
        "peak_gflops": round(peak / 1e9, 1),
        "share_of_peak": round(flops / statistics.median(times["tokjax"]) / peak, 3),
        "torch_share_of_peak": round(flops / statistics.median(times["torch"]) / peak, 3),
        "first_losses": [round(losses[n][0], 5) for n in ("torch", "tokjax")],
        "last_losses": [round(losses[n][-1], 4) for n in ("torch", "tokjax")],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
