"""Networks that read a language model's hidden states and say how much thinking is left."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float, Int

from tokjax.decoding.budget.gamma import SMALLEST
from tokjax.errors import CheckpointError, ConfigError
from tokjax.files import storage_errors, write_atomically
from tokjax.models import parameters
from tokjax.models.config import ModelConfig
from tokjax.models.encoder import Encoder
from tokjax.models.transformer import Output

Kind = Literal["linear", "encoder"]
_METADATA = "tokjax_length_predictor"


@dataclass(frozen=True)
class LengthPredictor:
    """For every candidate next token, a Gamma over the logarithm of the remaining length.

    `linear` applies two bias-free heads to the model's final hidden state. `encoder` runs a
    bidirectional encoder without positions over the layers, [CLS; W h_0; ...; W h_L], and applies
    the heads to the CLS output; the model may have any number of layers. Shape and rate are the
    softplus of the heads.

    CLS is a vector of the encoder's width that starts at zero (the reference code's has the model's
    width and goes through W: the same set of functions). The encoder normalises what enters it.

    Attributes:
        d_model: width of the language model.
        vocab_size: its number of token ids.
        kind: which network.
        width: of the encoder, BERT-base's by default.
        n_layers: of the encoder.
        n_heads: of the encoder.

    Reference: Li et al., "Steering LLM Thinking with Budget Guidance", arXiv 2506.13752; `linear`
    is meant for tiny models.
    """

    d_model: int
    vocab_size: int
    kind: Kind = "encoder"
    width: int = 768
    n_layers: int = 12
    n_heads: int = 12

    def __post_init__(self):
        if self.kind not in ("linear", "encoder"):
            raise ConfigError(f"kind={self.kind!r} must be 'linear' or 'encoder'")
        for name in ("d_model", "vocab_size", "width", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.kind == "encoder":
            _ = self.encoder  # refuses sizes that do not fit

    @property
    def encoder(self) -> Encoder:
        """The encoder over layers; its vocabulary is CLS alone."""
        return Encoder(
            ModelConfig(
                vocab_size=1,
                d_model=self.width,
                n_layers=self.n_layers,
                n_heads=self.n_heads,
                causal=False,
                positions="none",
                norm="layer",
                norm_bias=True,
                norm_placement="post",
                final_norm=False,
                embedding_norm=True,
                attention_bias=True,
                out_bias=True,
                mlp_bias=True,
                gated=False,
                activation="gelu",
                init_scale=0.0,
                remat="none",
            )
        )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns initial float32 parameters."""
        keys = jax.random.split(key, 4)
        width = self.d_model if self.kind == "linear" else self.width
        table = parameters.Parameter((self.vocab_size, width), ("vocab", "embed"), width**-0.5)
        found: dict[str, Any] = {
            "alpha": table.initialise(keys[0], jnp.float32),
            "rate": table.initialise(keys[1], jnp.float32),
        }
        if self.kind == "encoder":
            entry = parameters.Parameter(
                (self.d_model, self.width), (None, "embed"), self.d_model**-0.5
            )
            found["entry"] = entry.initialise(keys[2], jnp.float32)
            found["encoder"] = self.encoder.init(keys[3])
        return found

    @property
    def capture(self) -> tuple[str, ...]:
        """Sites of the model's backbone that `states` needs."""
        return () if self.kind == "linear" else ("resid_pre",)

    def states(self, out: Output) -> Float[Array, "B T S D"]:
        """Returns what the network reads of a backbone's output.

        The embeddings and what each block leaves, the last one behind the final norm (as in
        Hugging Face's `hidden_states`); for `linear` that last one alone.

        Args:
            out: of a pass that captured `capture`.
        """
        last = out.x.astype(jnp.float32)[:, :, None]
        if self.kind == "linear":
            return last
        earlier = jnp.moveaxis(out.captured["resid_pre"], 0, 2).astype(jnp.float32)
        return jnp.concatenate([earlier, last], axis=2)

    def read(self, params: Mapping[str, Any], states: Float[Array, "B S D"]) -> Float[Array, "B W"]:
        """Returns what the heads are applied to."""
        if self.kind == "linear":
            return states[:, -1]
        encoder, weights = self.encoder, params["encoder"]
        cls = encoder.embed(weights, jnp.zeros((states.shape[0], 1), jnp.int32))
        x = jnp.concatenate([cls, states @ params["entry"]], axis=1)
        return encoder.backbone(weights, x).x[:, 0]

    def __call__(
        self, params: Mapping[str, Any], states: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B V"], Float[Array, "B V"]]:
        """Returns shape and rate for each candidate next token."""
        z = self.read(params, states)
        return _positive(z @ params["alpha"].T), _positive(z @ params["rate"].T)

    def of_tokens(
        self, params: Mapping[str, Any], states: Float[Array, "B S D"], tokens: Int[Array, "B"]
    ) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """Returns shape and rate for one candidate a row, without the rest of the vocabulary."""
        z = self.read(params, states)
        alpha, rate = ((z * params[name][tokens]).sum(-1) for name in ("alpha", "rate"))
        return _positive(alpha), _positive(rate)

    def check(self, config: ModelConfig) -> None:
        """Refuses a language model that this predictor was not made for.

        Raises:
            ConfigError: width or vocabulary differ.
        """
        if config.embedding_width is not None:
            raise ConfigError(
                f"a length predictor reads states of one width, but this model's last one has "
                f"embedding_width={config.embedding_width}, the others d_model={config.d_model}"
            )
        for name, found in (("d_model", config.d_model), ("vocab_size", config.vocabulary)):
            if getattr(self, name) != found:
                raise ConfigError(
                    f"the length predictor was made for {name}={getattr(self, name)}, but the "
                    f"model has {found}: train one for this model"
                )


def _positive(x: jax.Array) -> jax.Array:
    return jnp.maximum(jax.nn.softplus(x), SMALLEST)


def save(path: Path | str, predictor: LengthPredictor, params: Mapping[str, Any]) -> None:
    """Writes a predictor and its parameters as one safetensors file.

    Raises:
        StorageError: the file cannot be written; one that was there is untouched.
    """
    tensors = {name: np.asarray(value) for name, value in _flat(params).items()}
    metadata = {_METADATA: json.dumps(asdict(predictor))}
    write_atomically(
        Path(path),
        safetensors.numpy.save(tensors, metadata),
        remedy="Free space or name a writable place.",
    )


def load(path: Path | str) -> tuple[LengthPredictor, dict[str, Any]]:
    """Returns a predictor and its parameters from a file that `save` wrote.

    Raises:
        StorageError: the file cannot be read.
        CheckpointError: it is damaged, or no length predictor's.
    """
    with storage_errors(path, "read", "Name a file that `save` wrote."):
        content = Path(path).read_bytes()
    try:
        tensors = safetensors.numpy.load(content)
        size = int.from_bytes(content[:8], "little")
        described = json.loads(content[8 : 8 + size])["__metadata__"][_METADATA]
        predictor = LengthPredictor(**json.loads(described))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no whole length predictor: {error}") from None
    shapes = jax.eval_shape(predictor.init, jax.random.key(0))
    expected = {name: leaf.shape for name, leaf in _flat(shapes).items()}
    for name in sorted({*expected, *tensors}):
        found = tensors[name].shape if name in tensors else None
        if expected.get(name) != found:
            raise CheckpointError(
                f"{path}: tensor {name!r} should have the shape {expected.get(name)}, not {found}"
            )
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = [jnp.asarray(tensors[_name(path)]) for path, _ in paths]
    return predictor, jax.tree.unflatten(structure, leaves)


def _flat(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(entry.key) for entry in path)
