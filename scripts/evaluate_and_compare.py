"""Evaluate checkpoints (and transformers baselines) side by side on the same data."""

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("compare"))
