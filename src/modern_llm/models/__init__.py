"""The decoder, its components and the verifier. Imports torch only.

Tensors carry their shape in their name, one letter an axis: B batch, T query time, S key time,
D model width, N query heads, K key/value heads, H head size, F hidden width of a feed-forward,
E experts, V vocabulary, M any flat selection of rows.
"""

from modern_llm.models.cost import Cost
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.ffn import ACTIVATIONS, FFNS
from modern_llm.models.generate import Completion, generate
from modern_llm.models.kernels import KERNELS
from modern_llm.models.kv_cache import KVCache, StreamingCache
from modern_llm.models.norms import NORMS
from modern_llm.models.positions import POSITIONS
from modern_llm.models.verifier import VerifierModel

__all__ = [
    "ACTIVATIONS",
    "FFNS",
    "KERNELS",
    "NORMS",
    "POSITIONS",
    "Completion",
    "Cost",
    "KVCache",
    "ModernDecoderLM",
    "StreamingCache",
    "VerifierModel",
    "generate",
]
