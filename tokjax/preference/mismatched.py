"""Prompts with the answers of other samples: what KTO measures its reference point on.

Reference: "KTO: Model Alignment as Prospect Theoretic Optimization" (arXiv 2402.01306), section 4.1
(the estimate of z0).
"""

import jax.numpy as jnp

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError


def mismatched(batch: Batch) -> Batch:
    """Returns each sample's prompt with the answer of the next sample of the batch.

    Samples follow each other in a row and then in the next row; the last one gets the first one's
    answer. A sample's answer begins with its first target that has weight. Samples without such a
    target are left out. What no longer fits into a row is cut off. There are no channels.

    Raises:
        ConfigError: the batch has room for one sample only.
    """
    (B, T), S = batch.tokens.shape, batch.example_id.shape[1]
    if B * S < 2:
        raise ConfigError(
            "reference_point='mismatched' needs the answers of other samples, but a micro-batch of "
            "one row has one: raise data.batch_size, lower micro_batches, or pack rows"
        )
    member = batch.segment_ids[:, None] == jnp.arange(1, S + 1)[:, None]  # [B S T]
    answer = member & (batch.weights != 0)[:, None]
    usable = answer.any(-1).reshape(-1)
    row = T * jnp.arange(B)[:, None]
    begin = (row + member.argmax(-1)).reshape(-1)
    first = (row + answer.argmax(-1)).reshape(-1)  # predicts the answer's first token
    end = begin + member.sum(-1).reshape(-1)
    # The next usable sample of each usable one.
    order = jnp.argsort(~usable, stable=True)
    count = jnp.maximum(usable.sum(), 1)
    following = jnp.zeros_like(order).at[order].set(order[(jnp.arange(B * S) + 1) % count])
    prompt = first - begin
    length = jnp.where(usable, prompt + (end - first)[following], 0)
    ends = jnp.cumsum(length.reshape(B, S), 1)
    slots = jnp.arange(T)
    in_row = (slots[:, None] >= ends[:, None]).sum(-1)  # [B T], S behind the last sample
    inside = in_row < S
    sample = S * jnp.arange(B)[:, None] + jnp.minimum(in_row, S - 1)
    place = jnp.where(inside, slots - (ends.reshape(-1) - length)[sample], 0)
    own = place < prompt[sample]
    taken = jnp.where(own, begin[sample] + place, first[following][sample] + place - prompt[sample])
    read = lambda values, at: jnp.where(inside, values.reshape(-1)[at], 0)  # noqa: E731
    # The last token of a prompt predicts the first of an answer, which may be another's.
    inputs = jnp.where(place == prompt[sample], first[sample], taken)
    return Batch(
        tokens=read(jnp.asarray(batch.tokens), inputs),
        targets=read(jnp.asarray(batch.targets), taken),
        positions=place,
        segment_ids=jnp.where(inside, in_row + 1, 0),
        weights=jnp.where(own, 0.0, read(jnp.asarray(batch.weights), taken)),
        example_id=jnp.where(usable.reshape(B, S), batch.example_id, -1),
    )
