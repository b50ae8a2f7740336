"""What a tile of logits adds to divergences and to gradients: the formulas of `token_stats`.

Notation: z logits, L their log-sum-exp, a = z - L log-probabilities, p = exp(a); b and r are
log-probabilities and probabilities of the other distribution. With H for the entropy, H2 for the
varentropy and u = a + H, the derivatives by z are, token by token:

    logprob of i   [i is the token] - p
    cross entropy  p sum(q) - q
    entropy        -p u
    varentropy     p (u^2 + 2 u - H2)
    KL(p || r)     p (a - b - KL), and by the other's logits r - p
    JSD            p (log(p/m) - KL(p || m)) / 2, and the same by the other's with r for p
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.signals.soft_targets import at_ids


def divergence_terms(a, b) -> dict[str, Float[Array, "n v"]]:
    """Returns the terms of each divergence, from both log-probabilities.

    p log(p/r) - p + r sums to the same as p log(p/r), but no term is negative, so that small
    divergences keep their digits.
    """
    p, r = jnp.exp(a), jnp.exp(b)
    mixture = 0.5 * (p + r)
    to_mixture, other_to_mixture = _to_mixture(a, b)
    term = lambda p, ratio, q: jnp.where(p > 0, p * ratio - p, 0.0) + q  # noqa: E731
    return {
        "kl": term(p, a - b, r),
        "reverse_kl": term(r, b - a, p),
        "to_mixture": term(p, to_mixture, mixture),
        "other_to_mixture": term(r, other_to_mixture, mixture),
    }


def _to_mixture(a, b):
    """Returns log(p/m) and log(r/m) of the mixture m = (p + r) / 2."""
    ln2 = jnp.log(jnp.float32(2.0))
    return ln2 - jax.nn.softplus(b - a), ln2 - jax.nn.softplus(a - b)


def coefficients(given, found, state, targets) -> dict[str, Any]:
    """Returns what multiplies each part of the logits' gradient at a position; absent is 0.

    Args:
        given: cotangents by statistic; none for those that nothing depends on.
        found: the statistics.
        state: what the forward passes found, before it became statistics.
        targets: ids [N K], or None.
    """
    norm = state["norms"][0]
    count = norm.largest.shape[0]
    c: dict[str, Any] = {"mass": jnp.zeros(count, jnp.float32)}
    sparse = []  # (ids, coefficients of the log-probabilities there)

    of_target = [sign * given[n] for n, sign in (("logprob", 1.0), ("nll", -1.0)) if n in given]
    if of_target:
        sparse.append((targets, sum(of_target)))
    if "top_logprobs" in given:
        k = given["top_logprobs"].shape[-1]
        sparse.append((state["best"][1][:, :k], given["top_logprobs"]))
    if "max_logprob" in given:
        sparse.append((state["best"][1][:, :1], given["max_logprob"][:, None]))
    if "margin" in given:
        both = jnp.stack([given["margin"], -given["margin"]], axis=-1)
        sparse.append((state["best"][1][:, :2], both))
    if sparse:
        c["ids"] = jnp.concatenate([ids for ids, _ in sparse], axis=-1)
        c["at_ids"] = jnp.concatenate([values for _, values in sparse], axis=-1)
        c["mass"] -= c["at_ids"].sum(-1)
    if "cross_entropy" in given:
        c["soft"] = given["cross_entropy"]
        c["mass"] += given["cross_entropy"] * state["soft_mass"]
    for name in ("entropy", "varentropy", "kl", "reverse_kl"):
        if name in given:
            c[name], c[f"{name}_value"] = given[name], found[name]
    if not given.keys().isdisjoint(("entropy", "varentropy")):
        c["mean"] = state["mean"] - norm.log_total  # E[a], the negative entropy
    if "jsd" in given:
        c["jsd"] = 0.5 * given["jsd"]
        c["mixtures"] = (state["to_mixture"], state["other_to_mixture"])
    return c


def logits_gradient(c, logprobs, q, ids) -> list[Float[Array, "n v"]]:
    """Returns the gradient with respect to each side's logits, from the coefficients `c`."""
    a = logprobs[0]
    column = lambda name: c[name][:, None]  # noqa: E731
    p = jnp.exp(a)
    factor = jnp.broadcast_to(column("mass"), a.shape)
    if "mean" in c:
        u = a - column("mean")
        if "entropy" in c:
            factor -= column("entropy") * u
        if "varentropy" in c:
            factor += column("varentropy") * (u * (u + 2.0) - column("varentropy_value"))
    other = None
    if len(logprobs) > 1:
        b = logprobs[1]
        r = jnp.exp(b)
        other, extra = jnp.zeros_like(b), jnp.zeros_like(a)
        if "kl" in c:
            factor += column("kl") * (a - b - column("kl_value"))
            other += column("kl") * (r - p)
        if "reverse_kl" in c:
            extra += column("reverse_kl") * (p - r)
            slope = b - a - column("reverse_kl_value")
            other += column("reverse_kl") * jnp.where(r > 0, r * slope, 0.0)
        if "jsd" in c:
            to_mixture, other_to_mixture = _to_mixture(a, b)
            of_p, of_r = (m[:, None] for m in c["mixtures"])
            factor += column("jsd") * (to_mixture - of_p)
            other += column("jsd") * jnp.where(r > 0, r * (other_to_mixture - of_r), 0.0)
    d_z = jnp.where(p > 0, p * factor, 0.0)
    if other is not None:
        d_z += extra
    if "ids" in c:
        d_z += at_ids(c["ids"], c["at_ids"], ids)
    if "soft" in c:
        d_z -= column("soft") * q
    return [d_z] if other is None else [d_z, other]
