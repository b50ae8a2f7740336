"""Flower's paths: through a catalogue's tree, drawn within it, freely, or from the catalogue."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokjax.data.batch import Batch
from tokjax.decoding.constrained.on_trie import on_trie
from tokjax.decoding.constrained.trie import TrieArrays
from tokjax.decoding.transforms import chain
from tokjax.decoding.transforms.base import Transform
from tokjax.errors import ConfigError, DataError
from tokjax.gflownet.catalogue import one_token, read_catalogue, read_preferences
from tokjax.gflownet.collector import FlowCollector, Paths
from tokjax.gflownet.flower import Flower
from tokjax.gflownet.path_rewards import (
    ending,
    path_rewards,
    personal_bonuses,
    personal_divisors,
)
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.training.answers import Question
from tokjax.training.passes import forward


class FlowerCollector(FlowCollector):
    """Makes the batches of a stage of Flower: references, and paths whose flow is balanced."""

    def __init__(self, objective: Flower, run: Any, stage: Any, workdir: Path):
        self.end = one_token(run.tokenizer, objective.end, "objective.end")
        catalogue = read_catalogue(objective.catalogue, objective.title, objective.weight)
        self.trie = catalogue.trie(run.tokenizer, self.end, objective.power)
        limit = objective.rollouts.max_new_tokens
        if self.trie.longest > limit:
            raise ConfigError(
                f"the catalogue's longest title has {self.trie.longest} tokens: raise "
                f"rollouts.max_new_tokens={limit}, or leave it out"
            )
        self.limit = limit
        self.references = objective.theta > 0
        super().__init__(objective, run, stage, workdir, more=int(self.references))
        size = run.model.config.vocabulary
        self.arrays = self.trie.arrays(size)
        self.within = on_trie(self.trie, size) if objective.explore == "trie" else None
        lengths = np.array([len(item) for item in self.trie.items], np.float64)
        self.by_length = lengths / lengths.sum()
        self.preferences = None
        if objective.preferences is not None:
            self.preferences = read_preferences(objective.preferences, len(self.trie.items))
        self._rewards = jax.jit(
            partial(
                path_rewards,
                floor=objective.floor,
                compat=objective.compat,
                granularity=objective.granularity,
            )
        )
        self._leak = jax.jit(partial(off_trie, run.model))

    def _questions(self, seq_len: int) -> tuple[list[Question], int]:
        """Returns the prompts with room for a path and, where it is imitated, their reference."""
        found, left_out = super()._questions(seq_len)
        if not self.references:
            return found, left_out
        fit = [
            q
            for q in found
            if len(q.prompt) + len(self._reference(q)) <= seq_len + 1
            and self.trie.item_of(self._title(q)) >= 0
        ]
        if not fit:
            shown = self.text(found[0].reference)
            raise DataError(
                f"no answer of data.train is a title of {self.objective.catalogue} in tokens; the "
                f"first is {shown!r}. Titles are tokenised as they stand there: do they need the "
                f"space that follows a prompt, or is data.tokenizer.add_eos missing?"
            )
        return fit, left_out + len(found) - len(fit)

    def _title(self, question: Question) -> tuple[int, ...]:
        """Returns the reference up to its end token, which is added where it is missing."""
        ids, ends = question.reference, (self.end, self.run.tokenizer.eos_id)
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return (*ids[:stop], self.end)

    def _reference(self, question: Question) -> tuple[int, ...]:
        """Returns what is imitated: title, end token, and the EOS behind another end token."""
        eos = self.run.tokenizer.eos_id
        more = () if eos is None or eos == self.end else (eos,)
        return (*self._title(question), *more)

    def transform(self, seeds: np.ndarray) -> Transform:
        """Returns the restriction to the tree, if paths are drawn within it, and the rest."""
        usual = super().transform(seeds)
        return usual if self.within is None else chain(self.within, usual)

    def found(
        self, state: Any, step: int, asked: Sequence[Question], seed: int
    ) -> tuple[Paths, dict[str, float]]:
        """Returns the paths of a collection: each prompt's reference, if imitated, then others."""
        G, buffer = self.config.group, self.objective.buffer.at(step)
        rng = np.random.default_rng([seed, 1])
        forced = rng.random(len(asked) * G) < buffer
        picked = rng.choice(len(self.trie.items), len(forced), p=self.by_length)
        drawn: list[Any] = [None] * len(forced)
        if not forced.all():
            drawn = self.drawn(state, asked, seed).tokens
        items = self.trie.items
        own = [
            [*items[picked[r]], self.end] if forced[r] else list(drawn[r])
            for r in range(len(forced))
        ]
        prompts: list[tuple[int, ...]] = []
        tokens: list[Any] = []
        kinds: list[str] = []
        for i, question in enumerate(asked):
            if self.references:
                prompts.append(question.prompt)
                tokens.append(self._reference(question))
                kinds.append("reference")
            for r in range(i * G, (i + 1) * G):
                prompts.append(question.prompt)
                tokens.append(own[r])
                kinds.append("buffer" if forced[r] else "drawn")
        imitated = np.array([kind == "reference" for kind in kinds])
        return self.valued(state, prompts, tokens, kinds, imitated, buffer)

    def valued(
        self, state: Any, prompts: Any, tokens: Any, kinds: Any, imitated: np.ndarray, buffer: float
    ) -> tuple[Paths, dict[str, float]]:
        """Returns the paths with their rewards, and metrics."""
        actions = np.full((len(tokens), self.limit + 1), self.end, np.int32)
        for r, path in enumerate(tokens):
            if not imitated[r]:
                actions[r, : len(path)] = path
        divisor, bonus = self.personal(prompts, actions)
        rewards = jax.device_get(
            self._rewards(self.arrays, jnp.asarray(actions), divisor=divisor, bonus=bonus)
        )
        states = rewards.states & ~imitated[:, None]
        last = (np.arange(states.shape[1]) * states).max(1)
        final = rewards.log_r[np.arange(len(last)), last]
        told = [
            {"kind": kinds[r]}
            | ({} if imitated[r] else {"item": int(rewards.item[r]), "log_r": float(final[r])})
            for r in range(len(kinds))
        ]
        # The longest titles are as long: after one of them the model learns to end.
        forced = states & (np.arange(self.limit + 1) == self.limit) & (rewards.item < 0)[:, None]
        paths = Paths(prompts, tokens, rewards.log_r, states, forced, imitated, told)
        flows, drawn = ~imitated, np.array([kind == "drawn" for kind in kinds])
        metrics = {
            "reward/mean": float(final[flows].mean()),
            "flow/buffer": buffer,
            "flow/length": float(last[flows].mean()),
            "flow/off_trie": self.leak(state, paths, rewards.nodes),
        }
        if drawn.any():
            metrics["flow/out_of_catalogue"] = float((rewards.item[drawn] < 0).mean())
            taken = rewards.item[drawn & (rewards.item >= 0)]
            metrics["flow/distinct_items"] = float(len(np.unique(taken)))
        return paths, metrics

    def personal(self, prompts: Any, actions: np.ndarray) -> tuple[Any, Any]:
        """Returns each path's divisor and bonus, from the item that it ends at."""
        rows = len(prompts)
        divisor, bonus = np.ones(rows, np.float32), np.zeros(rows, np.float32)
        if self.preferences is not None:
            items = np.asarray(ending(self.arrays, jnp.asarray(actions)))
            bos = self.run.tokenizer.bos_id
            for r, prompt in enumerate(prompts):
                text = self.text([i for i in prompt if i != bos])
                if text not in self.preferences:
                    raise DataError(
                        f"{self.objective.preferences} has no scores for the prompt {text!r}"
                    )
                if items[r] < 0:
                    continue
                p = self.preferences[text]
                if self.objective.personal == "div_s":
                    divisor[r] = personal_divisors(p)[items[r]]
                else:
                    bonus[r] = personal_bonuses(p, self.objective.strength)[items[r]]
        return divisor, bonus

    def leak(self, state: Any, paths: Paths, nodes: np.ndarray) -> float:
        """Returns the mean mass off the tree, over the states of paths that lie in it."""
        batch = self.rows_of_paths(paths)
        size, R = self.run.config.data.batch_size, len(paths.tokens)
        first = np.array([len(prompt) - 1 for prompt in paths.prompts], np.int32)
        nodes = np.where(paths.states, nodes, -1).astype(np.int32)
        total = np.zeros(2)
        for begin in range(0, R, size):
            place = np.minimum(np.arange(begin, begin + size), R - 1)
            part = self._on_device(jax.tree.map(lambda a, place=place: a[place], batch))
            fresh = np.arange(begin, begin + size) < R
            shown = np.where(fresh[:, None], nodes[place], -1)
            found = self._leak(state.whole, self.arrays, part, first[place], shown)
            total += np.asarray(jax.device_get(found), np.float64)
        return float(total[0] / max(total[1], 1.0))


def off_trie(
    model: Transformer,
    params: Params,
    trie: TrieArrays,
    batch: Batch,
    first: Array,
    nodes: Array,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the summed probability of leaving the tree, and the number of states.

    Args:
        model: the policy.
        params: its parameters.
        trie: of the catalogue.
        batch: rows of paths.
        first: place of each row's first state.
        nodes: of each state; -1 leaves it out.
    """
    x = forward(model, params, batch).x
    at = jnp.minimum(first[:, None] + jnp.arange(nodes.shape[1]), x.shape[1] - 1)
    logits = model.unembed(params, jnp.take_along_axis(x, at[..., None], axis=1))
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    allowed = trie.allowed(nodes, p.shape[-1])
    counted = nodes >= 0
    left = 1.0 - jnp.where(allowed, p, 0.0).sum(-1)
    return jnp.where(counted, left, 0.0).sum(), counted.sum().astype(jnp.float32)
