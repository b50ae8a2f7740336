"""A run, built from its configuration: tokenizer, data, model, stages. No state yet."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tokjax.config import to_dict
from tokjax.data.annotated import AnnotatedStore, annotate
from tokjax.data.cache import cache_directory
from tokjax.data.config import MixtureEntry
from tokjax.data.loader import EvalLoader, Loader, StageSlice
from tokjax.data.prepare import ensure_store
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import Tokenizer, build_tokenizer, sequence_ends
from tokjax.errors import ConfigError, DataError
from tokjax.models.encoder import decoder_or_encoder
from tokjax.models.transformer import Transformer, with_vocabulary
from tokjax.parallel.mesh import build_mesh
from tokjax.training.config import TrainConfig
from tokjax.training.frozen import check_frozen
from tokjax.training.initial import Initial, adopt_model, adopt_tokenizer, find_initial
from tokjax.training.objective import Materials
from tokjax.training.program import Program, Stage
from tokjax.training.state import (
    TrainState,
    begun,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class Run(Program):
    """Everything a configuration determines."""

    tokenizer: Tokenizer
    stores: tuple[TokenStore | AnnotatedStore, ...]
    eval_stores: Mapping[str, TokenStore]
    loader: Loader
    eval_loaders: Mapping[str, EvalLoader]

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
            objective |= {k: v[:16] for k, v in getattr(stage.objective, "content", {}).items()}
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
    model = decoder_or_encoder(with_vocabulary(config.model, tokenizer.vocab_size))
    _check_direction(config, model)
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
    materials = Materials(tokenizer, model, stores, cache, show_progress)
    stages = tuple(_prepared(stage, materials) for stage in _lay_out_stages(config, stores))
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
        config=config,
        model=model,
        mesh=mesh,
        stages=stages,
        initial=initial,
        tokenizer=tokenizer,
        stores=stores,
        eval_stores=eval_stores,
        loader=loader,
        eval_loaders=eval_loaders,
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
    for name in ("pairs", "rankings", "translations"):
        if getattr(objective, f"reads_{name}", False):
            return name
    return "single examples"


def _holds(store: Any) -> str:
    """Returns what examples a store holds."""
    if store.has_rankings:
        return "rankings"
    if store.has_translations:
        return "translations"
    return "pairs" if store.has_pairs else "single examples"


def _check_direction(config: TrainConfig, model: Transformer) -> None:
    """Refuses next tokens of a model that sees them, and the reverse."""
    if not model.config.causal and (config.samples.prompts or config.evaluation.answers):
        raise ConfigError(
            "a model with model.causal=False continues no text: leave out samples.prompts and "
            "evaluation.answers"
        )
    for stage in config.stage_list:
        restores = getattr(stage.objective, "bidirectional", False)
        if restores is not None and restores == model.config.causal:
            sees = "both sides" if restores else "what comes before alone"
            raise ConfigError(
                f"objective {_name(stage.objective)!r} needs a model that sees {sees}: set "
                f"model.causal={not restores}"
            )


def _prepared(stage: Stage, materials: Materials) -> Stage:
    """Returns a stage whose objective knows what it needs of the run."""
    make = getattr(stage.objective, "prepared", None)
    return stage if make is None else dataclasses.replace(stage, objective=make(materials))


def _check_prompts(config: TrainConfig, tokenizer: Tokenizer) -> None:
    # Found now rather than by the first sample, hours later.
    writes = config.samples.prompts or config.evaluation.answers
    if writes and config.model.embedding_rows is not None:
        raise ConfigError(
            "a model with model.embedding_rows writes only under a table that is drawn: leave out "
            "samples.prompts and evaluation.answers"
        )
    for stage in config.stage_list:
        if writes and getattr(stage.objective, "heads_write", False):
            raise ConfigError(
                f"the model of objective {_name(stage.objective)!r} writes only together with the "
                f"objective's heads: leave out samples.prompts and evaluation.answers"
            )
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
