"""modern_llm: pretrain, SFT, DPO, verifier, evaluation and report of a small language model."""

__version__ = "0.1.0"
