"""Tiny models, and their forward pass written out in float64 NumPy with plain loops over heads."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import ModelConfig, Transformer

B, T, V = 2, 12, 61


def _norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _rotate(x, positions, theta):
    # As complex numbers: the pair (i, i + d/2) is multiplied by exp(i * angle).
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def _attention(row, w, config, positions, segments, bias):
    T, d = len(row), config.head_width
    q, k, v = (
        (row @ w[n] + w.get(f"{n}_bias", 0)).reshape(T, -1, d) for n in ("query", "key", "value")
    )
    group = config.n_heads // config.kv_heads
    q, k = (
        np.stack([_rotate(a[:, h], positions, config.rope_theta) for h in range(a.shape[1])], 1)
        for a in (q, k)
    )
    outs, probabilities = [], []
    for h in range(config.n_heads):
        scores = q[:, h] @ k[:, h // group].T / np.sqrt(d) + bias[h % len(bias)]
        visible = np.tril(np.ones((T, T), bool)) & (segments[:, None] == segments[None])
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        outs.append(p @ v[:, h // group])
        probabilities.append(p)
    return np.concatenate(outs, -1) @ w["out"], np.stack(probabilities), (q, k, v)


def reference_forward(config, params, tokens, positions=None, segments=None, edits=None):
    """Returns (logits, captured) of one model, one row and one layer at a time."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    edits = {k: np.asarray(v, np.float64) for k, v in (edits or {}).items()}
    tokens = np.asarray(tokens)
    B, T = tokens.shape
    positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else positions
    segments = np.zeros((B, T)) if segments is None else segments
    x = params["embedding"][tokens]
    sites: dict[str, list] = {}
    for layer in range(config.n_layers):
        w = jax.tree.map(lambda a, i=layer: a[i], params["layers"])
        edit = {name: leaf[layer] for name, leaf in edits.items()}
        gate = np.broadcast_to(edit.get("layer_gate", np.ones((1, 1))), (B, T))[..., None]
        bias = edit.get("attention_bias", np.zeros((1, 1, 1, 1)))
        site = {"resid_pre": x}
        h = _norm(x, w["attention"]["norm"], config.norm_eps)
        rows = [
            _attention(h[b], w["attention"], config, positions[b], segments[b], bias[b % len(bias)])
            for b in range(B)
        ]
        site["attn_out"] = np.stack([r[0] for r in rows])
        site["attn_probs"] = np.stack([r[1] for r in rows])
        for i, name in enumerate("qkv"):
            site[name] = np.stack([r[2][i] for r in rows])
        x = site["resid_mid"] = x + gate * site["attn_out"]
        h = _norm(x, w["mlp"]["norm"], config.norm_eps)
        g = h @ w["mlp"]["gate"]
        if config.activation == "silu":
            g = g / (1 + np.exp(-g))
        else:
            g = g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        site["mlp_out"] = (g * (h @ w["mlp"]["up"])) @ w["mlp"]["down"]
        x = x + gate * site["mlp_out"]
        x = x + edit.get("residual_add", 0)
        if "write" in edit:
            x = np.where(edit["write_mask"][..., None] > 0, edit["write"], x)
        site["resid_post"] = x
        for name, value in site.items():
            sites.setdefault(name, []).append(value)
    table = params["embedding"] if config.tie_embeddings else params["head"]
    logits = _norm(x, params["norm"], config.norm_eps) @ table.T
    return logits, {name: np.stack(values) for name, values in sites.items()}


@pytest.fixture(scope="session")
def reference():
    """The function `reference_forward`."""
    return reference_forward


@pytest.fixture(scope="session")
def tiny():
    """A model of three layers with grouped heads, biases and a head of its own.

    Every parameter is random, norms and biases too: ones and zeros would hide a part left out.
    """
    config = ModelConfig(
        vocab_size=V,
        d_model=24,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        d_ff=40,
        tie_embeddings=False,
        attention_bias=True,
        rope_theta=500.0,
    )
    model = Transformer(config)
    shapes, tree = jax.tree.flatten(model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    leaves = [
        jnp.asarray(s + rng.normal(scale=0.3 if s.ndim < 3 else 0.1, size=s.shape), jnp.float32)
        for s in shapes
    ]
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 4 + [3] * 3, [1] * 7 + [2] * 5], np.int32)
    positions = np.array([[*range(5), *range(4), *range(3)], [*range(7), *range(5)]], np.int32)
    return SimpleNamespace(
        config=config,
        model=model,
        params=jax.tree.unflatten(tree, leaves),
        tokens=tokens,
        packed={"segments": segments, "positions": positions},
    )
