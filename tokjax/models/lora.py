"""Low-rank adapters (Hu et al. 2021, "LoRA", arXiv 2106.09685).

`ModelConfig.lora` adds to each target matrix W [N, M] of every block two parameters beside it,
`W_lora_a` [N, r] and `W_lora_b` [r, M]: the product becomes x W + scale (x A) B. The base model is
the same parameters seen by `off(model)`: extra leaves are not read. So the reference of a
preference or a policy loss costs no second copy.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.errors import CheckpointError, ConfigError, nearest
from tokjax.models.quantized import is_quantized

if TYPE_CHECKING:
    from tokjax.models.transformer import Transformer

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
A, B = "_lora_a", "_lora_b"


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how."""

    rank: int = 8  # inner width of an adapter
    alpha: float = 16.0  # the scale is alpha / rank
    targets: tuple[str, ...] = ("query", "value")  # matrices of a block that are adapted
    rank_stabilised: bool = False  # the scale is alpha / sqrt(rank) (arXiv 2312.03732)

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1")
        if not self.targets:
            raise ConfigError("targets is empty: name at least one matrix to adapt")
        for name in self.targets:
            if name not in TARGETS:
                raise ConfigError(f"unknown target {name!r}.{nearest(name, TARGETS)}")
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"targets={self.targets} names a matrix twice")

    @property
    def scale(self) -> float:
        """Factor of what adapters add."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


def on(
    model: "Transformer", params: Mapping[str, Any], lora: LoraConfig, key: jax.Array
) -> tuple["Transformer", dict[str, Any]]:
    """Returns the model with adapters, and its parameters with new ones that add nothing yet.

    Raises:
        ConfigError: the model has adapters already, or lacks a target.
    """
    if model.config.lora is not None:
        raise ConfigError("the model has adapters already: merge them first")
    adapted = dataclasses.replace(model, config=dataclasses.replace(model.config, lora=lora))
    # Each parameter's start depends on its own path only, so all but the adapters is not made.
    fresh = split(jax.jit(adapted.init)(key))[1]
    return adapted, join(params, fresh)


def off(model: "Transformer") -> "Transformer":
    """Returns the base model; it takes the same parameters and does not read the adapters."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, lora=None))


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (base parameters, adapters): trees that `join` puts together again."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        halves = [split({"layers": layer}) for layer in layers]
        base = tuple(half[0]["layers"] for half in halves)
        return {**params, "layers": base}, {"layers": tuple(half[1]["layers"] for half in halves)}
    base, adapters = {}, {}
    for part, weights in layers.items():
        base[part] = {name: w for name, w in weights.items() if not name.endswith((A, B))}
        own = {name: w for name, w in weights.items() if name.endswith((A, B))}
        adapters |= {part: own} if own else {}
    return {**params, "layers": base}, {"layers": adapters}


