"""Greedy decoding and training steps beside other JAX libraries, with the same weights, in one run.

    python3.11 -m venv /some/venv && /some/venv/bin/pip install google-tunix==0.1.7
    python benchmarks/peers.py --peer=tunix --python=/some/venv/bin/python [--batches=1,8]

    python3.11 -m venv /other/venv && /other/venv/bin/pip install easydel==0.3.0 pillow torch
    python benchmarks/peers.py --peer=easydel --python=/other/venv/bin/python [--repeats=9]
    python benchmarks/peers.py --peer=easydel --python=... --work=train --vocab=8192

A random Llama of 4.2M parameters (width 256, 4 layers, vocabulary 4,096, float32) is written as
safetensors and read by both. Each side lives in a process of its own with every core, the peer's in
its own environment; they take turns, one generation or step at a time, so that whatever else the
machine does hits both. What is a peer's own, and how it is called, stands in `peer_<name>.py`.

Printed for decoding, per batch: what `benchmarks/generate.py` prints, whose comparison this is,
with the rows whose texts are equal. For `--work=train`: the step of `benchmarks/train_step.py`
(AdamW, clipping at 1) on `--batch` rows of `--length` tokens, with both losses, which must agree.
Either with the machine's load before and behind.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata

import generate
import train_step

WARM = 2  # first steps, which compile, warm caches and allocators


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--peer", required=True, choices=["tunix", "easydel"])
    parser.add_argument("--python", help="the interpreter of the peer's environment")
    parser.add_argument("--work", default="decode", choices=["decode", "train"])
    sizes = {"d_model": 256, "layers": 4, "heads": 8, "d_ff": 688, "vocab": 4096}
    counts = {"new_tokens": 128, "batch": 8, "length": 256, "repeats": 9}
    for name, value in (sizes | counts).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batches", default="1,8", help="numbers of prompts, e.g. 1,8")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the weights' folder: the peer's side
    args = parser.parse_args()
    if args.serve is None and args.python is None:
        parser.error("--python is missing: the interpreter of the peer's environment")
    args.dtype, args.unroll = "float32", 1
    return args


def _serve(name: str, folder: str) -> None:
    """Answers jobs of one JSON line each; runs in the peer's environment."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between answers
    warnings.simplefilter("ignore")
    peer = importlib.import_module(f"peer_{name}")
    work = peer.load(folder)

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)

    answer({
        "version": metadata.version(peer.DISTRIBUTION) + ", JAX " + metadata.version("jax"),
        "work": list(work),
    })  # fmt: skip
    for line in sys.stdin:
        kind, *job = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        value = work[kind](*job)
        answer([time.perf_counter() - began, time.process_time() - cpu, value])


class _Peer:
    """The other environment's process, asked like a pipe of `multiprocessing`."""

    def __init__(self, args, folder):
        self.args = args
        command = [args.python, __file__, f"--peer={args.peer}", f"--serve={folder}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        about = self.recv()
        self.version = about["version"]
        if args.work not in about["work"]:
            self.end()
            raise SystemExit(f"--work={args.work}: peer_{args.peer}.py has only {about['work']}")

    def send(self, job):
        if self.args.work == "train":
            batches = train_step._batches(self.args)
            job = ["train", batches[job % len(batches)].tolist()]
        else:
            _, batch, new_tokens = job
            job = ["decode", generate._prompts(self.args, batch).tolist(), new_tokens]
        print(json.dumps(job), file=self.process.stdin, flush=True)

    def recv(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.args.peer} ended with {self.process.wait()}; see above")
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def _compare_generations(args, pipes) -> dict:
    def ask(side, what, batch=0, new_tokens=0):
        pipes[side].send((what, batch, new_tokens))
        return pipes[side].recv()

    size = ask("tokjax", "size")[2]
    found = {
        "parameter_bytes": size,
        "prompt": generate.PROMPT,
        "new_tokens": args.new_tokens,
        "batches": {},
    }
    arms = {side: (side, "greedy") for side in pipes}
    for batch in [int(b) for b in args.batches.split(",")]:
        found["batches"][batch] = generate._compare(args, ask, arms, batch, size)
    return found


def _compare_steps(args, pipes) -> dict:
    times, cpu, losses = ({side: [] for side in pipes} for _ in range(3))
    for i in range(args.repeats + WARM):
        for side, pipe in pipes.items():
            pipe.send(i)
            seconds, cpu_seconds, loss = pipe.recv()
            times[side].append(seconds)
            cpu[side].append(cpu_seconds)
            losses[side].append(loss)
    ratios = [t / o for t, o in zip(times[args.peer], times["tokjax"], strict=True)][WARM:]
    found = {"batch": args.batch, "length": args.length}
    for side in pipes:
        found[side] = {
            "step_s": round(statistics.median(times[side][WARM:]), 4),
            "cpu_s": round(statistics.median(cpu[side][WARM:]), 3),
            "first_loss": round(losses[side][0], 5),
            "last_loss": round(losses[side][-1], 4),
        }
    found[args.peer]["time_over_tokjax"] = round(statistics.median(ratios), 3)
    found[args.peer]["quartiles"] = [round(r, 3) for r in statistics.quantiles(ratios, n=4)[::2]]
    return found


def main() -> None:
    """Runs both sides and prints the comparison as JSON."""
    args = _arguments()
    if args.serve is not None:
        _serve(args.peer, args.serve)
        return
    context = multiprocessing.get_context("spawn")
    load = os.getloadavg()
    work = {
        "decode": (generate._tokjax_worker, _compare_generations),
        "train": (train_step._tokjax_worker, _compare_steps),
    }
    worker, compare = work[args.work]
    with tempfile.TemporaryDirectory() as folder:
        fields = importlib.import_module(f"peer_{args.peer}").FIELDS
        process = context.Process(target=generate._write_model, args=(args, folder), kwargs=fields)
        process.start()
        process.join()
        ours, there = context.Pipe()
        context.Process(target=worker, args=(args, folder, there), daemon=True).start()
        there.close()  # so that a side that dies ends this one too
        ours.recv()
        theirs = _Peer(args, folder)
        result = {
            "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
            "tokjax": "JAX " + metadata.version("jax"),
            args.peer: theirs.version,
        }
        result |= {"found": compare(args, {"tokjax": ours, args.peer: theirs})}
        ours.send(None)
        theirs.end()
    result["load"] = {"before": load, "behind": os.getloadavg()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
