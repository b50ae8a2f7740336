"""Supervised fine-tuning with a weight for every token: one method, one file."""
