"""Training and decoding beside PyTorch and transformers on one NVIDIA GPU, in the same run.

    python benchmarks/accelerator_pytorch.py [--part=decode,train] [--no-compile] [--dynamic]

Both sides hold the same Llama of 0.89B parameters (width 2048, 16 layers, vocabulary 32,768),
written by transformers as safetensors. Each part of each side is a process of its own, one after
another, with the whole GPU. Printed as JSON, one object a side:
    train   AdamW steps of 8 rows of 2,048 tokens in bfloat16 with float32 master weights, clipping
            at 1. PyTorch: autocast, sdpa attention, fused AdamW; as it is, and with torch.compile.
            Median seconds of a step, tokens per second and the losses, which must agree.
    decode  greedy, weights in bfloat16, prompt of 128, 256 new tokens, batch 1 and 8. transformers'
            `generate` with a static cache (whose passes it compiles); `--dynamic`: and by default.
            Median ms a token behind the first, the time to the first, and how much of the texts
            agrees, from their beginning on.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from typing import Any

TRAIN_ROWS, TRAIN_LENGTH = 8, 2048
PROMPT, NEW = 128, 256


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--part", default="decode,train")
    parser.add_argument("--small", action="store_true", help="a tiny model, on any machine")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--dynamic", action="store_true", help="also transformers' default cache")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def _vocabulary(args: argparse.Namespace) -> int:
    return 256 if args.small else 32768


def _write_model(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    if args.small:
        sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(
        vocab_size=_vocabulary(args), max_position_embeddings=4096, rms_norm_eps=1e-5,
        tie_word_embeddings=True, eos_token_id=None, bos_token_id=None, **sizes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    # Wider weights write texts that are no single repeated token, and have clear argmaxima.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)
    model.to(torch.bfloat16).save_pretrained(f"{folder}/wide")
    return {"parameters": sum(p.numel() for p in model.parameters())}


def _train_batches(args: argparse.Namespace) -> list:
    import numpy as np

    rows, length = (2, 64) if args.small else (TRAIN_ROWS, TRAIN_LENGTH)
    generator = np.random.default_rng(0)
    return [generator.integers(0, _vocabulary(args), (rows, length)) for _ in range(2)]


def _torch_train(args: argparse.Namespace, folder: str, compiled: bool) -> dict[str, Any]:
    import torch
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).to(device)
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if compiled else model
    batches = [torch.as_tensor(b).to(device) for b in _train_batches(args)]

    def step(i: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        ids = batches[i % len(batches)]
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    found = _steps(step, args.repeats, batches[0].numel())
    if device == "cuda":
        found["memory_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return found


def _tokjax_train(args: argparse.Namespace, folder: str) -> dict[str, Any]:
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
    config = dataclasses.replace(model.config, dtype="bfloat16", param_dtype="float32")
    model = Transformer(config)
    objective, optimizer = NextToken(), AdamW(weight_decay=0.1).build(config)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    state = jax.jit(lambda p: init_state(model, objective, optimizer, 0, False, p))(params)
    step = make_train_step(
        model, objective, optimizer, StepConfig(1e-4, Constant(), 0, 10**6, clip_norm=1.0)
    )
    made = []
    for ids in _train_batches(args):
        rows, length = ids.shape
        weights = np.ones((rows, length), np.float32)
        weights[:, -1] = 0  # the last token has no successor, as on the other side
        batch = Batch(
            tokens=jnp.asarray(ids, jnp.int32),
            targets=jnp.asarray(np.roll(ids, -1, 1), jnp.int32),
            positions=jnp.tile(jnp.arange(length), (rows, 1)),
            segment_ids=jnp.ones((rows, length), jnp.int32),
            weights=jnp.asarray(weights),
            example_id=jnp.zeros((rows, 1), jnp.int32),
        )
        made.append(batch)
    del params
    compiled = jax.jit(step, donate_argnums=0).lower(state, made[0]).compile()
    holder = [state]
    del state

    def one(i: int) -> float:
        holder[0], metrics = compiled(holder[0], made[i % len(made)])
        return float(metrics["loss"])

    found = _steps(one, args.repeats, made[0].tokens.size)
    used = compiled.memory_analysis()
    total = used.argument_size_in_bytes + used.temp_size_in_bytes
    return found | {"memory_GB": round(total / 1e9, 1)}


def _steps(step: Any, repeats: int, tokens: int) -> dict[str, Any]:
    losses, times = [], []
    for i in range(repeats + 3):
        began = time.perf_counter()
        losses.append(step(i))
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[3:])
    quartiles = statistics.quantiles(times[3:], n=4)[::2]
    return {
        "first_step_s": round(times[0], 1),
        "step_s": round(seconds, 4),
        "quartiles": [round(q, 4) for q in quartiles],
        "tokens_per_s": round(tokens / seconds),
        "losses": [round(loss, 4) for loss in losses],
    }


def _prompts(args: argparse.Namespace, batch: int) -> Any:
    import numpy as np

    return np.random.default_rng(batch).integers(3, _vocabulary(args), (batch, PROMPT))


def _lengths(args: argparse.Namespace) -> int:
    return 16 if args.small else NEW


def _torch_decode(args: argparse.Namespace, folder: str, static: bool) -> dict[str, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        f"{folder}/wide", dtype=torch.bfloat16, attn_implementation="sdpa"
    ).to(device)
    model.eval()
    kind = {"cache_implementation": "static"} if static else {}

    def run(batch: int, new: int) -> list:
        ids = torch.as_tensor(_prompts(args, batch)).to(device)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, **kind,
            )  # fmt: skip
        return out[:, PROMPT:].tolist()

    return _generations(args, run, repeats=args.repeats if static else 1)


def _tokjax_decode(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    import jax
    import numpy as np

    from tokjax.decoding import Prompts, decode, prepare
    from tokjax.models import Transformer
    from tokjax.models.config import with_dtypes
    from tokjax.models.huggingface import load

    model, params = load(f"{folder}/wide")
    model = Transformer(with_dtypes(model.config, "bfloat16", "bfloat16"))
    params = jax.tree.map(lambda p: p.astype("bfloat16"), params)
    weights = prepare(model, params)

    def run(batch: int, new: int) -> list:
        prompts = Prompts(_prompts(args, batch), np.full(batch, PROMPT))
        found = decode(model, weights, prompts, max_new_tokens=new)
        return np.asarray(found.tokens)[:, :new].tolist()

    return _generations(args, run, repeats=args.repeats)


def _generations(args: argparse.Namespace, run: Any, repeats: int) -> dict[str, Any]:
    new, found = _lengths(args), {}
    for batch in (1, 8):
        began = time.perf_counter()
        text = run(batch, new)
        first_call = time.perf_counter() - began
        run(batch, 1)
        whole, first = [], []
        for _ in range(repeats):
            for length, times in ((new, whole), (1, first)):
                began = time.perf_counter()
                run(batch, length)
                times.append(time.perf_counter() - began)
        step = (statistics.median(whole) - statistics.median(first)) / (new - 1)
        found[batch] = {
            "first_call_s": round(first_call, 1),
            "ms_a_token": round(1e3 * step, 3),
            "tokens_per_s": round(batch / step),
            "first_token_ms": round(1e3 * statistics.median(first), 2),
            "text": text,
        }
    return found


def _agreement(one: list, two: list) -> dict[str, Any]:
    """Returns the tokens before the first difference, by row, and how many rows are equal."""
    before = []
    for a, b in zip(one, two, strict=True):
        apart = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        before.append(apart[0] if apart else len(a))
    return {
        "equal_rows": sum(a == b for a, b in zip(one, two, strict=True)),
        "equal_tokens": before,
    }


def _in_process(function: Any, *arguments: Any) -> dict[str, Any]:
    """Returns what a function returns in a process of its own, which frees the GPU behind it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_send, args=(there, function, *arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"failed": f"the process ended with {process.exitcode}; its error is above"}
    finally:
        process.join()


def _send(pipe: Any, function: Any, *arguments: Any) -> None:
    pipe.send(function(*arguments))


def main() -> None:
    """Runs the parts asked for, and prints them."""
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        _show("model", _in_process(_write_model, args, folder))
        if "decode" in args.part:
            ours = _in_process(_tokjax_decode, args, folder)
            texts = {batch: each.pop("text") for batch, each in ours.items() if batch != "failed"}
            _show("decode, tokjax", ours)
            for static in (True, False) if args.dynamic else (True,):
                theirs = _in_process(_torch_decode, args, folder, static)
                for batch, each in theirs.items():
                    if batch in texts:
                        each |= _agreement(texts[batch], each.pop("text"))
                _show("decode, transformers" + ", static cache" * static, theirs)
        if "train" in args.part:
            _show("train, tokjax", _in_process(_tokjax_train, args, folder))
            _show("train, PyTorch", _in_process(_torch_train, args, folder, False))
            if not args.no_compile:
                _show("train, PyTorch, compiled", _in_process(_torch_train, args, folder, True))


def _show(name: str, found: Any) -> None:
    print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main()
