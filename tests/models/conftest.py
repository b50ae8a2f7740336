"""Tiny models, and their forward pass written out in float64 NumPy with plain loops over heads."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import Edits, ModelConfig, Transformer

B, T, V = 2, 12, 61


def _norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _rotate(x, positions, theta):
    # As complex numbers: the pair (i, i + d/2) is multiplied by exp(i * angle).
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def _softmax(scores):
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _suppressed(scores, visible, edits):
    """Scores [H T T] of one row with the suppressed ones overwritten, rule by rule."""
    attention = np.stack([_softmax(np.where(visible, s, -np.inf)) for s in scores]).mean(0)
    T, scores = visible.shape[0], scores.copy()
    for t in range(T):
        replaced = {}
        for edit in edits:
            for s in range(T):
                if not (edit.rows[t] and edit.columns[s] and visible[t, s]):
                    continue
                if edit.by == "row":
                    given = sum(attention[t, c] for c in range(T) if edit.columns[c])
                else:
                    given = max(attention[r, s] for r in range(T) if edit.rows[r])
                if given > edit.threshold:
                    replaced[s] = edit.score
        if len(replaced) < visible[t].sum():
            for s, score in replaced.items():
                scores[:, t, s] = score
    return scores


def _attention(row, w, config, positions, segments, bias, suppression, at):
    T, d = len(row), config.head_width
    q, k, v = (
        (row @ w[n] + w.get(f"{n}_bias", 0)).reshape(T, -1, d) for n in ("query", "key", "value")
    )
    group = config.n_heads // config.kv_heads
    q, k = (
        np.stack([_rotate(a[:, h], positions, config.rope_theta) for h in range(a.shape[1])], 1)
        for a in (q, k)
    )
    q, k, v = at("q", q), at("k", k), at("v", v)
    visible = np.tril(np.ones((T, T), bool)) & (segments[:, None] == segments[None])
    scores = np.stack(
        [
            q[:, h] @ k[:, h // group].T / np.sqrt(d) + bias[h % len(bias)]
            for h in range(config.n_heads)
        ]
    )
    if suppression:
        scores = _suppressed(scores, visible, suppression)
    probabilities = _softmax(np.where(visible, scores, -np.inf))
    probabilities = at("attn_probs", probabilities)
    heads = np.stack([p @ v[:, h // group] for h, p in enumerate(probabilities)], 1)
    heads = at("attn_heads", heads)
    found = {"q": q, "k": k, "v": v, "attn_probs": probabilities, "attn_heads": heads}
    return heads.reshape(T, -1) @ w["out"], found


def _row(leaf, b):
    """Row b of an array whose batch axis may be 1."""
    return leaf[b % len(leaf)]


def reference_forward(config, params, tokens, positions=None, segments=None, edits=None):
    """Returns (logits, captured) of one model, one row and one layer at a time."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    edits = Edits() if edits is None else jax.tree.map(np.asarray, edits)
    tokens = np.asarray(tokens)
    B, T = tokens.shape
    positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else positions
    segments = np.zeros((B, T)) if segments is None else segments
    sites: dict[str, list] = {}
    x = params["embedding"][tokens]
    for layer in range(config.n_layers):
        w = jax.tree.map(lambda a, i=layer: a[i], params["layers"])
        edit = jax.tree.map(lambda a, i=layer: a[i], edits)
        gate, bias = edit.layer_gate, edit.attention_bias
        gate = np.ones((B, T)) if gate is None else np.broadcast_to(gate, (B, T))
        bias = np.zeros((1, 1, 1, 1)) if bias is None else np.asarray(bias, np.float64)

        def at(site, value, b=None, edit=edit):
            pick = (lambda a: a) if b is None else (lambda a: _row(a, b))
            if site in edit.add:
                value = value + pick(edit.add[site])
            if site in edit.write:
                mask = pick(edit.write[site].mask)
                mask = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
                value = np.where(mask, pick(edit.write[site].value), value)
            return value

        site = {}

        def block_site(name, value, at=at, site=site):
            site[name] = at(name, value)
            return site[name]

        x = block_site("resid_pre", x)
        h = _norm(x, w["attention"]["norm"], config.norm_eps)
        rows = [
            _attention(
                *(h[b], w["attention"], config, positions[b], segments[b], _row(bias, b)),
                [
                    each.replace(columns=_row(each.columns, b), rows=_row(each.rows, b))
                    for each in edit.suppression
                ],
                lambda name, value, b=b, at=at: at(name, value, b),
            )
            for b in range(B)
        ]
        for name in rows[0][1]:
            site[name] = np.stack([found[name] for _, found in rows])
        attended = block_site("attn_out", np.stack([r[0] for r in rows]) * gate[..., None])
        x = block_site("resid_mid", x + attended)
        h = _norm(x, w["mlp"]["norm"], config.norm_eps)
        g = h @ w["mlp"]["gate"]
        if config.activation == "silu":
            g = g / (1 + np.exp(-g))
        else:
            g = g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        hidden = block_site("mlp_hidden", g * (h @ w["mlp"]["up"]))
        x = x + block_site("mlp_out", hidden @ w["mlp"]["down"] * gate[..., None])
        x = block_site("resid_post", x)
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
