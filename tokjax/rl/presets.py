"""The usual algorithms as settings of the objective "policy" or "ppo"."""

from typing import Any

# What each sets; all else is the objective's default.
PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300: each answer's mean, and a divergence from the start
    "grpo": {
        "name": "policy",
        "advantage": {"name": "group"},
        "norm": "response",
        "kl_coef": 0.04,
    },
    # arXiv 2503.14476: clip higher, mean over tokens, no divergence; groups of equal rewards give
    # way to others where more prompts are collected than are trained on
    "dapo": {
        "name": "policy",
        "advantage": {"name": "group", "drop_constant": True},
        "norm": "kept",
        "clip_high": 0.28,
    },
    # arXiv 2503.20783: neither the deviation nor an answer's length is divided by
    "dr_grpo": {
        "name": "policy",
        "advantage": {"name": "group", "scale": False},
        "norm": "constant",
    },
    # arXiv 2507.18071: one ratio for each answer, clipped much closer
    "gspo": {
        "name": "policy",
        "advantage": {"name": "group"},
        "ratio": "sequence_geo",
        "norm": "response",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    # arXiv 2402.14740: the other answers are the baseline
    "rloo": {"name": "policy", "advantage": {"name": "rloo"}, "norm": "constant"},
    # arXiv 2501.03262: returns standardised over the whole batch
    "reinforce_pp": {
        "name": "policy",
        "advantage": {"name": "reinforce_pp", "kl_coef": 0.01},
        "reference": True,
    },
    # arXiv 1707.06347: a critic
    "ppo": {"name": "ppo", "advantage": {"name": "gae", "kl_coef": 0.01}, "reference": True},
    # arXiv 2508.04349: outcomes shared out by entropy, among tokens or among answers
    "gtpo": {
        "name": "policy",
        "advantage": {"name": "gtpo", "drop_constant": True},
        "norm": "kept",
        "clip_high": 0.28,
    },
    "grpo_s": {
        "name": "policy",
        "advantage": {"name": "grpo_s"},
        "ratio": "sequence_arith",
        "norm": "response",
        "clip_high": 0.28,
    },
    # arXiv 2509.21880: groups of equal rewards teach by entropy
    "rl_zvp": {"name": "policy", "advantage": {"name": "rl_zvp"}, "clip_high": 0.28},
    # arXiv 2509.22115: a growing choice of answers and tokens
    "d3s": {"name": "policy", "advantage": {"name": "d3s"}, "norm": "kept"},
}
