"""The training loop: restore, train stage by stage, evaluate, sample, save, report."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from tokjax.config import defaults_of
from tokjax.data.annotated import AnnotatedStore
from tokjax.data.batch import Batch
from tokjax.data.feed import prefetch, to_device
from tokjax.decoding.text import generate_text
from tokjax.errors import NonFiniteError, StorageError
from tokjax.files import write_atomically
from tokjax.training import facts
from tokjax.training.answers import evaluate_answers, write_answers
from tokjax.training.checkpoints import Checkpointer
from tokjax.training.compiles import CompileWatch
from tokjax.training.evaluation import evaluate, parameters_in_use
from tokjax.training.ledger import Ledger
from tokjax.training.metrics import MetricWriter, read_metrics
from tokjax.training.preemption import StopRequest, watch_for_stop
from tokjax.training.processes import on_first
from tokjax.training.progress import Progress, banner
from tokjax.training.report import write_report
from tokjax.training.run import Run, Stage, reset_for_stage
from tokjax.training.run_facts import add_sample, read_samples, update_run
from tokjax.training.state import TrainState, with_models
from tokjax.training.workdir import lock_workdir

NONFINITE_FILE = "nonfinite.json"


@dataclass
class Result:
    """How a run ended.

    Attributes:
        state: the last state.
        step: steps done.
        finished: whether all steps are done; otherwise it was asked to stop.
        stopped_by: the signal that stopped it, or None.
        metrics: the last evaluation.
        seconds: wall time by category, over all restarts of the workdir.
        report: the HTML report, where one was written.
    """

    state: TrainState
    step: int
    finished: bool
    stopped_by: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    report: Path | None = None


def train(run: Run, workdir: Path, *, started: float | None = None) -> Result:
    """Trains to the end, or until asked to stop, continuing from the newest good checkpoint.

    Args:
        run: what to train; see `build_run`.
        workdir: checkpoints, metrics, samples and the report of this run and of no other.
        started: when the process began, as `time.monotonic()` tells it, for the ledger.

    Raises:
        CheckpointError: the workdir's checkpoints are of another configuration, or all damaged.
        NonFiniteError: a loss or gradient was not finite and `on_nonfinite` is "stop".
        StorageError: the workdir cannot be written, or another run is using it.
    """
    workdir = Path(workdir).absolute()
    peak = facts.peak_flops(run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_workdir(workdir))
        stack.enter_context(jax.set_mesh(run.mesh))
        stop = stack.enter_context(watch_for_stop())
        return _Training(run, workdir, stop, stack, started).run_to_end(peak)


class _Training:
    """The open files and running values of one call of `train`."""

    def __init__(
        self,
        run: Run,
        workdir: Path,
        stop: StopRequest,
        stack: contextlib.ExitStack,
        started: float | None,
    ):
        self.run, self.workdir, self.stop, self.stack = run, workdir, stop, stack
        self.first = jax.process_index() == 0
        before = 0.0 if started is None else time.monotonic() - started
        self.ledger = Ledger(workdir / "ledger.json", elapsed_before=before, enabled=self.first)
        self.exit_reason = "failed"
        stack.callback(self.close_ledger)
        self.checkpointer = stack.enter_context(
            Checkpointer(
                workdir / "checkpoints",
                run.config.checkpoints,
                identity=run.identity(),
                defaults=defaults_of(run.config),
            )
        )
        self.compiles = stack.enter_context(CompileWatch())
        self.provenance = facts.provenance(run)
        # Metrics of a step that may still be running, and what its batch was collected with.
        self.pending: tuple[int, Any, dict[str, float]] | None = None
        self.collector: Any = None  # makes the batches of a stage that collects its own
        self.objective = run.stages[0].objective  # that the state is of
        self.save_due = False
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})
        self.sampled = self.saved = -1
        self.skipped = 0
        self.warnings: list[str] = _data_warnings(run) + _schedule_warnings(run)

    def close_ledger(self) -> None:
        """Books the end of the run; after a failure a full disk does not hide the failure."""
        try:
            self.ledger.close(self.exit_reason)
        except StorageError:
            if not self.exit_reason.startswith("failed"):
                raise

    # ---------------------------------------------------------------- start

    def restore(self) -> tuple[TrainState, int]:
        """Returns the state to go on from, and the number of steps it has done."""
        run = self.run

        def template(step: int) -> TrainState:
            return run.abstract_state(run.stage_at(max(step - 1, 0)))

        restored = self.checkpointer.restore(lambda step: _kept(template(step)))
        adapted = run.model.config.lora is not None
        initial = run.initial_params() if restored is None or adapted else None
        if restored is None:
            shardings = jax.tree.map(lambda s: s.sharding, with_models(template(0), {}))
            init = jax.jit(partial(run.init_state, run.stages[0]), out_shardings=shardings)
            return init(initial), 0
        for lost in restored.lost_steps:
            self.warnings.append(
                f"checkpoint {lost.step} was damaged ({'; '.join(lost.reasons)}); the run "
                f"continued from step {restored.step}"
            )
        return dataclasses.replace(restored.state, frozen=initial or ()), restored.step

    # ---------------------------------------------------------------- the run

    def run_to_end(self, peak: float | None) -> Result:
        """Trains, and closes everything whatever happens."""
        run, stack = self.run, self.stack
        with self.ledger.measure("start_up"):
            state, step = self.restore()
        lost = self.ledger.resume_from(step)
        self.saved = step if step else -1
        self.evaluated = (step, _evaluation_at(self.workdir, step))
        self.writer = stack.enter_context(
            MetricWriter(self.workdir, resume_step=step or None, enabled=self.first)
        )
        stage = run.stage_at(min(step, run.total_steps - 1))
        self.progress = Progress(
            run.total_steps,
            start_step=step,
            tokens_per_step=facts.stage_tokens(run, stage),
            flops_per_step=facts.stage_flops(run, stage),
            peak_flops=peak,
            enabled=self.first,
        )
        compiled = None
        if step < run.total_steps:
            state, compiled = self.enter_stage(state, stage, step)
        else:
            state = self.with_frozen(state, stage)
        self.announce(state, step, compiled, peak, lost)
        stack.enter_context(self.progress)
        try:
            if self.evaluation_due(step) and not self.evaluated[1]:
                self.evaluated = (-1, {})
                # The run was stopped between this step and its evaluation.
                self.evaluate(state, step)
            if self.sample_due(step) and not on_first(lambda: _is_sampled(self.workdir, step)):
                self.sample(state, step)
            while step < run.total_steps and not self.stop.signal:
                if step == stage.end:
                    stage = run.stage_at(step)
                    self.progress.stage(
                        tokens_per_step=facts.stage_tokens(run, stage),
                        flops_per_step=facts.stage_flops(run, stage),
                    )
                    state, compiled = self.enter_stage(state, stage, step)
                state, step = self.run_stage(state, stage, compiled, step)
        except BaseException as error:
            self.exit_reason = f"failed: {error}" if str(error) else type(error).__name__
            with contextlib.suppress(StorageError):  # a full disk must not hide its own cause
                self.note(state=self.exit_reason)
            raise
        return self.finish(state, step)

    def enter_stage(self, state: TrainState, stage: Stage, step: int) -> tuple[TrainState, Any]:
        """Returns the state to begin or continue a stage with, and the stage's compiled step."""
        run = self.run
        if step == stage.first_step and step > 0:
            with self.ledger.measure("compile"), self.progress.pause():
                abstract = with_models(run.abstract_state(stage), {})
                shardings = jax.tree.map(lambda s: s.sharding, abstract)
                reset = jax.jit(
                    lambda state: reset_for_stage(run, stage, state), out_shardings=shardings
                )
                state = reset(with_models(state, {}))
                self.progress.message(f"step {step}: stage {stage.name!r} begins")
        state = self.with_frozen(state, stage)
        with self.ledger.measure("compile"), self.progress.pause():
            self.collector = None
            make = getattr(stage.objective, "collector", None)
            if make is not None:
                self.collector = self.stack.enter_context(make(run, stage, self.workdir))
            compiled = run.compile_step(stage, self.abstract_batch(step))
        return state, compiled

    def with_frozen(self, state: TrainState, stage: Stage) -> TrainState:
        """Returns the state with the models that a stage's objective reads."""
        self.objective = stage.objective
        with self.ledger.measure("start_up"):
            return with_models(state, self.run.frozen_params(stage))

    def batch(self, step: int) -> Any:
        """Returns the global batch of a step, on the devices."""
        run = self.run
        return to_device(
            lambda rows: run.loader.batch(step, rows), run.batch_sharding, run.loader.batch_size
        )

    def abstract_batch(self, step: int) -> Batch:
        """Returns shapes and shardings of the batch of a step."""
        rows, tokens, segments = self.run.loader.shape(step)
        names: Any = self.run.loader.channels
        values, group = self.run.loader.value_names, self.run.loader.group
        if self.collector is not None:  # one answer a row
            tokens, segments, names = self.run.config.data.seq_len, 1, self.collector.channels
            values, group = (), 1
        return self.run.abstract_batch(rows, tokens, segments, names, values, group)

    def run_stage(self, state, stage: Stage, compiled, step: int) -> tuple[TrainState, int]:
        """Trains to the end of a stage, or until asked to stop."""
        with contextlib.ExitStack() as stack:
            if self.collector is None:
                depth = self.run.config.data.prefetch
                feed = stack.enter_context(prefetch(self.batch, step, stage.end, depth))
            while step < stage.end:
                collected: dict[str, float] = {}
                if self.collector is None:
                    with self.ledger.measure("data_wait"):
                        batch = next(feed)
                else:
                    batch, collected = self.collect(state, step - stage.first_step)
                    if collected and self.stopping(step):
                        break  # asked to while answers were collected: they will be again
                with self.ledger.measure("step"), self.compiles.none_expected(step, self.warn):
                    state, metrics = compiled(state, batch)
                    # Read one step late, so that the device never waits for this process.
                    self.read_metrics()
                    self.pending = (step + 1, metrics, collected)
                step += 1
                self.ledger.at_step(step)
                stopping = self.stopping(step, stage)
                self.after_step(state, step, stopping, stage)
                if stopping:
                    break
        with self.ledger.measure("step"):
            self.read_metrics()
        return state, step

    def collect(self, state: TrainState, step: int) -> tuple[Batch, dict[str, float]]:
        """Returns the batch of a step of the stage; metrics with the first of a collection."""
        with self.ledger.measure("step"):
            self.read_metrics()  # the parameters are waited for anyway
        with self.ledger.measure("rollout"), self.progress.pause():
            batch, metrics, warnings = self.collector.batch(state, step)
        for warning in warnings:
            self.warn(warning)
        return batch, metrics

    def between_collections(self, stage: Stage, step: int) -> bool:
        """Returns whether nothing that was collected is left to be trained on."""
        if self.collector is None or step == stage.end:
            return True
        return (step - stage.first_step) % self.collector.period == 0

    def stopping(self, step: int, stage: Stage | None = None) -> bool:
        """Returns whether to stop here: where a collection is used up, if asked to by then."""
        if stage is None:  # right behind a collection: only a single process may leave alone
            return self.stop.signal is not None and jax.process_count() == 1
        asked = self.stop.at(step) or self.stop.signal is not None
        return asked and self.between_collections(stage, step)

    def after_step(self, state: TrainState, step: int, stopping: bool, stage: Stage) -> None:
        """Evaluates, samples and saves when it is time to."""
        last = step == self.run.total_steps
        if not stopping and self.evaluation_due(step):
            self.evaluate(state, step)
        if not stopping and self.sample_due(step):
            self.sample(state, step)
        self.save_due |= self.checkpointer.due(step)
        if stopping or last or (self.save_due and self.between_collections(stage, step)):
            self.save_due = False
            self.save(state, step)

    def evaluation_due(self, step: int) -> bool:
        """Returns whether to evaluate after `step` steps."""
        every = self.run.config.evaluation.every_steps
        return step > 0 and (step == self.run.total_steps or step % every == 0)

    def sample_due(self, step: int) -> bool:
        """Returns whether to sample after `step` steps."""
        every = self.run.config.samples.every_steps
        due = every is not None and step % every == 0
        return step > 0 and (due or step == self.run.total_steps)

    # ---------------------------------------------------------------- the parts

    def read_metrics(self) -> None:
        """Reads the metrics of the step before, logs them, and applies `on_nonfinite`."""
        if self.pending is None:
            return
        step, metrics, collected = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        finite = values.pop("finite") == 1.0
        if not finite:
            self.nonfinite(step, values)
        shown = {"reward": collected["reward/mean"]} if "reward/mean" in collected else {}
        self.progress.update(step, loss=values["loss"], **shown)
        due = step % self.run.config.log_every == 0 or step == self.run.total_steps
        if due or not finite or collected:
            values |= self.progress.rates() | collected
            values["tokens"] = float(self.tokens_seen(step))
            if self.skipped:
                values["skipped_updates"] = float(self.skipped)
            self.writer.write(step, values)

    def tokens_seen(self, step: int) -> int:
        """Returns the token places of the first `step` steps."""
        return sum(
            max(0, min(step, s.end) - s.first_step) * facts.stage_tokens(self.run, s)
            for s in self.run.stages
        )

    def nonfinite(self, step: int, values: Mapping[str, float]) -> None:
        """Records which examples gave a loss or gradient that is not finite; stops if told to."""
        ids: list[int] = []  # what the model wrote itself is no example
        if self.collector is None:
            batch = self.run.loader.batch(step - 1)
            ids = sorted({int(i) for i in batch.example_id.ravel() if i >= 0})
        record = {
            "step": step,
            "loss": str(values["loss"]),
            "grad_norm": str(values["grad_norm"]),
            "examples": [
                {"key": self.run.loader.example_key(i), "name": self.run.loader.example_name(i)}
                for i in ids
            ],
        }
        path = self.workdir / NONFINITE_FILE
        if self.first:
            write_atomically(path, json.dumps(record, indent=1) + "\n")
        said = (
            f"step {step}: loss {values['loss']} and gradient norm {values['grad_norm']} are not "
            f"both finite; the batch's {len(ids)} examples are listed in {path}"
        )
        if self.run.config.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{said}. The parameters are those before the step. Lower optimizer.peak_lr, "
                f"remove the examples, or set on_nonfinite='skip' to leave such updates out."
            )
        self.skipped += 1
        self.warn(f"{said}. Its update was left out ({self.skipped} so far).")

    def warn(self, text: str) -> None:
        """Shows a warning and keeps it for the report."""
        self.warnings.append(text)
        self.progress.message(f"warning: {text}")
        self.note(warnings=self.warnings)

    def note(self, **values: Any) -> None:
        """Writes facts to run.json."""
        if self.first:
            update_run(self.workdir, **values)

    def evaluate(self, state: TrainState, step: int) -> None:
        """Evaluates, unless that was done at this step."""
        if self.evaluated[0] == step or not self.run.eval_loaders:
            return
        with self.ledger.measure("step"):
            self.read_metrics()
        with self.ledger.measure("eval"), self.progress.pause():
            limit = self.run.config.evaluation.max_batches
            params = parameters_in_use(state)
            found = evaluate(self.run, params, limit, state.aux)
            accuracies, answers = evaluate_answers(self.run, *self.answering(state))
            found |= accuracies
            if self.first and answers:
                write_answers(self.workdir, step, answers)
        self.evaluated = (step, found)
        self.writer.write(step, found)
        losses = ", ".join(
            f"{k.removeprefix('eval/')} {v:.4f}"
            for k, v in found.items()
            if k.endswith(("loss", "accuracy"))
        )
        self.progress.message(f"step {step}: {losses}")

    def sample(self, state: TrainState, step: int) -> None:
        """Writes texts, unless that was done at this step."""
        config = self.run.config.samples
        if self.sampled == step or not config.prompts:
            return
        self.sampled = step
        with self.ledger.measure("sample"), self.progress.pause():
            texts = generate_text(
                *self.answering(state),
                self.run.tokenizer,
                list(config.prompts),
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=self.run.config.seed,
            )
        for prompt, text in zip(config.prompts, texts, strict=True):
            self.progress.message(f"step {step}: {prompt!r} -> {text!r}")
            if self.first:
                add_sample(self.workdir, step, prompt, text)

    def answering(self, state: TrainState) -> tuple[Any, Any]:
        """Returns what answers prompts: the objective's policy, else the model; and parameters."""
        params = parameters_in_use(state)
        policy = getattr(self.objective, "policy", None)
        if policy is None:
            return self.run.model, params
        return policy(self.run.model, params, state.aux)

    def save(self, state: TrainState, step: int) -> None:
        """Saves a checkpoint, unless that was done at this step."""
        if self.saved == step:
            return
        with self.ledger.measure("step"):
            self.read_metrics()
        with self.ledger.measure("save"), self.progress.pause():
            self.writer.flush()  # a resumed run's curves must not lack what came before
            metrics = self.evaluated[1] if self.evaluated[0] == step else None
            self.checkpointer.save(step, _kept(state), metrics=metrics, metadata=self.provenance)
        self.saved = step
        self.ledger.saved(step)

    # ---------------------------------------------------------------- before and after

    def announce(self, state, step: int, compiled, peak, lost: float) -> None:
        """Prints what the run will do, before its first step."""
        if not self.first:
            return
        if compiled is not None:
            sections = facts.banner_facts(self.run, state, compiled, peak, self.workdir)
            banner(sections)
            update_run(self.workdir, **facts.run_facts(self.run, sections, self.warnings))
        for warning in self.warnings:
            self.progress.message(f"warning: {warning}")
        if step:
            again = f", {lost:.0f} s of work is done again" if lost >= 1 else ""
            self.progress.message(f"continuing from step {step} of {self.run.total_steps}{again}")
        for note in self.writer.notes:
            self.progress.message(f"note: {note}")

    def finish(self, state: TrainState, step: int) -> Result:
        """Evaluates and saves what is left, and writes the report."""
        finished = step == self.run.total_steps
        if step:
            self.save(state, step)
        with self.ledger.measure("save"):
            self.checkpointer.wait()
        self.exit_reason = "finished" if finished else "preempted"
        report = None
        if self.first:
            final = self.evaluated[1]
            update_run(self.workdir, state=self.exit_reason, **({"final": final} if final else {}))
            self.writer.flush()
            self.ledger.flush()
            with self.ledger.measure("report"):
                report = write_report(self.workdir)
        return Result(
            state=state,
            step=step,
            finished=finished,
            stopped_by=self.stop.signal,
            metrics=self.evaluated[1],
            seconds=self.ledger.summary()["seconds"],
            report=report,
        )


