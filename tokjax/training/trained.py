"""The model that a run has trained, for use without the run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tokjax.config import resolve
from tokjax.data.cache import cache_directory
from tokjax.data.tokenizers import Tokenizer, build_tokenizer
from tokjax.errors import CheckpointError
from tokjax.models import lora, parameters
from tokjax.models.config import with_dtypes
from tokjax.models.encoder import decoder_or_encoder
from tokjax.models.transformer import Transformer, with_vocabulary
from tokjax.parallel.rules import parameter_shardings
from tokjax.training.checkpoints import Checkpointer
from tokjax.training.config import TrainConfig
from tokjax.training.initial import find_initial
from tokjax.training.objective import HEADS, init_heads
from tokjax.training.run_facts import RUN_FILE, read_run


@dataclass(frozen=True)
class Trained:
    """What a run leaves behind, read back.

    Attributes:
        model: the run's.
        params: of the newest good checkpoint; their moving average where the run kept one.
        tokenizer: the run's.
        add_bos: whether its sequences began with the BOS id.
        step: of the checkpoint.
        heads: the last objective's own parameters; {} where it has none.
    """

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    add_bos: bool
    step: int
    heads: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Described:
    """What a run's workdir says of its model, read without the parameters."""

    config: TrainConfig
    model: Transformer
    tokenizer: Tokenizer


def read_trained(workdir: Path) -> Described:
    """Returns the model and tokenizer of a run's workdir.

    Raises:
        CheckpointError: the folder is no run's.
        ConfigError: its configuration is not one of this version's.
    """
    tree = read_run(workdir).get("config")
    if not isinstance(tree, dict):
        raise CheckpointError(f"{Path(workdir) / RUN_FILE} holds no configuration of a run")
    config = resolve(TrainConfig, tree)
    data = config.data
    cache = Path(data.cache_dir) if data.cache_dir else cache_directory()
    tokenizer = build_tokenizer(data.tokenizer, cache)
    model = decoder_or_encoder(with_vocabulary(config.model, tokenizer.vocab_size))
    return Described(config, model, tokenizer)


def load_trained(workdir: Path, *, mesh: Mesh | None = None) -> Trained:
    """Returns the model of a run's workdir; nothing is written there, a run may be going on.

    Of a run with adapters the frozen parameters are read from its `init_from`.

    Args:
        workdir: of the run.
        mesh: devices to lay the parameters out on; default the first device.

    Raises:
        CheckpointError: the folder is no run's, it has no checkpoint yet, all are damaged, the
            tokenizer that can be made here is not the run's, or its `init_from` is gone or has
            become another.
        ConfigError: its configuration is not one of this version's.
    """
    found = read_trained(workdir)
    config, model, tokenizer = found.config, found.model, found.tokenizer
    part = "params" if config.ema_decay is None else "ema"
    if part == "ema":  # kept in float32 whatever the parameters are
        model = decoder_or_encoder(with_dtypes(model.config, "float32", model.config.dtype))
    whole = model.abstract_params()
    if mesh is not None:
        shardings = parameter_shardings(parameters.logical_axes(model.config), whole, mesh)
        whole = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), whole, shardings
        )
    adapted = model.config.lora is not None
    kept = lora.split(whole)[1] if adapted else whole
    last, key = config.stage_list[-1].objective, jax.random.key(0)
    kept = {**kept, **jax.eval_shape(lambda key: init_heads(last, key, model), key)}
    with Checkpointer(
        Path(workdir) / "checkpoints", config.checkpoints, identity={}, read_only=True
    ) as checkpoints:
        restored = checkpoints.restore({part: kept}, partial=True)
    if restored is None:
        raise CheckpointError(f"{workdir} has no checkpoint yet")
    if restored.metadata.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise CheckpointError(
            f"{workdir} was trained with another tokenizer than data.tokenizer gives here (a bpe "
            f"of the standard library differs between Python versions): use the machine or the "
            f"cache it was trained with"
        )
    params = dict(restored.state[part])
    heads = params.pop(HEADS, {})
    if adapted:
        params = lora.join(_frozen(workdir, config, restored.metadata, model, mesh), params)
    add_bos = config.data.tokenizer.add_bos
    return Trained(model, params, tokenizer, add_bos, int(restored.step), heads)


def _frozen(
    workdir: Path,
    config: TrainConfig,
    metadata: Mapping[str, Any],
    model: Transformer,
    mesh: Mesh | None,
) -> Mapping[str, Any]:
    """Returns the parameters that the adapters of a run were trained beside."""
    initial = find_initial(config.init_from or "")
    if metadata.get("init_from") != initial.fingerprint():
        raise CheckpointError(
            f"{workdir} holds adapters to init_from={config.init_from!r}, which has changed since"
        )
    return initial.load(model.config, mesh)
