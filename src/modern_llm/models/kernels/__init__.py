"""Attention kernels: softmax(q k^T / sqrt(H) + bias) v, the same values by different means.

To add one: a class with ``refuses``, ``__call__`` and ``flops`` as in `Kernel`, a name, and, for a
file of its own, an import here.
"""

from modern_llm.models.kernels.auto import AutoKernel
from modern_llm.models.kernels.base import KERNELS, Kernel
from modern_llm.models.kernels.blocks import BlockKernel
from modern_llm.models.kernels.flex import FlexKernel
from modern_llm.models.kernels.manual import ManualKernel
from modern_llm.models.kernels.sdpa import SDPAKernel

__all__ = [
    "KERNELS",
    "AutoKernel",
    "BlockKernel",
    "FlexKernel",
    "Kernel",
    "ManualKernel",
    "SDPAKernel",
]
