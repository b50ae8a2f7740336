"""Runs the arms of a plan for every seed, each as an ordinary training run in a workdir of its own.

An arm that is finished is not run again, one that was stopped goes on where it was, and one whose
configuration has changed since is refused: `arm.json` in its workdir tells.
"""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokjax.config import diff, resolve, to_dict
from tokjax.errors import ConfigError
from tokjax.files import storage_errors, write_atomically
from tokjax.models.parameters import count_parameters
from tokjax.reproduction.flops import matmul_flops
from tokjax.reproduction.plan import Plan
from tokjax.reproduction.results import ArmResult, Results, Series, StageCost
from tokjax.reproduction.same_data import with_data_of
from tokjax.training.config import TrainConfig
from tokjax.training.facts import stage_flops, stage_tokens
from tokjax.training.ledger import duration, read_ledger
from tokjax.training.loop import train
from tokjax.training.metrics import TIME_COLUMNS, read_metrics, series
from tokjax.training.run import Run, Stage, build_run

ARM_FILE = "arm.json"
_INDIFFERENT = {
    "": ("title", "mesh", "checkpoints", "samples"),
    "model": ("remat", "unroll", "attention"),
    "data": ("cache_dir", "prefetch"),
}
_LENGTH = ("stages", "objective", "steps", "tokens", "epochs")


@dataclass(frozen=True)
class Job:
    """One arm with one seed.

    Attributes:
        arm: its name.
        seed: of parameters and data.
        workdir: of its training run.
        digest: identity of what the plan says about it.
        config: its configuration.
        data_of: name and configuration of the arm whose data it reads, or None.
        from_stage: the stage of that arm where reading begins.
    """

    arm: str
    seed: int
    workdir: Path
    digest: str
    config: TrainConfig
    data_of: tuple[str, TrainConfig] | None = None
    from_stage: int = 0

    def finished_result(self) -> ArmResult | None:
        """Returns what was measured, or None when the arm is not finished.

        Raises:
            ConfigError: the workdir holds an arm of another configuration.
        """
        path = self.workdir / ARM_FILE
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); remove it to measure anew") from error
        remedy = "Name another --workdir, or remove that folder to run the arm again."
        try:
            before = _decisive(record)
        except ConfigError as error:
            raise ConfigError(f"{path} is of another version: {error}\n{remedy}") from error
        if changed := diff(before, _decisive(self._record(None))):
            listed = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, old, new in changed[:12])
            raise ConfigError(
                f"{self.workdir} holds arm {self.arm!r} of another configuration:{listed}\n{remedy}"
            )
        return None if record["result"] is None else ArmResult.from_json(record["result"])

    def write(self, result: ArmResult | None) -> None:
        """Writes the configuration, and the result once there is one.

        Raises:
            StorageError: the workdir cannot be written.
        """
        with storage_errors(self.workdir, "create"):
            self.workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._record(result), indent=1)
        write_atomically(self.workdir / ARM_FILE, text + "\n")

    def _record(self, result: ArmResult | None) -> dict[str, Any]:
        data_of = None
        if self.data_of is not None:
            name, config = self.data_of
            data_of = {"arm": name, "from_stage": self.from_stage, "config": to_dict(config)}
        return {
            "arm": self.arm,
            "seed": self.seed,
            "config": to_dict(self.config),
            "data_of": data_of,
            "result": None if result is None else result.to_json(),
        }


def plan_jobs(plan: Plan, workdir: Path, seeds: Sequence[int]) -> tuple[Job, ...]:
    """Returns the runs of a plan, all arms of a seed before those of the next.

    Raises:
        ConfigError: an arm's configuration is not that of a training run.
    """
    jobs = []
    for seed in seeds:
        for name, arm in plan.arms.items():
            written = {**arm.tree(seed), "data_of": arm.data_of, "from_stage": arm.from_stage}
            written.pop("title", None)
            text = json.dumps(written, sort_keys=True)
            other = None
            if arm.data_of is not None:
                other = (arm.data_of, _config(plan, arm.data_of, seed))
            jobs.append(
                Job(
                    arm=name,
                    seed=seed,
                    workdir=Path(workdir) / name / f"seed-{seed}",
                    digest=hashlib.sha256(text.encode()).hexdigest()[:16],
                    config=_config(plan, name, seed),
                    data_of=other,
                    from_stage=arm.from_stage,
                )
            )
    return tuple(jobs)


@dataclass(frozen=True)
class Stopped:
    """The runs were asked to stop; the same command continues.

    Attributes:
        signal: that asked.
    """

    signal: int | None


