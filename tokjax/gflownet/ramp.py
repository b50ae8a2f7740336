"""A setting that moves linearly over the first steps of a stage."""

from dataclasses import dataclass

from tokjax.errors import ConfigError


@dataclass(frozen=True)
class Ramp:
    """A number that goes from one value to another over some steps, and stays there."""

    start: float = 1.0  # at the stage's first step
    end: float = 1.0  # from step `steps` on
    steps: int = 0  # length of the way, in updates; 0 is at the end from the beginning

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError(f"steps={self.steps} must not be negative")

    def at(self, step: int) -> float:
        """Returns the value at a step.

        >>> [Ramp(1.5, 1.0, 50).at(step) for step in (0, 25, 50, 99)]
        [1.5, 1.25, 1.0, 1.0]
        """
        if step >= self.steps:  # also of infinite values
            return self.end
        return self.start + step / self.steps * (self.end - self.start)
