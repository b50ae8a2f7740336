"""What a run says before its first step, and what is kept beside its checkpoints."""

import math
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from tokjax.config import to_dict
from tokjax.models.cost import training_flops, tree_bytes
from tokjax.models.parameters import count_parameters
from tokjax.training.evaluation import bytes_per_token, unigram_entropies
from tokjax.training.progress import device_peak_flops, measure_matmul_peak, si
from tokjax.training.run import Run, Stage
from tokjax.training.state import TrainState

_PACKAGES = ("tokjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_state(directory: Path) -> str:
    """Returns the commit of the code, with `+changes` when it was edited; empty without git."""
    command = ["git", "-C", str(directory)]
    try:
        commit = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        if commit.returncode:
            return ""
        status = subprocess.run(
            [*command, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def provenance(run: Run) -> dict[str, Any]:
    """Returns the JSON that lies beside every checkpoint."""
    return {
        "config": to_dict(run.config),
        "vocab_size": run.model.config.vocabulary,
        "tokenizer": run.tokenizer.fingerprint,
        "init_from": None if run.initial is None else run.initial.fingerprint(),
        "frozen": {
            f"{stage.name}.{name}": each.initial.fingerprint()
            for stage in run.stages
            for name, each in run.frozen_models(stage).items()
        },
        "versions": versions(),
        "seed": run.config.seed,
        "git": git_state(Path(__file__).parent),
        "command": sys.orig_argv,
    }


def stage_flops(run: Run, stage: Stage) -> float:
    """Returns the model FLOPs of one training step of a stage, over all devices.

    Frozen matrices have no gradient of their own, which is a third of the work; the adapters' are
    not counted. An objective may say that it takes more or less than one pass forth and back.
    """
    data = run.config.data
    share = 1.0 if run.model.config.lora is None else 2 / 3
    share *= getattr(stage.objective, "relative_cost", 1.0)
    whole = training_flops(run.model.config, data.seq_len)
    return share * whole * data.seq_len * data.batch_size


def stage_tokens(run: Run, stage: Stage) -> int:
    """Returns the token places of one step of a stage, over all devices."""
    data = run.config.data
    return data.seq_len * data.batch_size * stage.objective.tokens_per_position


def peak_flops(run: Run) -> float | None:
    """Returns the peak of all devices together: from a table, on CPU measured by a product."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measure_matmul_peak(run.model.config.dtype)
    one = device_peak_flops(device.device_kind, run.model.config.dtype)
    return None if one is None else one * jax.device_count()


def bytes_text(count: float) -> str:
    """Returns a number of bytes with three digits or more and its unit.

    >>> bytes_text(3_500_000), bytes_text(2**31)
    ('3.34 MiB', '2.00 GiB')
    """
    power = min(3, max(1, int(math.log(max(count, 1), 1024))))
    return f"{count / 1024**power:.2f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def memory(state: TrainState, compiled: Any) -> dict[str, str]:
    """Returns an estimate of the memory per device by part, from the compiled step."""
    devices = jax.device_count()
    analysis = compiled.memory_analysis()
    parts = {
        "parameters": bytes_text(tree_bytes(state.whole)),
        "optimiser": bytes_text(tree_bytes(state.opt_state)),
    }
    if state.ema is not None:
        parts["moving average"] = bytes_text(tree_bytes(state.ema))
    if analysis is not None:
        parts["gradients and activations"] = bytes_text(analysis.temp_size_in_bytes) + " per device"
        total = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
        parts["total"] = bytes_text(total) + f" on each of {devices} device{'s' * (devices > 1)}"
    return parts


def banner_facts(
    run: Run, state: TrainState, compiled: Any, peak: float | None, workdir: Path
) -> dict[str, dict[str, str]]:
    """Returns the sections printed before the first step."""
    config, model, data = run.config, run.model.config, run.loader.describe()
    counts = count_parameters(model)
    total_flops = sum(stage_flops(run, s) * s.steps for s in run.stages)
    entropies = ", ".join(f"{n} {e:.3f}" for n, e in unigram_entropies(run).items())
    stages = "; ".join(
        f"{s.name}: {s.steps} steps of {si(stage_tokens(run, s))} tokens" for s in run.stages
    )
    checkpoints = config.checkpoints
    return {
        "model": {
            "parameters": si(sum(counts.values())),
            **({"trained": si(_size(state.params))} if config.model.lora is not None else {}),
            **{f"  {part}": si(count) for part, count in counts.items()},
            "layers x width": f"{model.n_layers} x {model.d_model}",
            "vocabulary": f"{model.vocabulary} ({config.data.tokenizer.name})",
            "compute, parameters": f"{model.dtype}, {model.param_dtype}",
            **{
                f"frozen {name}": f"{each.initial.name}, {si(each.parameters)}"
                for stage in run.stages
                for name, each in run.frozen_models(stage).items()
            },
        },
        "data": {
            "examples": f"{data['examples']:,}",
            "targets": f"{data['tokens']:,}",
            "filling": f"{data['waste']:.2%} of the places",
            "cut examples": f"{data['cuts']:,} cuts, no target lost",
            "too short": f"{data['short_examples']:,} examples without a target",
            "epochs": f"{data['epochs']:.2f}",
            "unigram entropy": f"{entropies} nats/token",
        },
        "compute": {
            "stages": stages,
            "tokens": si(sum(stage_tokens(run, s) * s.steps for s in run.stages)),
            "FLOPs": f"{si(stage_flops(run, run.stages[0]))} a step, {si(total_flops)} in all",
            "peak": "unknown" if peak is None else f"{si(peak)}FLOP/s",
            **memory(state, compiled),
        },
        "mesh": {
            "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}, "
            f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}",
            "axes": ", ".join(f"{n} {s}" for n, s in run.mesh.shape.items()),
        },
        "saved": {
            "workdir": str(workdir),
            "checkpoints": f"every {checkpoints.every_steps} steps, newest {checkpoints.keep}"
            + (f", best by {checkpoints.best_metric}" if checkpoints.best_metric else ""),
            "curves": "metrics.csv, tensorboard/, report.html at the end",
        },
    }


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def run_facts(run: Run, banner: dict[str, dict[str, str]], warnings: list[str]) -> dict[str, Any]:
    """Returns the facts for `run.json`, which the report reads."""
    facts: dict[str, Any] = dict(banner)
    facts["data"] = {
        **banner["data"],
        "unigram_entropy": unigram_entropies(run),
        "bytes_per_token": {
            name: rate
            for name, store in run.eval_stores.items()
            if (rate := bytes_per_token(store)) is not None and not store.has_weights
        },
    }
    return facts | {
        "title": run.config.title,
        "command": " ".join(sys.orig_argv),
        "state": "running",
        "total_steps": run.total_steps,
        "config": to_dict(run.config),
        "versions": versions(),
        "stages": [{"name": s.name, "first_step": s.first_step} for s in run.stages],
        "warnings": warnings,
    }
