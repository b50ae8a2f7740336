"""Evaluation by standard tasks: the sockets of lm-evaluation-harness over a tokjax model."""