def _kept(state: TrainState) -> TrainState:
    """Returns what a checkpoint holds of a state."""
    return dataclasses.replace(state, frozen=())


def _evaluation_at(workdir: Path, step: int) -> dict[str, float]:
    """Returns what was evaluated at a step by an earlier start, as metrics.csv tells it."""
    table = read_metrics(workdir)
    rows = [i for i, s in enumerate(table.get("step", [])) if s == step]
    return {
        name: values[i]
        for name, values in table.items()
        for i in rows
        if name.startswith("eval/") and values[i] is not None
    }


def _is_sampled(workdir: Path, step: int) -> bool:
    return any(sample["step"] == step for sample in read_samples(workdir))


def _data_warnings(run: Run) -> list[str]:
    warnings = []
    stores = [(f"training source {i + 1}", s) for i, s in enumerate(run.stores)]
    stores += [(f"evaluation set {name!r}", s) for name, s in run.eval_stores.items()]
    for name, store in stores:
        if isinstance(store, AnnotatedStore):
            warnings.append(f"{name}: {store.summary()}")
        skipped = store.manifest["counts"]["skipped"]
        if skipped:
            listed = store.directory / "skipped.jsonl"
            warnings.append(
                f"{name}: {skipped} bad records were skipped; they are listed in {listed}"
            )
    return warnings


def _schedule_warnings(run: Run) -> list[str]:
    warmup = getattr(run.config.schedule, "warmup_steps", 0)
    return [
        f"schedule.warmup_steps={warmup} is more than the {stage.steps} steps of stage "
        f"{stage.name!r}: the learning rate never reaches optimizer.peak_lr"
        for stage in run.stages
        if warmup > stage.steps
    ]
