"""Decoding: the signal walks on to the token where its energy is largest, or to a drawn one.

Reference: "BriLLM: Brain-inspired Large Language Model", arXiv 2503.11299.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.predictors import StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.pretraining.brillm.graph import BriLLM, Memory, Params


@struct.dataclass
class Walk:
    """Where the signals of rows are.

    Attributes:
        node: the last token.
        at: transitions behind it.
        first: signal at the first token.
        memory: of the signals since.
    """

    node: Int[Array, "B"]
    at: Int[Array, "B"]
    first: Float[Array, "B d"]
    memory: Memory


@dataclass(frozen=True)
class BriLLMPredictor:
    """Energies as logits, one edge a token; what `decode` samples, stops and records by.

    Attributes:
        model: the graph.
        self_loops: a token may follow itself. The authors' decoding leaves it out, while their
            training does not.
        late_codes: position codes are those of the place before, as in the authors' decoding, not
            those of training.
    """

    model: BriLLM
    self_loops: bool = True
    late_codes: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self.model.max_length

    def prepare(self, params: Params) -> Params:
        """Returns the parameters as they are."""
        return params

    def init(self, prepared: Params, prompts: Prompts, capacity: int) -> tuple[Walk, StepOutput]:
        """Returns the walk behind the prompts, and the energies of the first new token."""
        tokens = jnp.asarray(prompts.tokens)
        rows = tokens.shape[0]
        begun = Walk(
            tokens[:, 0],
            jnp.zeros(rows, jnp.int32),
            self.model.first(prepared, tokens[:, 0]),
            self.model.remember(rows),
        )

        def step(walk: Walk, given):
            t, token = given
            on = self._walked(prepared, walk, token)
            taken = t < prompts.lengths
            keep = lambda a, b: jnp.where(taken.reshape(-1, *[1] * (a.ndim - 1)), a, b)  # noqa: E731
            return jax.tree.map(keep, on, walk), None

        over = (jnp.arange(1, tokens.shape[1]), tokens[:, 1:].T)
        walk, _ = jax.lax.scan(step, begun, over)
        return walk, self._said(prepared, walk)

    def step(
        self, prepared: Params, state: Walk, tokens: Int[Array, "B"]
    ) -> tuple[Walk, StepOutput]:
        """Returns the walk one edge on, and the energies of the next token."""
        walk = self._walked(prepared, state, tokens)
        return walk, self._said(prepared, walk)

    def _walked(self, params: Params, walk: Walk, tokens: Int[Array, "B"]) -> Walk:
        model = self.model
        edge = model.edges(params, walk.node, tokens)
        x = model.incoming(params, walk.memory, walk.at, walk.first)
        through = jnp.einsum("bd,bde->be", x, params["edge_weight"][edge])
        out = jax.nn.gelu(through + params["edge_bias"][edge] + self._code(walk), approximate=False)
        memory = model.stored(params, walk.memory, walk.at, out)
        return Walk(tokens.astype(walk.node.dtype), walk.at + 1, walk.first, memory)

    def _code(self, walk: Walk) -> Float[Array, "B d"]:
        return self.model.code(walk.at if self.late_codes else walk.at + 1)

    def _said(self, params: Params, walk: Walk) -> StepOutput:
        x = self.model.incoming(params, walk.memory, walk.at, walk.first)
        energies = self.model.arriving(params, x, walk.node, self._code(walk))
        if not self.self_loops:
            own = jnp.arange(self.model.vocab_size) == walk.node[:, None]
            energies = jnp.where(own, -jnp.inf, energies)
        return StepOutput(energies, {"signal": x})


def brillm(
    model: BriLLM, params: Params, *, self_loops: bool = True, late_codes: bool = False
) -> tuple[BriLLMPredictor, Any]:
    """Returns what `decode` needs: `decode(*brillm(model, params), prompts, max_new_tokens=16)`.

    Temperatures divide energies (`tokjax.decoding.transforms`). The authors' divides the
    probabilities behind the softmax, which changes nothing: leave temperature out for theirs.

    Args:
        model: the graph.
        params: its parameters.
        self_loops: see `BriLLMPredictor`; False is the authors' decoding.
        late_codes: likewise; True is the authors' decoding.
    """
    return BriLLMPredictor(model, self_loops, late_codes), params
