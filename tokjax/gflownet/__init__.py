"""Generative flow networks over token sequences: tries, balance losses, Flower, LaCoT."""
