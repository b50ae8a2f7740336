"""What a model costs: floating-point operations and bytes, by formula."""

from typing import Any

import jax
import jax.numpy as jnp

from tokjax.models.config import ModelConfig
from tokjax.models.parameters import block_table


def forward_flops(config: ModelConfig, positions: int) -> float:
    """Returns the operations of one position's forward pass in a row of `positions`.

    Two per weight of every matrix product (the output head included, the embedding look-up not)
    plus 4 L H d T for attention, the full square counted although half of it is masked: the
    convention of Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
    """
    matrices = sum(
        p.shape[0] * p.shape[1]
        for part in block_table(config).values()
        for p in part.values()
        if len(p.shape) == 2
    )
    attention = 2 * positions * config.n_heads * config.head_width
    mixer: Any = config.mixer
    filters = mixer.products(config.d_model) if hasattr(mixer, "products") else 0
    per_layer = matrices + attention + filters
    return 2.0 * (config.n_layers * per_layer + config.vocabulary * config.d_model)


def training_flops(config: ModelConfig, positions: int) -> float:
    """Returns the operations of one position's training step: forward and twice that backward."""
    return 3 * forward_flops(config, positions)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays (or shapes) in a tree."""
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
