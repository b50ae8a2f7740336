"""Rotary positions in config.json: the older `rope_theta`, `rope_scaling` and the newer form."""

from typing import Any

from tokjax.errors import ConfigError, nearest
from tokjax.models.config import ModelConfig, RopeScaling
from tokjax.models.huggingface.family import Fields

_KINDS = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",  # Phi-3's first name of it
}
# config.json -> RopeScaling
_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}


def read_rope(fields: Fields, theta: float = 10000.0, fraction: float = 1.0) -> dict[str, Any]:
    """Returns rope_theta, rope_scaling and rotary_fraction of a configuration.

    Args:
        fields: a parsed config.json.
        theta: the family's default.
        fraction: the family's default.

    Raises:
        ConfigError: an unknown rule of scaling.
    """
    given = dict(fields.get("rope_parameters") or {})
    if not given:
        given = dict(fields.get("rope_scaling") or {})
    given.setdefault("rope_theta", fields.get("rope_theta", theta))
    given.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor", fraction))
    return {
        "rope_theta": float(given["rope_theta"]),
        "rotary_fraction": float(given["partial_rotary_factor"]),
        "rope_scaling": read_scaling(given, fields),
    }


def read_scaling(given: Fields, fields: Fields) -> RopeScaling:
    """Returns the rule of scaling in one dictionary of rotary parameters.

    Raises:
        ConfigError: an unknown rule, or a key is missing.
    """
    name = given.get("rope_type", given.get("type", "default"))
    if name not in _KINDS:
        raise ConfigError(
            f"config.json scales rotary positions by {name!r}.{nearest(name, _KINDS)}"
        )
    kind = _KINDS[name]
    if kind == "none":
        return RopeScaling()
    values: dict[str, Any] = {
        ours: tuple(map(float, value)) if isinstance(value, list) else value
        for key, ours in _KEYS.items()
        if (value := given.get(key)) is not None
    }
    # Phi-3 and others keep the original length outside, and that one counts.
    if "original_max_position_embeddings" in fields and kind in ("llama3", "yarn", "longrope"):
        values["original_positions"] = fields["original_max_position_embeddings"]
    if kind == "yarn" and "factor" not in values:
        original = values.get("original_positions", fields["max_position_embeddings"])
        values["factor"] = fields["max_position_embeddings"] / original
    return RopeScaling(kind=kind, **values)  # type: ignore[arg-type]


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling` as every version of transformers reads them."""
    scaling, default = config.rope_scaling, RopeScaling()
    if scaling.kind == "none":
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    written: dict[str, Any] = {"rope_type": scaling.kind}
    always = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow"),
    }
    for key, ours in _KEYS.items():
        value = getattr(scaling, ours)
        if value != getattr(default, ours) or ours in always.get(scaling.kind, ()):
            written[key] = list(value) if isinstance(value, tuple) else value
    return {"rope_theta": config.rope_theta, "rope_scaling": written}
