"""How close training and decoding come to what one accelerator can do, measured in the same run.

    python benchmarks/accelerator.py [--part=train,decode,long] [--small]

The model is a Llama of 1.0B parameters (width 2048, 16 layers, vocabulary 32,768) with fresh
weights. Printed as JSON, one object a part:
    train   bfloat16 step with float32 master weights, AdamW, 16 rows of 2,048 tokens: share of the
            matmul peak (MFU, of 6 operations a parameter and token plus attention), by kernel,
            what is computed again, and whether a row is one document or two
    decode  greedy, batch 1 and 8, weights in bfloat16 and int8, and in bfloat16 without the kernels
            made for it: share of the memory bandwidth (every weight and the cache read once a step)
            and of tokens equal to those of the first
    long    most memory in a gradient of the loss, by length of the row, over what parameters and
            gradients take
Peak and bandwidth are those of a product of two 8192 x 8192 bfloat16 matrices (the median) and of a
sum over 4 GiB (the fastest of 30), between the measurements. `--small` tries every part with a tiny
model.
"""

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--part", default="train,decode,long")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    return parser.parse_args()


def _config(small: bool, **changes: Any) -> Any:
    from tokjax.models import ModelConfig

    sizes = {
        "vocab_size": 32768,
        "d_model": 2048,
        "n_layers": 16,
        "n_heads": 16,
        "n_kv_heads": 16,
        "d_ff": 5632,
        "max_positions": 32768,
    }
    if small:
        sizes = {"vocab_size": 256, "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 128}
        sizes["max_positions"] = 512
    return ModelConfig(**(sizes | changes))


def _median_seconds(run: Any, repeats: int) -> float:
    import jax

    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _limits(small: bool) -> dict[str, float]:
    """Returns operations and bytes a second."""
    import jax
    import jax.numpy as jnp

    n = 256 if small else 8192
    # Random numbers: products of zeros draw less power and run faster.
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    product = jax.jit(lambda a: (a @ a) * 1e-3)
    room = jnp.ones(2**20 if small else 2**30, jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready((product(a), total(room)))
    many = 20

    def products():
        x = a
        for _ in range(many):
            x = product(x)
        return x

    flops = 2 * n**3 * many / _median_seconds(products, 5)
    fastest = min(_median_seconds(lambda: total(room), 1) for _ in range(30))
    return {"flops": flops, "bytes": room.nbytes / fastest}


def _train(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tokjax.data.batch import Batch
    from tokjax.models import Transformer
    from tokjax.pretraining.next_token import NextToken
    from tokjax.training.optimizers import AdamW, Constant
    from tokjax.training.state import init_state
    from tokjax.training.step import StepConfig, make_train_step

    rows, length = (2, 64) if args.small else (16, 2048)
    tokens = np.random.default_rng(0).integers(0, 256 if args.small else 32768, (rows, length))
    weights = np.ones((rows, length), np.float32)
    weights[:, -1] = 0
    batch = Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        targets=jnp.asarray(np.roll(tokens, -1, 1), jnp.int32),
        positions=jnp.tile(jnp.arange(length), (rows, 1)),
        segment_ids=jnp.ones((rows, length), jnp.int32),
        weights=jnp.asarray(weights),
        example_id=jnp.zeros((rows, 1), jnp.int32),
    )
    on_gpu = jax.default_backend() == "gpu"
    found = {}
    halves = np.where(np.arange(length) < length // 2, 1, 2)
    arms = [("cudnn", "elementwise", 1), ("cudnn", "elementwise", 2), ("cudnn", "block", 1)]
    for kernel, remat, documents in arms if on_gpu else [("dense", "block", 1)]:
        segments = np.ones(length, np.int32) if documents == 1 else halves
        segments = jnp.asarray(np.tile(segments, (rows, 1)), jnp.int32)
        batch = dataclasses.replace(batch, segment_ids=segments)
        config = _config(args.small, dtype="bfloat16", attention=kernel, remat=remat)
        model = Transformer(config)
        objective, optimizer = NextToken(), AdamW(weight_decay=0.1).build(config)
        step = make_train_step(
            model, objective, optimizer, StepConfig(1e-4, Constant(), 0, 10**6, clip_norm=1.0)
        )
        state = jax.jit(lambda m=model, o=optimizer: init_state(m, NextToken(), o, 0, False))()
        began = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - began
        losses, times = [], []
        for _ in range(args.repeats + 2):
            began = time.perf_counter()
            state, metrics = compiled(state, batch)
            losses.append(float(metrics["loss"]))
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times[2:])
        parameters = sum(p.size for p in jax.tree.leaves(state.params))
        operations = 6 * (parameters + config.n_layers * length * config.d_model) * rows * length
        peak = _limits(args.small)["flops"]
        used = compiled.memory_analysis()
        found[f"{kernel}, remat={remat}, documents in a row: {documents}"] = {
            "temporary_GB": round(used.temp_size_in_bytes / 1e9, 1),
            "parameters": parameters,
            "compile_s": round(compile_seconds, 1),
            "step_s": round(seconds, 4),
            "tokens_per_s": round(rows * length / seconds),
            "peak_tflops": round(peak / 1e12, 1),
            "mfu": round(operations / seconds / peak, 3),
            "losses": [round(losses[0], 3), round(losses[-1], 3)],
        }
        del state, compiled
    return found


def _decode(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np

    from tokjax.decoding import Prompts, decode, prepare
    from tokjax.decoding.predictors import ModelPredictor
    from tokjax.models import Transformer
    from tokjax.models.quantized import quantize

    new, prompt = (16, 16) if args.small else (256, 128)
    config = _config(args.small, dtype="bfloat16", param_dtype="bfloat16")
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0))
    found = {}
    plain, general = ModelPredictor(model), ModelPredictor(model, kernels=False)
    arms = {"bfloat16": (plain, params), "int8": (plain, quantize(params))}
    arms["bfloat16, general pass"] = (general, params)
    texts = {}
    for name, (predictor, given) in arms.items():
        size = sum(p.nbytes for p in jax.tree.leaves(given))
        weights = prepare(predictor, given)
        for batch in (1, 8):
            ids = np.random.default_rng(batch).integers(0, 256, (batch, prompt))
            prompts = Prompts(ids, np.full(batch, prompt))  # type: ignore[arg-type]

            def run(n: int, predictor=predictor, weights=weights, prompts=prompts) -> Any:
                return decode(predictor, weights, prompts, max_new_tokens=n).tokens

            texts[name, batch], _ = jax.block_until_ready((run(new), run(1)))
            whole, first = (_median_seconds(lambda n=n: run(n), args.repeats) for n in (new, 1))
            step = (whole - first) / (new - 1)
            cache = batch * (prompt + new / 2) * config.n_layers * 2 * config.d_model * 2
            bandwidth = _limits(args.small)["bytes"]
            found[f"{name}, batch {batch}"] = {
                "weight_bytes": size,
                "step_ms": round(1e3 * step, 3),
                "tokens_per_s": round(batch / step),
                "first_token_ms": round(1e3 * first, 2),
                "bandwidth_GB_per_s": round(bandwidth / 1e9),
                "share_of_bandwidth": round((size + cache) / bandwidth / step, 3),
                "same_tokens": float((texts[name, batch] == texts["bfloat16", batch]).mean()),
            }
    return found


def _long(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from tokjax.models import Transformer
    from tokjax.signals import token_stats

    on_gpu = jax.default_backend() == "gpu"
    found = {}
    for length in (64, 128) if args.small else (4096, 16384, 32768):
        config = _config(args.small, dtype="bfloat16", remat="block")
        config = dataclasses.replace(config, attention="cudnn" if on_gpu else "auto")
        model = Transformer(config)

        def loss(params: Any, tokens: Any, model: Any = model) -> Any:
            x = model.backbone(params, model.embed(params, tokens)).x
            stats = token_stats(x, model.head(params), jnp.roll(tokens, -1, 1), want=("nll",))
            return stats.nll.mean()

        params = model.abstract_params()
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        memory = jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis()
        size = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params))
        found[str(length)] = {
            "parameter_GB": round(size / 1e9, 2),
            "temporary_GB": round(memory.temp_size_in_bytes / 1e9, 2),
            "logits_of_the_row_would_be_GB": round(4 * length * config.vocab_size / 1e9, 2),
        }
    return found


def main() -> None:
    """Measures the parts asked for, and prints them."""
    args = _arguments()
    import jax

    parts = {"train": _train, "decode": _decode, "long": _long}
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    for part in args.part.split(","):
        print(json.dumps({part: parts[part](args)}, indent=1), flush=True)


if __name__ == "__main__":
    main()
