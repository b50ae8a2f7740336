"""What a run starts from: a checkpoint's model, its tokenizer and, later, its parameters."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.config import resolve
from tokjax.data.cache import cache_directory
from tokjax.data.checkpoint_tokenizer import checkpoint_tokenizer
from tokjax.data.files import file_digest
from tokjax.data.tokenizers import TokenizerConfig
from tokjax.errors import ConfigError
from tokjax.models import checkpoints, lora
from tokjax.models.config import ModelConfig
from tokjax.models.transformer import Transformer
from tokjax.training.objective import HEADS, init_heads
from tokjax.training.run_facts import RUN_FILE, read_run

# What a run may choose whatever the checkpoint's model is.
_CHOICES = ("dtype", "param_dtype", "remat", "unroll", "attention", "lora", "base")


@dataclass(frozen=True)
class Initial:
    """A checkpoint to start from: a folder or file of a model, or the workdir of a run.

    Attributes:
        name: as it was given.
        path: where it lies.
    """

    name: str
    path: Path

    @property
    def is_run(self) -> bool:
        """Whether it is the workdir of a run."""
        return (self.path / RUN_FILE).is_file()

    def model_config(self) -> ModelConfig:
        """Returns the model's configuration, without adapters."""
        if self.is_run:
            from tokjax.training.trained import read_trained

            found = read_trained(self.path).model.config
            return dataclasses.replace(found, lora=None)
        model = checkpoints.describe(self.path)
        if not isinstance(model, Transformer) or not model.config.causal:
            raise ConfigError(
                f"init_from={self.name!r} holds a model of the kind {type(model).__name__}; a run "
                f"trains a causal language model"
            )
        return model.config

    def tokenizer(self) -> TokenizerConfig:
        """Returns the tokenizer that belongs to it."""
        if self.is_run:
            tree = read_run(self.path)["config"]["data"]["tokenizer"]
            return resolve(TokenizerConfig, tree)
        return checkpoint_tokenizer(self.path)

    def abstract_heads(self, model: Transformer) -> dict[str, Any]:
        """Returns shapes and dtypes of the heads that the run trained last.

        Raises:
            ConfigError: there are none.
        """
        heads: dict[str, Any] = {}
        if self.is_run:
            from tokjax.training.trained import read_trained

            last, key = read_trained(self.path).config.stage_list[-1].objective, jax.random.key(0)
            heads = jax.eval_shape(lambda key: init_heads(last, key, model), key)
        if not heads:
            raise ConfigError(
                f"{self.name!r} has no heads: name the workdir of a run whose last objective "
                f"trains some"
            )
        return heads[HEADS]

    def load(
        self, config: ModelConfig, mesh: Mesh | None, *, heads: bool = False
    ) -> Mapping[str, Any]:
        """Returns the parameters, of the type and on the devices the run wants them.

        A run's adapters are merged.

        Args:
            config: of the model that takes them.
            mesh: the devices; None takes the first.
            heads: with those of the run's last objective, under `heads`.

        Raises:
            CheckpointError: files are missing or damaged.
        """
        if not self.is_run:
            return checkpoints.load(self.path, mesh=mesh, dtype=config.param_dtype)[1]
        from tokjax.training.trained import load_trained

        found = load_trained(self.path, mesh=mesh)
        params = found.params
        if found.model.config.lora is not None:
            params = lora.merge(found.model, params)[1]
        read = jax.tree.map(lambda p: p.astype(config.param_dtype), dict(params))
        if not heads:
            return read
        everywhere = None if mesh is None else NamedSharding(mesh, P())
        return {**read, HEADS: jax.device_put(dict(found.heads), everywhere)}

    def fingerprint(self) -> str:
        """Returns the SHA-256 (hex) of the checkpoint's contents."""
        if self.is_run:
            files = [self.path / RUN_FILE]
            files += sorted((self.path / "checkpoints").rglob("manifest.json"))[-1:]
        elif self.path.is_file():
            files = [self.path]
        else:
            files = sorted([*self.path.glob("*.safetensors"), self.path / "config.json"])
        facts = [[f.name, file_digest(str(f), cache_directory())] for f in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def find_initial(name: str) -> Initial:
    """Returns the checkpoint that `init_from` names.

    Raises:
        CheckpointError: there is none; the message says how to get it.
    """
    path = Path(name).expanduser()
    return Initial(name, path if (path / RUN_FILE).is_file() else checkpoints.find(name))


def adopt_model(initial: Initial, chosen: ModelConfig) -> ModelConfig:
    """Returns the checkpoint's model with what a run may choose taken from `chosen`.

    Raises:
        ConfigError: `chosen` sets something that the checkpoint decides otherwise.
    """
    found, default = initial.model_config(), ModelConfig()
    for field in dataclasses.fields(ModelConfig):
        name, value = field.name, getattr(chosen, field.name)
        if name in _CHOICES or value in (getattr(default, name), getattr(found, name)):
            continue
        raise ConfigError(
            f"model.{name}={value!r} contradicts init_from={initial.name!r}, whose model has "
            f"{name}={getattr(found, name)!r}: remove it"
        )
    return dataclasses.replace(
        found, **{name: getattr(chosen, name) for name in _CHOICES if name != "base"}
    )


def adopt_tokenizer(initial: Initial, chosen: TokenizerConfig) -> TokenizerConfig:
    """Returns the checkpoint's tokenizer where none was chosen, or where `checkpoint` was."""
    if chosen != TokenizerConfig() and chosen.name != "checkpoint":
        return chosen
    found = initial.tokenizer()
    if chosen.name != "checkpoint":
        return found
    given = {n: getattr(chosen, n) for n in ("bos", "eos", "pad") if getattr(chosen, n)}
    return dataclasses.replace(
        found,
        **given,
        added=(*found.added, *(text for text in chosen.added if text not in found.added)),
        add_bos=chosen.add_bos and found.add_bos,
        add_eos=chosen.add_eos,
        allow_lossy=chosen.allow_lossy,
    )
