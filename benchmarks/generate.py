"""Decoding beside transformers' `generate`, and as a share of the memory bandwidth, in one run.

    python benchmarks/generate.py [--repeats=7] [--batches=1,8] [--d_model=512 --layers=8 ...]
    python benchmarks/generate.py --against=strategies
    python benchmarks/generate.py --against=none --dtype=bfloat16     # a GPU, without transformers

Both sides continue the same prompts greedily with the same weights (a Llama of width 512, 8 layers,
29.5M parameters, vocabulary 8,192, float32). Each lives in a process of its own with every core;
they take turns, one generation at a time, so that whatever else the machine does hits both. The
texts must be equal. Printed for each batch: median tokens per second and per CPU second, the median
of the paired ratios with its quartiles, the time to the first token, and the share of what the
memory bandwidth measured between the generations allows (every parameter read once a token).
`strategies` sets DoLa, LayerCake and SH2 beside greedy decoding instead of transformers.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time

PROMPT = 32  # tokens


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    sizes = {"d_model": 512, "layers": 8, "heads": 8, "d_ff": 1376, "vocab": 8192}
    for name, value in (sizes | {"new_tokens": 128, "repeats": 7}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batches", default="1,8", help="numbers of prompts, e.g. 1,8")
    parser.add_argument("--against", choices=["transformers", "strategies", "none"],
                        default="transformers")  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def _prompts(args, batch):
    import numpy as np

    return np.random.default_rng(batch).integers(3, args.vocab, (batch, PROMPT))


def _torch_worker(args, folder, pipe) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=args.dtype).eval()

    def work(name, batch, new_tokens):
        del name
        ids = torch.as_tensor(_prompts(args, batch))
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, PROMPT:].tolist()

    _serve(pipe, work)


def _tokjax_worker(args, folder, pipe) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tokjax.decoding import Prompts, decode, prepare
    from tokjax.decoding.contrast import dola, layercake, sh2
    from tokjax.models import ModelConfig, Transformer, huggingface
    from tokjax.models.config import with_dtypes

    if folder is None:
        config = ModelConfig(
            vocab_size=args.vocab, d_model=args.d_model, n_layers=args.layers, n_heads=args.heads,
            d_ff=args.d_ff, max_positions=PROMPT + args.new_tokens,
        )  # fmt: skip
        model = Transformer(with_dtypes(config, args.dtype, args.dtype))
        params = jax.jit(model.init)(jax.random.key(0))
    else:
        model, params = huggingface.load(folder)
    size = sum(p.nbytes for p in jax.tree.leaves(params))
    params = prepare(model, params)  # once, as one who generates again and again does
    # A fourth of the machine's last-level caches would be too small to measure the memory.
    room = jnp.ones(2**28 if jax.default_backend() == "gpu" else 2**27, jnp.float32)
    total = jax.jit(jnp.sum)

    def strategy(name, prompts):
        batch = prompts.tokens.shape[0]
        if name == "dola":
            return dola(model, params, layers=range(0, args.layers // 2, 2))
        if name == "layercake":
            columns = np.arange(PROMPT)
            return layercake(
                model,
                params,
                punctuation=[columns % 8 == 7] * batch,
                concept=[columns % 8 < 3] * batch,
            )
        if name == "sh2":
            hesitant = [row[: PROMPT // 4].tolist() + row.tolist() for row in prompts.tokens]
            return sh2(model, params, Prompts.of(hesitant))
        return model, params

    def work(name, batch, new_tokens):
        if name == "bandwidth":
            jax.block_until_ready(total(room))
            return room.nbytes
        if name == "size":
            return size
        prompts = Prompts(_prompts(args, batch), np.full(batch, PROMPT))
        found = decode(*strategy(name, prompts), prompts, max_new_tokens=new_tokens)
        return np.asarray(found.tokens)[:, :new_tokens].tolist()

    _serve(pipe, work)


def _serve(pipe, work) -> None:
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        began, cpu = time.perf_counter(), time.process_time()
        value = work(*job)
        pipe.send((time.perf_counter() - began, time.process_time() - cpu, value))


def _write_model(args, folder, **fields) -> None:
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
        max_position_embeddings=2 * (PROMPT + args.new_tokens),
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.06,  # texts that are no single repeated token, and clear argmaxima
        eos_token_id=None,
        bos_token_id=None,
        **fields,
    )
    LlamaForCausalLM(config).to(getattr(torch, args.dtype)).save_pretrained(folder)


def main() -> None:
    """Runs all sides and prints the comparison as JSON."""
    args = _arguments()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = {"tokjax": _tokjax_worker}
        if args.against == "transformers":
            workers["transformers"] = _torch_worker
        model = None
        if args.against != "none":
            process = context.Process(target=_write_model, args=(args, folder))
            process.start()
            process.join()
            model = folder
        pipes = {}
        for name, worker in workers.items():
            pipes[name], there = context.Pipe()
            context.Process(target=worker, args=(args, model, there), daemon=True).start()
            there.close()  # so that a side that dies ends this one too
            pipes[name].recv()

        def ask(side, what, batch=0, new_tokens=0):
            pipes[side].send((what, batch, new_tokens))
            return pipes[side].recv()

        result = {
            "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
            "parameter_bytes": ask("tokjax", "size")[2],
            "dtype": args.dtype,
            "new_tokens": args.new_tokens,
            "batches": {},
        }
        for batch in [int(b) for b in args.batches.split(",")]:
            arms = {"tokjax": ("tokjax", "greedy")}
            if args.against == "transformers":
                arms["transformers"] = ("transformers", "greedy")
            if args.against == "strategies":
                arms |= {name: ("tokjax", name) for name in ("dola", "layercake", "sh2")}
            result["batches"][batch] = _compare(args, ask, arms, batch, result["parameter_bytes"])
        for pipe in pipes.values():
            pipe.send(None)
    print(json.dumps(result, indent=1))


def _compare(args, ask, arms, batch, size):
    began = {name: ask(*arm, batch, args.new_tokens)[0] for name, arm in arms.items()}
    for arm in arms.values():
        ask(*arm, batch, 1)
    times, cpu, first, bandwidths, texts = {}, {}, {}, [], {}
    for _ in range(args.repeats):
        for name, arm in arms.items():
            seconds, cpu_seconds, texts[name] = ask(*arm, batch, args.new_tokens)
            times.setdefault(name, []).append(seconds)
            cpu.setdefault(name, []).append(cpu_seconds)
            first.setdefault(name, []).append(ask(*arm, batch, 1)[0])
        seconds, _, read = min(ask("tokjax", "bandwidth") for _ in range(3))
        bandwidths.append(read / seconds)
    bandwidth = statistics.median(bandwidths)
    found = {"bandwidth_GB_per_s": round(bandwidth / 1e9, 2)}
    made = batch * args.new_tokens
    for name in arms:
        median = statistics.median(times[name])
        per_step = (median - statistics.median(first[name])) / (args.new_tokens - 1)
        found[name] = {
            "tokens_per_s": round(made / median, 1),
            "tokens_per_cpu_s": round(made / statistics.median(cpu[name]), 1),
            "ms_per_step_behind_the_first": round(1e3 * per_step, 3),
            "first_token_ms": round(1e3 * statistics.median(first[name]), 1),
            "first_call_s": round(began[name], 2),
            "share_of_bandwidth": round(size / bandwidth / per_step, 3),
        }
        if name != "tokjax":
            paired = [t / o for t, o in zip(times[name], times["tokjax"], strict=True)]
            found[name]["time_over_tokjax_greedy"] = round(statistics.median(paired), 3)
            found[name]["quartiles"] = [round(r, 3) for r in statistics.quantiles(paired, n=4)[::2]]
    for name, (side, _) in arms.items():
        if side != "tokjax":
            same = [a == b for a, b in zip(texts["tokjax"], texts[name], strict=True)]
            found["rows_with_equal_text"] = f"{sum(same)} of {len(same)}"
    return found


if __name__ == "__main__":
    main()
