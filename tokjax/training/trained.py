"""The model that a run has trained, for use without the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tokjax.config import resolve
from tokjax.data.cache import cache_directory
from tokjax.data.tokenizers import Tokenizer, build_tokenizer
from tokjax.errors import CheckpointError
from tokjax.models import parameters
from tokjax.models.config import with_dtypes
from tokjax.models.transformer import Transformer, with_vocabulary
from tokjax.parallel.rules import parameter_shardings
from tokjax.training.checkpoints import Checkpointer
from tokjax.training.config import TrainConfig
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
    """

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    add_bos: bool
    step: int


def load_trained(workdir: Path, *, mesh: Mesh | None = None) -> Trained:
    """Returns the model of a run's workdir; nothing is written there, a run may be going on.

    Args:
        workdir: of the run.
        mesh: devices to lay the parameters out on; default the first device.

    Raises:
        CheckpointError: the folder is no run's, it has no checkpoint yet, all are damaged, or the
            tokenizer that can be made here is not the run's.
        ConfigError: its configuration is not one of this version's.
    """
    tree = read_run(workdir).get("config")
    if not isinstance(tree, dict):
        raise CheckpointError(f"{Path(workdir) / RUN_FILE} holds no configuration of a run")
    config = resolve(TrainConfig, tree)
    data = config.data
    cache = Path(data.cache_dir) if data.cache_dir else cache_directory()
    tokenizer = build_tokenizer(data.tokenizer, cache)
    model = Transformer(with_vocabulary(config.model, tokenizer.vocab_size))
    part = "params" if config.ema_decay is None else "ema"
    if part == "ema":  # kept in float32 whatever the parameters are
        model = Transformer(with_dtypes(model.config, "float32", model.config.dtype))
    params = model.abstract_params()
    if mesh is not None:
        shardings = parameter_shardings(parameters.logical_axes(model.config), params, mesh)
        params = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, shardings
        )
    with Checkpointer(
        Path(workdir) / "checkpoints", config.checkpoints, identity={}, read_only=True
    ) as checkpoints:
        restored = checkpoints.restore({part: params}, partial=True)
    if restored is None:
        raise CheckpointError(f"{workdir} has no checkpoint yet")
    if restored.metadata.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise CheckpointError(
            f"{workdir} was trained with another tokenizer than data.tokenizer gives here (a bpe "
            f"of the standard library differs between Python versions): use the machine or the "
            f"cache it was trained with"
        )
    return Trained(
        model, restored.state[part], tokenizer, data.tokenizer.add_bos, int(restored.step)
    )
