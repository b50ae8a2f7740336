"""Reinforcement learning: rollouts, rewards, advantages and one policy loss (one method, one file).

A run's objective "policy" (or one built on it) makes its own data: `collector.py` lets the model
answer prompts, has the answers judged, and cuts the rollouts into batches; `policy_loss.py` is
what they are trained on. All that varies between most methods is an advantage, a token reward or a
reward, each a small class registered under that kind.
"""
