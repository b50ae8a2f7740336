"""The programs of a run, traced and compiled for a topology from its configuration alone."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.ahead.chips import Topology
from tokjax.ahead.estimate import Estimate, estimate
from tokjax.ahead.operations import operations
from tokjax.data.cache import cache_directory
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.errors import ConfigError, MemoryLimitError
from tokjax.models import parameters
from tokjax.models.config import with_dtypes
from tokjax.models.cost import forward_flops, training_flops
from tokjax.models.encoder import decoder_or_encoder
from tokjax.models.transformer import with_vocabulary
from tokjax.parallel.mesh import build_mesh
from tokjax.parallel.rules import BATCH_AXES, RULES, fit_spec, parameter_shardings
from tokjax.training.config import TrainConfig
from tokjax.training.program import Program, Stage

_SEGMENTS = 16  # examples that a row has room for: their ids are read, nothing is computed by them


def program(config: TrainConfig, topology: Topology, vocab_size: int | None = None) -> Program:
    """Returns a run's program for devices that need not be there; its data are not looked at.

    Args:
        config: of the run; without `init_from`.
        topology: that the mesh is built of.
        vocab_size: token ids; None takes the model's or the tokenizer's.

    Raises:
        ConfigError: there is no such tokenizer, or the sizes do not fit the devices.
    """
    if config.init_from is not None:
        raise ConfigError(
            "ahead of time a checkpoint is not read: leave out init_from and set model.base to the "
            "checkpoint's config.json or a size of the zoo"
        )
    size = config.model.vocab_size or vocab_size or _vocabulary(config.data.tokenizer)
    model = decoder_or_encoder(with_vocabulary(config.model, size))
    mesh = build_mesh(config.mesh, list(topology.devices))
    rows = config.data.batch_size // config.micro_batches
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} gives {rows} rows at a time, which do not "
            f"divide among {parts} chips: make it a multiple of {parts * config.micro_batches}"
        )
    steps = config.steps or 1000  # the schedule's length changes no shape
    stages = tuple(
        Stage(type(each.objective).__name__, each.objective, 0, steps, False, each.rate)
        for each in config.stage_list
    )
    return Program(config, model, mesh, stages)


def _vocabulary(config: TokenizerConfig) -> int:
    """Returns the number of ids of a tokenizer; one that is yet to be trained is not."""
    if config.name == "bpe":
        return config.vocab_size
    return build_tokenizer(config, cache_directory()).vocab_size


def training_estimate(made: Program, topology: Topology, stage: Stage) -> Estimate:
    """Returns what a stage's training step needs.

    Raises:
        MemoryLimitError: the compiler finds no way to fit it, with what to change.
    """
    data = made.config.data
    tokens = data.seq_len * stage.objective.tokens_per_position
    batch = made.abstract_batch(data.batch_size, tokens, _SEGMENTS)
    with jax.set_mesh(made.mesh):
        traced = jax.make_jaxpr(made.train_step(stage))(made.abstract_state(stage), batch)
        compiled = _compile(made.lower_step(stage, batch), made)
    share = getattr(stage.objective, "relative_cost", 1.0)
    model_flops = share * training_flops(made.model.config, data.seq_len)
    return estimate(
        f"training step ({stage.name})",
        compiled,
        topology,
        model_flops=model_flops * data.seq_len * data.batch_size,
        flops=operations(traced),
    )


def decoding_estimate(made: Program, topology: Topology, rows: int, capacity: int) -> Estimate:
    """Returns what one step of decoding needs: a token for every row, beside a full cache.

    Weights are in the compute dtype, split along `tensor` and whole otherwise; rows are split among
    the mesh axes of the batch, the heads of the cache among `tensor`.

    Args:
        made: of the run.
        topology: that it is compiled for.
        rows: texts that are decoded at once.
        capacity: tokens that the cache of each has room for.
    """
    config, mesh = made.model.config, made.mesh
    config = with_dtypes(config, config.dtype, config.dtype)
    model = dataclasses.replace(made.model, config=config)
    shapes = model.abstract_params()
    axes = parameters.logical_axes(config)
    shardings = parameter_shardings(axes, shapes, mesh, {**RULES, "embed": None})
    params = _unstacked(
        jax.tree.map(
            lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings
        ),
        config.n_layers,
    )

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P(BATCH_AXES, "tensor") if len(leaf.shape) == 4 else P(BATCH_AXES)
        at = NamedSharding(mesh, fit_spec(spec, leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

    cache = jax.tree.map(placed, jax.eval_shape(lambda: model.init_cache(rows, capacity)))
    tokens = placed(jax.ShapeDtypeStruct((rows, 1), jnp.int32))

    def step(params: Any, cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, out = model(params, tokens, cache=cache)
        return jnp.argmax(logits[:, -1], axis=-1), out.cache

    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(step)(params, cache, tokens)
        results = (None, jax.tree.map(lambda leaf: leaf.sharding, cache))
        lowered = jax.jit(step, donate_argnums=1, out_shardings=results).lower(
            params, cache, tokens
        )
        compiled = _compile(lowered, made)
    return estimate(
        f"decoding step ({rows} rows, {capacity} tokens)",
        compiled,
        topology,
        model_flops=forward_flops(config, capacity) * rows,
        flops=operations(traced),
        rewrites=False,
    )


def _unstacked(params: Any, n_layers: int) -> Any:
    """Returns abstract parameters with `layers` as a tuple of per-layer trees."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P(*leaf.sharding.spec[1:])  # type: ignore[union-attr]
        at = NamedSharding(leaf.sharding.mesh, spec)  # type: ignore[union-attr]
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=at)

    layer = jax.tree.map(one, params["layers"])
    return params | {"layers": (layer,) * n_layers}


def _compile(lowered: Any, made: Program) -> Any:
    try:
        return lowered.compile()
    except Exception as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
            raise
        used = re.search(r"Used ([\d.]+\S+) of ([\d.]+\S+)", text)
        needs = f" (it needs {used[1]} of {used[2]})" if used else ""
        raise MemoryLimitError(
            f"the program does not fit a chip{needs}. {advice(made.config)}"
        ) from error


def advice(config: TrainConfig) -> str:
    """Returns what to change where a training step does not fit."""
    found = []
    if config.model.remat != "block":
        found.append("compute blocks again in the backward pass: model.remat='block'")
    rows = config.data.batch_size // config.micro_batches
    if rows > 1:
        found.append(f"compute fewer rows at a time: micro_batches={2 * config.micro_batches}")
    if config.mesh.fsdp != -1:
        found.append("split parameters over more chips: mesh.data=1, mesh.fsdp=-1")
    found.append("or take a larger topology, shorter rows (data.seq_len) or mesh.sequence")
    return "To fit: " + "; ".join(found) + "."
