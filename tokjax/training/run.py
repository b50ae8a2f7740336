"""A run, built from its configuration: tokenizer, data, model, stages. No state yet."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.config import to_dict
from tokjax.data.annotated import AnnotatedStore, annotate
from tokjax.data.cache import cache_directory
from tokjax.data.config import MixtureEntry
from tokjax.data.loader import EvalLoader, Loader, StageSlice
from tokjax.data.prepare import ensure_store
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import Tokenizer, build_tokenizer, sequence_ends
from tokjax.errors import ConfigError, DataError
from tokjax.models import lora
from tokjax.models.transformer import Transformer, with_vocabulary
from tokjax.parallel.mesh import build_mesh
from tokjax.parallel.rules import BATCH_AXES
from tokjax.training.config import TrainConfig
from tokjax.training.frozen import FrozenModel, check_frozen, frozen_models
from tokjax.training.initial import Initial, adopt_model, adopt_tokenizer, find_initial
from tokjax.training.objective import Objective
from tokjax.training.state import (
    TrainState,
    begun,
    init_state,
    state_shardings,
    whole,
    with_models,
)
from tokjax.training.step import StepConfig, make_train_step


@dataclass(frozen=True)
class Stage:
    """A part of the run: which steps, and what is minimised."""

    name: str
    objective: Objective
    first_step: int
    steps: int
    keep_optimizer: bool
    rate: float = 1.0

    @property
    def end(self) -> int:
        """The step after the last."""
        return self.first_step + self.steps


@dataclass(frozen=True)
class Run:
    """Everything a configuration determines."""

    config: TrainConfig
    tokenizer: Tokenizer
    stores: tuple[TokenStore | AnnotatedStore, ...]
    eval_stores: Mapping[str, TokenStore]
    model: Transformer
    mesh: Mesh
    stages: tuple[Stage, ...]
    loader: Loader
    eval_loaders: Mapping[str, EvalLoader]
    initial: Initial | None = None

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return self.stages[-1].end

    def stage_at(self, step: int) -> Stage:
        """Returns the stage that step number `step` (from 0) belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optax transformation, at learning rate 1."""
        return self.config.optimizer.build(self.model.config)

    @cached_property
    def batch_sharding(self) -> NamedSharding:
        """Rows over `data` and `fsdp`, positions over `sequence`."""
        return NamedSharding(self.mesh, P(BATCH_AXES, "sequence"))

    def initial_params(self) -> Any:
        """Returns the parameters of `init_from`, on the devices; None where there is none."""
        if self.initial is None:
            return None
        return self.initial.load(self.model.config, self.mesh)

    def frozen_models(self, stage: Stage) -> Mapping[str, FrozenModel]:
        """Returns the models that a stage's objective reads beside the run's, by name."""
        return frozen_models(stage.objective, self.model)

    def frozen_params(self, stage: Stage) -> dict[str, Any]:
        """Returns the parameters of the stage's frozen models, on the devices."""
        return {name: each.load(self.mesh) for name, each in self.frozen_models(stage).items()}

    def init_state(self, stage: Stage, initial: Any = None) -> TrainState:
        """Returns the state a run starts with in this stage (pure; see `abstract_state`).

        The objective's frozen models are put into it afterwards: see `with_models`.

        Args:
            stage: of the run.
            initial: what `initial_params` returns.
        """
        return init_state(
            self.model,
            stage.objective,
            self.optimizer,
            self.config.seed,
            self.config.ema_decay is not None,
            initial,
        )

    def abstract_state(self, stage: Stage) -> TrainState:
        """Returns shapes, dtypes and shardings of the state."""
        base = None if self.initial is None else lora.off(self.model).abstract_params()
        shapes = jax.eval_shape(lambda initial: self.init_state(stage, initial), base)
        shardings = state_shardings(shapes, self.model, self.mesh)
        state = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        models = self.frozen_models(stage).items()
        return with_models(state, {name: each.abstract_params(self.mesh) for name, each in models})

    def train_step(self, stage: Stage) -> Any:
        """Returns the stage's step function (state, batch) -> (state, metrics), not compiled."""
        config = self.config
        step_config = StepConfig(
            peak_lr=config.optimizer.peak_lr * stage.rate,
            schedule=config.schedule,
            first_step=stage.first_step,
            stage_steps=stage.steps,
            micro_batches=config.micro_batches,
            clip_norm=config.clip_norm,
            ema_decay=config.ema_decay,
        )
        return make_train_step(self.model, stage.objective, self.optimizer, step_config)

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint and the run that continues from it must have in common.

        Everything that changes the numbers. Left out: how often something is saved, shown or
        evaluated, where files lie, on which mesh and in how many parts a step is computed.
        """
        tree = to_dict(self.config)
        for key in ("title", "mesh", "evaluation", "samples", "checkpoints", "log_every"):
            del tree[key]
        del tree["micro_batches"]
        for key in ("cache_dir", "prefetch", "evals", "train", "tokenizer", "on_error"):
            del tree["data"][key]
        for key in ("remat", "unroll", "attention", "base"):
            del tree["model"][key]
        # Data are known by their content, wherever they lie.
        tree["data"]["train"] = [store.fingerprint[:16] for store in self.stores]
        tree["data"]["rates"] = [entry.rate for entry in self.config.data.train]
        tree["tokenizer"] = self.tokenizer.fingerprint[:16]
        if self.initial is not None:
            tree["init_from"] = self.initial.fingerprint()[:16]
        objectives = [each["objective"] for each in tree["stages"]] or [tree["objective"]]
        for stage, objective in zip(self.stages, objectives, strict=True):
            for name, each in self.frozen_models(stage).items():
                objective[name] = each.initial.fingerprint()[:16]
        return tree


def build_run(
    config: TrainConfig, *, devices: list | None = None, show_progress: bool = True
) -> Run:
    """Returns the run; prepares tokenizer and token stores where that was not done before.

    Args:
        config: what to run.
        devices: to run on; None takes all.
        show_progress: whether preparing data shows its progress.

    Raises:
        ConfigError: parts that do not fit together.
        DataError: data that cannot be prepared.
    """
    config, initial = adopt(config)
    mesh = build_mesh(config.mesh, devices)
    _check_mesh(config, mesh)
    data = config.data
    cache = Path(data.cache_dir) if data.cache_dir else cache_directory()
    tokenizer = build_tokenizer(data.tokenizer, cache)
    _check_vocabulary(config, tokenizer)
    _check_prompts(config, tokenizer)
    model = Transformer(with_vocabulary(config.model, tokenizer.vocab_size))
    for stage in config.stage_list:
        check_frozen(stage.objective, model, tokenizer, data.seq_len)

    def store(source: Any) -> TokenStore:
        return TokenStore.open(ensure_store(source, data, cache_dir=cache, progress=show_progress))

    def kept(entry: MixtureEntry) -> TokenStore | AnnotatedStore:
        found = store(entry.source)
        return found if entry.artifact is None else annotate(found, entry.artifact)

    stores = tuple(kept(entry) for entry in data.train)
    eval_stores = {name: store(source) for name, source in data.evals.items()}
    _check_weights(stores, eval_stores)
    _check_pairs(config, stores, eval_stores)
    stages = _lay_out_stages(config, stores)
    loader = _loader(config, stores, stages)
    eval_loaders = {
        name: EvalLoader(
            [eval_store],
            seq_len=data.seq_len,
            batch_size=config.evaluation.batch_size or data.batch_size,
            packing=data.packing,
            long_examples="split",
        )
        for name, eval_store in eval_stores.items()
    }
    return Run(
        config, tokenizer, stores, eval_stores, model, mesh, stages, loader, eval_loaders, initial
    )


def adopt(config: TrainConfig) -> tuple[TrainConfig, Initial | None]:
    """Returns the configuration with the model and tokenizer of its `init_from`, and that.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: the configuration sets what the checkpoint decides otherwise.
    """
    if config.init_from is None:
        return config, None
    initial = find_initial(config.init_from)
    tokenizer = adopt_tokenizer(initial, config.data.tokenizer)
    return dataclasses.replace(
        config,
        model=adopt_model(initial, config.model),
        data=dataclasses.replace(config.data, tokenizer=tokenizer),
    ), initial


def _check_mesh(config: TrainConfig, mesh: Mesh) -> None:
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, size in (
        ("data.batch_size", config.data.batch_size // config.micro_batches),
        ("evaluation.batch_size", config.evaluation.batch_size or config.data.batch_size),
    ):
        if size % rows:
            raise ConfigError(
                f"{name} gives {size} rows at a time, which do not divide among the {rows} devices "
                f"of the mesh axes data and fsdp; make it a multiple of {rows}"
            )
    if config.data.seq_len % mesh.shape["sequence"]:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} does not divide among the "
            f"{mesh.shape['sequence']} devices of the mesh axis sequence"
        )


def _check_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> None:
    size = config.model.vocab_size
    if size is not None and size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer.vocab_size} ids; "
            f"set it to at least that, or to None"
        )


def _check_weights(stores: tuple[Any, ...], eval_stores: Mapping[str, TokenStore]) -> None:
    named = [(f"data.train.{i}", s) for i, s in enumerate(stores)]
    named += [(f"data.evals.{name}", s) for name, s in eval_stores.items()]
    for name, store in named:
        counts = store.manifest["counts"]
        if counts["examples_without_weight"] == counts["examples"]:
            raise DataError(
                f"{name}: none of the {counts['examples']:,} examples has a target with a weight, "
                f"so there is no loss. Look at the records' weights; in chats only assistant turns "
                f"weigh"
            )


def _check_pairs(config: TrainConfig, stores: tuple, eval_stores: Mapping[str, Any]) -> None:
    """Refuses pairs of answers without an objective of pairs, the reverse, and so for rankings."""
    named = [(f"data.train.{i}", store) for i, store in enumerate(stores)]
    for stage in config.stage_list:
        wanted = _reads(stage.objective)
        for name, store in named:
            if (found := _holds(store)) != wanted:
                raise ConfigError(
                    f"objective {_name(stage.objective)!r} reads {wanted}, but {name} holds "
                    f"{found}: choose another objective, or another data.train kind"
                )
    last = config.stage_list[-1].objective
    for name, store in eval_stores.items():
        if (found := _holds(store)) not in ("single examples", _reads(last)):
            raise ConfigError(
                f"data.evals.{name} holds {found}, which only an objective of {found} evaluates; "
                f"the last one is {_name(last)!r}"
            )


def _reads(objective: Any) -> str:
    """Returns what examples an objective takes."""
    for name in ("pairs", "rankings"):
        if getattr(objective, f"reads_{name}", False):
            return name
    return "single examples"


def _holds(store: Any) -> str:
    """Returns what examples a store holds."""
    if store.has_rankings:
        return "rankings"
    return "pairs" if store.has_pairs else "single examples"


def _check_prompts(config: TrainConfig, tokenizer: Tokenizer) -> None:
    # Found now rather than by the first sample, hours later.
    for prompt in config.samples.prompts:
        before, _ = sequence_ends(config.data.tokenizer, tokenizer)
        size = len(before) + len(tokenizer.encode(prompt))
        if size + config.samples.max_new_tokens > config.model.max_positions:
            raise ConfigError(
                f"samples.prompts: {prompt!r} has {size} tokens; with samples.max_new_tokens="
                f"{config.samples.max_new_tokens} that is more than model.max_positions="
                f"{config.model.max_positions}"
            )


def _loader(config: TrainConfig, stores: tuple[Any, ...], stages: Any) -> Loader:
    data = config.data
    return Loader(
        stores,
        rates=[entry.rate for entry in data.train] if len(data.train) > 1 else None,
        seq_len=data.seq_len,
        batch_size=data.batch_size,
        seed=data.seed,
        packing=data.packing,
        long_examples=data.long_examples,
        shuffle=data.shuffle,
        stages=[StageSlice(s.steps, s.objective.tokens_per_position) for s in stages],
    )


def _lay_out_stages(config: TrainConfig, stores: tuple[Any, ...]) -> tuple[Stage, ...]:
    per_step = config.data.seq_len * config.data.batch_size
    if config.steps is not None:
        budget = float(config.steps * per_step)
    elif config.tokens is not None:
        budget = float(config.tokens)
    else:
        # The length of an epoch is known once the examples are packed into rows.
        probe = [
            Stage("", stage.objective, i, 1, False) for i, stage in enumerate(config.stage_list)
        ]
        facts = _loader(config, stores, probe).describe()
        budget = (config.epochs or 0) * facts["rows"] * facts["row_tokens"]
    stages, first = [], 0
    for stage in config.stage_list:
        objective = stage.objective
        steps = round(stage.share * budget / (per_step * objective.tokens_per_position))
        if steps < 1:
            raise ConfigError(
                f"the run's {budget:.0f} data tokens give the stage {_name(objective)!r} with "
                f"share={stage.share} not one step of "
                f"{per_step * objective.tokens_per_position} tokens; train for longer"
            )
        keep, rate = stage.keep_optimizer, stage.rate
        stages.append(Stage(_name(objective), objective, first, steps, keep, rate))
        first += steps
    for before, stage in itertools.pairwise(stages):
        owns = [hasattr(each.objective, "init_heads") for each in (before, stage)]
        if stage.keep_optimizer and any(owns):
            raise ConfigError(
                f"the stage {stage.name!r} cannot keep the optimiser's moments of {before.name!r}: "
                f"an objective's heads start afresh; set its keep_optimizer=False"
            )
    if first >= 2**31:
        raise ConfigError(f"the run would take {first:,} steps, more than the step counter holds")
    return tuple(stages)


def _name(objective: Any) -> str:
    return to_dict(objective).get("name", type(objective).__name__)


def reset_for_stage(run: Run, stage: Stage, state: TrainState) -> TrainState:
    """Returns the state with the optimiser and what is the objective's started afresh (pure)."""
    key = jax.random.fold_in(state.key, stage.first_step)
    head_key = jax.random.fold_in(key, 1)
    params = begun(state.params, stage.objective, head_key, run.model)
    ema = state.ema
    if ema is not None:
        ema = begun(ema, stage.objective, head_key, run.model)
    opt_state = state.opt_state if stage.keep_optimizer else run.optimizer.init(params)
    aux = stage.objective.init(key, run.model, whole(state.frozen, params))
    return dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema, aux=aux)