def join(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters from what `split` returns; train on `lambda a: loss(join(base, a))`."""

    def together(layer: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        return {part: {**weights, **own.get(part, {})} for part, weights in layer.items()}

    if isinstance(base["layers"], tuple):
        layers: Any = tuple(map(together, base["layers"], adapters["layers"]))
    else:
        layers = together(base["layers"], adapters["layers"])
    return {**base, "layers": layers}


def merge(model: "Transformer", params: Mapping[str, Any]) -> tuple["Transformer", dict[str, Any]]:
    """Returns the base model with the adapters added to its matrices, in float32.

    The products are those of the adapted model to rounding.

    Raises:
        ConfigError: the parameters are quantised.
    """
    if is_quantized(params):
        raise ConfigError("int8 matrices take no adapters: merge into quantized.dequantize(params)")
    base, adapters = split(params)
    return off(model), _added(base, adapters, _scale(model))


def unmerge(
    model: "Transformer", params: Mapping[str, Any], adapters: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns merged parameters without the adapters again, to rounding.

    Args:
        model: the adapted model.
        params: merged parameters.
        adapters: as `split` returns them.
    """
    return _added(params, adapters, -_scale(model))


def _scale(model: "Transformer") -> float:
    if model.config.lora is None:
        raise ConfigError("the model has no adapters")
    return model.config.lora.scale


def _added(base: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
    @jax.jit
    def added(w, a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        product = jnp.einsum("...nr,...rm->...nm", a, b, precision="highest")
        return (w.astype(jnp.float32) + scale * product).astype(w.dtype)

    def layer(weights: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        return {
            part: {
                name: added(w, own[part][f"{name}{A}"], own[part][f"{name}{B}"])
                if f"{name}{A}" in own.get(part, {})
                else w
                for name, w in matrices.items()
            }
            for part, matrices in weights.items()
        }

    if isinstance(base["layers"], tuple):
        return {**base, "layers": tuple(map(layer, base["layers"], adapters["layers"]))}
    return {**base, "layers": layer(base["layers"], adapters["layers"])}


def save(
    folder: str | os.PathLike, model: "Transformer", params: Mapping[str, Any], *, base: str = ""
) -> None:
    """Writes the adapters alone, in the form that the library `peft` reads.

    Args:
        folder: where; made when missing.
        model: the adapted model.
        params: its parameters.
        base: path or hub id of the base model, noted for who reads the adapters.

    Raises:
        ConfigError: the model has no adapters, or its family fuses a target with other matrices.
        StorageError: the folder cannot be written.
    """
    from safetensors.numpy import save as to_bytes

    from tokjax.files import storage_errors, write_atomically
    from tokjax.models import parameters

    lora, modules = _lora(model), _modules(model)
    adapters = split(parameters.stack(params))[1]["layers"]
    tensors = {}
    for part, weights in adapters.items():
        for name, stacked in weights.items():
            target, letter = (name[: -len(A)], "A") if name.endswith(A) else (name[: -len(B)], "B")
            for layer, w in enumerate(np.asarray(jax.device_get(stacked))):
                module = modules[f"{part}/{target}"].format(layer=layer)
                key = f"base_model.model.{module}.lora_{letter}.weight"
                tensors[key] = np.ascontiguousarray(w.T)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "target_modules": sorted({m.rsplit(".", 1)[1] for m in modules.values()}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    folder = Path(folder)
    with storage_errors(folder, "create"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", to_bytes(tensors, {"format": "pt"}))
    write_atomically(folder / "adapter_config.json", json.dumps(described, indent=2) + "\n")


def load(
    folder: str | os.PathLike, model: "Transformer", params: Mapping[str, Any]
) -> tuple["Transformer", dict[str, Any]]:
    """Returns a base model with adapters that `save` or the library `peft` wrote.

    Raises:
        CheckpointError: files are missing or damaged, or tensors do not fit the model.
        ConfigError: a feature of the adapters is not supported.
    """
    from tokjax.models import parameters
    from tokjax.models.huggingface.safetensors_files import find_tensors

    folder = Path(folder)
    try:
        described = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'adapter_config.json'}: {error}") from None
    _check_supported(described, folder)
    config = model.config
    theirs = {m.rsplit(".", 1)[1]: path for path, m in _module_names(model, TARGETS).items()}
    wanted = described["target_modules"]
    wanted = [wanted] if isinstance(wanted, str) else wanted
    unknown = sorted(set(wanted) - set(theirs))
    if unknown:
        raise ConfigError(
            f"{folder}: target module {unknown[0]!r} is none of a {config.family} block."
            f"{nearest(unknown[0], theirs)}"
        )
    lora = LoraConfig(
        rank=described["r"],
        alpha=float(described["lora_alpha"]),
        targets=tuple(t for t in TARGETS if t in {theirs[w].split("/")[1] for w in wanted}),
        rank_stabilised=bool(described.get("use_rslora")),
    )
    adapted = dataclasses.replace(model, config=dataclasses.replace(config, lora=lora))
    tensors = find_tensors(folder / "adapter_model.safetensors")
    shapes = split(adapted.abstract_params())[1]["layers"]
    adapters: dict[str, Any] = {}
    for path, module in _modules(adapted).items():
        part, target = path.split("/")
        for suffix, letter in ((A, "A"), (B, "B")):
            expected, layers = shapes[part][f"{target}{suffix}"], []
            for layer in range(config.n_layers):
                name = f"base_model.model.{module.format(layer=layer)}.lora_{letter}.weight"
                if name not in tensors:
                    raise CheckpointError(f"{folder}: there is no tensor {name!r}")
                w = tensors.pop(name).read().T
                if w.shape != expected.shape[1:]:
                    raise CheckpointError(
                        f"{folder}: tensor {name!r} has shape {list(w.T.shape)}, but the model "
                        f"makes it {list(expected.shape[:0:-1])}"
                    )
                layers.append(w)
            adapters.setdefault(part, {})[f"{target}{suffix}"] = jnp.asarray(np.stack(layers))
    if tensors:
        raise CheckpointError(f"{folder}: tensor {min(tensors)!r} has no place in the model")
    return adapted, join(parameters.stack(params), {"layers": adapters})


def _check_supported(described: Mapping[str, Any], folder: Path) -> None:
    if described.get("peft_type") != "LORA":
        raise ConfigError(
            f"{folder}: peft_type={described.get('peft_type')!r}; only 'LORA' is read"
        )
    for key, plain in (
        ("bias", "none"),
        ("use_dora", False),
        ("fan_in_fan_out", False),
        ("rank_pattern", {}),
        ("alpha_pattern", {}),
        ("modules_to_save", None),
        ("layers_to_transform", None),
        ("layer_replication", None),
    ):
        if described.get(key, plain) not in (plain, None):
            raise ConfigError(
                f"{folder}: adapter_config.json says {key}={described[key]!r}, which is not "
                f"supported; only {plain!r} is"
            )


def _lora(model: "Transformer") -> LoraConfig:
    if model.config.lora is None:
        raise ConfigError("the model has no adapters: see lora.on")
    return model.config.lora


def _modules(model: "Transformer") -> dict[str, str]:
    """Returns `part/target` -> name of its module in the base model."""
    return _module_names(model, _lora(model).targets, strict=True)


def _module_names(
    model: "Transformer", targets: tuple[str, ...], *, strict: bool = False
) -> dict[str, str]:
    from tokjax.models import huggingface, parameters  # noqa: F401 (knows the families)
    from tokjax.models.huggingface.family import family_of

    names = family_of(model.config.family).tensors(model.config)
    found = {}
    for part, table in parameters.block_table(off(model).config).items():
        for target in targets:
            if target not in table:
                continue
            tensor = names[f"layers/{part}/{target}"]
            if tensor.split is None and tensor.transposed:
                found[f"{part}/{target}"] = tensor.name.removesuffix(".weight")
            elif strict:
                raise ConfigError(
                    f"a {model.config.family} checkpoint keeps {target!r} in the fused or "
                    f"transposed tensor {tensor.name!r}, for which peft's form has no place: save "
                    f"the merged model instead (lora.merge)"
                )
    return found
