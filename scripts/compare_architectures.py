"""Compare results of experiments: by name, or the newest (``--latest 5``)."""

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("compare-architectures"))
