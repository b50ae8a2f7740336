"""Language models: embed -> backbone -> unembed, over plain trees of parameters.

Dimension letters, the same everywhere in tokjax:
B batch, T tokens (queries), S tokens (keys, cache slots), D model width, H heads, K key/value
heads, d head width, F feed-forward width, L layers, V vocabulary, G group (samples a prompt),
N examples.
"""

from tokjax.models.cache import Cache
from tokjax.models.checkpoints import load
from tokjax.models.config import EncDecConfig, ModelConfig
from tokjax.models.edits import Edits, Steer, Suppression, Write
from tokjax.models.encdec import EncoderDecoder
from tokjax.models.encoder import Encoder, pool
from tokjax.models.head import Head
from tokjax.models.layers import Memory
from tokjax.models.transformer import Output, Transformer, padding

__all__ = [
    "Cache",
    "Edits",
    "EncDecConfig",
    "Encoder",
    "EncoderDecoder",
    "Head",
    "Memory",
    "ModelConfig",
    "Output",
    "Steer",
    "Suppression",
    "Transformer",
    "Write",
    "load",
    "padding",
    "pool",
]
