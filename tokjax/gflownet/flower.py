"""Flower: recommendations in proportion to a catalogue's weights, supervised token by token.

The catalogue's tree gives every prefix of a title a reward; sub-trajectory balance makes the
model's token probabilities follow it, beside imitation of the titles that users chose.

What differs from the authors' code, each by option: the reward is a function of the state also
where a title begins like another (`compat`); `buffer` falls with the steps, not with the loss of
an epoch, so that a run resumes exactly; the end token is the tokenizer's EOS (`end`).

Balance on paths in the tree does not see the mass that leaks off it: sampling within the tree is
then out of proportion although the loss is 0. The metric `flow/off_trie` is that mass, and
imitation (theta > 0) or paths drawn freely (explore = "free") remove it.

Reference: "Process-Supervised LLM Recommenders via Flow-guided Tuning", arXiv 2503.07377.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokjax.config import register
from tokjax.errors import ConfigError
from tokjax.gflownet.flow import Flow
from tokjax.gflownet.path_rewards import FLOOR
from tokjax.gflownet.ramp import Ramp
from tokjax.training.sampling import SamplingConfig


@register("objective", "flower")
@dataclass(frozen=True, kw_only=True)
class Flower(Flow):
    """theta x SFT + (1 - theta) x sub-trajectory balance over a catalogue's tree of titles."""

    rollouts: SamplingConfig = SamplingConfig(group=1, max_new_tokens=100)  # how paths are drawn
    # share of imitation; each prompt then brings its reference as a row more. The paper's code has
    # 0.99 to 0.9999 for next items, and 0 to fit a distribution
    theta: float = 0.999
    catalogue: str  # file of titles with weights: JSON lines or CSV, perhaps compressed (.gz)
    title: str = "title"  # its field of the title, as it follows a prompt
    weight: str = "weight"  # its field of the weight; records without one weigh 1
    power: float = 1.0  # of the weights: 0.5 makes a flatter target, 0 a uniform one
    end: str | None = None  # text of the one token that ends a title; None: the EOS
    explore: Literal["trie", "free"] = "trie"  # draw paths within the tree, or from all tokens
    # probability that a path is not drawn from the model but a title of the catalogue, the longer
    # the likelier (in proportion to its tokens)
    buffer: Ramp = Ramp(0.0, 0.0, 0)
    floor: float = FLOOR  # log-reward of an edge off the tree, and of ending where no title does
    compat: bool = False  # reward a title within a title only where the path ends there
    granularity: int = 1  # tokens of one action; as many as the longest title has: whole titles
    # rewards of each user's own: R^(1/s) with s about 1, or R times a factor for every edge
    personal: Literal["none", "div_s", "add_logs"] = "none"
    preferences: str | None = None  # file of users' scores for all titles, by their prompt
    strength: float = 1.0  # of add_logs; the paper's value is not known

    def __post_init__(self):
        super().__post_init__()
        if (self.personal != "none") != (self.preferences is not None):
            raise ConfigError(
                f"personal={self.personal!r} and preferences={self.preferences!r} belong together: "
                f"set both or neither"
            )
        if self.granularity < 1:
            raise ConfigError(f"granularity={self.granularity} must be at least 1")
        for value in (self.buffer.start, self.buffer.end):
            if not 0 <= value <= 1:
                raise ConfigError(f"buffer={value} is a probability: 0 to 1")
        if not self.floor < 0:
            raise ConfigError(f"floor={self.floor} is the log of a tiny reward: below 0")

    def collector(self, run: Any, stage: Any, workdir: Path) -> Any:
        """Returns what makes this stage's batches."""
        from tokjax.gflownet.flower_collector import FlowerCollector

        return FlowerCollector(self, run, stage, workdir)
