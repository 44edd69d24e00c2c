"""Pretrain one architecture, with the flags of other training scripts; ``--help`` says how."""

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("train"))
