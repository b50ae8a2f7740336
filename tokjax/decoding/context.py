"""What a transform, a stop or a recorded signal may look at while a text is being written."""

from collections.abc import Mapping

from jaxtyping import Array, Bool, Float, Int, Shaped

from tokjax import struct
from tokjax.decoding.prompts import Prompts


@struct.dataclass
class Context:
    """The state of a decode between two tokens.

    Attributes:
        step: number of tokens sampled so far, the same for every row still being written.
        last: each row's latest token; the last one of its prompt at step 0. Of no meaning in rows
            that are done.
        generated: the new tokens; those of row b from min(step, its length) on are filling.
        done: rows that have ended.
        prompts: what was continued.
        last_logprob: the model's log-probability of `last` at temperature 1; of no meaning at
            step 0.
        logits: from which the token is taken (for a stop: from which `last` was taken), before
            any transform.
        signals: what else the predictor said with these logits, by name.
        limits: each row's largest number of new tokens.
    """

    step: Int[Array, ""]
    last: Int[Array, "B"]
    generated: Int[Array, "B N"]
    done: Bool[Array, "B"]
    prompts: Prompts
    last_logprob: Float[Array, "B"] | None = None
    logits: Float[Array, "B V"] | None = None
    signals: Mapping[str, Shaped[Array, "B ..."]] = struct.field(default_factory=dict)
    limits: Int[Array, "B"] | None = None
