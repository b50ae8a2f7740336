"""Greedy decoding beside the sampler of Tunix, with the same weights, in one run.

    python3.11 -m venv /some/venv && /some/venv/bin/pip install google-tunix==0.1.7
    python benchmarks/tunix.py --tunix-python=/some/venv/bin/python [--repeats=9] [--batches=1,8]

A random Llama of 4.2M parameters (width 256, 4 layers, vocabulary 4,096, float32) is written as
safetensors and read by both. Each side lives in a process of its own with every core, Tunix's in
its own environment; they take turns, one generation at a time, so that whatever else the machine
does hits both. Printed for each batch: what `benchmarks/generate.py` prints, whose comparison this
is, with the rows whose texts are equal, and the machine's load before and behind.

Tunix 0.1.7 turns the positions of a Llama with a base of 1,000,000 whatever its configuration says,
so the weights' configuration says that. Its sampler gets a cache of just the length needed, prompts
of a length that it does not pad, and no end of text.
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path

BASE = 1_000_000.0  # of the rotation of positions


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    sizes = {"d_model": 256, "layers": 4, "heads": 8, "d_ff": 688, "vocab": 4096}
    for name, value in (sizes | {"new_tokens": 128, "repeats": 9}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batches", default="1,8", help="numbers of prompts, e.g. 1,8")
    parser.add_argument("--tunix-python", help="the interpreter of Tunix's environment")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the weights' folder: Tunix's side
    args = parser.parse_args()
    if args.serve is None and args.tunix_python is None:
        parser.error("--tunix-python is missing: the interpreter of Tunix's environment")
    args.dtype, args.against = "float32", "tunix"
    return args


class _Numbers:
    """A tokenizer of texts that are ids with spaces between."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def bos_id(self):
        return None

    def eos_id(self):
        return -1

    def pad_id(self):
        return -1  # an id that no model writes: the sampler hides padding wherever it stands


def _serve(folder: str) -> None:
    """Answers jobs of one JSON line each; runs in Tunix's environment."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between answers
    warnings.simplefilter("ignore")
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3.model import ModelConfig
    from tunix.models.llama3.params import create_model_from_safe_tensors

    fields = json.loads((Path(folder) / "config.json").read_text())
    heads = fields["num_attention_heads"]
    config = ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=heads,
        head_dim=fields["hidden_size"] // heads,
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=int(BASE),
        norm_eps=fields["rms_norm_eps"],
        weight_tying=fields["tie_word_embeddings"],
    )
    model = create_model_from_safe_tensors(folder, config)
    samplers = {}

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)

    answer(metadata.version("google-tunix") + ", JAX " + metadata.version("jax"))
    for line in sys.stdin:
        prompts, new_tokens = json.loads(line)
        length = len(prompts[0]) + new_tokens
        if length not in samplers:
            shape = (config.num_layers, config.num_kv_heads, config.head_dim)
            samplers[length] = Sampler(model, _Numbers(), CacheConfig(length, *shape))
        texts = [" ".join(map(str, ids)) for ids in prompts]
        began, cpu = time.perf_counter(), time.process_time()
        found = samplers[length](
            texts, max_generation_steps=new_tokens, max_prompt_length=len(prompts[0])
        )
        times = time.perf_counter() - began, time.process_time() - cpu
        answer([*times, [ids.tolist() for ids in found.tokens]])


class _Tunix:
    """The other environment's process, asked like a pipe of `multiprocessing`."""

    def __init__(self, args, folder):
        self.args = args
        # -P: else this very file would be found where `tunix` is imported.
        command = [args.tunix_python, "-P", __file__, f"--serve={folder}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self.recv()

    def send(self, job):
        from generate import _prompts

        _, batch, new_tokens = job
        prompts = _prompts(self.args, batch).tolist()
        print(json.dumps([prompts, new_tokens]), file=self.process.stdin, flush=True)

    def recv(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"Tunix's side ended with {self.process.wait()}; see above")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Runs both sides and prints the comparison as JSON."""
    args = _arguments()
    if args.serve is not None:
        _serve(args.serve)
        return
    from generate import PROMPT, _compare, _tokjax_worker, _write_model

    context = multiprocessing.get_context("spawn")
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        positions = {"rope_parameters": {"rope_type": "default", "rope_theta": BASE}}
        process = context.Process(target=_write_model, args=(args, folder), kwargs=positions)
        process.start()
        process.join()
        ours, there = context.Pipe()
        worker = context.Process(target=_tokjax_worker, args=(args, folder, there), daemon=True)
        worker.start()
        there.close()  # so that a side that dies ends this one too
        ours.recv()
        theirs = _Tunix(args, folder)
        pipes = {"tokjax": ours, "tunix": theirs}

        def ask(side, what, batch=0, new_tokens=0):
            pipes[side].send((what, batch, new_tokens))
            return pipes[side].recv()

        size = ask("tokjax", "size")[2]
        result = {
            "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
            "tokjax": "JAX " + metadata.version("jax"),
            "tunix": theirs.version,
            "parameter_bytes": size,
            "prompt": PROMPT,
            "new_tokens": args.new_tokens,
            "batches": {},
        }
        arms = {side: (side, "greedy") for side in pipes}
        for batch in [int(b) for b in args.batches.split(",")]:
            result["batches"][batch] = _compare(args, ask, arms, batch, size)
        ours.send(None)
        theirs.end()
    result["load"] = {"before": load, "behind": os.getloadavg()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
