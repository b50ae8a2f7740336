"""Retrieval: rerankers of passages, their losses and their measures."""
