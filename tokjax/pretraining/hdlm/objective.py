"""The objective of hyperschedule diffusion language models.

Reference: "Unifying Autoregressive and Diffusion-Based Sequence Generation", arXiv 2504.06416.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.config import Choice, register
from tokjax.data.batch import Batch
from tokjax.data.tokenizers import Tokenizer
from tokjax.errors import ConfigError, nearest
from tokjax.models.encoder import Encoder
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining.corruption import Corruption, with_ids
from tokjax.pretraining.hdlm.draws import Step, draw_blocks, draw_steps
from tokjax.pretraining.hdlm.epsilon import EpsilonHybrid, Noised
from tokjax.pretraining.hdlm.losses import cross_entropy, mean_of_settled, score_entropy
from tokjax.pretraining.hdlm.masks import check_attention, step_mask
from tokjax.pretraining.hdlm.passes import before, block_states, check_model, step_states
from tokjax.pretraining.hdlm.schedules import Block
from tokjax.pretraining.masked_lm import own_weights
from tokjax.training.objective import Aux, Loss, Materials, PerToken, WithoutState

_CHOICES = {"times": ("auto", "continuous", "levels"), "passes": ("auto", "one", "step")}


@register("objective", "hdlm")
@dataclass(frozen=True)
class HDLM(PerToken, WithoutState):
    """Restores noised tokens of a bidirectional model under a hyperschedule.

    Needs `model.causal=False`. Tokens without weight (prompts) keep their place in the schedule but
    are never noised. Held-out data are evaluated by the same loss.
    """

    # which positions are noised how much at each step: block, simple_annealing or hybrid
    schedule: Annotated[Any, Choice("hyperschedule")] = Block()
    noise: Annotated[Any, Choice("hdlm_noise")] = EpsilonHybrid()  # epsilon or gamma
    # noise that a step is trained at: drawn evenly from [0, 1] for each block, or that of a level
    # of the schedule; auto is continuous for blocks
    times: Literal["auto", "continuous", "levels"] = "auto"
    # a clean and a noisy copy in one pass that trains all blocks, or one step of the schedule for
    # each text; auto is one for blocks
    passes: Literal["auto", "one", "step"] = "auto"
    # what settled positions see of the settled: their block and those before, those before, or all
    settled_attention: Literal["block_causal", "causal", "full"] = "block_causal"
    active_attention: Literal["full", "causal"] = "full"  # what active positions see of the active
    # the state before a position predicts it, as in the autoregressive model to start from; the
    # first token of a text is then never noised
    shifted: bool = False
    # of the cross entropy of settled tokens, averaged by itself; None: 1 with gamma noise, else 0
    settled_weight: float | None = None
    mask_id: int | None = None  # None: the tokenizer's, or the id behind its last
    random_ids: int | None = None  # random ids are drawn from 0 up to here; None: the tokenizer's

    evaluates: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    def __post_init__(self):
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), known)}")
        check_attention(self.settled_attention, self.active_attention)
        for name, only in (("times", "continuous"), ("passes", "one")):
            if getattr(self, name) == only and not isinstance(self.schedule, Block):
                raise ConfigError(
                    f"{name}={only!r} is for blocks, whose positions are noised alike: with this "
                    f"schedule leave it at 'auto'"
                )
        if self.passes == "one" and self.settled_attention == "full":
            raise ConfigError(
                "passes='one' cannot have settled_attention='full': settled positions would change "
                "from block to block; set passes='step'"
            )
        if self.settled_weight is not None and not self.settled_weight >= 0:
            raise ConfigError(f"settled_weight={self.settled_weight} must not be negative")

    @property
    def one_pass(self) -> bool:
        """Whether all blocks are trained in one pass."""
        if self.passes == "auto":
            return isinstance(self.schedule, Block) and self.settled_attention != "full"
        return self.passes == "one"

    @property
    def continuous(self) -> bool:
        """Whether noise is drawn from an interval."""
        return isinstance(self.schedule, Block) and self.times != "levels"

    @property
    def weight_of_settled(self) -> float:
        """The weight of settled tokens' cross entropy."""
        if self.settled_weight is not None:
            return self.settled_weight
        return 0.0 if isinstance(self.noise, EpsilonHybrid) else 1.0

    @property
    def relative_cost(self) -> float:
        """2 where one pass reads two copies of each text, else 1."""
        several = isinstance(self.schedule, Block) and self.schedule.width is not None
        return 2.0 if self.one_pass and (several or self.weight_of_settled) else 1.0

    def with_ids_of(self, tokenizer: Tokenizer, model: Transformer) -> "HDLM":
        """Returns the objective with the ids that the tokenizer decides.

        Raises:
            ConfigError: there is no mask and no id to spare for one, or the model cannot be used.
        """
        check_model(model)
        spec = Corruption(mask_id=self.mask_id, random_ids=self.random_ids)
        special = tokenizer.special_tokens
        spec = with_ids(spec, tokenizer.vocab_size, special, model.config.vocabulary)
        return dataclasses.replace(self, mask_id=spec.mask_id, random_ids=spec.random_ids)

    def prepared(self, materials: Materials) -> "HDLM":
        """Returns the objective with the ids that the tokenizer decides; see `with_ids_of`."""
        return self.with_ids_of(materials.tokenizer, materials.model)

    def ids(self) -> tuple[int, int]:
        """Returns the mask's id and the number of ids that are drawn at random.

        Raises:
            ConfigError: they are not known.
        """
        if self.mask_id is None or self.random_ids is None:
            raise ConfigError(
                "objective 'hdlm' does not know its ids yet: name mask_id and random_ids, or take "
                "them from a tokenizer by with_ids_of"
            )
        return self.mask_id, self.random_ids

    def drawn(self, batch: Batch, key: jax.Array) -> Step:
        """Returns the step that each text, or with one pass each block, is trained at."""
        draw = draw_blocks if self.one_pass else draw_steps
        return draw(key, batch, self.schedule, self.continuous)

    def eligible(self, batch: Batch) -> Bool[Array, "B T"]:
        """Returns the tokens that may be noised and predicted: those with weight."""
        found = (own_weights(batch) != 0) & (batch.tokens != self.ids()[0])
        return found & (batch.positions > 0) if self.shifted else found

    def noised(self, batch: Batch, step: Step, key: jax.Array) -> Noised:
        """Returns the tokens that the model reads; worthless ones keep their ids, unseen."""
        active = step.active & self.eligible(batch)
        return self.noise.corrupt(key, batch.tokens, active, step.p, *self.ids())

    def states(
        self, model: Encoder, params: Params, batch: Batch, step: Step, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Bool[Array, "B T"]]:
        """Returns the states that predict active tokens, those that predict settled ones, and which
        tokens are settled.

        Args:
            model: the model.
            params: its parameters.
            batch: the texts.
            step: where they are.
            tokens: under noise.
        """
        positions, segments = batch.positions, batch.segment_ids
        T = tokens.shape[1]
        block = self.schedule.block(T)
        attention: Any = (self.settled_attention, self.active_attention)
        if not self.one_pass:
            visible = step_mask(positions, step.settled, step.active, block, *attention)
            x = step_states(
                model, params, tokens, visible, positions, segments, shifted=self.shifted
            )
            return x, x, step.settled
        if block >= T and self.active_attention == "full" and not self.weight_of_settled:
            # A single block has nothing before it: plain diffusion needs no clean copy.
            x = model.embed(params, tokens)
            x = model.backbone(params, x, positions=positions, segments=segments).x
            x = before(x) if self.shifted else x
            return x, x, step.settled
        x, of_clean = block_states(
            model,
            params,
            batch.tokens,
            tokens,
            positions,
            segments,
            block,
            attention=attention,
            shifted=self.shifted,
        )
        return x, of_clean, segments > 0

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of weighted losses and the number (by data weight) of active tokens.

        Raises:
            ConfigError: the model cannot be used, or the mask's id is not known.
        """
        encoder, (mask_id, _) = check_model(model), self.ids()
        draw, corrupt = jax.random.split(key)
        step = self.drawn(batch, draw)
        noised = self.noised(batch, step, corrupt)
        x, x_settled, settled = self.states(encoder, params, batch, step, noised.tokens)
        counted = jnp.where(self.eligible(batch), own_weights(batch), 0.0)
        score: Any = cross_entropy if isinstance(self.noise, EpsilonHybrid) else score_entropy
        weights = jnp.where(step.active, counted, 0.0)
        found = score(
            encoder, params, x, batch.tokens, noised, step.p, weights, self.noise, mask_id
        )
        if not self.weight_of_settled:
            return dataclasses.replace(found, aux=aux)
        weights = jnp.where(settled, counted, 0.0)
        mean, metrics = mean_of_settled(encoder, params, x_settled, batch.tokens, weights, mask_id)
        total = found.total + self.weight_of_settled * mean * found.weight
        return Loss(total, found.weight, found.metrics | metrics, aux)
