"""How a model in training is asked for answers: the part of a configuration that says so."""

from dataclasses import dataclass

from tokjax.errors import ConfigError


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are collected: prompts come from `data.train`, shuffled anew each epoch.

    An update trains on `data.batch_size` rows of `data.seq_len` tokens, one answer in each.
    """

    group: int = 8  # answers to each prompt
    minibatches: int = 1  # updates that the rows of one collection are shared out to
    epochs: int = 1  # how often those rows are gone through
    # prompts of a collection; None takes as many as make the rows that are trained on. Of more
    # answers, those without any weight in the loss are left out first
    prompts: int | None = None
    max_new_tokens: int = 64  # most tokens of an answer
    temperature: float = 1.0  # of sampling; in reinforcement learning of the trained policy too
    top_p: float = 1.0  # probability mass sampled from; below 1 the policy trained is another
    rows: int = 128  # answers written at a time

    def __post_init__(self):
        for name in ("group", "minibatches", "epochs", "prompts", "max_new_tokens", "rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0: answers are drawn")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
