"""LaCoT: rationales drawn from their posterior given the answer.

The rationale Z between a question X and an answer Y is latent: q(Z | X) is trained to draw Z in
proportion to P(Z, Y | X) under a frozen copy of the model, by sub-trajectory balance over the
rationale's tokens. A prefix z_1..z_t, closed by the end marker, has the log-reward
log P(z_1..z_t marker Y | X) / tau; it is computed every `every` tokens and interpolated between.
Rationales that are worse than the data's own by more than `delta` are left out.

What differs from the authors' code: anchors begin at `min_tokens` itself and the last one is the
end of the rationale, however near; the reward model is the frozen one throughout.

Reference: "LaCoT: Latent Chain-of-Thought for Visual Reasoning", arXiv 2510.23925. Nothing here
needs images: X may be text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from tokjax.config import register
from tokjax.errors import ConfigError
from tokjax.gflownet.flow import Flow
from tokjax.gflownet.ramp import Ramp
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.training.objective import Aux
from tokjax.training.reference import init_reference
from tokjax.training.sampling import SamplingConfig


@register("objective", "lacot")
@dataclass(frozen=True, kw_only=True)
class LaCoT(Flow):
    """Sub-trajectory balance of rationales, rewarded by what a frozen copy makes of the answer.

    Answers of the data are a rationale, the marker, and the answer proper. With `model.lora` the
    frozen copy is the model without its adapters.
    """

    # explorations of each prompt; the data's own rationale is a row more
    rollouts: SamplingConfig = SamplingConfig(group=6, max_new_tokens=1024)
    # text between rationale and answer; its first token is what ends a rationale
    marker: str
    # tokens between two exact rewards; 1 computes each. The script has 16, the paper 8
    every: int = 16
    min_tokens: int = 64  # of a rationale: the marker is not drawn before
    early: float = -99.0  # log-reward of ending before
    tau: Ramp = Ramp(1.0, 0.7, 50)  # temperature of the reward
    # a rationale is kept if its mean log-probability per token is at least delta times that of the
    # data's own: above 1 is lenient, 1 asks for as good a one, None keeps all
    delta: Ramp | None = Ramp(1.5, 1.0, 50)
    hot: float = 0.25  # share of explorations drawn at another temperature than rollouts' ...
    hot_low: float = 0.5  # ... uniform from here
    hot_high: float = 1.0  # ... to here

    def __post_init__(self):
        super().__post_init__()
        if not self.marker:
            raise ConfigError("marker is empty: name the text between rationale and answer")
        if self.every < 1:
            raise ConfigError(f"every={self.every} must be at least 1")
        if not 0 <= self.min_tokens <= self.rollouts.max_new_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens} must be 0 to rollouts.max_new_tokens="
                f"{self.rollouts.max_new_tokens}"
            )
        for name in ("tau", "delta"):
            ramp = getattr(self, name)
            if ramp is not None and not (ramp.start > 0 and ramp.end > 0):
                raise ConfigError(f"{name} goes from {ramp.start} to {ramp.end}: must be above 0")
        if not 0 <= self.hot <= 1:
            raise ConfigError(f"hot={self.hot} is a share: 0 to 1")
        if not 0 < self.hot_low <= self.hot_high:
            raise ConfigError(
                f"hot_low={self.hot_low} and hot_high={self.hot_high} must be temperatures above "
                f"0, in this order"
            )

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns the frozen copy, or nothing where it is the model without its adapters."""
        return init_reference(model, params)

    def collector(self, run: Any, stage: Any, workdir: Path) -> Any:
        """Returns what makes this stage's batches."""
        from tokjax.gflownet.lacot_collector import LaCoTCollector

        return LaCoTCollector(self, run, stage, workdir)


def anchors(length: int, every: int, first: int = 0) -> list[int]:
    """Returns the lengths of prefixes whose reward is computed: every few, and the whole.

    >>> anchors(10, 4)
    [0, 4, 8, 10]
    >>> anchors(10, 4, first=3)
    [3, 7, 10]
    >>> anchors(2, 4, first=3)
    [2]
    """
    return sorted({*range(first, length, every), length})


def interpolated(
    length: int, at: Any, values: Any, *, first: int = 0, early: float = -99.0
) -> Float[np.ndarray, "L1"]:
    """Returns the log-rewards of prefixes of 0 to `length` tokens, linear between those known.

    Args:
        length: tokens of the rationale.
        at: lengths of the prefixes that are known, rising; the last is `length`.
        values: their log-rewards.
        first: shorter prefixes have `early`.
        early: log-reward of ending before.

    >>> interpolated(4, [0, 4], [-120.0, -100.0]).tolist()
    [-120.0, -115.0, -110.0, -105.0, -100.0]
    """
    found = np.interp(np.arange(length + 1), np.asarray(at), np.asarray(values, np.float64))
    found[: min(first, length)] = early
    return found


def kept(
    rewards: Float[np.ndarray, "*B M"], reference: Float[np.ndarray, "*B"], delta: float | None
) -> Bool[np.ndarray, "*B M"]:
    """Returns which explorations are at least delta times as good as the reference.

    Args:
        rewards: mean log-probability per token of each, over tau; below 0.
        reference: that of the data's own rationale.
        delta: above 1 is lenient; None keeps all.

    >>> kept(np.array([-2.0, -1.9, -2.5]), np.array(-2.0), 1.2).tolist()
    [True, True, False]
    """
    if delta is None:
        return np.ones(np.shape(rewards), bool)
    return np.asarray(rewards) >= delta * np.asarray(reference)[..., None]
