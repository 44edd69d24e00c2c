"""Show what a checkpoint is and samples of it, then go on with what is typed."""

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("inference"))
