"""Download and tokenize the data of a config ahead of training."""

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("prepare-data"))
