"""A frozen reference beside the model in training, and log-ratios of answers under the two.

Preference data carry signs: targets of a chosen (or good) answer weigh above 0, those of a rejected
(or bad) one below, so that the sum of weight x log-ratio over a pair is the margin that every loss
of preferences is a function of. Token weights (cDPO, MR-ALIGN) are nothing but other sizes of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.data.batch import Batch
from tokjax.models import lora
from tokjax.models.head import Head
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals import token_stats
from tokjax.signals.packed import packed_sums
from tokjax.training.objective import Aux, of_model
from tokjax.training.passes import forward


def init_reference(model: Transformer, params: Params) -> Aux:
    """Returns the reference's parameters: none where it is the model without its adapters."""
    return () if model.config.lora is not None else jax.tree.map(jnp.copy, of_model(params))


@struct.dataclass
class LogRatios:
    """Log-likelihoods of targets under policy and reference; filling and prompts are 0.

    Attributes:
        policy: log pi(y_t | y_<t), in nats, with the gradient.
        reference: log pi_ref(y_t | y_<t), in nats.
    """

    policy: Float[Array, "B T"]
    reference: Float[Array, "B T"]

    @property
    def ratio(self) -> Float[Array, "B T"]:
        """log pi / pi_ref of each target."""
        return self.policy - self.reference


def log_ratios(model: Transformer, params: Params, reference: Aux, batch: Batch) -> LogRatios:
    """Returns the targets' log-likelihoods under a model and its reference.

    Args:
        model: the policy.
        params: its parameters.
        reference: what `init_reference` returned.
        batch: whose weighted targets are meant.
    """
    counted = batch.weights != 0

    def logprobs(x: Array, head: Head) -> Array:
        found = token_stats(x, head, batch.targets, ["logprob"], mask=counted)
        assert found.logprob is not None
        return found.logprob

    fixed = logprobs(*reference_pass(model, params, reference, batch))
    return LogRatios(logprobs(forward(model, params, batch).x, model.head(params)), fixed)


def reference_pass(
    model: Transformer, params: Params, reference: Aux, batch: Batch
) -> tuple[Float[Array, "B T D"], Head]:
    """Returns the reference's final hidden states of a batch and its head, as constants.

    Args:
        model: the policy.
        params: its parameters.
        reference: what `init_reference` returned.
        batch: whose tokens are read.
    """
    if reference == ():
        model, reference = lora.off(model), lora.split(params)[0]
    reference = jax.lax.stop_gradient(reference)
    return forward(model, reference, batch).x, model.head(reference)


def sample_sums(values: Float[Array, "B T"], batch: Batch) -> Float[Array, "B S"]:
    """Returns the sum of values over each sample, with the sizes of the data's weights."""
    num = batch.example_id.shape[1]
    return packed_sums(values * jnp.abs(batch.weights), batch.segment_ids, num)


def pair_sides(per_sample: Float[Array, "B S"]) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Returns what belongs to the chosen and to the rejected answer of each pair."""
    return per_sample[:, 0::2], per_sample[:, 1::2]


def whole_pairs(batch: Batch) -> Bool[Array, "B P"]:
    """Returns which pairs have a target that counts on both sides; the others are left out."""
    num = batch.example_id.shape[1]
    counted = packed_sums((batch.weights != 0).astype(jnp.float32), batch.segment_ids, num)
    chosen, rejected = pair_sides(counted)
    return (chosen > 0) & (rejected > 0)