def run_plan(
    plan: Plan,
    workdir: Path,
    seeds: Sequence[int],
    *,
    say: Callable[[str], None] = print,
    devices: list | None = None,
) -> Results | Stopped:
    """Returns the measurements of all arms and seeds, after running those that are not finished.

    Args:
        plan: what to run.
        workdir: holds a folder `<arm>/seed-<n>` for every run.
        seeds: of parameters and data, one run of every arm each.
        say: receives lines about the progress over all arms.
        devices: to run on; None takes all.

    Raises:
        ConfigError: a configuration that cannot be meant, or that differs from the one that was
            begun in its workdir.
        StorageError: a workdir cannot be written.
    """
    jobs = plan_jobs(plan, workdir, seeds)
    results = {job: job.finished_result() for job in jobs}
    # Everything that can be wrong with any arm is found before the first one takes its time.
    runs = {job: _run(job, devices) for job in jobs if results[job] is None}
    left = {
        job: sum(stage_flops(run, s) * s.steps for s in run.stages) for job, run in runs.items()
    }
    say(f"{len(jobs)} runs ({len(plan.arms)} arms x {len(seeds)} seeds), {len(runs)} to do")
    total, began = sum(left.values()), time.monotonic()
    for number, job in enumerate(jobs, 1):
        if results[job] is not None:
            continue
        say(f"--- run {number} of {len(jobs)}: {job.arm}, seed {job.seed}")
        job.write(None)
        outcome = train(runs[job], job.workdir)
        if not outcome.finished:
            return Stopped(outcome.stopped_by)
        results[job] = _measure(runs[job], job)
        job.write(results[job])
        del left[job], runs[job]
        share = 1 - sum(left.values()) / total
        spent = time.monotonic() - began
        say(
            f"--- {share:.0%} of the operations done in {duration(spent)}"
            + (f", about {duration(spent / share * (1 - share))} left" if left else "")
        )
    return Results(tuple(r for r in results.values() if r is not None), tuple(seeds))


def _config(plan: Plan, arm: str, seed: int) -> TrainConfig:
    return resolve(TrainConfig, plan.arms[arm].tree(seed), path=f"arms.{arm}")


def _decisive(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what can change a number, as today's schema reads what was written.

    So a key that is new since then has its default on both sides.
    """
    tree = to_dict(resolve(TrainConfig, record["config"]))
    tree = {key: value for key, value in tree.items() if key not in _INDIFFERENT[""]}
    for part in ("model", "data"):
        tree[part] = {k: v for k, v in tree[part].items() if k not in _INDIFFERENT[part]}
    if (source := record["data_of"]) is not None:
        other = to_dict(resolve(TrainConfig, source["config"]))
        tree["data_of"] = {**source, "config": {key: other[key] for key in _LENGTH}}
    return tree


def _run(job: Job, devices: list | None) -> Run:
    if not job.config.data.evals:
        raise ConfigError(f"arm {job.arm!r} evaluates nothing; set data.evals")
    run = build_run(job.config, devices=devices)
    if job.data_of is None:
        return run
    return with_data_of(run, build_run(job.data_of[1], devices=devices), job.from_stage)


def _measure(run: Run, job: Job) -> ArmResult:
    table = read_metrics(job.workdir)
    skipped = {"step", "tokens", "learning_rate", *TIME_COLUMNS}
    curves = {name: _series(table, name) for name in table if name not in skipped}
    ledger = read_ledger(job.workdir / "ledger.json")
    if ledger is None:
        raise ConfigError(f"{job.workdir / 'ledger.json'} cannot be read; remove {job.workdir}")
    return ArmResult(
        arm=job.arm,
        seed=job.seed,
        parameters=sum(count_parameters(run.model.config).values()),
        stages=tuple(_stage_cost(run, stage, table) for stage in run.stages),
        curves=curves,
        seconds=dict(ledger["seconds"]),
        eval_data={name: store.fingerprint for name, store in run.eval_stores.items()},
        load_average=os.getloadavg()[2] if hasattr(os, "getloadavg") else None,
    )


def _stage_cost(run: Run, stage: Stage, table: Mapping[str, list[Any]]) -> StageCost:
    rates = _series(table, "steps_per_second") if "steps_per_second" in table else Series((), ())
    inside = [
        1 / rate
        for step, rate in zip(rates.steps, rates.values, strict=True)
        if stage.first_step < step <= stage.end
    ]
    return StageCost(
        name=stage.name,
        first_step=stage.first_step,
        steps=stage.steps,
        tokens=stage_tokens(run, stage),
        model_flops=stage_flops(run, stage),
        counted_flops=_counted_flops(run, stage),
        step_seconds=statistics.median(inside) if inside else None,
    )


def _counted_flops(run: Run, stage: Stage) -> float:
    return matmul_flops(
        run.train_step(stage), run.abstract_state(stage), run.loader.batch(stage.first_step)
    )


def _series(table: Mapping[str, list[Any]], name: str) -> Series:
    # A start from an older checkpoint writes a step again: the later row counts.
    points = dict(zip(*series(table, name), strict=True))
    steps = sorted(points)
    return Series(tuple(steps), tuple(points[step] for step in steps))
