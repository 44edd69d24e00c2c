"""What a decoder keeps in memory from its forward to its backward; measured in ``benchmarks/``."""

from modern_llm.models.memory.decoder import Activations, activations
from modern_llm.models.memory.passes import FP32, Pass

__all__ = ["FP32", "Activations", "Pass", "activations"]
