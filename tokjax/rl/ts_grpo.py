"""TS-GRPO: a plan is credited token by token, the answer behind it as one sequence.

The text is `<plan> ... </plan><sql> ... </sql>`. Rewards of the plan make the advantage of its
tokens, rewards of the answer that of the answer; ratios to the old policy are the tokens' own in
the plan and one for all of the answer.

Reference: "Thinkquel: A Model Dedicated to Text-to-dbt Using Synthetic Data and a Span-Aware
Objective", arXiv 2510.00186. Its formula is not public: this is a reconstruction,
J = mean_i w_P/n_i sum_plan min(r A_P, clip(r) A_P) + mean_i w_S min(s A_S, clip(s) A_S).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.config import Choice, register
from tokjax.data.batch import Batch
from tokjax.data.offsets import offsets_of_ids
from tokjax.errors import ConfigError, nearest
from tokjax.rl.advantages import Shaped, group_advantages
from tokjax.rl.policy import Policy
from tokjax.rl.policy_loss import Norm, Ratio, importance_ratios
from tokjax.rl.rollout import Rollout
from tokjax.rl.span_rewards import Ranges, at_actions
from tokjax.rl.sql_rewards import SchemaLinking, SQLExecution
from tokjax.signals.spans import span_mask, without_spaces

FORMAT, PLAN, ANSWER = 0, 1, 2
_TAGS = ("neither", "span")


@dataclass(frozen=True)
class SpanTags:
    """The texts around a plan and around an answer."""

    plan: tuple[str, str] = ("<plan>", "</plan>")  # before and behind a plan
    answer: tuple[str, str] = ("<sql>", "</sql>")  # before and behind an answer
    # tags and the end token belong to neither part, or to the "span" they stand at: they are then
    # trained too (the end token with the answer)
    tags: Literal["neither", "span"] = "neither"

    def __post_init__(self):
        if self.tags not in _TAGS:
            raise ConfigError(f"unknown tags={self.tags!r}.{nearest(str(self.tags), _TAGS)}")
        for name in ("plan", "answer"):
            if not all(getattr(self, name)):
                raise ConfigError(f"the tags of {name}={getattr(self, name)} must not be empty")

    def ranges(self, text: str) -> tuple[list[tuple[int, int]], tuple[int, int]] | None:
        """Returns the characters of the plans and of the last answer, without their tags.

        None where the last answer, or any plan before it, is not there with both its tags.
        """
        opening, closing = self.answer
        end = text.rfind(closing)
        start = text.rfind(opening, 0, max(end, 0))
        if start < 0:
            return None
        answer = (start + len(opening), end)
        plans, at = [], 0
        while (begin := text.find(self.plan[0], at, start)) >= 0:
            begin += len(self.plan[0])
            stop = text.find(self.plan[1], begin, start)
            if stop < 0:
                return None
            plans.append((begin, stop))
            at = stop + len(self.plan[1])
        return (plans, answer) if plans else None

    def spans(self, text: str, offsets: Ranges) -> tuple[Int[np.ndarray, " N"], bool]:
        """Returns PLAN, ANSWER or FORMAT for each token, and whether all tags are there.

        A token that holds a part of a tag is FORMAT, as is text outside of the spans. Where tags
        are missing all tokens are PLAN.

        Args:
            text: of an answer.
            offsets: characters of each of its tokens.
        """
        found = self.ranges(text)
        if found is None:
            return np.full(len(offsets), PLAN, np.int32), False
        plans, answer = found
        tokens = without_spaces(offsets, text)
        ids = np.full(len(offsets), FORMAT, np.int32)
        if self.tags == "span":
            wider = [(a - len(self.plan[0]), b + len(self.plan[1])) for a, b in plans]
            ids[span_mask(tokens, wider, "any")] = PLAN
            around = (answer[0] - len(self.answer[0]), answer[1] + len(self.answer[1]))
            ids[span_mask(tokens, [around], "any")] = ANSWER
            behind = [k for k, (a, b) in enumerate(offsets) if a == b == len(text)]
            ids[behind] = ANSWER
            return ids, True
        ids[span_mask(tokens, plans, "contained")] = PLAN
        ids[span_mask(tokens, [answer], "contained")] = ANSWER
        return ids, True


@register("advantage", "ts_grpo")
@dataclass(frozen=True)
class SpanAdvantage:
    """The plan's reward relative to its group at the plan, the answer's at the answer.

    Weights are such that norm "response" averages plans over the answers that have one, and answers
    likewise, each span counting once whatever its length.
    """

    plan: str = "schema_linking"  # name of the plan's reward among the objective's
    answer: str = "sql"  # name of the answer's reward; 0 where the answer was cut at its limit
    # c: the plan is paid its own reward + c times the answer's; at 0 a good plan is never paid for
    # a right answer
    answer_share: float = 0.0
    format_penalty: float = 0.5  # taken off the plan's reward where tags are missing
    plan_weight: float = 1.0  # of the plans in the loss
    answer_weight: float = 1.0  # of the answers in the loss
    ddof: int = 1  # of the group's deviation: 1 of a sample, 0 of a population
    eps: float = 1e-4  # added to the deviation
    tags: SpanTags = SpanTags()  # what stands around plan and answer

    def __post_init__(self):
        if self.ddof not in (0, 1):
            raise ConfigError(f"ddof={self.ddof} must be 0 or 1")

    def gather(self, rollout: Rollout, environment: Any) -> dict[str, Any]:
        """Returns the span of each action, -1 elsewhere, and which answers have their tags."""
        tokenizer = environment.collector.run.tokenizer
        return self.tagged(rollout, environment.answers.tokens, tokenizer)

    def tagged(
        self, rollout: Rollout, tokens: Sequence[Sequence[int]], tokenizer: Any
    ) -> dict[str, Any]:
        """Returns what `gather` does of the ids of answers."""
        mask = np.asarray(rollout.mask)
        found = [
            self.tags.spans(tokenizer.decode(ids), offsets_of_ids(tokenizer, ids)) for ids in tokens
        ]
        spans = at_actions(mask, [ids for ids, _ in found])
        return {
            "spans": np.where(mask, spans, -1).astype(np.int32),
            "tagged": np.array([complete for _, complete in found], bool),
        }

    def __call__(self, rollout: Rollout) -> Shaped:
        """Returns the advantages and the weights of the actions in the loss."""
        for name in (self.plan, self.answer):
            if name not in rollout.rewards:
                raise ConfigError(
                    f"advantage 'ts_grpo' names the reward {name!r}, which the objective has not."
                    f"{nearest(name, rollout.rewards)}"
                )
        tagged = rollout.extra["tagged"]
        whole = tagged & rollout.stopped
        answer = jnp.where(whole, rollout.rewards[self.answer], 0.0)
        plan = rollout.rewards[self.plan] + self.answer_share * answer
        plan = plan - jnp.where(tagged, 0.0, self.format_penalty)
        spans = rollout.extra["spans"]
        advantages, weights = jnp.zeros(spans.shape), jnp.zeros(spans.shape)
        parts = ((PLAN, plan, self.plan_weight), (ANSWER, answer, self.answer_weight))
        for span, reward, weight in parts:
            inside = spans == span
            found = self._relative(rollout, reward)
            advantages = jnp.where(inside, found[:, None], advantages)
            weights = jnp.where(inside, weight * span_weights(inside, rollout.lengths), weights)
        return advantages, weights

    def _relative(self, rollout: Rollout, reward: Float[Array, "R"]) -> Float[Array, "R"]:
        by_prompt = rollout.by_prompt(reward)
        if rollout.group == 1:
            return reward
        return rollout.flat(group_advantages(by_prompt, ddof=self.ddof, eps=self.eps))


def span_weights(inside: Array, lengths: Float[Array, "R"]) -> Float[Array, "R T"]:
    """Returns weights by which norm "response" gives the mean of the rows' means over a span.

    Rows without the span do not count among those averaged over.

    Args:
        inside: actions of the span [R, T].
        lengths: actions of each row.
    """
    own = inside.sum(-1).astype(jnp.float32)
    having = jnp.maximum((own > 0).sum(), 1).astype(jnp.float32)
    rows = jnp.maximum((lengths > 0).sum(), 1).astype(jnp.float32)
    each = lengths / jnp.maximum(own, 1) * (rows / having)
    return jnp.where(inside, each[:, None], 0.0)


@register("objective", "ts_grpo")
@dataclass(frozen=True)
class TSGRPO(Policy):
    """The policy loss with a ratio for each token of the plan and one for the whole answer."""

    rewards: tuple[Annotated[Any, Choice("reward")], ...] = (
        SchemaLinking(),
        SQLExecution(),
    )  # named by the advantage
    advantage: Annotated[Any, Choice("advantage")] = SpanAdvantage()  # gives spans
    ratio: Ratio = "mixed"  # of each token of the plan, and of the whole answer; no other is one
    norm: Norm = "response"  # each span's mean, then that over the answers; no other is one
    answer_clip_low: float = 3e-4  # the answer's ratio is clipped to 1 - answer_clip_low ...
    answer_clip_high: float = 4e-4  # ... and 1 + answer_clip_high

    def __post_init__(self):
        super().__post_init__()
        if self.ratio != "mixed" or self.norm != "response":
            raise ConfigError(
                f"objective 'ts_grpo' is ratio 'mixed' and norm 'response'; ratio={self.ratio!r} "
                f"and norm={self.norm!r} are other objectives: use 'policy'"
            )
        if not isinstance(self.advantage, SpanAdvantage):
            raise ConfigError("objective 'ts_grpo' needs the advantage 'ts_grpo'")
        for name in ("answer_clip_low", "answer_clip_high"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def channels(self) -> tuple[str, ...]:
        """The values beside each action that a batch brings along."""
        return (*super().channels, "answer")

    def shape(self, rollout: Rollout) -> dict[str, Float[Array, "R T"]]:
        """Returns the channels of the batches that the answers are trained on."""
        answer = (rollout.extra["spans"] == ANSWER).astype(jnp.float32)
        return {**super().shape(rollout), "answer": answer}

    def ratios(self, logprobs: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
        """Returns pi / pi_old of the actions."""
        answer = batch.channels["answer"] != 0
        return importance_ratios(
            logprobs, batch.channels["old"], batch.weights != 0, self.ratio, answer
        )

    def clip(self, batch: Batch) -> tuple[Any, Any]:
        """Returns how far below and above 1 the ratio of each action may lie."""
        answer = batch.channels["answer"] != 0
        return (
            jnp.where(answer, self.answer_clip_low, self.clip_low),
            jnp.where(answer, self.answer_clip_high, self.clip_high),
        )
