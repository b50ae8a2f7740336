"""Language models: embed -> backbone -> unembed, over plain trees of parameters.

Dimension letters, the same everywhere in tokjax:
B batch, T tokens (queries), S tokens (keys, cache slots), D model width, H heads, K key/value
heads, d head width, F feed-forward width, L layers, V vocabulary, G group (samples a prompt),
N examples.
"""

from tokjax.models.cache import Cache
from tokjax.models.config import ModelConfig
from tokjax.models.edits import Edits
from tokjax.models.transformer import Output, Transformer

__all__ = ["Cache", "Edits", "ModelConfig", "Output", "Transformer"]
